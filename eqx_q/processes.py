"""Several processes that train together: how they connect, and what happens when one dies.

Left to itself, JAX waits for a dead process, possibly for ever, and then kills the others without
a helpful message. So the processes watch each other: each keeps a connection to the first process
open, which the operating system closes when either end dies.
"""

import atexit
import contextlib
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from .errors import UsageError

_PATIENCE = 24 * 3600  # seconds that processes wait for the first one's last evaluation
_TIME_TO_MEET, _TIME_FOR_NEWS = 60.0, 1.0  # seconds
_HELLO, _NEWS = struct.Struct("!16sI"), struct.Struct("!i")
_BYE = -1  # news of a regular end; any other news is the number of the process that died
# A machine that is down closes no connection, so a silent connection is probed.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


def join_processes(
    coordinator: str | None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several. Call it before JAX touches a device.

    From then on, if one process disappears, the others exit within seconds and say which. A process
    that fails with an exception exits at once; call `abandon` instead of `sys.exit(1)`.

    **Arguments:**

    - `coordinator`: `"host:port"` of the first process; `"auto"` if the launcher (Slurm, MPI,
        Kubernetes) tells JAX; `None` for a single process.
    - `num_processes`, `process_id`: with `"host:port"`: the number of processes, and the index of
        this one, from 0.

    **Raises:** `UsageError` if the processes do not find each other, or if the number or index is
    given without a coordinator.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise UsageError(
                "distributed.num_processes and distributed.process_id need a coordinator: add "
                "distributed.coordinator=HOST:PORT, or remove both"
            )
        return
    detected = coordinator == "auto"
    known = (None, None, None) if detected else (coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(*known, shutdown_timeout_seconds=_PATIENCE)
        others = _meet()
    except (RuntimeError, ValueError, TypeError, IndexError, OSError) as error:
        # TypeError: the number of processes is missing; IndexError: the port is missing.
        raise UsageError(
            f"the processes do not find each other ({error}): give each the same "
            "distributed.coordinator=HOST:PORT and distributed.num_processes, and its own "
            "distributed.process_id"
        ) from error
    number = jax.process_count()  # JAX cannot be asked at exit
    threading.Thread(target=_watch, args=[others, number], daemon=True).start()
    atexit.register(_tell, others, _BYE)
    sys.excepthook = _end_with(sys.excepthook)


def is_first_process() -> bool:
    """Whether this is the process that writes files and logs."""
    return jax.process_index() == 0


def as_first_says(*flags: bool) -> tuple[bool, ...]:
    """Returns the first process's flags in every process."""
    if jax.process_count() == 1:
        return flags
    return tuple(bool(x) for x in multihost_utils.broadcast_one_to_all(np.asarray(flags, np.int32)))


def requeue() -> None:
    """Asks Slurm to restart this job, which is about to be ended.

    **Raises:** `UsageError` if this is not a Slurm job, or Slurm refuses.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise UsageError("SLURM_JOB_ID is not set: start the same command again")
    try:
        subprocess.run(
            ["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        what = " ".join(f"{getattr(error, 'stderr', None) or error}".split())
        raise UsageError(
            f"Slurm did not requeue job {job} ({what}): submit it again, with --requeue"
        ) from error


def abandon() -> None:
    """Ends this failed process at once if it is one of several; the others notice.

    Otherwise they would wait for each other.
    """
    if jax.distributed.is_initialized():
        _end_now()


def _end_now() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def _end_with(hook: Callable[..., None]) -> Callable[..., None]:
    """Calls `hook` with an uncaught exception, then `abandon`."""

    def wrapped(*exception) -> None:
        # The first sign that another process died may be an error in a joint computation.
        time.sleep(_TIME_FOR_NEWS)
        hook(*exception)
        abandon()

    return wrapped


def _meet() -> dict[int, socket.socket]:
    """Connects the first process to all others; returns the connections by process number."""
    number, both = jax.process_count(), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with contextlib.ExitStack() as stack:
        server, port = None, 0
        if is_first_process():
            server = socket.create_server(
                ("", 0), family=family, dualstack_ipv6=both, backlog=number
            )
            stack.enter_context(server).settimeout(_TIME_TO_MEET)
            port = server.getsockname()[1]
        told = (np.int32(port), np.frombuffer(os.urandom(16), np.uint8))
        port, secret = multihost_utils.broadcast_one_to_all(told)
        secret = bytes(secret)
        if server is None:
            # The address that this process reached the first one by; JAX has no public name for it.
            host = str(global_state.coordinator_address).rpartition(":")[0].strip("[]")
            first = socket.create_connection((host, int(port)), timeout=_TIME_TO_MEET)
            first.sendall(_HELLO.pack(secret, jax.process_index()))
            return {0: _kept_alive(first)}
        others: dict[int, socket.socket] = {}
        while len(others) < number - 1:
            connection, _ = server.accept()
            connection.settimeout(_TIME_TO_MEET)
            hello = _received(connection, _HELLO)
            if hello is None or hello[0] != secret:
                connection.close()  # a stranger
            else:
                others[hello[1]] = _kept_alive(connection)
        return others


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    return connection


def _watch(others: dict[int, socket.socket], number: int) -> None:
    """Ends this process when another dies; returns once all have announced a regular end."""
    with selectors.DefaultSelector() as selector:
        for process, connection in others.items():
            selector.register(connection, selectors.EVENT_READ, (process, connection))
        while selector.get_map():
            for key, _ in selector.select():
                process, connection = key.data
                (gone,) = _received(connection, _NEWS) or [process]
                if gone == _BYE:
                    selector.unregister(connection)
                    continue
                _tell(others, gone)
                try:
                    print(
                        f"error: process {gone} of {number} has ended (its last output says why), "
                        "so this one ends too: start all of them again; with resume=DIR the run "
                        "continues from its last checkpoint",
                        file=sys.stderr,
                    )
                finally:  # printing fails if the terminal is gone
                    _end_now()


def _tell(others: dict[int, socket.socket], news: int) -> None:
    for connection in others.values():
        with contextlib.suppress(OSError):
            connection.sendall(_NEWS.pack(news))


def _received(connection: socket.socket, what: struct.Struct) -> tuple | None:
    """The message of the other side; `None` if it closed the connection."""
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < what.size and (more := connection.recv(what.size - len(data))):
            data += more
    return what.unpack(data) if len(data) == what.size else None
