"""The offline loop: one compiled program over an agent and a data set."""

import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from ..agents import Agent, OfflineAgent
from ..data import Blocks, Dataset, Priorities, Replay, Sampling
from ..errors import UsageError
from ..sharding import Lay, agreed, check_divides, constrain, gather, make_mesh, put
from .training import Boundaries, Callback, Metrics, run

logger = logging.getLogger(__name__)


class OfflineState(eqx.Module):
    """All of an offline run: save it and the run can go on, bit for bit.

    **Fields:** the `agent`; the `key` of all randomness to come; `num_updates` so far; the
    `priorities` of the block that is learnt from, where transitions are not drawn uniformly (in a
    population with a leading axis of members); in how many blocks the data come, which is 0 before
    the first.
    """

    agent: OfflineAgent
    key: PRNGKeyArray
    num_updates: Int[Array, ""]
    priorities: Priorities | None = None
    num_blocks: Int[Array, ""] = eqx.field(default_factory=lambda: jnp.zeros((), jnp.int32))

    def spread(self, lay: Lay) -> "OfflineState":
        """See `eqx_q.sharding.Spreadable`: devices share members, or draw for one together."""
        of_members = None if self.agent.num_members is None else 0
        return OfflineState(
            agent=lay(self.agent, of_members),
            key=lay(self.key, None),
            num_updates=lay(self.num_updates, None),
            priorities=lay(self.priorities, of_members),
            num_blocks=lay(self.num_blocks, None),
        )


def advance_offline(
    run_state: OfflineState,
    replay: Replay,
    num_updates: int | Int[Array, ""],
    mesh: Mesh | None = None,
) -> tuple[OfflineState, dict[str, Array]]:
    """The pure core of `train_offline`: `num_updates` times draw a batch and learn from it.

    **Arguments:** `mesh`: of devices that share the members, or the batches of one agent.

    **Returns:** the new state, and the agent's metrics, averaged over updates.
    """
    arrays, rest = eqx.partition(run_state, eqx.is_array)  # somebody's network may hold functions

    @jax.jit  # traced once for the shapes below and for the loop
    def update(arrays):
        run_state, metrics = _update(eqx.combine(arrays, rest), replay, mesh)
        return eqx.filter(run_state, eqx.is_array), metrics

    _, shapes = jax.eval_shape(update, arrays)
    totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(_, carry):
        arrays, totals = carry
        arrays, new = update(arrays)
        return arrays, jax.tree.map(jnp.add, totals, new)

    arrays, totals = jax.lax.fori_loop(0, num_updates, body, (arrays, totals))
    return eqx.combine(arrays, rest), jax.tree.map(
        lambda x: x / jnp.maximum(num_updates, 1), totals
    )


def _update(
    run_state: OfflineState, replay: Replay, mesh: Mesh | None
) -> tuple[OfflineState, dict[str, Array]]:
    """One batch (one for each member), and one update."""
    agent, priorities = run_state.agent, run_state.priorities
    key, draw_key, update_key = jax.random.split(run_state.key, 3)
    members = () if agent.num_members is None else (agent.num_members,)
    if priorities is None:
        place = replay.draw(draw_key, (*members, agent.batch_size))
        weight = None
    elif members:
        keys = jax.random.split(draw_key, members[0])
        place, weight = jax.vmap(lambda p, k: p.draw(k, agent.batch_size))(priorities, keys)
    else:
        place, weight = priorities.draw(draw_key, agent.batch_size)
    place = constrain(mesh, place, 0)
    batch = replay.transitions(place.reshape(-1), agent.n_step)
    batch = jax.tree.map(lambda x: x.reshape(*place.shape, *x.shape[1:]), batch)
    batch = eqx.tree_at(lambda b: b.weight, batch, weight, is_leaf=lambda x: x is None)
    agent, metrics, td_error = agent.update(batch, key=update_key)
    if priorities is not None:
        updated = jax.vmap(Priorities.updated) if members else Priorities.updated
        priorities = updated(priorities, place, td_error)
    run_state = dataclasses.replace(
        run_state,
        agent=agent,
        key=key,
        num_updates=run_state.num_updates + 1,
        priorities=priorities,
    )
    return run_state, metrics


