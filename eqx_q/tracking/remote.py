"""Experiment trackers such as Aim or W&B. A failing tracker never stops a run."""

import collections
import contextlib
import functools
import importlib.util
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UnknownNameError, UsageError
from ..saving.files import write_whole
from .series import CONSTANTS, COUNTS, series
from .tracker import Tracker

_logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("worker.py")
_BACKENDS_DIR = Path(__file__).with_name("backends")
_MAX_RUNS = 32  # trackers get slow with many runs: a larger population becomes one run
_BINS = 64  # of a histogram
_QUEUE_SIZE = 1024  # messages


class Backend(NamedTuple):
    """Describes a tracker, for checks and messages. `backends/<name>.py` writes to it.

    **Attributes:**

    - `title`: the name to show.
    - `package`: the Python package it needs. `extra` installs it.
    - `store`: the file or directory in `repo` that holds its data.
    - `python_below`: the first version of Python that the package does not run on.
    - `hint`: further advice after a failure. It may contain `{repo}`, `{store}` and `{run}`.
    """

    title: str
    package: str
    store: str
    extra: str = "trackers"
    python_below: tuple[int, int] = (4, 0)
    hint: str = ""


BACKENDS = {
    "aim": Backend(
        "Aim",
        "aim",
        ".aim",
        "train",
        python_below=(3, 12),
        hint=" (a dead process may have left a lock: remove it with `rm {store}/locks/*lock` or "
        "`aim runs --repo {repo} close {run}`)",
    ),
    "tensorboard": Backend("TensorBoard", "tensorboardX", "tensorboard"),
    "wandb": Backend(
        "Weights & Biases",
        "wandb",
        "wandb",
        hint=" (with tracker.wandb.mode=online, also check `wandb login` and the network)",
    ),
    "trackio": Backend("trackio", "trackio", "trackio"),
    "mlflow": Backend(
        "MLflow",
        "mlflow",
        "mlflow.db",
        hint=" (with tracker.mlflow.uri, also check that the server is up)",
    ),
}


