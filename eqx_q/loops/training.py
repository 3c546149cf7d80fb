"""The training loop: one compiled program over an agent and an environment."""

import concurrent.futures
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, UInt

from ..agents import OnlineAgent, decide
from ..clock import clock
from ..errors import DivergedError, UsageError
from ..sharding import (
    Lay,
    Spreadable,
    agreed,
    check_divides,
    constrain,
    from_first_process,
    gather,
    make_mesh,
    put,
)
from ..types import Memory, Rollout, Scalar, TimeStep
from ..wrappers import Env

Metrics = dict[str, Any]
State = TypeVar("State", bound=Spreadable)

# A chunk is long enough to hide the host's work, short enough to watch and to interrupt.
_CHUNK_SECONDS = 1.0
_MIN_CHUNKS = 100
_MAX_HISTORY = 1000
_MAX_STEPS = 2**32  # counted in uint32


class RunState(eqx.Module):
    """All of a run: save it and the run can go on, bit for bit.

    **Fields:** the `agent`; the environment's state and last timestep; the agent's `memory` of the
    running episodes; the `key` of all randomness to come; `num_updates` so far, and how many
    `transitions` really happened (`[S]` in a population); `burn_in`: the last steps of the rollout
    before, with the memory at their start, where the agent asks for them.
    """

    agent: OnlineAgent
    env_state: PyTree
    timestep: TimeStep
    memory: Memory
    key: PRNGKeyArray
    num_updates: Int[Array, ""]
    transitions: UInt[Array, "*S"]
    burn_in: Rollout | None = None

    def spread(self, lay: Lay) -> "RunState":
        """See `eqx_q.sharding.Spreadable`: devices share lanes, and with them members."""
        of_members = None if self.agent.num_members is None else 0
        before, burn_in = self.burn_in, None
        if before is not None:
            timesteps, actions, values = lay((before.timesteps, before.actions, before.values), 1)
            burn_in = Rollout(timesteps, actions, lay(before.memory, 0), values)
        return RunState(
            agent=lay(self.agent, of_members),
            env_state=lay(self.env_state, 0),
            timestep=lay(self.timestep, 0),
            memory=lay(self.memory, 0),
            key=lay(self.key, None),
            num_updates=lay(self.num_updates, None),
            transitions=lay(self.transitions, of_members),
            burn_in=burn_in,
        )


class StopTraining(Exception):
    """Raised by a callback to end the run at this boundary; `train` then returns normally."""


@runtime_checkable
class Callback(Protocol):
    """Called at boundaries between chunks, with host values of what happened since the last one.

    A plain function will do. Objects may have two more attributes:

    - `every`: lane-steps (per member) between calls; chunks are cut at its multiples.
    - `overlap`: `True` for a callback that only observes. It then runs while the next chunk does,
        on a snapshot, and what it returns is ignored.

    It may add entries to `metrics` for the callbacks after it, return another run state to go on
    with, or raise `StopTraining`.
    """

    def __call__(self, run_state: Any, metrics: Metrics) -> Any: ...


def start(agent: OnlineAgent, env: Env, *, key: PRNGKeyArray) -> RunState:
    """A run's first state: environments reset, memory empty.

    **Raises:** `UsageError` where the agent learns from data, or where its spaces and those of the
    environment differ.
    """
    if not hasattr(agent, "rollout_length"):
        name = type(getattr(agent, "members", agent)).__name__
        raise UsageError(
            f"{name} learns from data, not from environments: use eqx_q.train_offline, or an agent "
            "that learns online (eqx_q.PQN)"
        )
    for name in ("observation_space", "action_space", "num_agents"):
        ours, theirs = getattr(agent, name), getattr(env, name)
        if ours != theirs:
            raise UsageError(
                f"the agent's {name} is {ours}, the environment's {theirs}: "
                f"create the agent with env.{name}"
            )
    if env.num_envs % (agent.num_members or 1):
        raise UsageError(
            f"{env.num_envs} lanes do not divide over {agent.num_members} members: "
            "make the environment with members x lanes"
        )
    reset_key, key = jax.random.split(key)
    env_state, timestep = env.reset(reset_key)
    memory = agent.initial_memory(env.num_envs)
    return RunState(
        agent=agent,
        env_state=env_state,
        timestep=timestep,
        memory=memory,
        key=key,
        num_updates=jnp.zeros((), jnp.int32),
        transitions=jnp.zeros(agent.env_steps.shape, jnp.uint32),
        burn_in=_empty_burn_in(agent, timestep, memory),
    )


