"""Several processes that train together: how they meet, and what happens where one is gone.

JAX lets a process wait for the others for as long as they are thought to live, which can be for
ever, and then kills it without a word that helps. So they watch each other here: every process
keeps a connection to the first one open, which the system closes when either of them is gone.
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
_BYE = -1  # the news of one that ends as it should; all other news are the process that is gone
# A machine that is gone closes no connection: one that is silent is asked for a sign of life.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


def join_processes(
    coordinator: str | None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several. To be called before JAX touches a device.

    From then on, if one process disappears, the others exit within seconds and say which. One that
    fails with an exception exits at once; instead of `sys.exit(1)` call `abandon`.

    **Arguments:**

    - `coordinator`: `"host:port"` of the first process; `"auto"`: what started the processes
        (Slurm, MPI, Kubernetes) has told JAX; `None`: this process is alone.
    - `num_processes`, `process_id`: of the first kind: how many, and which one from 0 this is.

    **Raises:** `UsageError` where the processes do not find each other, or without a coordinator
    cannot.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise UsageError(
                "without distributed.coordinator=HOST:PORT a process is alone: give it, or leave "
                "out distributed.num_processes and distributed.process_id"
            )
        return
    detected = coordinator == "auto"
    known = (None, None, None) if detected else (coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(*known, shutdown_timeout_seconds=_PATIENCE)
        others = _meet()
    except (RuntimeError, ValueError, TypeError, IndexError, OSError) as error:
        # A TypeError: of no number of processes; an IndexError: of no port.
        raise UsageError(
            f"the processes do not find each other ({error}): give every one the same "
            "distributed.coordinator=HOST:PORT and distributed.num_processes, and a "
            "distributed.process_id of its own"
        ) from error
    number = jax.process_count()  # at exit JAX may not be asked any more
    threading.Thread(target=_watch, args=[others, number], daemon=True).start()
    atexit.register(_tell, others, _BYE)
    sys.excepthook = _end_with(sys.excepthook)


def is_first_process() -> bool:
    """Whether this process is the one that writes what is to be written once."""
    return jax.process_index() == 0


def as_first_says(*flags: bool) -> tuple[bool, ...]:
    """What the first process says, where each may have another opinion."""
    if jax.process_count() == 1:
        return flags
    return tuple(bool(x) for x in multihost_utils.broadcast_one_to_all(np.asarray(flags, np.int32)))


def requeue() -> None:
    """Asks Slurm to start this job again, which it is about to end.

    **Raises:** `UsageError` where this is no job of Slurm's, or Slurm refuses.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise UsageError("there is no SLURM_JOB_ID: start the same command again")
    try:
        subprocess.run(
            ["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        what = " ".join(f"{getattr(error, 'stderr', None) or error}".split())
        raise UsageError(
            f"Slurm does not requeue job {job} ({what}): submit it with --requeue, or again"
        ) from error


def abandon() -> None:
    """Ends this process, which failed, at once where it is one of several; they will see it.

    Else it would wait for them, and they for it.
    """
    if jax.distributed.is_initialized():
        _end_now()


def _end_now() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def _end_with(hook: Callable[..., None]) -> Callable[..., None]:
    """Calls `hook` with an exception that nobody caught, and then `abandon`."""

    def wrapped(*exception) -> None:
        # Where another process is gone, the first sign of it may be an error of what both compute.
        time.sleep(_TIME_FOR_NEWS)
        hook(*exception)
        abandon()

    return wrapped


def _meet() -> dict[int, socket.socket]:
    """Connections: of the first process to all others by their number, of the others to it."""
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
            # Where this process has reached the first one already; nothing public tells it.
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
                connection.close()  # none of ours
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
    """Ends this process where another is gone, until all have said that they end."""
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
                        "so this one ends too. Start all of them again; with resume=DIR the run "
                        "goes on from its last checkpoint",
                        file=sys.stderr,
                    )
                finally:  # a terminal may be gone, too
                    _end_now()


def _tell(others: dict[int, socket.socket], news: int) -> None:
    for connection in others.values():
        with contextlib.suppress(OSError):
            connection.sendall(_NEWS.pack(news))


def _received(connection: socket.socket, what: struct.Struct) -> tuple | None:
    """What the other side sent; `None` where it closed the connection."""
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < what.size and (more := connection.recv(what.size - len(data))):
            data += more
    return what.unpack(data) if len(data) == what.size else None
