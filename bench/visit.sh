#!/usr/bin/env bash
# One visit to a machine with a GPU: its tests first, then the report with the minutes that they leave.
#
#   bench/visit.sh [--minutes N] [--out DIR] [--no-tests | --tests "PYTEST ARGUMENTS"] [what bench.report takes]
#
# Leaves one folder to commit (DIR, below the project's folder; default: profiles/DEVICE): report.json, report.md,
# plots, and visit.log with all that was printed. Tests that fail stop no measurement. The last line begins with DONE or
# FAILED, and the exit status is 0 or 1. It needs no network; profiles/README.md lists the packages.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2

TESTS_SHARE=0.45 # of the minutes, at the most, are the tests'
TESTS_SECONDS=240

python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/ddpm-fast
export PYTHONUNBUFFERED=1                                  # a visit that is cut off leaves what was printed
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton} # what the tests compile, the report finds
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}

minutes=9 out="" tests=default device=auto report=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,10p' "$0" && exit 0 ;;
        --minutes | --out | --tests | --device) [ $# -ge 2 ] || { echo "visit.sh: $1 needs a value" >&2 && exit 2; } ;;
    esac
    case $1 in
        --minutes) minutes=$2 && shift ;;
        --out) out=$2 && shift ;;
        --tests) tests=$2 && shift ;;
        --no-tests) tests="" ;;
        --device) device=$2 && report+=("$1" "$2") && shift ;;
        *) report+=("$1") ;;
    esac
    shift
done
if [ "$tests" = default ]; then # a CPU has no GPU tests
    [ "$device" = cpu ] && tests="" || tests="-m gpu -n 8 --dist worksteal"
fi
[ -n "$out" ] || out=$("$python" -m bench.timing.machine "$device") || exit 2
mkdir -p "$out" && log=$out/visit.log || exit 2

calculate() { awk "BEGIN { printf \"%.${2:-0}f\", $1 }"; }
say() { echo "$@" | tee -a "$log"; }

failed=() tested="not asked for"
say "== visit of $(date -u +%Y-%m-%dT%H:%MZ), $minutes minutes, $out"
if [ -n "$tests" ]; then
    share=$(calculate "$minutes * 60 * $TESTS_SHARE")
    limit=$((share < TESTS_SECONDS ? share : TESTS_SECONDS))
    say "== tests: pytest $tests, for $limit s at the most"
    # shellcheck disable=SC2086  # one word an argument
    timeout --kill-after=10 "$limit" "$python" -m pytest -q $tests 2>&1 | tee -a "$log"
    status=$?
    tested=$(tail -n 1 "$log")
    [ $status -eq 124 ] || [ $status -eq 137 ] && tested="not done after $limit s"
    # Where there is no GPU they are all skipped, which pytest counts as a success.
    [ $status -eq 0 ] && [[ $tested != *" passed"* ]] && status=1 tested="none ran: $tested"
    [ $status -eq 0 ] || failed+=("tests ($tested)")
fi

left=$(calculate "$minutes - $SECONDS / 60" 2)
say "== report: $left minutes"
"$python" -m bench.report --minutes "$left" --out "$out" "${report[@]}" 2>&1 | tee -a "$log"
status=$?
reported=$(tail -n 1 "$log")
[ $status -eq 0 ] || failed+=("report ($reported)")

say "== after $SECONDS s"
say "tests   $tested"
say "report  $reported"
say "folder  $(find "$out" -type f | wc -l) files, $(du -sk "$out" | cut -f1) KiB"
if [ ${#failed[@]} -eq 0 ]; then
    say "DONE $out"
else
    say "FAILED $(printf '%s; ' "${failed[@]}")see $log"
    exit 1
fi