def check_shares(mesh: Mesh | None, agent: OnlineAgent, env: Env) -> None:
    """Raises `UsageError` where the devices cannot share the agent's work, or the environment."""
    if agent.num_members is None:
        check_divides(mesh, agent.lane_groups, "lane_groups")
    else:
        check_divides(mesh, agent.num_members, "members (num_seeds)")
    made_for = getattr(env, "mesh", None)
    if env.on_host and made_for != mesh:
        raise UsageError(
            "this environment lives outside JAX, where every device needs its own, and was made "
            f"for {made_for.size if made_for else 1} of them, not {mesh.size if mesh else 1}: "
            "make it with eqx_q.wrappers.make_for"
        )


def _empty_burn_in(agent: OnlineAgent, timestep: TimeStep, memory: Memory) -> Rollout | None:
    """Steps that never happened: each starts an episode, so that memory stays as at a start."""
    if not agent.burn_in:
        return None
    decision = decide(agent, timestep, memory)
    timesteps, actions, values = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (agent.burn_in, *x.shape)),
        (timestep, decision.action, decision.value),
    )
    return Rollout(timesteps, actions, memory, values)


def advance(
    run_state: RunState, env: Env, num_updates: int | Int[Array, ""]
) -> tuple[RunState, dict[str, Array]]:
    """The pure core of `train`: `num_updates` times act for a rollout, then learn from it.

    **Arguments:** `num_updates` may be traced: one compiled program serves every length.

    **Returns:** the new state, and metrics: the agent's, averaged over updates; `episodes` that
    ended, their mean `episode_return` and `episode_length` (NaN where none ended) and the suite's
    own `episode_*`; `q_values`, the greedy values over lanes at the last step.
    """
    arrays, rest = eqx.partition(run_state, eqx.is_array)  # somebody's network may hold functions

    @jax.jit  # traced once for the shapes below and for the loop
    def update(arrays):
        run_state, metrics = _update(eqx.combine(arrays, rest), env)
        return eqx.filter(run_state, eqx.is_array), metrics

    _, shapes = jax.eval_shape(update, arrays)
    totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(_, carry):
        arrays, totals = carry
        arrays, new = update(arrays)
        return arrays, _accumulate(totals, new)

    arrays, totals = jax.lax.fori_loop(0, num_updates, body, (arrays, totals))
    return eqx.combine(arrays, rest), _average(totals, num_updates)


def _update(run_state: RunState, env: Env) -> tuple[RunState, dict[str, dict[str, Array]]]:
    """One rollout and one update."""
    key, act_key, update_key = jax.random.split(run_state.key, 3)
    carry, rollout, burn_in = _collect(run_state, env, act_key)
    agent, learnt = run_state.agent.update(
        _joined(run_state.burn_in, rollout) if run_state.burn_in else rollout, key=update_key
    )
    metrics = {"means": learnt, **agent.measure(_measure, rollout)}
    transitions = agent.measure(lambda r: jnp.sum(r.real, dtype=jnp.uint32), rollout)
    env_state, timestep, memory = carry
    run_state = RunState(
        agent=agent,
        env_state=env_state,
        timestep=timestep,
        memory=memory,
        key=key,
        num_updates=run_state.num_updates + 1,
        transitions=run_state.transitions + transitions,
        burn_in=burn_in,
    )
    return run_state, metrics


