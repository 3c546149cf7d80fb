"""Collecting rollouts: an agent acts in an environment."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from ..agents import Agent, Population, Rollouts, decide
from ..errors import UsageError
from ..types import Memory, Observation, Rollout, TimeStep
from ..wrappers import Env
from .packing import Packed


class Position(NamedTuple):
    """Where a run is in its environment: its state, the last timestep, and the agent's memory."""

    env_state: PyTree
    timestep: TimeStep
    memory: Memory


class _Part(NamedTuple):
    """Lanes that act in turn, while they collect a rollout.

    **Fields:** `env_state`: between steps the state, during a step what was sent; `obs`: the
    current one, between steps; `decided`: during a step, actions and values; `memory` of the
    agent; `kept`: that at the start of the next burn-in; `record` of rows, each a timestep and the
    decision that led to it.
    """

    env_state: PyTree
    obs: Observation | None
    decided: tuple[Array, Array] | None
    memory: Memory
    kept: Memory
    record: Packed


def collect(
    agent: Agent, env: Env, position: Position, key: PRNGKeyArray
) -> tuple[Position, Rollout, Rollout | None]:
    """Collects a rollout; returns the position after it, the rollout and the next burn-in.

    Where lanes come in several parts, all but the first are a turn behind: while the agent acts in
    one part, the step of another is under way.
    """
    length, overlap = rollouts_of(agent).length, rollouts_of(agent).burn_in
    envs, agents = _parts(env, agent)
    number = len(envs)

    def pack(index: int, tree: PyTree) -> Packed:
        return Packed.of(tree, envs[index].num_envs)

    def begin(index: int) -> _Part:
        memory, timestep = jax.tree.map(
            lambda x: x if number == 1 else jnp.split(x, number)[index],
            (position.memory, position.timestep),
        )
        decision = jax.eval_shape(lambda: decide(agents[index], timestep, memory, key=key))
        none_yet = (jnp.zeros(x.shape, x.dtype) for x in (decision.action, decision.value))
        row = pack(index, (timestep, tuple(none_yet)))
        record = row.blank(length + 1).write(0, row)
        env_state = position.env_state if number == 1 else position.env_state[index]
        kept = memory if overlap else None
        return _Part(env_state, timestep.obs, None, memory, kept, record)

    def act(index: int, part: _Part, step: Int[Array, ""], keys: Array) -> _Part:
        act_key, env_key = keys[index]
        kept = part.kept
        if overlap:
            starts = step == length - overlap
            kept = jax.tree.map(lambda new, old: jnp.where(starts, new, old), part.memory, kept)
        timestep, _ = part.record.at(step).tree
        timestep = dataclasses.replace(timestep, obs=part.obs)
        decision = decide(agents[index], timestep, part.memory, key=act_key)
        sent = envs[index].send(part.env_state, decision.action, env_key)
        decided = decision.action, decision.value
        return _Part(sent, None, decided, decision.memory, kept, part.record)

    def see(parts: list[_Part], index: int, step: Int[Array, ""]) -> _Part:
        part, after = parts[index], parts[index - 1].env_state if number > 1 else None
        env_state, timestep = envs[index].recv(part.env_state, after)
        record = part.record.write(step, pack(index, (timestep, part.decided)))
        return part._replace(env_state=env_state, obs=timestep.obs, decided=None, record=record)

    def turn(parts: list[_Part], inputs: tuple[Array, Array], under_way: bool = True):
        step, keys = inputs
        parts = [part._replace(env_state=part.env_state.tree) for part in parts]
        for index in range(number):
            if index and under_way:
                parts[index] = see(parts, index, step)
            parts[index] = act(index, parts[index], step, keys)
        parts[0] = see(parts, 0, step + 1)
        return packed(parts), None

    def packed(parts: list[_Part]) -> list[_Part]:
        return [
            part._replace(env_state=pack(index, part.env_state)) for index, part in enumerate(parts)
        ]

    parts = packed([begin(index) for index in range(number)])
    keys = jax.vmap(jax.random.split)(jax.random.split(key, length * number))
    turns = jnp.arange(length), keys.reshape(length, number, *keys.shape[1:])
    if number > 1:  # nothing is under way in the first turn
        parts, _ = turn(parts, jax.tree.map(lambda x: x[0], turns), under_way=False)
        turns = jax.tree.map(lambda x: x[1:], turns)
    parts, _ = jax.lax.scan(turn, parts, turns)
    parts = [part._replace(env_state=part.env_state.tree) for part in parts]
    for index in range(1, number):
        parts[index] = see(parts, index, jnp.asarray(length))

    def together(trees: Iterable[PyTree], axis: int) -> PyTree:
        trees = list(trees)
        join = lambda *x: jnp.concatenate(x, axis)  # noqa: E731
        return trees[0] if number == 1 else jax.tree.map(join, *trees)

    timesteps, decisions = together((part.record.tree for part in parts), axis=1)
    actions, values = jax.tree.map(lambda x: x[1:], decisions)
    burn_in = None
    if overlap:
        last = slice(length - overlap, length)
        some = jax.tree.map(lambda x: x[last], Rollout(timesteps, actions, None, values))
        burn_in = dataclasses.replace(some, memory=together((part.kept for part in parts), axis=0))
    rollout = Rollout(timesteps, actions, position.memory, values)
    states = tuple(part.env_state for part in parts)
    timestep = together((part.record.at(length).tree[0] for part in parts), axis=0)
    memory = together((part.memory for part in parts), axis=0)
    after = Position(states[0] if number == 1 else states, timestep, memory)
    return after, rollout, burn_in


def _parts(env: Env, agent: Agent) -> tuple[tuple[Env, ...], list[Agent]]:
    """Parts of the environment, with the agent of each: of a population, some of its members.

    If the members cannot be shared evenly, the environment is stepped as a whole.
    """
    number = len(env.parts)
    if agent.num_members is None:
        return env.parts, [agent] * number
    if number == 1 or agent.num_members % number:
        return (env,), [agent]
    members = np.split(np.arange(agent.num_members), number)
    return env.parts, [cast(Population, agent).select(some) for some in members]


def joined(before: Rollout, after: Rollout) -> Rollout:
    """Joins two rollouts; the first has no last timestep, since the second starts with it."""
    timesteps, actions, values = (
        jax.tree.map(lambda *x: jnp.concatenate(x), getattr(before, name), getattr(after, name))
        for name in ("timesteps", "actions", "values")
    )
    return Rollout(timesteps, actions, before.memory, values)


def rollouts_of(agent: Agent) -> Rollouts:
    """The rollouts that the agent learns from. Raises `UsageError` if it learns offline."""
    if not isinstance(agent.learns_from, Rollouts):
        raise UsageError(
            "this agent learns from data, not from environments: use eqx_q.train_offline, or "
            "an agent that learns online (eqx_q.PQN)"
        )
    return agent.learns_from
