"""The offline loop: one compiled program over an agent and a data set."""

import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..agents import Agent, Batches
from ..data import Blocks, Dataset, Priorities, Replay, Sampling
from ..errors import UsageError
from ..sharding import Lay, OneDevice, Placement, place_on
from ..spaces import leaves, of_actions, of_observations
from ..types import Rollout, Transitions
from .running import Boundaries, Callback, Metrics, run
from .source import (
    AbstractRunState,
    AbstractSource,
    ByName,
    UpdateMetrics,
    advance_from,
    check_shares,
)

logger = logging.getLogger(__name__)


class OfflineState(AbstractRunState):
    """The complete state of an offline run: a saved run continues from it, bit for bit.

    **Fields:** the `agent`; the `key` of all future randomness; `num_updates` so far; the
    `priorities` of the current block, if sampling is prioritised (in a population, with a leading
    axis of members); `num_blocks` of the data, 0 before the first is loaded.
    """

    agent: Agent
    key: PRNGKeyArray
    num_updates: Int[Array, ""]
    priorities: Priorities | None = None
    num_blocks: Int[Array, ""] = eqx.field(default_factory=lambda: jnp.zeros((), jnp.int32))

    def spread(self, lay: Lay) -> "OfflineState":
        """See `AbstractRunState`: devices share members, or the batches of one agent."""
        of_members = None if self.agent.num_members is None else 0
        return OfflineState(
            agent=lay(self.agent, of_members),
            key=lay(self.key, None),
            num_updates=lay(self.num_updates, None),
            priorities=lay(self.priorities, of_members),
            num_blocks=lay(self.num_blocks, None),
        )


class Recorded(AbstractSource[OfflineState]):
    """Batches from a block of a data set; each member draws its own."""

    replay: Replay
    place: Placement = eqx.field(static=True)

    def draw(
        self, state: OfflineState, key: PRNGKeyArray
    ) -> tuple[Rollout | Transitions, Int[Array, "*S B"]]:
        """Draws a batch, and the indices of its items in the replay."""
        agent, priorities = state.agent, state.priorities
        batches = _batches(agent)
        members = () if agent.num_members is None else (agent.num_members,)
        if priorities is None:
            drawn, weight = self.replay.draw(key, (*members, batches.size)), None
        elif members:
            keys = jax.random.split(key, members[0])
            drawn, weight = jax.vmap(lambda p, k: p.draw(k, batches.size))(priorities, keys)
        else:
            drawn, weight = priorities.draw(key, batches.size)
        drawn = self.place.constrain(drawn, 0)
        if batches.sequence_length is not None:
            rollout = self.replay.sequences(drawn.reshape(-1), batches.sequence_length)
            memory = agent.initial_memory(drawn.size)
            weight = None if weight is None else weight.reshape(-1)
            return dataclasses.replace(rollout, memory=memory, weight=weight), drawn
        batch = self.replay.transitions(drawn.reshape(-1), batches.n_step)
        batch = jax.tree.map(lambda x: x.reshape(*drawn.shape, *x.shape[1:]), batch)
        return eqx.tree_at(lambda b: b.weight, batch, weight, is_leaf=lambda x: x is None), drawn

    def follow(
        self, state: OfflineState, drawn: Int[Array, "*S B"], metrics: ByName
    ) -> tuple[OfflineState, UpdateMetrics]:
        """See `AbstractSource`."""
        metrics = dict(metrics)
        priority = metrics.pop("priority")
        if state.priorities is not None:
            updated = Priorities.updated
            updated = updated if state.agent.num_members is None else jax.vmap(updated)
            priorities = updated(state.priorities, drawn, priority)
            state = dataclasses.replace(state, priorities=priorities)
        return state, UpdateMetrics.of(state.agent, metrics, {}, {})


def advance_offline(
    run_state: OfflineState,
    replay: Replay,
    num_updates: int | Int[Array, ""],
    place: Placement = OneDevice(),  # noqa: B008
) -> tuple[OfflineState, dict[str, Array]]:
    """The pure core of `train_offline`: draws a batch and learns from it, `num_updates` times.

    **Arguments:** `place`: the devices that share the members, or the batches of one agent.

    **Returns:** the new state, and the agent's metrics, averaged over updates (for distributions,
    the last).
    """
    return advance_from(Recorded(replay, place), run_state, num_updates)


