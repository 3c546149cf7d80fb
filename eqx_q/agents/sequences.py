"""Prepares rollouts for learning: adds an axis of agents, checks, unrolls, warms up memory.

A single agent is a team of one.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .. import spaces
from ..errors import UsageError
from ..types import AnyArray, Memory, Rollout
from .acting import AgentMemory, QAgent
from .model import Model, Unrolled


def as_team(agent: QAgent, rollout: Rollout, burn_in: int) -> Rollout:
    """Adds an axis of agents after that of lanes.

    **Raises:** `UsageError` if the rollout does not match the agent, or is no longer than its
    burn-in.
    """
    own = agent.action_space.shape or ()
    team = () if agent.num_agents is None else (agent.num_agents,)
    shape = rollout.actions.shape
    axes = shape[: len(shape) - len(own)]
    if shape != (*axes, *own) or len(axes) != 2 + len(team) or axes[2:] != team:
        expected = ", ".join(["steps", "lanes", *map(str, (*team, *own))])
        raise UsageError(f"actions have shape {shape}, not ({expected})")
    num_steps, *lanes = axes
    seen = (num_steps + 1, *lanes)
    timesteps = rollout.timesteps
    found = spaces.leading_axes(agent.observation_space, timesteps.obs)
    if found != seen:
        raise UsageError(
            f"timesteps.obs has leading axes {found}, not {seen}: give it axes for steps (one more "
            "timestep than actions), lanes, agents of a team, then those of the space"
        )
    _check_shape("action_mask", timesteps.action_mask, (*seen, agent.actions.num_choices))
    _check_shape("agent_mask", timesteps.agent_mask, seen)
    if num_steps <= burn_in:
        raise UsageError(
            f"a rollout of {num_steps} steps leaves nothing after burn_in={burn_in}: give "
            "the last steps of the previous rollout, then new ones"
        )
    if team:
        return rollout

    def parts(x: Rollout) -> tuple[PyTree, ...]:
        return x.timesteps.obs, x.timesteps.action_mask, x.actions, x.values

    widened = jax.tree.map(lambda x: x[:, :, None], parts(rollout))
    return eqx.tree_at(parts, rollout, widened, is_leaf=lambda x: x is None)


def _check_shape(name: str, x: AnyArray | None, expected: tuple[int, ...]) -> None:
    if x is not None and x.shape != expected:
        raise UsageError(
            f"{name} has shape {x.shape}, not {expected}: give it axes for steps (one more "
            "timestep than actions), lanes, agents of a team, then its own"
        )


def unroll(
    model: Model,
    statistics: PyTree[Array],
    rollout: Rollout,
    acting: Bool[Array, "T N M"] | None = None,
) -> Unrolled:
    """Applies the model to all timesteps of a team's rollout, from the memory at its start."""
    memory = rollout.memory
    if memory is None:
        return model.unroll(statistics, rollout.timesteps, acting=acting)
    index = model.actions.encode(rollout.actions)
    last_action = jnp.concatenate([memory.last_action.reshape(1, *index.shape[1:]), index])
    return model.unroll(statistics, rollout.timesteps, memory.network, last_action, acting)


def warmed_up(model: Model, statistics: PyTree[Array], rollout: Rollout, burn_in: int) -> Rollout:
    """The rollout after its burn-in, with the memory that the current parameters reach there.

    Nothing is learnt from the burn-in (R2D2, Kapturowski et al. 2019, §3).
    """
    if not burn_in:
        return rollout
    timesteps, actions = jax.tree.map(lambda x: x[:burn_in], (rollout.timesteps, rollout.actions))
    # No batch mask: only the steps to learn from count for normalisation.
    unrolled = unroll(model, statistics, Rollout(timesteps, actions[:-1], rollout.memory))
    last = model.actions.encode(actions[-1])
    memory = AgentMemory(jax.lax.stop_gradient(unrolled.memory), last.reshape(-1, last.shape[-1]))
    return part(rollout, slice(burn_in, None), memory)


def part(rollout: Rollout, steps: slice, memory: Memory) -> Rollout:
    """A slice of a rollout's timesteps, with the actions taken there."""
    timesteps = jax.tree.map(lambda x: x[steps], rollout.timesteps)
    return Rollout(timesteps, rollout.actions[steps], memory)
