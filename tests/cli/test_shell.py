"""The command line as a shell meets it: the Tab key, pipes that close, and how soon help comes."""

import shutil
import subprocess
import sys
import time

import pytest

pytest.importorskip("tyro")
from ddpm_fast.cli import main as cli


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["sa"], ["sample"]),
        (["sample", "runs/x", "--samp"], ["--sampler"]),
        (["sample", "runs/x", "--sampler", "d"], ["ddpm", "ddim", "dpm++"]),
        (["train", "--no-ker"], ["--no-kernels"]),
        (["sample", "runs/"], []),  # bash then completes paths
    ],
)
def test_the_tab_key_completes_in_bash(words, completions):
    line = " ".join(f"'{word}'" for word in ["ddpm-fast", *words])
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _ddpm_fast; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    script = f"{cli.completion('bash')}\ncomplete -p ddpm-fast\n{ask}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    registered, *offered = done.stdout.split("\n")
    assert registered == "complete -o default -F _ddpm_fast ddpm-fast"
    assert [word for word in offered if word] == completions


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_every_shell_gets_a_script_with_the_commands(shell, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--completion", shell])
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "--learning-rate", "--first-index"))


@pytest.mark.parametrize("arguments", ["--help", "train --help"])
def test_a_reader_that_has_seen_enough_is_no_bug(arguments):
    command = [sys.executable, "-m", "ddpm_fast", *arguments.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_help_does_not_import_torch():
    code = "import sys; from ddpm_fast.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code + "assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_python_dash_m_works():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "ddpm_fast", "--help"], capture_output=True, text=True, check=True)
    assert "train" in done.stdout
    assert time.perf_counter() - started < 10  # 0.2 s where nothing else runs