def blocks_of(run_state: OfflineState | None, dataset: Dataset, sampling: Sampling) -> Blocks:
    """The blocks that a run learns from: of one that goes on those that it had.

    Which transitions are drawn must not depend on the memory that is free at a resume.

    **Raises:** `UsageError` as `Blocks` does.
    """
    by_memory = sampling.memory_gb is None and sampling.shards_per_block is None
    before = int(run_state.num_blocks) if run_state is not None and by_memory else 0
    return Blocks(dataset, sampling, num_blocks=before or None)


@eqx.filter_jit(donate="all-except-first")
def _advance_chunk(fixed, run_state, num_updates):
    replay, mesh = fixed
    lay = partial(constrain, mesh)
    run_state, metrics = advance_offline(run_state.spread(lay), replay, num_updates, mesh)
    return run_state.spread(lay), metrics


def start_offline(agent: OfflineAgent, dataset: Dataset, *, key: PRNGKeyArray) -> OfflineState:
    """A run's first state.

    **Raises:** `UsageError` where the agent does not fit the data.
    """
    _check_fit(agent, dataset)
    return OfflineState(agent, key, jnp.zeros((), jnp.int32))


def _check_fit(agent: Agent, dataset: Dataset) -> None:
    """Raises `UsageError` where the agent does not learn offline, or not from these data."""
    if not hasattr(agent, "batch_size"):
        name = type(getattr(agent, "members", agent)).__name__
        raise UsageError(
            f"{name} learns from environments, not from data: use eqx_q.train, or "
            "an agent that learns offline (eqx_q.DQN, eqx_q.CQL, eqx_q.BC)"
        )
    of_data = dataset.description
    if agent.action_space != of_data.action_space:
        raise UsageError(
            f"'{dataset.path}' has {of_data.action_space.n} actions, the agent "
            f"{agent.action_space.n}: choose the environment that the data are of ({of_data.env}, "
            f"{dict(of_data.preprocessing)})"
        )
    if agent.observation_space.shape != of_data.observation_space.shape or (
        agent.observation_space.dtype != of_data.observation_space.dtype
    ):
        raise UsageError(
            f"'{dataset.path}' has observations {of_data.observation_space}, the agent "
            f"{agent.observation_space}: choose the environment that the data are of "
            f"({of_data.env}, {dict(of_data.preprocessing)})"
        )


def check_shares(mesh: Mesh | None, agent: OfflineAgent) -> None:
    """Raises `UsageError` where the devices cannot share the agent's work."""
    if agent.num_members is None:
        check_divides(mesh, agent.batch_size, "batch_size")
    else:
        check_divides(mesh, agent.num_members, "members (num_seeds)")


