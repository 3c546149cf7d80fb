"""Callbacks for training, online and offline: evaluation, checkpoints, progress, GIFs, Ctrl-C.

Each is called as `callback(run_state, metrics)` at boundaries between chunks; see
`eqx_q.loops.running.Callback`. List callbacks that add metrics (`Evaluation`) before those that log
them (`eqx_q.tracking`).
"""

import dataclasses
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..clock import clock
from ..errors import LaneError, UsageError
from ..progress import Display
from ..saving.checkpoint import load_latest, newest_checkpoint, save_checkpoint
from ..sharding import OneDevice, Placement
from ..tracking import Tracker
from ..wrappers import Env, Exact
from ..wrappers.exact import Past
from ..wrappers.host import own_errors
from .evaluation import Episodes, compile_evaluation, play_episodes
from .media import record_episode, write_gif
from .running import Metrics, StopTraining
from .source import AbstractRunState
from .training import RunState, start

logger = logging.getLogger(__name__)


class TimeBudget:
    """Limits side work to a fraction of a run's wall-clock time.

    Each kind of work has a final round in any case, so the cost of its last round is held in
    reserve. Only a first round, whose cost is unknown, may exceed the limit.
    """

    def __init__(self, fraction: float):
        self.fraction = fraction
        self._started = time.perf_counter()
        self._spent = 0.0
        self._costs: dict[str, float] = {}
        self._warned = False

    def affords(self, work: str, *, guess: float = 0.0) -> bool:
        """Whether another round of `work` fits, by its last cost, or by `guess` before the first.

        Logs the first time that a round does not fit.
        """
        elapsed = time.perf_counter() - self._started
        cost, reserve = self._costs.get(work, guess), sum(self._costs.values())
        fits = self._spent + cost + reserve <= self.fraction * elapsed
        if not fits and work in self._costs and not self._warned:
            self._warned = True
            logger.info(
                "%s would take more than %g %% of the time, so some rounds are skipped: raise "
                "eval.time_fraction to allow more",
                work,
                100 * self.fraction,
            )
        return fits

    def charge(self, work: str, seconds: float) -> None:
        """Records the duration of a round of `work`."""
        self._spent += seconds
        self._costs[work] = seconds


class Evaluation:
    """Adds `eval/return` and other evaluation metrics, from an environment of its own.

    The suite's episode metrics, such as whether a battle was `won`, are averaged as `eval/won`.

    Randomness is folded from the step counter, so that evaluations do not affect the run.

    **Arguments:**

    - `env`: for evaluation alone (`env.replicate(...)`).
    - `every`: lane-steps (per member) between evaluations; the final one always takes place.
    - `num_episodes`: per member. `epsilon`: 0 is greedy.
    - `max_episode_steps`: longer episodes are cut here.
    - `min_steps`: rounds of `num_episodes` are played until this many steps.
    - `budget`: evaluations beyond it are skipped.

    **Attributes:** `last`: the episodes of the last evaluation.
    """

    def __init__(
        self,
        env: Env,
        *,
        every: int,
        num_episodes: int,
        seed: int = 0,
        epsilon: float = 0.0,
        max_episode_steps: int | None = None,
        min_steps: int = 0,
        budget: TimeBudget | None = None,
    ):
        self.every = every
        self.last: Episodes | None = None
        self._env = env
        self._options = {
            "num_episodes": num_episodes,
            "epsilon": epsilon,
            "max_episode_steps": max_episode_steps,
        }
        self._min_steps = min_steps
        self._key = jax.random.key(seed)
        self._compiled = False
        self._budget = budget or TimeBudget(math.inf)

    def __call__(self, run_state: AbstractRunState, metrics: Metrics) -> None:
        """Evaluates, unless it is over budget."""
        if not (metrics["done"] or self._budget.affords("evaluation")):
            return
        if not self._compiled:  # not charged to the budget, since the final round needs it anyway
            compile_evaluation(run_state.agent, self._env, **self._options)
            self._compiled = True
        started = time.perf_counter()
        key = jax.random.fold_in(self._key, int(run_state.num_updates))
        try:
            with own_errors(self._env):
                self.last = play_episodes(
                    run_state.agent, self._env, key=key, min_steps=self._min_steps, **self._options
                )
        except LaneError as error:
            raise LaneError(f"in an evaluation, {error}") from error
        seconds = time.perf_counter() - started
        self._budget.charge("evaluation", seconds)
        metrics["eval/return"] = self.last.returns.mean(-1)
        metrics["eval/return_std"] = self.last.returns.std(-1)
        metrics["eval/length"] = self.last.lengths.mean(-1)
        for name, values in self.last.metrics.items():
            metrics[f"eval/{name}"] = values.mean(-1)
        metrics["eval/seconds"] = seconds


