"""Tracking with Aim, which a run never depends on."""

import collections
import contextlib
import importlib.util
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..saving.files import write_whole
from .tracker import Tracker

_logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("aim_worker.py")
_MOST_RUNS = 32  # Aim is slow with very many runs: a larger population is summed up in one
_BINS = 64
_WAITING = 1024  # messages in the queue


class AimTracker(Tracker):
    """Logs to an Aim repository, for `aim up` to show.

    One Aim run per member of a population, or one with `mean`, `std`, `min` and `max` over members
    where there are more than 32. Contexts tell `{"subset": "train"}` from `{"subset": "eval"}`.

    Aim works in a process of its own. Where it is missing, locked, broken or too slow, one warning
    says what to do about it, and the run goes on without.

    **Arguments:**

    - `directory`: of the run. Its name is the name of the Aim run, and `aim.json` in it remembers
        which one that is, so that a resumed run continues it.
    - `repo`: directory that has (or gets) the `.aim` repository.
    - `experiment`: Aim's name for runs that belong together.
    - `num_members`: of a population.
    - `names`: of the Aim runs, one for each member, however many; by default after `directory`.
    - `open_timeout`, `close_timeout`: seconds that Aim has to take a message, the first of which
        opens the repository, and to finish in `close`.
    """

    def __init__(
        self,
        directory: str | os.PathLike | None = None,
        *,
        repo: str | os.PathLike = ".",
        experiment: str | None = None,
        num_members: int | None = None,
        names: Sequence[str] | None = None,
        open_timeout: float = 60.0,
        close_timeout: float = 30.0,
    ):
        self._repo = str(Path(repo).absolute())
        self._num_members = num_members
        self._summed_up = names is None and num_members is not None and num_members > _MOST_RUNS
        self._note = None if directory is None else Path(directory) / "aim.json"
        self._open_timeout, self._close_timeout = open_timeout, close_timeout
        self._queue: queue.Queue[str | None] = queue.Queue(_WAITING)
        self._fed_at = time.monotonic()
        self._lock = threading.Lock()
        self._given_up = self._left_out = False
        self._process: subprocess.Popen[str] | None = None

        if importlib.util.find_spec("aim") is None:
            mend = (
                "run `pip install 'eqx_q[train]'`"
                if sys.version_info < (3, 12)
                else ("take tracker=jsonl: this Python is newer than what Aim can run on, 3.11")
            )
            self._give_up("it is not installed", mend)
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run, which then closes Aim in order
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
            repo=self._repo,
            experiment=experiment,
            names=list(names),
            hashes=self._remembered(len(names)),
            process=os.getpid(),
            patience=open_timeout / 3,
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Queues numbers and distributions. Never blocks."""
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
        context = {"subset": "eval"}
        self._send(
            kind="gif", path=str(Path(path).absolute()), name=name, step=step, context=context
        )

    def close(self) -> None:
        """Waits until Aim has everything, but no longer than `close_timeout`."""
        if self._given_up:
            return
        deadline = time.monotonic() + self._close_timeout
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
            elif not self._left_out:
                self._left_out = True
                _logger.warning("Aim is slower than this run: it will lack some points")

    def _feed(self, process: subprocess.Popen[str]) -> None:
        """Hands the queue to Aim's process, in a thread that may block without harm."""
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

    def _give_up(self, reason: str, mend: str | None = None) -> None:
        """The one warning; from here on nothing is logged."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
        if self._process is not None:
            self._process.kill()
        if mend is None:
            aim = Path(self._repo) / ".aim"
            close = "".join(
                f" or `aim runs --repo {self._repo} close {h}`" for h in self._remembered(1)
            )
            mend = (
                f"see to it that '{aim}' can be written to and that no other process uses it (a "
                f"lock that a dead one left goes with `rm {aim / 'locks' / '*lock'}`{close}), or "
                "take another repository (tracker.repo=DIR) or none (tracker=jsonl)"
            )
        _logger.warning(
            "Aim does not track this run (%s); the run goes on, and metrics.jsonl has it all. "
            "To mend it, %s",
            reason,
            mend,
        )

    # ---- which Aim runs are ours

    def _remember(self, hashes: list[str]) -> None:
        if self._note is not None:
            try:
                write_whole(self._note, [json.dumps({"repo": self._repo, "runs": hashes}).encode()])
            except UsageError as error:
                _logger.warning("%s; a resumed run will be a new one in Aim", error)

    def _remembered(self, members: int) -> list[str]:
        """Hashes of the Aim runs that this run had before; empty where there are none."""
        try:
            note = json.loads(self._note.read_text()) if self._note is not None else {}
        except (OSError, ValueError):
            return []
        runs = note.get("runs", [])
        return runs if note.get("repo") == self._repo and len(runs) == members else []


def _records(
    metrics: Mapping[str, Any], num_members: int | None, summed_up: bool
) -> tuple[list, list]:
    """**Returns:** what is finite of the metrics, as Aim's process takes it:

    - numbers: `[run, {name: value}, context]`.
    - histograms: `[run, name, counts, [start, end], context]`.
    """
    members = num_members or 1
    numbers = collections.defaultdict(dict)
    histograms = []
    for name, value in metrics.items():
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            continue
        array = array.astype(float)
        if num_members is None or array.shape[:1] != (members,):
            array = np.broadcast_to(array, (members, *array.shape))  # the same for all members
        subset, name = ("eval", name[5:]) if name.startswith("eval/") else ("train", name)
        if array.ndim > 1:
            rows = array.reshape(1 if summed_up else members, -1)
            for i, row in enumerate(rows):
                if (row := row[np.isfinite(row)]).size:
                    counts, edges = np.histogram(row, _BINS)
                    ends = [float(edges[0]), float(edges[-1])]
                    histograms.append([i, name, counts.tolist(), ends, {"subset": subset}])
        elif not summed_up:
            for i, x in enumerate(array):
                if np.isfinite(x):
                    numbers[i, subset, None][name] = float(x)
        elif (finite := array[np.isfinite(array)]).size:
            for statistic in ("mean", "std", "min", "max"):
                numbers[0, subset, statistic][name] = float(getattr(finite, statistic)())
    return [
        [i, row, {"subset": subset} | ({"over_members": statistic} if statistic else {})]
        for (i, subset, statistic), row in numbers.items()
    ], histograms


def _answer(line: str) -> dict[str, Any]:
    """What Aim's process says in a line; nothing where it died before it could."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _plain(value: Any) -> Any:
    """What JSON does not know, as what it knows."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