class RemoteTracker(Tracker):
    """Logs to an experiment tracker, which runs in a process of its own.

    Each member of a population gets its own run in the tracker. A population of more than 32
    members gets one run with the `mean`, `std`, `min` and `max` over members.
    `eqx_q.tracking.series` defines the names of the series.

    Logging never blocks. If the tracker is missing, locked, broken or slower than training, one
    warning says what to do, and the run continues without it. `close` takes at most
    `close_timeout` seconds; several trackers are closed one after another. The tracker's process
    ends with the run. If the run is killed, it ends within about a minute.

    **Arguments:**

    - `backend`: `"aim"`, `"tensorboard"`, `"wandb"`, `"trackio"` or `"mlflow"`.
    - `directory`: the run directory. Its last two parts name the tracker's run. `<backend>.json` in
        it stores the ids of the tracker's runs, so that a resumed run continues them.
    - `repo`: the directory in which the tracker keeps its data. It is created if missing.
    - `experiment`: the name under which the tracker groups runs.
    - `num_members`: the size of a population; `None` for a single agent.
    - `names`: names of the tracker's runs, one for each member, also beyond 32. By default they
        follow from `directory`.
    - `description`, `tags`: shown with the run.
    - `open_timeout`: seconds that the tracker has to open.
    - `close_timeout`: seconds that it has to finish in `close`.
    - `options`: options of the backend: `views` (Aim), `mode` and `entity` (W&B), `uri` (MLflow).

    **Raises:** `UnknownNameError` if there is no such backend.
    """

    def __init__(
        self,
        backend: str,
        directory: str | os.PathLike | None = None,
        *,
        repo: str | os.PathLike = ".",
        experiment: str | None = None,
        num_members: int | None = None,
        names: Sequence[str] | None = None,
        description: str = "",
        tags: Sequence[str] = (),
        open_timeout: float = 60.0,
        close_timeout: float = 30.0,
        **options: Any,
    ):
        if backend not in BACKENDS:
            raise UnknownNameError("tracker", backend, BACKENDS)
        self._backend = BACKENDS[backend]
        self._repo = str(Path(repo).absolute())
        self._num_members = num_members
        self._aggregate = names is None and num_members is not None and num_members > _MAX_RUNS
        self._ids_file = None if directory is None else Path(directory) / f"{backend}.json"
        self._open_timeout, self._close_timeout = open_timeout, close_timeout
        self._queue: queue.Queue[str | None] = queue.Queue(_QUEUE_SIZE)
        self._last_write = time.monotonic()
        self._lock = threading.Lock()
        self._given_up = self._warned = False
        self._constants: dict[str, Any] = {}
        self._counts: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

        if not installed(backend):
            self._give_up("it is not installed for this Python", self._install_advice())
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C must not stop it before the run closes it
            )
        except OSError as error:
            self._give_up(str(error))
            return
        self._writer = threading.Thread(
            target=self._write_queue, args=(self._process,), daemon=True
        )
        self._writer.start()
        if names is None:
            name = "run" if directory is None else "/".join(Path(directory).absolute().parts[-2:])
            members = 1 if num_members is None or self._aggregate else num_members
            names = [name] if members == 1 else [f"{name} #{i}" for i in range(members)]
        self._send(
            backend=str(_BACKENDS_DIR / f"{backend}.py"),
            names=list(names),
            resume_ids=self._stored_ids(len(names)),
            options=options,
            repo=self._repo,
            experiment=experiment,
            description=description,
            tags=list(tags),
            train_pid=os.getpid(),
            lock_timeout=open_timeout / 3,
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Queues numbers and histograms. Never blocks."""
        if self._given_up:
            return
        constants, self._counts = (
            _plain_numbers(metrics, CONSTANTS),
            _plain_numbers(metrics, COUNTS),
        )
        if constants != self._constants:
            self._constants = constants
            self.log_params(constants)
        numbers, histograms = _records(metrics, self._num_members, self._aggregate)
        self._send(kind="metrics", step=step, records=numbers)
        if histograms:
            self._send(kind="histograms", step=step, records=histograms)

    def log_params(self, params: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Queues hyperparameters: the same for all members, or a list with one entry each.

        Never blocks.
        """
        params = dict(params) if isinstance(params, Mapping) else list(params)
        self._send(kind="params", params=params)

    def log_gif(self, path: str | os.PathLike, step: int, name: str = "episode") -> None:
        """Queues a GIF for the run of the first member. Never blocks."""
        self._send(kind="gif", path=str(Path(path).absolute()), name=f"eval/{name}", step=step)

    def close(self) -> None:
        """Waits until the tracker has written everything, at most `close_timeout` seconds."""
        if self._given_up:
            return
        deadline = time.monotonic() + self._close_timeout
        if self._counts:
            self.log_params(self._counts)
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=self._close_timeout)
        self._writer.join(max(0.0, deadline - time.monotonic()))
        if self._writer.is_alive():
            self._give_up(f"it did not finish within {self._close_timeout:g} s")

    # ---- sending

    def _send(self, **message: Any) -> None:
        if self._given_up:
            return
        try:
            self._queue.put_nowait(json.dumps(message, default=_plain, skipkeys=True) + "\n")
        except queue.Full:
            if time.monotonic() - self._last_write > self._open_timeout:
                self._give_up("it hangs")
            else:
                self._warn("it is slower than the run")

    def _write_queue(self, process: subprocess.Popen[str]) -> None:
        """Writes the queue to the tracker's process. Runs in a thread, which may block."""
        try:
            with process:
                answer = self._exchange(process)
                if process.wait() != 0:
                    reason = answer.get("error", "its process died")
                    missing = reason.startswith("ModuleNotFoundError")
                    self._give_up(reason, self._install_advice() if missing else None)
        except Exception as error:  # leaving `with process` may raise another BrokenPipeError
            self._give_up(str(error))

    def _exchange(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """**Returns:** the last answer of the process."""
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(self._queue.get() or "")
            stdin.flush()
            if not select.select([stdout], [], [], self._open_timeout)[0]:
                self._give_up(f"it did not open within {self._open_timeout:g} s")
            answer = _answer(stdout.readline())
            if "runs" not in answer:
                return answer
            self._store_ids(answer["runs"])
            for line in iter(self._queue.get, None):
                stdin.write(line)
                stdin.flush()
                self._last_write = time.monotonic()
            stdin.close()
        except BrokenPipeError:
            pass  # the process died; its last answer may say why
        return _answer(stdout.readline())

    # ---- failing

    def _give_up(self, reason: str, advice: str | None = None) -> None:
        """Kills the tracker's process and stops logging to it."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # and its child processes
        self._warn(reason, advice)

    def _warn(self, reason: str, advice: str | None = None) -> None:
        """Logs a warning, unless there was one before."""
        with self._lock:
            if self._warned:
                return
            self._warned = True
        _logger.warning(
            "%s does not track this run, or not all of it: %s. The run goes on, and metrics.jsonl "
            "has all metrics. To fix this, %s",
            self._backend.title,
            reason,
            advice or self._advice(),
        )

    def _install_advice(self) -> str:
        backend = self._backend
        if sys.version_info < backend.python_below:
            return f"run `pip install 'eqx_q[{backend.extra}]'`"
        version = ".".join(map(str, backend.python_below))
        return f"use tracker=tensorboard: {backend.title} does not run on Python {version} or later"

    def _advice(self) -> str:
        store = Path(self._repo) / self._backend.store
        run = (self._stored_ids() or ["HASH"])[0]
        hint = self._backend.hint.format(repo=self._repo, store=store, run=run)
        return (
            f"check that '{store}' is writable and that no other process uses it{hint}, choose "
            "another directory (tracker.repo=DIR), or use no tracker (tracker=jsonl)"
        )

    # ---- resuming the tracker's runs

    def _store_ids(self, runs: list[str]) -> None:
        if self._ids_file is not None:
            try:
                write_whole(
                    self._ids_file, [json.dumps({"repo": self._repo, "runs": runs}).encode()]
                )
            except UsageError as error:
                _logger.warning(
                    "%s; after a resume, %s will show a new run", error, self._backend.title
                )

    def _stored_ids(self, members: int | None = None) -> list[str]:
        """Ids of the tracker's runs, from before a resume. Empty if `repo` or `members` differ."""
        if self._ids_file is None:
            return []
        try:
            stored = json.loads(self._ids_file.read_text())
            repo, runs = stored["repo"], list(stored["runs"])
        except (OSError, ValueError, LookupError, TypeError):  # none yet, or a damaged file
            return []
        return runs if repo == self._repo and members in (None, len(runs)) else []


def installed(backend: str) -> bool:
    """Whether the package of a tracker is installed, and runs on this version of Python."""
    spec = importlib.util.find_spec(BACKENDS[backend].package)
    found = spec is not None and spec.origin is not None  # a bare directory has no origin
    return found and sys.version_info < BACKENDS[backend].python_below


def _records(
    metrics: Mapping[str, Any], num_members: int | None, aggregate: bool
) -> tuple[list, list]:
    """Converts metrics to messages for the tracker's process, without values that are not finite.

    **Returns:**

    - numbers: `[member, {series: value}]`.
    - histograms: `[member, series, counts, [start, end]]`.
    """
    members = num_members or 1
    numbers = collections.defaultdict(dict)
    histograms = []
    for metric, value in metrics.items():
        array, name = np.asarray(value), series(metric)
        if name is None or array.dtype.kind not in "biuf":
            continue
        array = array.astype(float)
        if num_members is None or array.shape[:1] != (members,):
            array = np.broadcast_to(array, (members, *array.shape))  # one value for all members
        if array.ndim > 1:
            rows = array.reshape(1 if aggregate else members, -1)
            for i, row in enumerate(rows):
                if (row := row[np.isfinite(row)]).size:
                    counts, edges = np.histogram(row, _BINS)
                    ends = [float(edges[0]), float(edges[-1])]
                    histograms.append([i, name, counts.tolist(), ends])
        elif not aggregate:
            for i, x in enumerate(array):
                if np.isfinite(x):
                    numbers[i][name] = float(x)
        elif (finite := array[np.isfinite(array)]).size:
            for statistic in ("mean", "std", "min", "max"):
                numbers[0][f"{name}/{statistic}"] = float(getattr(finite, statistic)())
    return [list(record) for record in numbers.items()], histograms


def _plain_numbers(metrics: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The metrics of these names that are finite scalars."""
    found = {name: np.asarray(x) for name, x in metrics.items() if name in names}
    return {name: x.item() for name, x in found.items() if x.ndim == 0 and np.isfinite(x)}


def _answer(line: str) -> dict[str, Any]:
    """Parses an answer of the tracker's process; empty if it died before it could answer."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _plain(value: Any) -> Any:
    """Converts a value that JSON does not support."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


AimTracker = functools.partial(RemoteTracker, "aim")
TensorBoardTracker = functools.partial(RemoteTracker, "tensorboard")
WandbTracker = functools.partial(RemoteTracker, "wandb")
TrackioTracker = functools.partial(RemoteTracker, "trackio")
MlflowTracker = functools.partial(RemoteTracker, "mlflow")