def _collect(
    run_state: RunState, env: Env, key: PRNGKeyArray
) -> tuple[tuple[PyTree, TimeStep, Memory], Rollout, Rollout | None]:
    """Where the environment and the memory stand after a rollout, it, and the next burn-in."""
    agent = run_state.agent
    length, overlap = agent.rollout_length, agent.burn_in

    def step(carry, step):
        env_state, timestep, memory, kept = carry
        index, key = step
        if overlap:
            starts = index == length - overlap
            kept = jax.tree.map(lambda new, old: jnp.where(starts, new, old), memory, kept)
        act_key, env_key = jax.random.split(key)
        decision = decide(agent, timestep, memory, key=act_key)
        env_state, next_timestep = env.step(env_state, decision.action, env_key)
        carry = (env_state, next_timestep, decision.memory, kept)
        return carry, (timestep, decision.action, decision.value)

    memory = run_state.memory
    (env_state, timestep, memory_after, kept), steps = jax.lax.scan(
        step,
        (run_state.env_state, run_state.timestep, memory, memory),
        (jnp.arange(length), jax.random.split(key, length)),
    )
    timesteps, actions, values = steps
    burn_in = None
    if overlap:
        timesteps_there, actions_there, values_there = jax.tree.map(lambda x: x[-overlap:], steps)
        burn_in = Rollout(timesteps_there, actions_there, kept, values_there)
    timesteps = jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), timesteps, timestep)
    rollout = Rollout(timesteps, actions, memory, values)
    return (env_state, timestep, memory_after), rollout, burn_in


def _joined(before: Rollout, after: Rollout) -> Rollout:
    """Two rollouts as one; the first without the timestep that the second starts with."""
    timesteps, actions, values = (
        jax.tree.map(lambda *x: jnp.concatenate(x), getattr(before, name), getattr(after, name))
        for name in ("timesteps", "actions", "values")
    )
    return Rollout(timesteps, actions, before.memory, values)


def _measure(rollout: Rollout) -> dict[str, dict[str, Array]]:
    """What a rollout says of the environment: `sums` to add, `samples` to keep the last of."""
    episode = jax.tree.map(lambda x: x[1:], rollout.timesteps.episode)

    def over_ended(x):
        return jnp.sum(jnp.where(episode.ended, x, 0), dtype=jnp.float32)

    sums = {
        "episodes": over_ended(1),
        "episode_return": over_ended(episode.returns),
        "episode_length": over_ended(episode.length),
    }
    sums |= {f"episode_{name}": over_ended(x) for name, x in episode.metrics.items()}
    samples = {} if rollout.values is None else {"q_values": rollout.values[-1].reshape(-1)}
    return {"sums": sums, "samples": samples}


def _accumulate(totals, new):
    return {
        "means": jax.tree.map(jnp.add, totals["means"], new["means"]),
        "sums": jax.tree.map(jnp.add, totals["sums"], new["sums"]),
        "samples": new["samples"],
    }


def _average(totals, num_updates) -> dict[str, Array]:
    count = jnp.maximum(num_updates, 1)
    metrics = {name: total / count for name, total in totals["means"].items()}
    for name, total in totals["sums"].items():
        per_episode = name.startswith("episode_")
        metrics[name] = total / totals["sums"]["episodes"] if per_episode else total
    return metrics | totals["samples"]


@eqx.filter_jit(donate="all-except-first")
def _advance_chunk(fixed, run_state, num_updates):
    env, mesh = fixed
    lay = functools.partial(constrain, mesh)
    run_state, metrics = advance(run_state.spread(lay), env, num_updates)
    return _strong(run_state.spread(lay)), metrics


def _strong(tree: PyTree) -> PyTree:
    """No array is weakly typed, as an environment's may be: the next chunk would compile anew."""
    strong = lambda x: jax.lax.convert_element_type(x, x.dtype) if eqx.is_array(x) else x  # noqa: E731
    return jax.tree.map(strong, tree)


@eqx.filter_jit
def copy(tree: PyTree) -> PyTree:
    """A tree whose arrays are its own, to be donated."""
    return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, tree)