def blocks_of(run_state: OfflineState | None, dataset: Dataset, sampling: Sampling) -> Blocks:
    """The blocks that a run learns from; a resumed run keeps its number of blocks.

    So the drawn transitions do not depend on the memory that is free when it resumes.

    **Raises:** `UsageError` as `Blocks` does.
    """
    by_memory = sampling.memory_gb is None and sampling.shards_per_block is None
    before = int(run_state.num_blocks) if run_state is not None and by_memory else 0
    return Blocks(dataset, sampling, num_blocks=before or None)


def start_offline(agent: Agent, dataset: Dataset, *, key: PRNGKeyArray) -> OfflineState:
    """A run's initial state.

    **Raises:** `UsageError` if the agent does not fit the data.
    """
    _check_fit(agent, dataset)
    return OfflineState(agent, key, jnp.zeros((), jnp.int32))


def _check_fit(agent: Agent, dataset: Dataset) -> None:
    """Raises `UsageError` if the agent does not learn offline, or does not fit the data."""
    _batches(agent)
    of_data = dataset.description
    seen, there = agent.observation_space, of_observations(of_data.observation_space)
    done, actions = agent.action_space, of_actions(of_data.action_space)
    for name, ours, theirs, fits in (
        ("agents", agent.num_agents, of_data.num_agents, agent.num_agents == of_data.num_agents),
        ("actions", done, actions, done == actions),
        ("observations", seen, there, _kind(seen) == _kind(there)),
    ):
        if not fits:
            raise UsageError(
                f"'{dataset.path}' has {name} {theirs}, the agent {ours}: choose the environment "
                f"of the data ({of_data.env}, {dict(of_data.preprocessing)})"
            )


def _kind(space: gymnasium.Space) -> list[tuple[str, Any]]:
    """The properties that two spaces must share; the bounds of a Box may differ."""
    return [
        (path, (leaf.shape, leaf.dtype) if isinstance(leaf, gymnasium.spaces.Box) else leaf)
        for path, leaf in leaves(space)
    ]


def _batches(agent: Agent) -> Batches:
    """The batches that the agent learns from. Raises `UsageError` if it learns online."""
    if not isinstance(agent.learns_from, Batches):
        raise UsageError(
            "this agent learns from environments, not from data: use eqx_q.train, or "
            "an agent that learns offline (eqx_q.DQN, eqx_q.CQL, eqx_q.BC)"
        )
    return agent.learns_from


class Feed:
    """Loads the current block of data, and the next one in the background."""

    def __init__(self, blocks: Blocks, sampling: Sampling, place: Placement):
        self._blocks, self._sampling, self._place = blocks, sampling, place
        self._single = blocks.num_blocks == 1
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._index = -1
        self._replay: Any = None
        self._next: Any = None

    @property
    def period(self) -> int | None:
        """Updates per block; `None` if there is only one."""
        return None if self._single else self._sampling.updates_per_block

    def source(self, state: OfflineState, num_updates: int) -> tuple[OfflineState, Recorded]:
        """The state with the right priorities, and the block to use after `num_updates`."""
        index = 0 if self._single else num_updates // self._sampling.updates_per_block
        if index != self._index:
            ahead = self._next if index == self._index + 1 else None
            self._replay = None  # freed first, so that at most two blocks are in memory
            self._replay = ahead.result() if ahead else self._load(index)
            self._index = index
            if not self._single:
                self._next = self._pool.submit(self._load, index + 1)
            if self._sampling.priority_exponent:
                state = self._prioritised(state, num_updates)
        return state, Recorded(self._replay, self._place)

    def close(self) -> None:
        """Stops loading blocks."""
        self._pool.shutdown(cancel_futures=True)

    def _load(self, index: int) -> Replay:
        """Loads a block onto every device."""
        return self._place.put(self._blocks.load(index))

    def _prioritised(self, state: OfflineState, num_updates: int) -> OfflineState:
        """The state with fresh priorities, unless a run resumes in the middle of the block."""
        members, before = state.agent.num_members, state.priorities
        largest = jnp.float32(1) if before is None else jnp.max(before.values, axis=-1)
        fresh = _priorities(members, self._replay, self._sampling, largest)
        fresh = self._place.put(fresh, None if members is None else 0)
        resumed = self._single or num_updates % self._sampling.updates_per_block
        if resumed and before is not None:
            _check_same_places(before, fresh)
            return state
        return dataclasses.replace(state, priorities=fresh)


