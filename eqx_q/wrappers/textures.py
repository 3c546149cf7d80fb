"""Loads Craftax's constants, whose first import draws textures and keeps them in a file.

Craftax writes that file without a lock, so a second process that starts meanwhile reads half of it;
and a process that is killed meanwhile leaves half of it for good.
"""

import contextlib
import fcntl
import functools
import importlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from types import ModuleType

_REDRAW = "CRAFTAX_RELOAD_TEXTURES"


@functools.cache
def load_constants(package: str) -> ModuleType:
    """The module `constants` of `package`, imported by one process at a time.

    Textures that cannot be read are drawn again.
    """
    name = f"{package}.constants"
    with _in_turn(f"eqx_q-{package}-{os.getuid()}.lock"):
        try:
            return importlib.import_module(name)
        except (EOFError, OSError, pickle.UnpicklingError):
            if _REDRAW in os.environ:
                raise
            os.environ[_REDRAW] = "1"
            try:
                return importlib.import_module(name)
            finally:
                del os.environ[_REDRAW]


@contextlib.contextmanager
def _in_turn(name: str) -> Iterator[None]:
    """Waits until no other process of this user on this machine is in a block of this name."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a directory that cannot be written, or has no locks
            # The directory is everybody's: a link there must not lead to another file.
            flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW
            lock = os.open(os.path.join(tempfile.gettempdir(), name), flags, 0o600)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
