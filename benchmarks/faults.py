"""Simulates a failing file system: counts calls that change files, and makes one of them fail.

It intercepts `open`, writes to opened files, and `os`, with which eqx_q, Hydra, Optuna and
Matplotlib change files. It does not intercept writes of C code (HDF5, memory maps).
"""

import builtins
import errno
import functools
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED = 137
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_ON_PATHS = ("mkdir", "rmdir", "unlink", "remove", "truncate")
_ON_TWO_PATHS = ("rename", "replace", "link", "symlink")  # the second path is created
_ON_FILES = ("write", "fsync", "fdatasync", "ftruncate")
# A full disk does not affect the other calls.
_NEEDS_SPACE = {"open", "write", "mkdir", *_ON_TWO_PATHS, "fsync", "fdatasync"}


class Faults:
    """Counts calls that change files below a directory, and makes one of them fail.

    **Arguments:** `root`: the directory. `point`: the index of the call, from 0; `None`: no fault.
    `trace`: a file elsewhere that gets a line per call. `mode`: the fault:

    - `"kill"` ends the process before that call, without cleanup;
    - `"torn"` ends it after that call, or after half of its write;
    - `"full"` simulates a full disk: half of that write fits, and nothing after it;
    - `"stop"` stops the process before that call, until it is continued.
    """

    def __init__(
        self, root: Path, point: int | None = None, mode: str = "kill", trace: Path | None = None
    ):
        self._root, self._point, self._mode = f"{root.resolve()}{os.sep}", point, mode
        self._count, self._lock = 0, threading.RLock()
        self._write = os.write  # before it is replaced
        self._trace = trace and os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def install(self) -> None:
        """Intercepts the calls for the rest of the process."""
        self._open = builtins.open
        builtins.open = io.open = self._opened
        for names, which in ((_ON_PATHS, 0), (_ON_TWO_PATHS, 1), (_ON_FILES, 0)):
            for name in names:
                setattr(os, name, self._guarded(name, getattr(os, name), which))
        opens = os.open
        guarded = self._guarded("open", opens, 0)

        def os_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            call = guarded if flags & _OPENS_TO_WRITE else opens
            return call(path, flags, *arguments, **options)

        os.open = os_open

    def call(self, name: str, path: Any, whole: Callable[[], Any], half: Any = None) -> Any:
        """Makes a call, or the fault. `half`: makes half of the call, if it can be halved."""
        if not self._concerns(path):
            return whole()
        with self._lock:
            number, self._count = self._count, self._count + 1
            if self._trace:
                self._write(self._trace, f"{name} {_path(path)}\n".encode())
            if self._mode == "full":
                is_full = self._point is not None and number >= self._point
                if is_full and name in _NEEDS_SPACE:
                    if half is not None and number == self._point:
                        return half()
                    which = () if name in _ON_FILES else (_path(path),)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *which)
            elif number == self._point and self._mode == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif number == self._point:
                try:
                    if self._mode == "torn":
                        (half or whole)()
                finally:
                    os._exit(KILLED)
            return whole()

    def _concerns(self, path: Any) -> bool:
        name = _path(path)
        is_stream = isinstance(path, int) and not name.startswith(os.sep)  # such as "pipe:[12]"
        return not is_stream and f"{os.path.abspath(name)}{os.sep}".startswith(self._root)

    def _guarded(self, name: str, call: Any, which: int) -> Any:
        @functools.wraps(call)
        def guarded(*arguments: Any, **options: Any) -> Any:
            whole = functools.partial(call, *arguments, **options)
            half = None
            if name == "write":
                file, data = arguments
                half = functools.partial(call, file, data[: len(data) // 2])
            return self.call(name, arguments[which], whole, half)

        return guarded

    def _opened(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax+") or not self._concerns(file):
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw_mode = mode.replace("b", "").replace("t", "")
        raw = self.call("open", file, lambda: _File(self, file, raw_mode, closefd, opener))
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)


class _File(io.FileIO):
    """A file whose writes may fail."""

    def __init__(self, faults: Faults, *arguments: Any):
        self._faults = faults
        super().__init__(*arguments)

    def write(self, data: Any) -> int:
        data, write = memoryview(data).cast("B"), super().write
        half = functools.partial(write, data[: len(data) // 2])
        return self._faults.call("write", self.fileno(), functools.partial(write, data), half)

    def truncate(self, size: int | None = None) -> int:
        whole = functools.partial(super().truncate, size)
        return self._faults.call("ftruncate", self.fileno(), whole)


def _path(path: Any) -> str:
    return os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)


def start(
    action: Callable[[], Any], faults: Faults | None = None, output: Path = Path(os.devnull)
) -> int:
    """Starts an action in a forked process with faults; returns its process id.

    Its output goes to `output`. Forking saves imports; JAX must not have started.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if faults is not None:
            faults.install()
        action()
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def wait(process: int) -> int:
    """Waits for the process; returns its exit status, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