def train_offline(
    agent: Agent,
    dataset: Dataset | str | os.PathLike,
    *,
    num_updates: int,
    key: PRNGKeyArray,
    sampling: Sampling | None = None,
    callbacks: Iterable[Callback] = (),
    run_state: OfflineState | None = None,
    log_every: int | None = None,
    devices: int | None = 1,
) -> tuple[Agent, list[Metrics]]:
    """Trains `agent` on recorded data.

    **Arguments:**

    - `dataset`: the data set, or its path.
    - `num_updates`: gradient steps (of each member of a population).
    - `key`: for all randomness. The caller's `agent` stays usable: the run works on a copy.
    - `sampling`: how transitions are drawn; by default uniformly from all data.
    - `callbacks`: as in `eqx_q.train`, but they count updates instead of steps.
    - `run_state`: resume from here until `num_updates` in total; `agent` and `key` are ignored.
    - `log_every`: updates in a chunk; by default as many as take about a second. The result does
        not depend on it.
    - `devices`: as in `eqx_q.train`; they share the batches of one agent. Each holds all data.

    **Returns:** the trained agent, and `history`: the metrics of each boundary.

    **Raises:** `UsageError` for invalid input, before work starts; `DivergedError` when no member's
    loss is finite any more.
    """
    if not isinstance(num_updates, int) or not 0 < num_updates < 2**31:
        raise UsageError(f"num_updates must be a whole number from 1 to 2**31, got {num_updates}")
    dataset = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    sampling = sampling or Sampling()
    state = start_offline(agent, dataset, key=key) if run_state is None else run_state
    _check_fit(state.agent, dataset)
    place = place_on(devices)
    check_shares(place, state.agent)
    if not sampling.priority_exponent:  # the run may have had some before
        state = dataclasses.replace(state, priorities=None)
    blocks = blocks_of(state, dataset, sampling)
    together = place.agreed(blocks.num_blocks)
    if together != blocks.num_blocks:  # the first process has more memory, or less
        blocks = Blocks(dataset, sampling, num_blocks=together)
    state = dataclasses.replace(state, num_blocks=jnp.asarray(blocks.num_blocks, jnp.int32))
    turns = -(-num_updates // sampling.updates_per_block)
    if turns < blocks.num_blocks and sampling.shards_per_block is None:
        logger.warning(
            "the data have %d blocks, but %d updates use only %d of them: lower updates_per_block",
            blocks.num_blocks,
            num_updates,
            turns,
        )
    feed = Feed(blocks, sampling, place)
    boundaries = Boundaries(
        done=int(state.num_updates),
        end=num_updates,
        steps_per_update=1,
        callbacks=callbacks,
        log_every=log_every,
        period=feed.period,
    )

    def tell(run_state: OfflineState, boundaries: Boundaries, per_second: float) -> Metrics:
        return {
            "num_updates": boundaries.done,
            "total_updates": boundaries.end,
            "updates_per_second": per_second,
        }

    try:
        state, history = run(state, feed.source, boundaries, tell, place)
    finally:
        feed.close()
    return place.gather(state.agent), history


def _check_same_places(ours: Priorities, fresh: Priorities) -> None:
    same = ours.values.shape == fresh.values.shape
    if not same or bool(jnp.any(ours.count != fresh.count)):
        raise UsageError(
            "the data differ from those that the run learnt from: resume with the same sampling, "
            "or with priority_exponent=0"
        )


def _priorities(
    num_members: int | None, replay: Replay, sampling: Sampling, largest: Float[Array, "*S"]
) -> Priorities:
    """Fresh priorities, for each member of a population."""

    def create(largest):
        exponents = sampling.priority_exponent, sampling.priority_correction
        return Priorities.create(replay, *exponents, largest)

    if num_members is None:
        return create(largest)
    return jax.vmap(create)(jnp.broadcast_to(largest, num_members))
