"""Guards lanes of Python environments: detects failures, and stops or restarts the lane."""

import collections
import contextlib
import dataclasses
import logging
import math
import queue
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_args

import gymnasium
import numpy as np

from .. import spaces
from ..errors import LaneError, UsageError
from .options import OnError, require_choice, require_count

logger = logging.getLogger(__name__)

BROKEN = "eqx_q_broken"  # key in `info`
_WINDOW = 1000  # steps of a lane within which its restarts are counted

E = TypeVar("E")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Guard:
    """What to do when the environment of a lane fails.

    It fails if it raises, takes too long, or returns a non-finite number or an observation whose
    shape differs from its space's.

    **Attributes:**

    - `on_error`: `"stop"` raises `LaneError`; `"restart"` replaces that lane's environment by a new
        one with a new seed. Its episode has no end: the next timestep is simply a `first` one.
    - `timeout`: seconds that a step or a reset may take. Each then runs in a thread of the lane,
        which costs about 15 µs; `None`: no limit, and no thread.
    - `max_restarts`: of one lane within 1,000 of its steps. If it fails more often, `LaneError` is
        raised.
    - `finite`: whether observations must be finite.

    **Raises:** `UsageError` for invalid values.
    """

    on_error: str = "stop"
    timeout: float | None = None
    max_restarts: int = 10
    finite: bool = True

    def __post_init__(self):
        require_choice("on_error", self.on_error, get_args(OnError))
        require_count("max_restarts", self.max_restarts)
        limit = self.timeout
        if limit is not None and not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
            raise UsageError(f"timeout={limit!r}: give a number of seconds above 0, or null")

    @property
    def leaves_lanes_alone(self) -> bool:
        """Whether no lane needs individual treatment."""
        return self.on_error == "stop" and self.timeout is None


class Unfit(ValueError):
    """An environment returned an invalid observation or reward."""


class _Late(TimeoutError):
    """A call did not return in time."""


class Restarted(NamedTuple):
    """The result of a new environment's reset, and why the old one failed."""

    fresh: Any
    reason: str


class Guarded(Generic[E]):
    """The environment of one lane, under a `Guard`.

    **Arguments:** `create`: makes the environment. `lane`: its number.
    """

    def __init__(self, create: Callable[[], E], lane: int, guard: Guard):
        self.env = create()
        self._create, self._lane, self.guard = create, lane, guard
        self._seed, self._hangs = lane, False
        self._steps, self._num_restarts = 0, 0
        self._restarted_at: collections.deque[int] = collections.deque(maxlen=guard.max_restarts)
        self._thread = None if guard.timeout is None else _Thread()

    def reset(
        self, reset: Callable[[E, int | None], Result], seed: int | None
    ) -> Result | Restarted:
        """Resets with the seed; if that fails, restarts with new seeds."""
        if seed is not None:
            self._seed = seed
        try:
            return self._within_time(lambda: reset(self.env, seed))
        except (Exception, SystemExit) as error:
            return self._restart(error, reset)

    def step(
        self, step: Callable[[E], Result], reset: Callable[[E, int | None], Any]
    ) -> Result | Restarted:
        """The result of a step; if it fails, that of a restart."""
        self._steps += 1
        try:
            return self._within_time(lambda: step(self.env))
        except (Exception, SystemExit) as error:
            return self._restart(error, reset)

    def close(self) -> None:
        """Closes the environment, unless it hangs."""
        if not self._hangs:
            self._within_time(lambda: self.env.close())  # pyright: ignore[reportAttributeAccessIssue]
        if self._thread is not None:
            self._thread.end()

    def _within_time(self, function: Callable[[], Result]) -> Result:
        if self._thread is None:
            return function()
        try:
            return self._thread.run(function, self.guard.timeout)
        except _Late:
            self._hangs = True
            raise

    def _restart(self, error: BaseException, reset: Callable[[E, int | None], Any]) -> Restarted:
        """Restarts the environment until a reset succeeds."""
        reason = _in_words(error)
        while True:
            self._give_up_or_count(error)
            with contextlib.suppress(Exception, SystemExit):  # it has failed anyway
                self.close()
            if self._thread is not None:
                self._thread, self._hangs = _Thread(), False  # the old one may hang
            (seed,) = np.random.SeedSequence([self._seed, self._num_restarts]).generate_state(1)
            try:
                self.env = self._within_time(self._create)
                fresh = self._within_time(lambda: reset(self.env, int(seed) >> 1))  # noqa: B023
                return Restarted(fresh, reason)
            except (Exception, SystemExit) as another:
                error = another

    def _give_up_or_count(self, error: BaseException) -> None:
        message = f"the environment of lane {self._lane} failed: {_in_words(error)}"
        if self.guard.on_error == "stop":
            raise LaneError(
                f"{message}; set on_error=restart (in a run: on_env_error=restart) to restart it"
            ) from error
        recent = self._restarted_at
        if len(recent) == recent.maxlen and self._steps - recent[0] < _WINDOW:
            raise LaneError(
                f"{message}; it was restarted {len(recent)} times in {_WINDOW} steps"
            ) from error
        recent.append(self._steps)
        self._num_restarts += 1


