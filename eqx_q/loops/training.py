"""The training loop: one compiled program over an agent and an environment."""

import dataclasses
import math
from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from ..agents import Agent, decide
from ..errors import UsageError
from ..sharding import Lay, Placement, place_on
from ..types import Count, Memory, Rollout, Scalar, TimeStep
from ..wrappers import Env
from ..wrappers.host import own_errors
from .collecting import Position, collect, joined, rollouts_of
from .running import Boundaries, Callback, Metrics, number, run
from .source import (
    AbstractRunState,
    AbstractSource,
    ByName,
    UpdateMetrics,
    advance_from,
    check_fits,
    check_shares,
)

_MAX_UPDATES = 2**31  # counted in int32


class RunState(AbstractRunState):
    """The complete state of a run: a saved run continues from it, bit for bit.

    **Fields:** the `agent`; the environment's state and last timestep; the agent's `memory` of the
    running episodes; the `key` of all future randomness; `num_updates` and real `transitions` so
    far (`[S]` in a population); `burn_in`: if the agent has one, the last steps of the previous
    rollout, with the memory at their start.
    """

    agent: Agent
    env_state: PyTree
    timestep: TimeStep
    memory: Memory
    key: PRNGKeyArray
    num_updates: Int[Array, ""]
    transitions: Count
    burn_in: Rollout | None = None

    def spread(self, lay: Lay) -> "RunState":
        """See `AbstractRunState`: devices share lanes, and thereby members."""
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


def start(agent: Agent, env: Env, *, key: PRNGKeyArray) -> RunState:
    """A run's initial state: environments reset, memory empty.

    **Raises:** `UsageError` if the agent learns offline, or if its spaces differ from the
    environment's.
    """
    rollouts = rollouts_of(agent)
    check_fits(agent, env, "create the agent with env.{}")
    memory = agent.initial_memory(env.num_envs)
    reset_key, key = jax.random.split(key)
    env_state, timestep = env.reset(reset_key)
    return RunState(
        agent=agent,
        env_state=env_state,
        timestep=timestep,
        memory=memory,
        key=key,
        num_updates=jnp.zeros((), jnp.int32),
        transitions=Count.of(np.zeros(np.shape(np.asarray(agent.learnt)), np.uint32)),
        burn_in=_empty_burn_in(agent, rollouts.burn_in, timestep, memory),
    )


def check_lanes(place: Placement, agent: Agent, env: Env) -> None:
    """Raises `UsageError` if the lanes do not divide over devices, lane groups or minibatches."""
    rollouts_of(agent).num_items(env.num_envs // (agent.num_members or 1))
    if env.on_host and env.num_devices != place.num_devices:
        raise UsageError(
            f"this environment lives outside JAX and was made for {env.num_devices} devices, not "
            f"{place.num_devices}: make it with eqx_q.wrappers.make_for"
        )


def _empty_burn_in(agent: Agent, length: int, timestep: TimeStep, memory: Memory) -> Rollout | None:
    """Placeholder steps that each start an episode, so that memory stays at its initial value."""
    if not length:
        return None
    decision = decide(agent, timestep, memory)
    timesteps, actions, values = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (length, *x.shape)),
        (timestep, decision.action, decision.value),
    )
    return Rollout(timesteps, actions, memory, values)


class Lanes(AbstractSource[RunState]):
    """Rollouts from the lanes of an environment."""

    env: Env

    def draw(self, state: RunState, key: PRNGKeyArray) -> tuple[Rollout, PyTree]:
        """A rollout with its burn-in; then the end state, the rollout alone, the next burn-in."""
        position = Position(state.env_state, state.timestep, state.memory)
        after, rollout, burn_in = collect(state.agent, self.env, position, key)
        before = state.burn_in
        return joined(before, rollout) if before else rollout, (after, rollout, burn_in)

    def follow(
        self, state: RunState, drawn: PyTree, metrics: ByName
    ) -> tuple[RunState, UpdateMetrics]:
        """See `AbstractSource`."""
        (env_state, timestep, memory), rollout, burn_in = drawn
        seen = state.agent.measure(_measure, rollout)
        if self.env.on_host:
            seen["sums"] |= state.agent.measure(_count_restarts, rollout)
        transitions = state.agent.measure(lambda r: jnp.sum(r.real, dtype=jnp.uint32), rollout)
        state = dataclasses.replace(
            state,
            env_state=env_state,
            timestep=timestep,
            memory=memory,
            transitions=state.transitions.plus(transitions),
            burn_in=burn_in,
        )
        return state, UpdateMetrics.of(state.agent, metrics, **seen)


