"""An Optuna study in a directory that several processes share, robust to dying processes."""

import contextlib
import fcntl
import itertools
import json
import logging
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptFileError, UsageError
from ..saving.files import cannot_write, sealed, unseal
from .space import Space, import_optuna

logger = logging.getLogger(__name__)

SAMPLERS = ("tpe", "random", "grid")
STUDY = "study.journal"
_PATIENCE = 60.0  # seconds to wait for another process, which usually needs far less than one


class SharedStudy:
    """A search's trials on disk: every process that opens the directory takes part.

    When a process dies, the kernel releases its locks; from that the others notice that its
    unfinished trials must be given up.

    **Arguments:**

    - `directory`: of the search; the trials are in `study.journal`.
    - `space`: the search space.
    - `sampler`: proposes trials. `"tpe"` learns from earlier trials (Bergstra et al. 2011),
        `"random"` does not, `"grid"` proposes every combination of choices once.
    - `maximize`: whether higher results are better.
    - `seed`: of proposals, together with the number of trials so far.

    **Attributes:** `alone`: a lock for operations of one process at a time.

    **Raises:** `UsageError` if the storage is locked or damaged.
    """

    def __init__(
        self, directory: Path, space: Space, *, sampler: str, maximize: bool, seed: int = 0
    ):
        self._optuna = optuna = import_optuna()
        if sampler not in SAMPLERS:
            raise UsageError(f"sampler={sampler}: choose one of {', '.join(SAMPLERS)}")
        self._grid = _grid(space) if sampler == "grid" else None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._sampler, self._seed = space, sampler, seed
        self._workers = directory / "workers"
        self._workers.mkdir(parents=True, exist_ok=True)
        self.alone = _Lock(directory / ".alone.lock")
        self._name = uuid.uuid4().hex
        self._alive = _Lock(self._workers / self._name)
        with self.alone:  # so that no process looks dead before it has its lock
            for worker in self._workers.iterdir():
                self._is_alive(worker.name)  # removes the files of dead processes
            self._alive.acquire()
        try:
            self.study = _open(directory / STUDY, "maximize" if maximize else "minimize")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves the search; other processes may then give up its unfinished trials."""
        (self._workers / self._name).unlink(missing_ok=True)
        self._alive.release()

    @property
    def finished(self) -> list[Any]:
        """Trials with a result, including pruned ones."""
        return self._in_states("COMPLETE", "PRUNED")

    @property
    def complete(self) -> list[Any]:
        """Trials that ran to the end."""
        return self._in_states("COMPLETE")

    @property
    def best(self) -> Any | None:
        """The best complete trial; `None` before there is one."""
        return self.study.best_trial if self.complete else None

    def ask(self, num_trials: int, at_most: int) -> list[Any]:
        """Proposes trials that share their static values, with consecutive numbers.

        **Arguments:** `num_trials`: of the whole search. `at_most`: the maximum now.

        **Returns:** the trials; empty if all are finished, or taken by other processes.
        """
        optuna = self._optuna
        with self.alone:
            # In this order, a trial that finishes in between is in both lists, not in neither.
            taken = {t.number: t.params for t in [*self._running(), *self.finished]}
            left = num_trials - len(taken)
            if left <= 0:
                return []
            if self._grid is not None:
                return self._ask_grid(list(taken.values()), left, at_most)
            size = _even(left, at_most)
            # A new seed for each batch, so that a resumed search does not repeat its proposals.
            number = len(self.study.get_trials(deepcopy=False))
            (seed,) = np.random.SeedSequence([self._seed, number]).generate_state(1)
            kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
            sampler = kinds[self._sampler](seed=int(seed))
            first = self._ask_one(sampler)
            sampler = _fixed(self._space.static(first.params), sampler)
            return [first, *(self._ask_one(sampler) for _ in range(size - 1))]

    def tell(self, trial: Any, value: float | None, **attributes: Any) -> None:
        """Ends a trial with its result, or as pruned if that is `None`."""
        for name, attribute in attributes.items():
            trial.set_user_attr(name, attribute)
        if value is None:
            self.study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, value)

    def unfinished(self, trials: list[Any]) -> list[Any]:
        """Those of `trials` that have not ended."""
        ended = {trial.number for trial in self.finished}
        return [trial for trial in trials if trial.number not in ended]

    def give_up(self, trial: Any) -> None:
        """Marks a trial as failed unless it has ended; another one will replace it."""
        failed = self._optuna.trial.TrialState.FAIL
        self.study.tell(trial.number, state=failed, skip_if_finished=True)

    def _ask_one(self, sampler: Any) -> Any:
        self.study.sampler = sampler
        trial = self.study.ask(dict(self._space.distributions))
        trial.set_user_attr("worker", self._name)
        return trial

    def _ask_grid(self, taken: list[dict[str, Any]], left: int, at_most: int) -> list[Any]:
        assert self._grid is not None
        points = [point for point in self._grid if point not in taken]
        static = self._space.static
        alike = [point for point in points if static(point) == static(points[0])][:left]
        anyone = self._optuna.samplers.RandomSampler()
        batch = alike[: _even(len(alike), at_most)] if alike else []
        return [self._ask_one(_fixed(point, anyone)) for point in batch]

    def _running(self) -> list[Any]:
        """Trials that a process is working on; gives up those of dead processes."""
        running = self._in_states("RUNNING")
        is_alive = {name: self._is_alive(name) for name in {_worker(t) for t in running}}
        for trial in running:
            if not is_alive[_worker(trial)]:
                self.give_up(trial)
        return [trial for trial in running if is_alive[_worker(trial)]]

    def _in_states(self, *names: str) -> list[Any]:
        states = tuple(self._optuna.trial.TrialState[name] for name in names)
        return self.study.get_trials(deepcopy=False, states=states)

    def _is_alive(self, name: str) -> bool:
        path = self._workers / name
        if name == self._name:
            return True
        if not name or not path.exists():
            return False
        with contextlib.suppress(UsageError):
            with _Lock(path, patience=0):
                path.unlink()
            return False
        return True


def _even(number: int, at_most: int) -> int:
    """The size of equal batches of `number` things, since equal sizes compile once."""
    return -(-number // -(-number // at_most))


def _worker(trial: Any) -> str:
    return trial.user_attrs.get("worker", "")


def _fixed(params: dict[str, Any], sampler: Any) -> Any:
    """A sampler that proposes these parameters, and the others like `sampler`."""
    optuna = import_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler(params, sampler)


def _grid(space: Space) -> list[dict[str, Any]]:
    """Every combination, ordered so that those that share static values are adjacent."""
    names = sorted(space.distributions, key=lambda name: name in space.traced)
    values = []
    for name in names:
        distribution = space.distributions[name]
        if hasattr(distribution, "choices"):
            values.append(distribution.choices)
        elif isinstance(distribution.low, int) and not distribution.log:
            values.append(range(distribution.low, distribution.high + 1, distribution.step))
        else:
            raise UsageError(f"a grid needs choices: give search.{name} as a list")
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*values)]


def _open(path: Path, direction: str) -> Any:
    """Opens the study in a file, or creates it."""
    optuna = import_optuna()
    lock = _Lock(path.with_name(f"{path.name}.lock"))

    class Journal(optuna.storages.journal.JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            super().append_logs([sealed(log) for log in logs])

    try:
        with lock:
            _check_lines(path)
        backend = Journal(str(path), lock_obj=lock)  # pyright: ignore
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="search",
            direction=direction,
            load_if_exists=True,
        )
    except UsageError:
        raise
    except (ValueError, LookupError, TypeError, AssertionError, AttributeError) as error:
        raise CorruptFileError(
            f"'{path}' is damaged ({type(error).__name__}: {error}): delete that line, or "
            "start a new search in another directory"
        ) from None


def _check_lines(path: Path) -> None:
    """Raises `ValueError` for a damaged line. Drops a partial last line of a killed process."""
    *lines, half = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            unseal(json.loads(line), required=False)  # earlier versions have no checksum
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    if half:  # the next line would be appended to it
        logger.warning("dropped the incomplete last line of '%s'", path)
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - len(half))


class _Lock:
    """A lock that the kernel releases when its process dies, unlike Optuna's locks."""

    def __init__(self, path: Path, patience: float | None = None):
        self._path, self._patience = path, patience
        self._file: Any = None

    def acquire(self) -> bool:
        """Waits for the lock. Raises `UsageError` on timeout, or if the file cannot be made."""
        try:
            file = open(self._path, "a")  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self._path, error) from error
        deadline = time.monotonic() + (_PATIENCE if self._patience is None else self._patience)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file = file
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.close()
                    raise UsageError(
                        f"another process holds '{self._path}': end it, then run this again"
                    ) from None
            time.sleep(0.01)

    def release(self) -> None:
        """Releases the lock."""
        self._file.close()

    def __enter__(self) -> "_Lock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