class _Feed:
    """The block that is learnt from, and in the background the next one."""

    def __init__(self, blocks: Blocks, sampling: Sampling, single: bool, mesh: Mesh | None):
        self._blocks, self._sampling, self._single = blocks, sampling, single
        self._mesh = mesh
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._index = -1
        self._replay: Any = None
        self._next: Any = None

    def replay(self, num_updates: int) -> tuple[Replay, bool]:
        """The block whose turn it is after so many updates, and whether it is a new one."""
        index = 0 if self._single else num_updates // self._sampling.updates_per_block
        is_new = index != self._index
        if is_new:
            ahead = self._next if index == self._index + 1 else None
            self._replay = None  # before the next comes, so that no more than two are there
            self._replay = ahead.result() if ahead else self._load(index)
            self._index = index
            if not self._single:
                self._next = self._pool.submit(self._load, index + 1)
        return self._replay, is_new

    def _load(self, index: int) -> Replay:
        """Onto every device."""
        return put(self._mesh, self._blocks.load(index))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def train_offline(
    agent: OfflineAgent,
    dataset: Dataset | str | os.PathLike,
    *,
    num_updates: int,
    key: PRNGKeyArray,
    sampling: Sampling | None = None,
    callbacks: Iterable[Callback] = (),
    run_state: OfflineState | None = None,
    log_every: int | None = None,
    devices: int | None = 1,
) -> tuple[OfflineAgent, list[Metrics]]:
    """Trains `agent` on recorded data.

    **Arguments:**

    - `dataset`: or where it is.
    - `num_updates`: gradient steps (of each member of a population).
    - `key`: of all randomness. The caller's `agent` stays usable: the run works on a copy.
    - `sampling`: how transitions are drawn; by default uniformly from all of the data.
    - `callbacks`: as of `eqx_q.train`; what they count in steps is counted in updates here.
    - `run_state`: go on from there (`agent` and `key` are then ignored) until `num_updates` in all.
    - `log_every`: updates in a chunk; by default as many as take about a second. Where a run is
        cut into chunks changes nothing in its result.
    - `devices`: as of `eqx_q.train`; those of one agent share its batches. Each holds all data.

    **Returns:** the trained agent, and `history`: the metrics of each boundary.

    **Raises:** `UsageError` for what cannot work, before work starts; `DivergedError` when every
    member's loss is no longer finite.
    """
    if not isinstance(num_updates, int) or not 0 < num_updates < 2**31:
        raise UsageError(f"num_updates must be a whole number from 1 to 2**31, got {num_updates}")
    if log_every is not None and (not isinstance(log_every, int) or log_every < 1):
        raise UsageError(f"log_every must be a whole number of at least 1, got {log_every!r}")
    dataset = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    sampling = sampling or Sampling()
    state = start_offline(agent, dataset, key=key) if run_state is None else run_state
    _check_fit(state.agent, dataset)
    mesh = make_mesh(devices)
    check_shares(mesh, state.agent)
    if not sampling.priority_exponent:  # whatever the run did before
        state = dataclasses.replace(state, priorities=None)
    blocks = blocks_of(state, dataset, sampling)
    together = agreed(blocks.num_blocks)
    if together != blocks.num_blocks:  # another process has less memory, or more
        blocks = Blocks(dataset, sampling, num_blocks=together)
    state = dataclasses.replace(state, num_blocks=jnp.asarray(blocks.num_blocks, jnp.int32))
    single = blocks.num_blocks == 1
    turns = -(-num_updates // sampling.updates_per_block)
    if turns < blocks.num_blocks and sampling.shards_per_block is None:
        logger.warning(
            "the data come in %d blocks, of which %d updates see %d: lower updates_per_block",
            blocks.num_blocks,
            num_updates,
            turns,
        )
    boundaries = Boundaries(
        done=int(state.num_updates),
        end=num_updates,
        steps_per_update=1,
        callbacks=list(callbacks),
        log_every=log_every,
        period=None if single else sampling.updates_per_block,
    )
    feed = _Feed(blocks, sampling, single, mesh)

    def advance_chunk(run_state: OfflineState, length: Int[Array, ""]):
        replay, is_new = feed.replay(boundaries.done)
        resumed = single or boundaries.done % sampling.updates_per_block
        if is_new and sampling.priority_exponent:
            fresh = _priorities(run_state.agent, replay, sampling)
            of_members = None if run_state.agent.num_members is None else 0
            fresh = put(mesh, fresh, of_members)
            if resumed and run_state.priorities is not None:
                _check_same_places(run_state.priorities, fresh)
            else:
                run_state = dataclasses.replace(run_state, priorities=fresh)
        return _advance_chunk((replay, mesh), run_state, length)

    def tell(run_state: OfflineState, boundaries: Boundaries, per_second: float) -> Metrics:
        return {
            "num_updates": boundaries.done,
            "total_updates": boundaries.end,
            "updates_per_second": per_second,
        }

    try:
        members = state.agent.num_members
        state, history = run(state, advance_chunk, boundaries, tell, members, mesh)
    finally:
        feed.close()
    return gather(mesh, state.agent), history


def _check_same_places(ours: Priorities, fresh: Priorities) -> None:
    same = ours.values.shape == fresh.values.shape
    if not same or bool(jnp.any(ours.count != fresh.count)):
        raise UsageError(
            "the run was learning from other data than these: go on with the same sampling, or "
            "with priority_exponent=0"
        )


def _priorities(agent: OfflineAgent, replay: Replay, sampling: Sampling) -> Priorities:
    """Fresh ones, for each member of a population."""
    create = partial(
        Priorities.create, replay, sampling.priority_exponent, sampling.priority_correction
    )
    if agent.num_members is None:
        return create()
    one = create()
    return jax.tree.map(lambda x: jnp.stack([x] * int(agent.num_members or 1)), one)
