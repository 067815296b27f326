"""What is claimed, measured: benchmarks of what a user waits for, the peers beside them, and one report of it all.

    pytest bench/ --benchmark-only                    every benchmark at this device's sizes
    python -m bench.report --minutes 9 --out DIR      one page on this machine: report.json, report.md and plots
    bench/visit.sh --minutes 9 --out DIR              the GPU tests before it, all in one folder

The regression guard is pytest-benchmark's own: save a run before a change, compare after it, and fail beyond what the
machine's noise explains:

    pytest bench/ --benchmark-only --benchmark-autosave
    pytest bench/ --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%
"""
