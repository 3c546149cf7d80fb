"""Linting, formatting, types and import rules, as the pre-commit hooks run them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command", ["ruff check", "ruff format --check", "pyright", "lint-imports"]
)
def test_is_clean(command: str):
    program, *options = command.split()
    if program == "pyright":
        options = ["--pythonpath", sys.executable]
    run = subprocess.run(
        [BIN / program, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
