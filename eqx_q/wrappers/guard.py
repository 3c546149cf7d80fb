"""Python environments that break: which lane it was, and what becomes of it."""

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

BROKEN = "eqx_q_broken"  # in `info`
_WINDOW = 1000  # steps of a lane in which its restarts are counted

E = TypeVar("E")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Guard:
    """What to do where the environment of a lane breaks.

    It breaks where it raises, takes too long, or returns a number that is not finite or an
    observation of another shape than its space's.

    **Attributes:**

    - `on_error`: `"stop"` raises `LaneError`; `"restart"` makes that lane's environment anew, with
        a new seed. Its broken episode ends without an end: the next timestep is a `first` one.
    - `timeout`: seconds that a step or a reset may take. Each then runs in a thread of the lane's,
        which costs about 15 µs; `None`: no limit, and no thread.
    - `max_restarts`: of one lane in 1,000 of its steps. Where it breaks more often, `LaneError` is
        raised.

    **Raises:** `UsageError` for other values.
    """

    on_error: str = "stop"
    timeout: float | None = None
    max_restarts: int = 10

    def __post_init__(self):
        require_choice("on_error", self.on_error, get_args(OnError))
        require_count("max_restarts", self.max_restarts)
        limit = self.timeout
        if limit is not None and not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
            raise UsageError(f"timeout is {limit!r}: give a number of seconds above 0, or null")

    @property
    def leaves_lanes_alone(self) -> bool:
        """Whether nothing must be done to a single lane."""
        return self.on_error == "stop" and self.timeout is None


class Unfit(ValueError):
    """An environment returned what nothing can be learnt from."""


class _Late(TimeoutError):
    """It did not return in time."""


class Restarted(NamedTuple):
    """What the reset of a new environment gave, and what had happened to the old one."""

    fresh: Any
    reason: str


class Guarded(Generic[E]):
    """The environment of one lane, under a `Guard`.

    **Arguments:** `create`: makes the environment. `lane`: its number.
    """

    def __init__(self, create: Callable[[], E], lane: int, guard: Guard):
        self.env = create()
        self._create, self._lane, self._guard = create, lane, guard
        self._seed = lane
        self._steps, self._num_restarts = 0, 0
        self._restarted_at: collections.deque[int] = collections.deque(maxlen=guard.max_restarts)
        self._thread = None if guard.timeout is None else _Thread()

    def reset(self, reset: Callable[[E, int | None], Result], seed: int | None) -> Result:
        """What a reset gives, with that seed; where it breaks, with new ones."""
        if seed is not None:
            self._seed = seed
        try:
            return self._within_time(lambda: reset(self.env, seed))
        except Exception as error:
            return self._restart(error, reset).fresh

    def step(
        self, step: Callable[[E], Result], reset: Callable[[E, int | None], Any]
    ) -> Result | Restarted:
        """What a step gives; where it breaks, what a reset gives."""
        self._steps += 1
        try:
            return self._within_time(lambda: step(self.env))
        except Exception as error:
            return self._restart(error, reset)

    def _within_time(self, function: Callable[[], Result]) -> Result:
        if self._thread is None:
            return function()
        return self._thread.run(function, self._guard.timeout)

    def _restart(self, error: Exception, reset: Callable[[E, int | None], Any]) -> Restarted:
        """What the first reset gives that does not break."""
        reason = _in_words(error)
        while True:
            self._give_up_or_count(error)
            if isinstance(error, _Late):
                self._thread = _Thread()  # the other one is still busy with it
            else:
                with contextlib.suppress(Exception):  # it is broken
                    self.env.close()  # pyright: ignore[reportAttributeAccessIssue]
            (seed,) = np.random.SeedSequence([self._seed, self._num_restarts]).generate_state(1)
            try:
                self.env = self._create()
                fresh = self._within_time(lambda: reset(self.env, int(seed) >> 1))  # noqa: B023
                return Restarted(fresh, reason)
            except Exception as another:
                error = another

    def _give_up_or_count(self, error: Exception) -> None:
        message = f"the environment of lane {self._lane} broke: {_in_words(error)}"
        if self._guard.on_error == "stop":
            raise LaneError(message) from error
        recent = self._restarted_at
        if len(recent) == recent.maxlen and self._steps - recent[0] < _WINDOW:
            raise LaneError(
                f"{message}; it was restarted {len(recent)} times in {_WINDOW} steps"
            ) from error
        recent.append(self._steps)
        self._num_restarts += 1


class GuardedEnv(gymnasium.Wrapper):
    """A Gymnasium environment under a `Guard`. Where it was restarted, `info[BROKEN]` says why.

    **Arguments:** `leave_out`: entries of its observations that are not seen, nor checked.
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
        fresh = self._guarded.reset(self._reset, seed)
        self.env = self._guarded.env
        return fresh

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        told = self._guarded.step(lambda env: self._step(env, action), self._reset)
        if not isinstance(told, Restarted):
            return told
        self.env = self._guarded.env
        obs, info = told.fresh
        return obs, 0.0, False, False, {**info, BROKEN: told.reason}

    def _reset(self, env: gymnasium.Env, seed: int | None) -> tuple[Any, dict[str, Any]]:
        obs, info = env.reset(seed=seed)
        check(self._seen, obs)
        return obs, info

    def _step(self, env: gymnasium.Env, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = env.step(action)
        obs, reward, *_ = result
        check(self._seen, obs)
        check_reward(reward)
        return result


def check(space: gymnasium.Space, obs: Any, path: str = "") -> None:
    """Raises `Unfit` where an observation is of another shape, or not finite."""
    if isinstance(space, gymnasium.spaces.Dict):
        for name, part in space.items():
            check(part, obs[name], f"{path}.{name}" if path else name)
    elif isinstance(space, gymnasium.spaces.Tuple):
        for index, part in enumerate(space):
            check(part, obs[index], f"{path}.{index}" if path else str(index))
    elif space.shape is not None:
        x, where = np.asarray(obs), f" at '{path}'" if path else ""
        if x.shape != space.shape:
            raise Unfit(
                f"an observation has shape {x.shape}{where}, but its space says {space.shape}"
            )
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise Unfit(f"an observation is not finite{where}")


def check_reward(reward: Any) -> None:
    """Raises `Unfit` where it is no finite number."""
    if not math.isfinite(reward):
        raise Unfit(f"the reward is {reward}")


def report_restart(lane: int, reason: str) -> None:
    """Tells the log that a lane was restarted."""
    logger.warning("the environment of lane %s was made anew: %s", lane, reason)


def _in_words(error: Exception) -> str:
    """An error, and where in whose code it was raised, in one line."""
    if isinstance(error, (Unfit, _Late)):
        return str(error)
    what = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    last = next((x for x in reversed(frames) if x.filename != __file__), None)
    return what if last is None else f"{what} ({Path(last.filename).name}:{last.lineno})"


class _Thread:
    """A thread that runs functions one at a time; whoever waits too long for one may leave it."""

    def __init__(self):
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._answered: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="lane").start()

    def run(self, function: Callable[[], Result], timeout: float | None) -> Result:
        """What the function returns or raises. Raises `_Late` where it does neither in time."""
        self._asked.put(function)
        try:
            result, error = self._answered.get(timeout=timeout)
        except queue.Empty:
            self._asked.put(None)  # which ends the thread, should the function ever return
            raise _Late(f"no answer within {timeout:g} s") from None
        if error is not None:
            raise error
        return result

    def _work(self) -> None:
        while (function := self._asked.get()) is not None:
            try:
                answer = function(), None
            except Exception as error:
                answer = None, error
            self._answered.put(answer)