def train(
    agent: OnlineAgent,
    env: Env,
    *,
    total_steps: Scalar,
    key: PRNGKeyArray,
    callbacks: Iterable[Callback] = (),
    run_state: RunState | None = None,
    log_every: int | None = None,
    devices: int | None = 1,
) -> tuple[OnlineAgent, list[Metrics]]:
    """Trains `agent` in `env`.

    **Arguments:**

    - `total_steps`: lane-steps, per member of a population; rounded up to whole updates.
    - `key`: of all randomness. The caller's `agent` stays usable: the run works on a copy.
    - `callbacks`: see `Callback`.
    - `run_state`: go on from there (`agent` and `key` are then ignored) until `total_steps` in all.
    - `log_every`: updates in a chunk; by default as many as take about a second. Where a run is
        cut into chunks changes nothing in its result.
    - `devices`: that share the members of a population, or the lanes of one agent, whose
        `lane_groups` they must divide; `None`: all there are. How many they are changes the result
        by rounding alone. Callbacks see all of the run state on one device. Of several processes
        each calls its own callbacks, and goes on as those of the first one say.

    **Returns:** the trained agent, and `history`: the metrics of each boundary, without
    distributions (thinned out evenly beyond 1000 of them).

    **Raises:** `UsageError` for what cannot work, before work starts; `DivergedError` when every
    member's loss is no longer finite.
    """
    if not 0 < total_steps < _MAX_STEPS:
        raise UsageError(f"total_steps must be positive and below 2**32, got {total_steps}")
    if log_every is not None and (not isinstance(log_every, int) or log_every < 1):
        raise UsageError(f"log_every must be a whole number of at least 1, got {log_every!r}")
    mesh = make_mesh(devices)
    state = start(agent, env, key=key) if run_state is None else run_state
    agent = state.agent
    check_shares(mesh, agent, env)
    members = agent.num_members or 1
    steps_per_update = agent.rollout_length * (env.num_envs // members)
    done = int(state.num_updates)
    # What the agent had learnt from before this run shifts its schedules, it does not end them.
    before = jnp.asarray(agent.env_steps, jnp.float32) - done * steps_per_update
    agent = agent.with_schedule(before + jnp.float32(total_steps))
    state = eqx.tree_at(lambda s: s.agent, state, agent)
    boundaries = Boundaries(
        done=done,
        end=math.ceil(total_steps / steps_per_update),
        steps_per_update=steps_per_update,
        callbacks=list(callbacks),
        log_every=log_every,
    )

    def tell(run_state: RunState, boundaries: Boundaries, updates_per_second: float) -> Metrics:
        return {
            "env_steps": boundaries.done * steps_per_update,
            "total_steps": boundaries.end * steps_per_update,
            "transitions": _number(np.asarray(run_state.transitions)),
            "steps_per_second": members * updates_per_second * steps_per_update,
        }

    advance_chunk = functools.partial(_advance_chunk, (env, mesh))
    state, history = run(state, advance_chunk, boundaries, tell, agent.num_members, mesh)
    return gather(mesh, state.agent), history


def run(
    run_state: State,
    advance_chunk: Callable[[State, Int[Array, ""]], tuple[State, dict[str, Array]]],
    boundaries: "Boundaries",
    tell: Callable[[State, "Boundaries", float], Metrics],
    num_members: int | None,
    mesh: Mesh | None = None,
) -> tuple[State, list[Metrics]]:
    """Chunk after chunk, with the host's work on one done while the next is running.

    **Arguments:**

    - `run_state`: where it begins.
    - `advance_chunk`: makes so many updates on the device.
    - `boundaries`: where to cut.
    - `tell`: where the run stands, given it, its boundaries and the updates per second.
    - `num_members`: of a population.
    - `mesh`: of devices that share the work.
    """
    lay = functools.partial(put, mesh)
    run_state = copy(run_state.spread(lay))  # the caller's stays usable
    history = _History(num_members)
    started = time.perf_counter()
    run_state, _ = jax.block_until_ready(advance_chunk(run_state, jnp.asarray(0)))
    times = {"compile_seconds": time.perf_counter() - started, "train_seconds": 0.0}
    observe = None  # what observers still have to do for the boundary before
    stopped = False
    with concurrent.futures.ThreadPoolExecutor(1) as waiter:
        while not (stopped or boundaries.finished):
            length = agreed(boundaries.next_length())
            dispatched = time.perf_counter()
            run_state, on_device = advance_chunk(run_state, jnp.asarray(length))
            ready = waiter.submit(_time_when_ready, on_device)
            stopped = bool(agreed(observe is not None and observe()))
            seconds = ready.result() - dispatched
            times["train_seconds"] += seconds
            times["wall_seconds"] = time.perf_counter() - started
            due = boundaries.advance(length, seconds)
            # A copy for the callbacks: the next chunk is given the original's memory to reuse.
            snapshot = gather(mesh, run_state)
            if snapshot is run_state and boundaries.callbacks:
                snapshot = copy(run_state)
            metrics = _to_host(gather(mesh, on_device)) | times
            metrics |= tell(snapshot, boundaries, length / seconds)
            metrics["done"] = stopped or boundaries.finished
            _check_finite(metrics)
            seen, stopped_here = _call(_blocking(due), snapshot, metrics)
            if agreed(seen is not snapshot):
                run_state = copy(from_first_process(seen).spread(lay))
            stopped |= bool(agreed(stopped_here))
            metrics["done"] = stopped or boundaries.finished
            history.append(metrics)
            observers = _observers(boundaries.callbacks if stopped else due)
            observe = functools.partial(_observe, observers, seen, metrics)
    if observe is not None:
        observe()
    return run_state, history.rows


def _blocking(callbacks: list[Callback]) -> list[Callback]:
    return [c for c in callbacks if not getattr(c, "overlap", False)]


def _observers(callbacks: list[Callback]) -> list[Callback]:
    return [c for c in callbacks if getattr(c, "overlap", False)]


def _observe(callbacks, run_state, metrics) -> bool:
    return _call(callbacks, run_state, metrics)[1]


def _call(callbacks, run_state, metrics) -> tuple[Any, bool]:
    """Calls callbacks in turn; tells whether one of them stopped the run."""
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


def _number(x: np.ndarray) -> float | int | np.ndarray:
    return x.item() if x.ndim == 0 else x


def _to_host(metrics) -> Metrics:
    return {name: _number(x) for name, x in jax.device_get(metrics).items()}


def _check_finite(metrics: Metrics) -> None:
    # The gradient too: the last one of a chunk spoils parameters before any loss has shown it.
    finite = np.isfinite(metrics.get("loss", 0.0)) & np.isfinite(metrics.get("grad_norm", 0.0))
    if not np.any(finite):
        now = clock(metrics)
        raise DivergedError(
            f"the loss is not finite after {now.done} {now.noun}: lower learning_rate or "
            "max_grad_norm, or scale rewards down (reward_scale)"
        )


class Boundaries:
    """Cuts a run into chunks, and knows which callbacks are due at each cut.

    **Arguments:**

    - `done`, `end`: updates so far, and those to come to.
    - `steps_per_update`: what an update counts in the steps that callbacks count in.
    - `callbacks`: see `Callback`.
    - `log_every`: updates in a chunk; `None`: as many as take about a second.
    - `period`: updates after which there must be a cut.
    """

    def __init__(self, *, done, end, steps_per_update, callbacks, log_every, period=None):
        self.done, self.end = done, end
        self.steps_per_update = steps_per_update
        self.callbacks = callbacks
        self.log_every = log_every
        self._periods = [
            math.ceil(c.every / steps_per_update) for c in callbacks if getattr(c, "every", None)
        ]
        self._periods += [period] if period else []
        self._target = 1.0

    @property
    def finished(self) -> bool:
        """Whether the end is reached."""
        return self.done >= self.end

    def next_length(self) -> int:
        """Updates in the next chunk."""
        length = self.log_every or min(int(self._target), max(1, self.end // _MIN_CHUNKS))
        nearest = [period - self.done % period for period in self._periods]
        return max(1, min([length, self.end - self.done, *nearest]))

    def advance(self, length: int, seconds: float) -> list[Callback]:
        """Counts a finished chunk; returns the callbacks that are due."""
        self.done += length
        self._target = _CHUNK_SECONDS * length / max(seconds, 1e-9)
        return [c for c in self.callbacks if self._due(c)]

    def _due(self, callback) -> bool:
        every = getattr(callback, "every", None)
        return (
            not every or self.finished or not self.done % math.ceil(every / self.steps_per_update)
        )


class _History:
    """Rows of metrics, thinned out evenly so that a long run holds no more than a short one.

    Distributions are left out, the last row is always there.
    """

    def __init__(self, num_members: int | None = None):
        self._scalar_axes = 0 if num_members is None else 1
        self._rows: list[Metrics] = []
        self._stride, self._seen = 1, 0
        self._last: Metrics | None = None

    @property
    def rows(self) -> list[Metrics]:
        """In order."""
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
