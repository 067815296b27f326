"""OpenMP is told to let idle threads sleep soon before PyTorch is loaded; the user's own settings stay."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
from ddpm_fast.cli import waiting
waiting.wait_politely()
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("users", "said"),
    [({}, "30000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "5"}, "5")],
)
def test_idle_threads_sleep_soon_unless_the_user_decided(users, said):
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | users
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [said, "False"]


def test_the_command_line_decides_before_pytorch_is_there():
    code = """
import builtins, os, sys
from ddpm_fast.cli import main
found, load = [], builtins.__import__
def importing(name, *rest):
    if name == "torch":
        print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
        os._exit(0)
    return load(name, *rest)
builtins.__import__ = importing
main.main(["check"])
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "30000", done.stderr