def advance(
    run_state: RunState, env: Env, num_updates: int | Int[Array, ""]
) -> tuple[RunState, dict[str, Array]]:
    """The pure core of `train`: acts for a rollout, then learns from it, `num_updates` times.

    **Arguments:** `num_updates` may be traced: one compiled program serves every length.

    **Returns:** the new state, and metrics: the agent's, averaged over updates (for distributions,
    the last); `episodes` that ended, their mean `episode_return` and `episode_length` (NaN if none
    ended) and the suite's own `episode_*`; `q_values`, the greedy values over lanes at the last
    step; for environments outside JAX, `restarts` of failed lanes.
    """
    return advance_from(Lanes(env), run_state, num_updates)


def _measure(rollout: Rollout) -> dict[str, dict[str, Array]]:
    """Environment metrics of a rollout: `sums` to add up, `samples` to keep the last of."""
    episode = jax.tree.map(lambda x: x[1:], rollout.timesteps.episode)

    of_episodes = {"return": episode.returns, "length": episode.length, **episode.metrics}
    # By one reduction: there may be many, and each takes a kernel.
    stacked = jnp.stack([jnp.ones_like(episode.returns), *of_episodes.values()], dtype=jnp.float32)
    totals = jnp.sum(jnp.where(episode.ended, stacked, 0.0), axis=range(1, stacked.ndim))
    names = ["episodes", *(f"episode_{name}" for name in of_episodes)]
    sums = dict(zip(names, totals, strict=True))
    samples = {} if rollout.values is None else {"q_values": rollout.values[-1].reshape(-1)}
    return {"sums": sums, "samples": samples}


def _num_updates(total_steps: Scalar, steps_per_update: int) -> int:
    """The number of updates for at least `total_steps` steps."""
    updates = math.ceil(total_steps / steps_per_update)
    if updates >= _MAX_UPDATES:
        raise UsageError(
            f"total_steps={total_steps:,} are {updates:,} updates, but 2**31 are too many: lower "
            "total_steps, or use more lanes or longer rollouts"
        )
    return updates


def _count_restarts(rollout: Rollout) -> dict[str, Array]:
    """Counts restarted lanes: episodes that start without an ended one before."""
    timesteps = rollout.timesteps
    restarted = timesteps.first[1:] & ~timesteps.ended[:-1]
    return {"restarts": jnp.sum(restarted, dtype=jnp.float32)}


def train(
    agent: Agent,
    env: Env,
    *,
    total_steps: Scalar,
    key: PRNGKeyArray,
    callbacks: Iterable[Callback] = (),
    run_state: RunState | None = None,
    log_every: int | None = None,
    devices: int | None = 1,
) -> tuple[Agent, list[Metrics]]:
    """Trains `agent` in `env`.

    **Arguments:**

    - `total_steps`: lane-steps, per member of a population; rounded up to whole updates.
    - `key`: for all randomness. The caller's `agent` stays usable: the run works on a copy.
    - `callbacks`: see `Callback`.
    - `run_state`: resume from here until `total_steps` in total; `agent` and `key` are ignored.
    - `log_every`: updates in a chunk; by default as many as take about a second. The result does
        not depend on it.
    - `devices`: number of devices that share the members of a population, or the lanes of one
        agent, whose `lane_groups` it must divide; `None`: all. It only changes rounding, but
        eventually that flips a greedy action, and runs differ from there. Callbacks get the whole
        run state on one device. With several processes, each calls its own callbacks, and all
        follow those of the first.

    **Returns:** the trained agent, and `history`: the metrics of each boundary, without
    distributions (thinned out evenly beyond 1000 boundaries).

    **Raises:** `UsageError` for invalid input, before work starts; `DivergedError` when no member's
    loss is finite any more; `LaneError` when a lane's environment fails.
    """
    if not 0 < total_steps < math.inf:
        raise UsageError(f"total_steps must be positive, got {total_steps}")
    place = place_on(devices)
    state = start(agent, env, key=key) if run_state is None else run_state
    agent = state.agent
    check_shares(place, agent)
    check_lanes(place, agent, env)
    members = agent.num_members or 1
    steps_per_update = agent.learns_from.units(env.num_envs // members)
    boundaries = Boundaries(
        done=int(state.num_updates),
        end=_num_updates(total_steps, steps_per_update),
        steps_per_update=steps_per_update,
        callbacks=callbacks,
        log_every=log_every,
    )
    # Steps learnt before this run shift the agent's schedules; they do not use them up.
    before = np.asarray(agent.learnt, np.float64) - boundaries.done * steps_per_update
    agent = agent.with_schedule(jnp.asarray(before + total_steps, jnp.float32))
    state = eqx.tree_at(lambda s: s.agent, state, agent)

    def tell(run_state: RunState, boundaries: Boundaries, updates_per_second: float) -> Metrics:
        return {
            "env_steps": boundaries.done * steps_per_update,
            "total_steps": boundaries.end * steps_per_update,
            "transitions": number(np.asarray(run_state.transitions)),
            "steps_per_second": members * updates_per_second * steps_per_update,
        }

    lanes = Lanes(env)
    with own_errors(env):
        state, history = run(state, lambda state, _: (state, lanes), boundaries, tell, place)
    return place.gather(state.agent), history
