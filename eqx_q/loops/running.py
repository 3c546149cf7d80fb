"""Training on the host: cuts a run into chunks, calls callbacks, keeps a history."""

import concurrent.futures
import contextlib
import functools
import math
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..clock import clock
from ..errors import DivergedError, check_whole
from ..sharding import Placement
from .source import AbstractSource, State, advance_chunk

Metrics = dict[str, Any]

# A chunk is long enough to hide the host's work, and short enough to watch and to interrupt.
_CHUNK_SECONDS = 1.0
_MIN_CHUNKS = 100
_MAX_HISTORY = 1000


class StopTraining(Exception):
    """Raised by a callback to end the run at this boundary; `train` then returns normally."""


@runtime_checkable
class Callback(Protocol):
    """Called at boundaries between chunks, with the metrics since the last one as host values.

    A plain function is enough. Objects may have three more attributes:

    - `every`: lane-steps (per member) between calls; chunks are cut at its multiples.
    - `rescue(run_state, metrics)`: called with those of the previous boundary if a chunk fails for
        an external reason (an environment failed, memory ran out), before the error is raised.
    - `overlap`: `True` for a callback that only observes. It then runs on a snapshot, during the
        next chunk, and its return value is ignored.

    It may add entries to `metrics` for the callbacks after it, return another run state to
    continue with, or raise `StopTraining`.
    """

    def __call__(self, run_state: Any, metrics: Metrics) -> Any: ...


def run(
    state: State,
    source_of: Callable[[State, int], tuple[State, AbstractSource[State]]],
    boundaries: "Boundaries",
    tell: Callable[[State, "Boundaries", float], Metrics],
    place: Placement,
) -> tuple[State, list[Metrics]]:
    """Runs chunk after chunk; the host works on one chunk while the next is running.

    **Arguments:**

    - `state`: the initial state.
    - `source_of`: returns the state and the source to continue with, given the updates so far.
    - `boundaries`: where to cut the run into chunks.
    - `tell`: returns progress metrics, given the state, boundaries and updates per second.
    - `place`: the devices that share the work.
    """

    def advance(state: State, length: int) -> tuple[State, dict[str, jax.Array]]:
        state, source = source_of(state, boundaries.done)
        return advance_chunk((source, place), state, jnp.asarray(length))

    history = History(state.agent.num_members)
    good, state = state, copy(state.spread(place.put))  # the caller's state stays usable
    started = time.perf_counter()
    state, _ = jax.block_until_ready(advance(state, 0))
    times = {"compile_seconds": time.perf_counter() - started, "train_seconds": 0.0}
    stopped = False
    rescuing = _Rescue(boundaries.callbacks)
    with rescuing, concurrent.futures.ThreadPoolExecutor(1) as waiter:
        while not (stopped or boundaries.finished):
            length = place.agreed(boundaries.next_length())
            dispatched = time.perf_counter()
            state, on_device = advance(state, length)
            ready = waiter.submit(_time_when_ready, on_device)
            stopped = bool(place.agreed(rescuing.observe()))
            seconds = ready.result() - dispatched
            times["train_seconds"] += seconds
            times["wall_seconds"] = time.perf_counter() - started
            due = boundaries.advance(length, seconds)
            # Callbacks get a copy, since the next chunk reuses the original's memory.
            snapshot = place.gather(state)
            if snapshot is state and boundaries.callbacks:
                snapshot = copy(state)
            metrics = _to_host(place.gather(on_device)) | times
            metrics |= tell(snapshot, boundaries, length / seconds)
            metrics["done"] = stopped or boundaries.finished
            _check_finite(metrics, good)
            seen, stopped_here = _call(_blocking(due), snapshot, metrics)
            if place.agreed(seen is not snapshot):
                state = copy(place.from_first(seen).spread(place.put))
            stopped |= bool(place.agreed(stopped_here))
            metrics["done"] = stopped or boundaries.finished
            history.append(metrics)
            good = seen if boundaries.callbacks else None  # without callbacks its memory is reused
            rescuing.last = good, metrics
            observers = _observers(boundaries.callbacks if stopped else due)
            rescuing.pending = functools.partial(_observe, observers, seen, metrics)
        rescuing.observe()
    return state, history.rows


class _Rescue:
    """Calls the callbacks' `rescue` with the last boundary if the block inside fails."""

    def __init__(self, callbacks: list[Callback]):
        self._callbacks = callbacks
        self.last: tuple[Any, Metrics] | None = None
        self.pending: Callable[[], bool] | None = None  # the observers' work for that boundary

    def observe(self) -> bool:
        """Runs the observers' pending work; returns whether one of them stopped the run."""
        pending, self.pending = self.pending, None
        return pending is not None and pending()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.last is None or kind is None or not issubclass(kind, jax.errors.JaxRuntimeError):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # an evaluation may fail, too
            self.observe()
        for callback in self._callbacks:
            if rescue := getattr(callback, "rescue", None):
                rescue(*self.last)