class Checkpoint:
    """Writes the run state every so many steps or seconds, whichever is sooner, and at the end.

    If writing fails, it logs a warning and tries again at the next boundary; at the end of the run
    the failure is raised.

    **Arguments:** `directory`: for the files. `every`: lane-steps (per member). `seconds`: of wall
    time. `keep`: the number of newest files to keep; `None`: all. `with_env`: `False` if the
    environment lives outside JAX, so that its state cannot be saved (except by `wrappers.Exact`).
    """

    overlap = True

    def __init__(
        self,
        directory: Path,
        *,
        every: int,
        seconds: float = 600.0,
        keep: int | None = 2,
        with_env: bool = True,
    ):
        self._directory, self._with_env = directory, with_env
        self._every, self._seconds, self._keep = every, seconds, keep
        self._next_step = every
        self._saved_step: int | None = None
        self._saved_at = time.perf_counter()
        self._warned = False

    def __call__(self, run_state: AbstractRunState, metrics: Metrics) -> None:
        """Saves if it is due."""
        waited = time.perf_counter() - self._saved_at
        done = clock(metrics).done
        if metrics["done"] or done >= self._next_step or waited > self._seconds:
            try:
                self.save(run_state, done)
            except UsageError as error:
                passing = isinstance(error.__cause__, OSError)  # any other cause would persist
                if metrics["done"] or not passing:
                    raise
                if not self._warned:
                    self._warned = True
                    logger.warning("no checkpoint: %s; the run continues, and tries again", error)

    def rescue(self, run_state: AbstractRunState, metrics: Metrics) -> None:
        """Saves the last good run state of a failed run, unless it is saved already."""
        done = clock(metrics).done
        if done != self._saved_step:
            try:
                self.save(run_state, done)
            except UsageError as error:
                logger.warning("no checkpoint: %s", error)

    def save(self, run_state: AbstractRunState, step: int) -> Path:
        """Saves now."""
        if not self._with_env:
            run_state = without_env(run_state)
        path = save_checkpoint(self._directory, run_state, step, keep=self._keep)
        self._next_step = (step // self._every + 1) * self._every
        self._saved_at, self._saved_step = time.perf_counter(), step
        return path


def last_in_words(directory: Path) -> str:
    """Names the newest good checkpoint for a message; it may be older than the resumed run."""
    last = newest_checkpoint(directory)
    return f"the last good checkpoint is {last}" if last else "no checkpoint was due"


def restore(directory: Path, env: Env) -> AbstractRunState:
    """The run state of the newest good checkpoint, for `train` with the same `env`.

    For an environment outside JAX, an `Exact` one replays its episodes; any other starts new ones,
    and the log says so.

    **Raises:** `UsageError` if there is no good checkpoint, or episodes cannot be replayed.
    """
    run_state, path = load_latest(directory)
    run_state = with_env(run_state, env)
    logger.info("resuming from %s", path)
    return run_state


def without_env(run_state: AbstractRunState) -> AbstractRunState:
    """A run state without the parts that an environment outside JAX cannot save."""
    if not isinstance(run_state, RunState):
        return run_state
    return _with_outside_parts(run_state, (None, None, None))


def with_env(run_state: AbstractRunState, env: Env) -> AbstractRunState:
    """A saved run state, prepared to continue in `env`; see `restore`."""
    if not isinstance(run_state, RunState):
        return run_state
    if not env.on_host and run_state.timestep is not None:
        return run_state
    if isinstance(env, Exact):
        if not isinstance(run_state.env_state, Past):
            raise UsageError(
                "the run did not keep its actions, so episodes cannot be replayed: resume with "
                "exact_resume=false"
            )
        return dataclasses.replace(run_state, env_state=env.resume(run_state.env_state))
    logger.info("the emulators cannot be restored: they start new episodes")
    fresh = start(run_state.agent, env, key=run_state.key)
    return _with_outside_parts(run_state, _outside_parts(fresh))


def _outside_parts(run_state: Any) -> tuple[Any, Any, Any]:
    return run_state.env_state, run_state.timestep, run_state.memory


def _with_outside_parts(run_state: Any, parts: tuple[Any, Any, Any]) -> Any:
    return eqx.tree_at(_outside_parts, run_state, parts, is_leaf=lambda x: x is None)


class Video:
    """Records a GIF of a greedy episode, if the environment can draw.

    **Arguments:** `env`: for this alone, with one lane per member. `directory`: for the files.
    `tracker`: also gets the pictures. `every`: lane-steps between recordings; one more at the end.
    """

    overlap = True

    def __init__(
        self,
        env: Env,
        directory: Path,
        *,
        every: int,
        tracker: Tracker | None = None,
        max_steps: int = 1000,
        budget: TimeBudget | None = None,
    ):
        self.every = every
        self._env, self._directory, self._tracker = env, directory, tracker
        self._max_steps = max_steps
        self._failed = False
        self._budget = budget or TimeBudget(math.inf)

    def __call__(self, run_state: AbstractRunState, metrics: Metrics) -> None:
        """Records, unless it is over budget."""
        if self._failed or not (metrics["done"] or self._budget.affords("recording", guess=5.0)):
            return
        started = time.perf_counter()
        try:
            self._record(run_state, clock(metrics).done)
        except Exception:  # a failing renderer must not end the run
            logger.exception("recording an episode failed: the run continues without pictures")
            self._failed = True
        self._budget.charge("recording", time.perf_counter() - started)

    def _record(self, run_state: AbstractRunState, step: int) -> None:
        frames, _ = record_episode(
            run_state.agent, self._env, key=jax.random.key(step), max_steps=self._max_steps
        )
        if frames:
            path = self._directory / f"{step:012d}.gif"
            write_gif(path, frames)
            if self._tracker is not None:
                self._tracker.log_gif(path, step=step)


class Progress:
    """A bar with steps/s, return and time left; outside a terminal, a line every ten seconds.

    **Arguments:** `stream`: a text file, by default stderr.
    """

    overlap = True

    def __init__(self, stream: Any = None, seconds_between_lines: float = 10.0):
        self._display = Display(stream, seconds_between_lines)
        self._eval_return: float | None = None

    def __call__(self, run_state: AbstractRunState | None, metrics: Metrics) -> None:
        """Shows the progress of the run, read from the metrics alone."""
        if "eval/return" in metrics:
            self._eval_return = float(np.mean(metrics["eval/return"]))
        now = clock(metrics)
        unit, members = now.noun.removesuffix("s"), np.ndim(self._values(metrics))
        self._display(
            now.done,
            now.total,
            f"{unit} of each seed" if members else unit,
            self._state(metrics),
            self._line(metrics),
            last=metrics["done"],
        )

    def close(self) -> None:
        """Closes the bar and leaves it on the screen."""
        self._display.close()

    def _line(self, metrics: Metrics) -> str:
        now = clock(metrics)
        speed = float(np.sum(metrics[f"{now.noun}_per_second"]))
        sharing = np.size(metrics["episode_return"]) if now.unit == "env_steps" else 1
        left = (now.total - now.done) * sharing / max(speed, 1e-9)
        parts = [
            f"{now.done:,}/{now.total:,} {now.noun} ({now.done / now.total:.0%})",
            f"{speed:,.0f} {now.noun}/s",
            self._state(metrics),
            f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} left",
        ]
        return "  ".join(part for part in parts if part)

    def _state(self, metrics: Metrics) -> str:
        name = "return" if "episode_return" in metrics else "loss"
        values = self._values(metrics)
        parts = [] if np.isnan(values).all() else [f"{name} {np.nanmean(values):.4g}"]
        if self._eval_return is not None:
            parts.append(f"eval {self._eval_return:.4g}")
        return "  ".join(parts)

    def _values(self, metrics: Metrics) -> np.ndarray:
        """The values to show: returns of training, or the loss offline."""
        return np.asarray(metrics.get("episode_return", metrics.get("loss")), float)


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a clean end at the next boundary; a second one ends at once.

    SIGUSR1 also ends the run cleanly: it is the notice of preemption or of the time limit (Slurm's
    `--signal=USR1@300`).

    Use it as a context manager around `train`, and as one of its callbacks.

    **Arguments:** `place`: with several processes, theirs. A signal to one then stops all; each
    must have this callback.

    **Attributes:** `received`: whether a signal has come; `noticed`: whether it was SIGUSR1.
    """

    def __init__(self, place: Placement = OneDevice()):  # noqa: B008
        self.received = self.noticed = self._asked = False
        self._place = place
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        """Installs the signal handlers."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self, run_state: AbstractRunState, metrics: Metrics) -> None:
        """Ends the run if a signal has come."""
        told = self._place.largest(2 if self.noticed else int(self.received))
        self.received |= told > 0
        self.noticed |= told == 2
        if told:
            raise StopTraining

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self.noticed |= not self._asked
        elif self._asked:
            os._exit(128 + number)
        else:
            self._asked = True
        self.received = True
        print("\nstopping at the next boundary (once more to quit at once)", file=sys.stderr)
