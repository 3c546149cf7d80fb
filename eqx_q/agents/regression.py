"""Regression of raw values on targets, shared by all agents.

Shapes are those of `eqx_q.agents.model`.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..types import Rollout, TimeStep
from .model import Model


class Items(eqx.Module):
    """Choices to learn from, their targets, and a mask of real transitions.

    `acting` is false for transitions into a reset, and for dead agents.
    """

    index: Int[Array, "*steps M F"]
    target: Float[Array, "*steps P L"]
    acting: Bool[Array, "*steps M"]
    global_state: Float[Array, "*steps S"] | None


def items_of(model: Model, rollout: Rollout, target: Float[Array, "T N P L"]) -> Items:
    """Items of a team's rollout, given its targets."""
    before = jax.tree.map(lambda x: x[:-1], rollout.timesteps)
    index = model.actions.encode(rollout.actions)
    return Items(index, target, acting_in(rollout), model.global_state(before))


class Fit(NamedTuple):
    """The fit of values to their targets.

    **Fields:** `loss` of each prediction, 0 where it is not `real`; `metrics` of each, by name.
    """

    loss: Float[Array, "*steps P"]
    real: Bool[Array, "*steps P"]
    metrics: dict[str, Float[Array, "*steps P"]]


def fit(model: Model, values: Float[Array, "*steps M A K"], items: Items) -> Fit:
    """Compares the values of the actions taken with their targets."""
    raw = model.of_action(values, items.index)
    raw, value = model.predict(raw, items.acting, items.global_state)
    real = model.acts(items.acting)
    # Targets of masked transitions may be anything, even NaN.
    target = jnp.where(real[..., None], items.target, 0.0)
    predicted, mean = value.expected(raw), jnp.mean(target, axis=-1)
    metrics = {"td_error": jnp.abs(mean - predicted), "q_value": predicted, "target": mean}
    loss, further = value.loss(raw, target)
    return Fit(jnp.where(real, loss, 0.0), real, metrics | further)


def average(
    weight: Float[Array, "*steps P"], metrics: dict[str, Float[Array, "*steps P"]]
) -> dict[str, Float[Array, ""]]:
    """Weighted sums of metrics."""
    return {name: jnp.sum(jnp.where(weight > 0, weight * x, 0.0)) for name, x in metrics.items()}


def acting_in(rollout: Rollout) -> Bool[Array, "T N M"]:
    """Mask of agents with a real transition: not into a reset, and the agent was alive."""
    timesteps = rollout.timesteps
    real = jnp.asarray(rollout.real)[..., None]
    if timesteps.agent_mask is None:
        return jnp.broadcast_to(real, rollout.actions.shape[:3])
    return real & jnp.asarray(timesteps.agent_mask)[:-1]


class Outcome(NamedTuple):
    """Outcomes of steps, for each prediction and each of its samples."""

    reward: Float[Array, "T N P L"]
    terminated: Bool[Array, "T N P L"]
    truncated: Bool[Array, "T N P L"]
    next_value: Float[Array, "T N P L"]


def outcome(
    model: Model,
    samples: Float[Array, "steps N M L"],
    timesteps: TimeStep,
    reward_scale: Float[Array, ""],
) -> Outcome:
    """Outcomes of `T` steps, given samples at all `T + 1` timesteps.

    A dead agent's episode counts as terminated. If the next step resets the lane, the episode
    counts as truncated: it ended here, or its environment failed (see `eqx_q.wrappers.guard`).
    """
    later = jax.tree.map(lambda x: jnp.asarray(x)[1:], timesteps)
    samples, terminated = samples[1:], later.terminated[..., None]
    if later.agent_mask is not None:
        samples = jnp.where(later.agent_mask[..., None], samples, 0.0)
        terminated = terminated | ~model.acts(jnp.asarray(later.agent_mask))
    next_value = model.mixed_samples(samples, later)
    resets_next = jnp.concatenate([later.first[1:], jnp.zeros_like(later.first[:1])])
    truncated = (later.truncated | resets_next)[..., None]
    others = (model.reward(later) * reward_scale, terminated, truncated)
    reward, terminated, truncated = (
        jnp.broadcast_to(x[..., None], next_value.shape) for x in others
    )
    return Outcome(reward, terminated, truncated, next_value)
