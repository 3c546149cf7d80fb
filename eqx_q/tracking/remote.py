"""Trackers of other makers, which a run never depends on."""

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
_PROGRAMS = Path(__file__).with_name("backends")
_MOST_RUNS = 32  # trackers are slow with very many runs: a larger population is summed up in one
_BINS = 64
_WAITING = 1024  # messages in the queue


class Backend(NamedTuple):
    """What messages say of a tracker; `backends/<name>.py` is what writes to it.

    **Attributes:**

    - `title`: its name, for people.
    - `package`: what it needs, which `extra` brings; where `below` is a version of Python, only to
        older ones.
    - `store`: what it keeps in `repo`.
    - `hint`: where else a failure may come from. It may name `{repo}`, `{store}` and `{run}`.
    """

    title: str
    package: str
    store: str
    extra: str = "trackers"
    below: tuple[int, int] = (4, 0)
    hint: str = ""


BACKENDS = {
    "aim": Backend(
        "Aim",
        "aim",
        ".aim",
        "train",
        below=(3, 12),
        hint=" (a lock that a dead one left goes with `rm {store}/locks/*lock` or "
        "`aim runs --repo {repo} close {run}`)",
    ),
    "tensorboard": Backend("TensorBoard", "tensorboardX", "tensorboard"),
    "wandb": Backend(
        "Weights & Biases",
        "wandb",
        "wandb",
        hint=" (with tracker.wandb.mode=online, that `wandb login` was run and the server answers)",
    ),
    "trackio": Backend("trackio", "trackio", "trackio"),
    "mlflow": Backend(
        "MLflow",
        "mlflow",
        "mlflow.db",
        hint=" (with tracker.mlflow.uri, that the server answers)",
    ),
}