@eqx.filter_jit
def copy(tree: PyTree) -> PyTree:
    """A copy with arrays of its own, which can be donated."""
    return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, tree)


def _blocking(callbacks: list[Callback]) -> list[Callback]:
    return [c for c in callbacks if not getattr(c, "overlap", False)]


def _observers(callbacks: list[Callback]) -> list[Callback]:
    return [c for c in callbacks if getattr(c, "overlap", False)]


def _observe(callbacks, run_state, metrics) -> bool:
    return _call(callbacks, run_state, metrics)[1]


def _call(callbacks, run_state, metrics) -> tuple[Any, bool]:
    """Calls callbacks in turn; returns the run state, and whether one of them stopped the run."""
    stopped = False
    for callback in callbacks:
        try:
            replaced = callback(run_state, metrics)
        except StopTraining:
            stopped = True
            continue
        if replaced is not None:
            run_state = replaced
    return run_state, stopped


def _time_when_ready(tree) -> float:
    jax.block_until_ready(tree)
    return time.perf_counter()


def number(x: np.ndarray) -> float | int | np.ndarray:
    """Converts an array of no dimensions to a Python number."""
    return x.item() if x.ndim == 0 else x


def _to_host(metrics) -> Metrics:
    return {name: number(x) for name, x in jax.device_get(metrics).items()}


def _check_finite(metrics: Metrics, good: Any = None) -> None:
    # Also the gradient: the last one of a chunk spoils the parameters before any loss shows it.
    finite = np.isfinite(metrics.get("loss", 0.0)) & np.isfinite(metrics.get("grad_norm", 0.0))
    if not np.any(finite):
        now = clock(metrics)
        raise DivergedError(
            f"the loss is not finite after {now.done} {now.noun}: lower learning_rate or "
            "max_grad_norm, or scale rewards down (reward_scale)",
            good,
        )


class Boundaries:
    """Cuts a run into chunks, and determines which callbacks are due at each cut.

    **Arguments:**

    - `done`, `end`: updates so far, and in total.
    - `steps_per_update`: steps per update, in the unit of the callbacks' `every`.
    - `callbacks`: see `Callback`.
    - `log_every`: updates in a chunk; `None`: as many as take about a second.
    - `period`: cut at multiples of this number of updates.

    **Raises:** `UsageError` for an invalid `log_every`.
    """

    def __init__(self, *, done, end, steps_per_update, callbacks, log_every, period=None):
        if log_every is not None:
            check_whole(log_every=log_every)
        self.done, self.end = done, end
        self.steps_per_update = steps_per_update
        self.callbacks: list[Callback] = list(callbacks)
        self.log_every = log_every
        self._periods = [period, *map(self._period, self.callbacks)]
        self._target = 1.0

    @property
    def finished(self) -> bool:
        """Whether the end is reached."""
        return self.done >= self.end

    def next_length(self) -> int:
        """Updates in the next chunk."""
        length = self.log_every or min(int(self._target), max(1, self.end // _MIN_CHUNKS))
        nearest = [period - self.done % period for period in self._periods if period]
        return max(1, min([length, self.end - self.done, *nearest]))

    def advance(self, length: int, seconds: float) -> list[Callback]:
        """Counts a finished chunk; returns the callbacks that are due."""
        self.done += length
        self._target = _CHUNK_SECONDS * length / max(seconds, 1e-9)
        return [c for c in self.callbacks if self._due(c)]

    def _due(self, callback: Callback) -> bool:
        period = self._period(callback)
        return not period or self.finished or not self.done % period

    def _period(self, callback: Callback) -> int | None:
        """Updates between calls."""
        every = getattr(callback, "every", None)
        return math.ceil(every / self.steps_per_update) if every else None


class History:
    """Rows of metrics, thinned out evenly so that a long run keeps no more than a short one.

    Distributions are left out; the last row is always kept.
    """

    def __init__(self, num_members: int | None = None):
        self._scalar_axes = 0 if num_members is None else 1
        self._rows: list[Metrics] = []
        self._stride, self._seen = 1, 0
        self._last: Metrics | None = None

    @property
    def rows(self) -> list[Metrics]:
        """The rows in order."""
        if self._last is None or self._rows[-1] is self._last:
            return self._rows
        return [*self._rows, self._last]

    def append(self, metrics: Metrics) -> None:
        row = {name: x for name, x in metrics.items() if np.ndim(x) <= self._scalar_axes}
        if self._seen % self._stride == 0:
            self._rows.append(row)
        self._seen += 1
        self._last = row
        if len(self._rows) >= _MAX_HISTORY:
            self._rows = self._rows[::2]
            self._stride *= 2