class GuardedEnv(gymnasium.Wrapper):
    """A Gymnasium environment under a `Guard`. After a restart, `info[BROKEN]` says why.

    **Arguments:** `leave_out`: entries of its observations that are neither seen nor checked.
    """

    def __init__(
        self,
        create: Callable[[], gymnasium.Env],
        lane: int,
        guard: Guard,
        leave_out: tuple[str, ...],
    ):
        self._guarded = Guarded(create, lane, guard)
        super().__init__(self._guarded.env)
        self._seen = spaces.without(self.env.observation_space, leave_out)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        told = self._guarded.reset(self._reset, seed)
        if not isinstance(told, Restarted):
            return told
        self.env = self._guarded.env
        obs, info = told.fresh
        return obs, {**info, BROKEN: told.reason}

    def close(self) -> None:
        self._guarded.close()

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        told = self._guarded.step(lambda env: self._step(env, action), self._reset)
        if not isinstance(told, Restarted):
            return told
        self.env = self._guarded.env
        obs, info = told.fresh
        return obs, 0.0, False, False, {**info, BROKEN: told.reason}

    def _reset(self, env: gymnasium.Env, seed: int | None) -> tuple[Any, dict[str, Any]]:
        obs, info = env.reset(seed=seed)
        check(self._seen, obs, finite=self._guarded.guard.finite)
        return obs, info

    def _step(self, env: gymnasium.Env, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = env.step(action)
        check(self._seen, obs, finite=self._guarded.guard.finite)
        check_reward(reward)
        return obs, reward, bool(terminated), bool(truncated), info


def check(space: gymnasium.Space, obs: Any, path: str = "", *, finite: bool = True) -> None:
    """Raises `Unfit` if an observation has another shape, or is not `finite` as `float32`."""
    if isinstance(space, gymnasium.spaces.Dict):
        for name, part in space.items():
            check(part, obs[name], f"{path}.{name}" if path else name, finite=finite)
    elif isinstance(space, gymnasium.spaces.Tuple):
        for index, part in enumerate(space):
            check(part, obs[index], f"{path}.{index}" if path else str(index), finite=finite)
    elif space.shape is not None:
        x, where = np.asarray(obs), f" at '{path}'" if path else ""
        if x.shape != space.shape:
            raise Unfit(
                f"an observation has shape {x.shape}{where}, but its space has shape {space.shape}"
            )
        if finite and not _is_finite(x):
            raise Unfit(f"an observation is not finite{where}")


def check_reward(reward: Any) -> None:
    """Raises `Unfit` if `reward` is not a finite number."""
    if not _is_finite(np.asarray(reward, float)):
        raise Unfit(f"the reward is {reward}")


def _is_finite(x: np.ndarray) -> bool:
    if x.dtype.kind != "f":
        return True
    with np.errstate(over="ignore"):
        return bool(np.isfinite(x.astype(np.float32, copy=False)).all())


def report_restart(lane: int, reason: str) -> None:
    """Logs that a lane was restarted."""
    logger.warning("restarted the environment of lane %s: %s", lane, reason)


def _in_words(error: BaseException) -> str:
    """An error, with file and line of the code that raised it, in one line."""
    if isinstance(error, (Unfit, _Late)):
        return str(error)
    what = " ".join(f"{type(error).__name__}: {error}".split())
    frames = [x for x in traceback.extract_tb(error.__traceback__) if x.filename != __file__]
    own = [x for x in frames if "site-packages" not in x.filename]
    last = next(reversed(own or frames), None)
    return what if last is None else f"{what} ({Path(last.filename).name}:{last.lineno})"


class _Thread:
    """A thread that runs functions one at a time; a caller can give up on one that hangs."""

    def __init__(self):
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._answered: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="lane").start()

    def run(self, function: Callable[[], Result], timeout: float | None) -> Result:
        """Returns or raises what the function does. Raises `_Late` if that takes too long."""
        self._asked.put(function)
        try:
            result, error = self._answered.get(timeout=timeout)
        except queue.Empty:
            raise _Late(f"no answer within {timeout:g} s") from None
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """Lets the thread end as soon as it is free."""
        self._asked.put(None)

    def _work(self) -> None:
        while (function := self._asked.get()) is not None:
            try:
                answer = function(), None
            except BaseException as error:
                answer = None, error
            self._answered.put(answer)
            del function, answer