class RemoteTracker(Tracker):
    """Logs to a tracker of somebody else's, which works in a process of its own.

    One run of the tracker per member of a population, or one with `mean`, `std`, `min` and `max`
    over members where there are more than 32. `eqx_q.tracking.series` says how series are called.

    Logging never blocks. Where the tracker is missing, locked, broken, or slower than the training,
    one warning says what to do about it, and the run goes on without. `close` takes at most
    `close_timeout`; of several trackers each does so in turn. The tracker's process ends with the
    run's, at most a minute after one that was killed.

    **Arguments:**

    - `backend`: `"aim"`, `"tensorboard"`, `"wandb"`, `"trackio"` or `"mlflow"`.
    - `directory`: of the run. Its name is the name of the tracker's run, and `<backend>.json` in it
        remembers which one that is, so that a resumed run continues it.
    - `repo`: directory that has (or gets) what the tracker keeps.
    - `experiment`: what runs that belong together are called.
    - `num_members`: of a population.
    - `names`: of the tracker's runs, one for each member, however many; by default after
        `directory`.
    - `description`, `tags`: of the run, for people.
    - `open_timeout`, `close_timeout`: seconds that the tracker has to open, and to finish in
        `close`.
    - `options`: the tracker's own: `mode` and `entity` of `wandb`, `uri` of `mlflow`.

    **Raises:** `UnknownNameError` where there is no such backend.
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
        self._summed_up = names is None and num_members is not None and num_members > _MOST_RUNS
        self._note = None if directory is None else Path(directory) / f"{backend}.json"
        self._open_timeout, self._close_timeout = open_timeout, close_timeout
        self._queue: queue.Queue[str | None] = queue.Queue(_WAITING)
        self._fed_at = time.monotonic()
        self._lock = threading.Lock()
        self._given_up = self._warned = False
        self._constants: dict[str, Any] = {}
        self._counts: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

        if not installed(backend):
            self._give_up("it is not installed for this Python", self._install())
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run, which then closes it in order
            )
        except OSError as error:
            self._give_up(str(error))
            return
        self._feeder = threading.Thread(target=self._feed, args=(self._process,), daemon=True)
        self._feeder.start()
        if names is None:
            name = "run" if directory is None else "/".join(Path(directory).absolute().parts[-2:])
            members = 1 if num_members is None or self._summed_up else num_members
            names = [name] if members == 1 else [f"{name} #{i}" for i in range(members)]
        self._send(
            backend=str(_PROGRAMS / f"{backend}.py"),
            names=list(names),
            known=self._remembered(len(names)),
            options=options,
            repo=self._repo,
            experiment=experiment,
            description=description,
            tags=list(tags),
            process=os.getpid(),
            patience=open_timeout / 3,
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Queues numbers and distributions. Never blocks."""
        constants, self._counts = (
            _plain_numbers(metrics, CONSTANTS),
            _plain_numbers(metrics, COUNTS),
        )
        if constants != self._constants:
            self._constants = constants
            self.log_params(constants)
        numbers, histograms = _records(metrics, self._num_members, self._summed_up)
        self._send(kind="metrics", step=step, records=numbers)
        if histograms:
            self._send(kind="histograms", step=step, records=histograms)

    def log_params(self, params: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Queues parameters, the same for every member or those of each. Never blocks."""
        of_each = dict(params) if isinstance(params, Mapping) else list(params)
        self._send(kind="params", params=of_each)

    def log_gif(self, path: str | os.PathLike, step: int, name: str = "episode") -> None:
        """Queues a picture, for the first member. Never blocks."""
        self._send(kind="gif", path=str(Path(path).absolute()), name=f"eval/{name}", step=step)

    def close(self) -> None:
        """Waits until the tracker has everything, but no longer than `close_timeout`."""
        if self._given_up:
            return
        deadline = time.monotonic() + self._close_timeout
        if self._counts:
            self.log_params(self._counts)
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=self._close_timeout)
        self._feeder.join(max(0.0, deadline - time.monotonic()))
        if self._feeder.is_alive():
            self._give_up(f"it did not finish within {self._close_timeout:g} s")

    # ---- how it gets there

    def _send(self, **message: Any) -> None:
        if self._given_up:
            return
        try:
            self._queue.put_nowait(json.dumps(message, default=_plain, skipkeys=True) + "\n")
        except queue.Full:
            if time.monotonic() - self._fed_at > self._open_timeout:
                self._give_up("it hangs")
            else:
                self._warn("it is slower than the run")

    def _feed(self, process: subprocess.Popen[str]) -> None:
        """Hands the queue to the tracker's process, in a thread that may block without harm."""
        try:
            with process:
                answer = self._converse(process)
                if process.wait() != 0:
                    self._give_up(answer.get("error", "its process died"))
        except Exception as error:  # leaving `process` may break its pipe once more
            self._give_up(str(error))

    def _converse(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """**Returns:** the last that it said."""
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
            self._remember(answer["runs"])
            for line in iter(self._queue.get, None):
                stdin.write(line)
                stdin.flush()
                self._fed_at = time.monotonic()
            stdin.close()
        except BrokenPipeError:
            pass  # it has died, and may have said why
        return _answer(stdout.readline())

    # ---- what is said where it fails

    def _give_up(self, reason: str, mend: str | None = None) -> None:
        """From here on nothing is logged."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with what it has started itself
        self._warn(reason, mend)

    def _warn(self, reason: str, mend: str | None = None) -> None:
        """The one warning."""
        with self._lock:
            if self._warned:
                return
            self._warned = True
        _logger.warning(
            "%s lacks this run, or part of it (%s); the run goes on, and metrics.jsonl has it all. "
            "To mend it, %s",
            self._backend.title,
            reason,
            mend or self._mend(),
        )

    def _install(self) -> str:
        backend = self._backend
        if sys.version_info < backend.below:
            return f"run `pip install 'eqx_q[{backend.extra}]'`"
        older = ".".join(map(str, backend.below))
        return f"take tracker=tensorboard: {backend.title} needs a Python before {older}"

    def _mend(self) -> str:
        store = Path(self._repo) / self._backend.store
        run = (self._remembered() or ["HASH"])[0]
        hint = self._backend.hint.format(repo=self._repo, store=store, run=run)
        return (
            f"see to it that '{store}' can be written to and that no other process uses it{hint}, "
            "or take another directory (tracker.repo=DIR) or none (tracker=jsonl)"
        )

    # ---- which runs of the tracker are ours

    def _remember(self, runs: list[str]) -> None:
        if self._note is not None:
            try:
                write_whole(self._note, [json.dumps({"repo": self._repo, "runs": runs}).encode()])
            except UsageError as error:
                _logger.warning(
                    "%s; a resumed run will be a new one in %s", error, self._backend.title
                )

    def _remembered(self, members: int | None = None) -> list[str]:
        """The tracker's runs that this run had before; empty where there are no such `members`."""
        try:
            note = json.loads(self._note.read_text()) if self._note is not None else {}
        except (OSError, ValueError):
            return []
        runs = note.get("runs", [])
        same = members is None or len(runs) == members
        return runs if note.get("repo") == self._repo and same else []


def installed(backend: str) -> bool:
    """Whether this Python has what a tracker needs, and may use it."""
    spec = importlib.util.find_spec(BACKENDS[backend].package)
    there = spec is not None and spec.origin is not None  # else it is a directory of that name
    return there and sys.version_info < BACKENDS[backend].below


def _records(
    metrics: Mapping[str, Any], num_members: int | None, summed_up: bool
) -> tuple[list, list]:
    """**Returns:** what is finite of the metrics, as the tracker's process takes it:

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
            array = np.broadcast_to(array, (members, *array.shape))  # the same for all members
        if array.ndim > 1:
            rows = array.reshape(1 if summed_up else members, -1)
            for i, row in enumerate(rows):
                if (row := row[np.isfinite(row)]).size:
                    counts, edges = np.histogram(row, _BINS)
                    ends = [float(edges[0]), float(edges[-1])]
                    histograms.append([i, name, counts.tolist(), ends])
        elif not summed_up:
            for i, x in enumerate(array):
                if np.isfinite(x):
                    numbers[i][name] = float(x)
        elif (finite := array[np.isfinite(array)]).size:
            for statistic in ("mean", "std", "min", "max"):
                numbers[0][f"{name}/{statistic}"] = float(getattr(finite, statistic)())
    return [list(record) for record in numbers.items()], histograms


def _plain_numbers(metrics: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Those of the names that are one for all members, and finite."""
    found = {name: np.asarray(x) for name, x in metrics.items() if name in names}
    return {name: x.item() for name, x in found.items() if x.ndim == 0 and np.isfinite(x)}


def _answer(line: str) -> dict[str, Any]:
    """What the tracker's process says in a line; nothing where it died before it could."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _plain(value: Any) -> Any:
    """What JSON does not know, as what it knows."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


AimTracker = functools.partial(RemoteTracker, "aim")
TensorBoardTracker = functools.partial(RemoteTracker, "tensorboard")
WandbTracker = functools.partial(RemoteTracker, "wandb")
TrackioTracker = functools.partial(RemoteTracker, "trackio")
MlflowTracker = functools.partial(RemoteTracker, "mlflow")
