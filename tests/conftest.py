"""Tests check every annotated shape and type, and run without a display."""

import json
import logging
import os
import runpy
import sys
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
# Most of the time is compiling, and what is compiled runs for a moment only: XLA's older emitters
# compile three times as fast, and fewer, larger parts save a tenth. What was compiled once is kept
# for other tests and for later.
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
install_import_hook("eqx_q", "typechecker.typechecked")

import jax  # noqa: E402
import pytest  # noqa: E402

HANDLERS = logging._handlerList


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """Compiled programs of one module are of no use to the next: memory stays flat."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimized():
    """Compiles as users do: for what depends on it, to the last digit or in the program's text."""
    jax.clear_caches()  # of what others have compiled
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs a script as `python scripts/name.py ...` does, in an empty working directory.

    Returns its exit status and what it wrote to stdout and stderr.
    """
    jax.devices()  # before a script divides the CPU
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # scripts add to it
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run(name, *arguments):
        capsys.readouterr()
        handlers = list(logging.root.handlers)
        monkeypatch.setattr(logging, "_handlerList", [])  # Hydra would close pytest's
        path = str(ROOT / "scripts" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        status = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as exit:
            status = exit.code or 0
        for handler in set(logging.root.handlers) - set(handlers):
            handler.close()
        logging.root.handlers = handlers
        monkeypatch.setattr(logging, "_handlerList", HANDLERS)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def replace_backend(tmp_path, monkeypatch):
    """Replaces a tracker's backend, by default with one that records its calls."""

    def replace(code=None, name="aim"):
        code = code or (ROOT / "tests" / "tracking" / "fake.py").read_text()
        from eqx_q.tracking import remote  # after the import hook is installed

        (tmp_path / "backends").mkdir(exist_ok=True)
        (tmp_path / "backends" / f"{name}.py").write_text(code)
        monkeypatch.setattr(remote, "_BACKENDS_DIR", tmp_path / "backends")
        backend = remote.BACKENDS[name]._replace(package="json", python_below=(4, 0))
        monkeypatch.setitem(remote.BACKENDS, name, backend)

    return replace


@pytest.fixture
def received():
    """The calls that the recording backend received for a member."""

    def read(directory, member=0):
        lines = (Path(directory) / f"received {member}").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return read
