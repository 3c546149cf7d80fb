"""Tests run with every annotation of shape and type checked, and without a screen."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
install_import_hook("eqx_q", "typechecker.typechecked")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """Compiled programs of one module are of no use to the next: memory stays flat."""
    yield
    jax.clear_caches()
