"""Next-step reset for environments that are pure functions of one lane."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..types import Episode, TimeStep


class LaneStep(eqx.Module):
    """What a suite reports of one lane. After a reset the reward is 0 and both flags are down."""

    obs: Shaped[Array, "*obs"]
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]
    metrics: dict[str, Shaped[Array, ""]] = eqx.field(default_factory=dict)
    action_mask: Bool[Array, "*actions"] | None = None
    agent_mask: Bool[Array, " M"] | None = None
    agent_reward: Float[Array, " M"] | None = None


class LaneState(eqx.Module):
    """The suite's own state of every lane, and the running episode."""

    inner: PyTree
    ended: Bool[Array, " N"]
    returns: Float[Array, " N"]
    length: Int[Array, " N"]


ResetLane = Callable[[PRNGKeyArray], tuple[PyTree, LaneStep]]
StepLane = Callable[[PyTree, Int[Array, "*M"], PRNGKeyArray], tuple[PyTree, LaneStep]]


def reset(reset_lane: ResetLane, key: PRNGKeyArray, num_envs: int) -> tuple[LaneState, TimeStep]:
    """Starts an episode in every lane."""
    inner, lanes = _strong(jax.vmap(reset_lane)(jax.random.split(key, num_envs)))
    return _emit(inner, lanes, jnp.ones(num_envs, bool), jnp.zeros(num_envs), 0)


def step(
    reset_lane: ResetLane,
    step_lane: StepLane,
    state: LaneState,
    action: Int[Array, "N *M"],
    key: PRNGKeyArray,
) -> tuple[LaneState, TimeStep]:
    """Acts in the lanes whose episode goes on, and resets those whose episode has ended.

    Both are computed in every lane, and one is chosen: with many lanes some episode nearly always
    has just ended, so that skipping resets where none did was measured to be the slower way.
    A lane uses its key for one of the two, never for both.
    """

    def lane(ended: Bool[Array, ""], inner: PyTree, action: Any, key: PRNGKeyArray):
        fresh, stepped = reset_lane(key), step_lane(inner, action, key)
        return jax.tree.map(lambda a, b: jnp.where(ended, a, b), fresh, stepped)

    keys = jax.random.split(key, state.ended.shape[0])
    inner, lanes = _strong(jax.vmap(lane)(state.ended, state.inner, action, keys))
    return _emit(inner, lanes, state.ended, state.returns, state.length)


def _emit(
    inner: PyTree,
    lanes: Any,
    first: Bool[Array, " N"],
    returns: Float[Array, " N"],
    length: Int[Array, " N"] | int,
) -> tuple[LaneState, TimeStep]:
    truncated = lanes.truncated & ~lanes.terminated
    ended = lanes.terminated | truncated
    returns = jnp.where(first, 0.0, returns + lanes.reward)
    length = jnp.where(first, 0, length + 1)
    timestep = TimeStep(
        lanes.obs,
        lanes.reward,
        lanes.terminated,
        truncated,
        first,
        Episode(ended, returns, length, lanes.metrics),
        lanes.action_mask,
        lanes.agent_mask,
        lanes.agent_reward,
    )
    return LaneState(inner, ended, returns, length), timestep


def _strong(tree: PyTree[Array]) -> PyTree[Array]:
    """Takes away weak types, which would change between reset and step, and break a scan."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)
