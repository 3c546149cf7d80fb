"""Choosing actions from Q-values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..types import Scalar


def legal(
    q_values: Float[Array, "*lanes A"], action_mask: Bool[Array, "*lanes A"] | None
) -> Float[Array, "*lanes A"]:
    """Q-values with illegal actions at -inf.

    Where nothing is legal (games say so when they are over) everything is: values stay finite.
    """
    if action_mask is None:
        return q_values
    over = ~jnp.any(action_mask, axis=-1, keepdims=True)
    return jnp.where(action_mask | over, q_values, -jnp.inf)


def epsilon_greedy(
    q_values: Float[Array, "*lanes A"],
    epsilon: Scalar,
    key: PRNGKeyArray,
    action_mask: Bool[Array, "*lanes A"] | None = None,
) -> Int[Array, "*lanes"]:
    """With probability `epsilon` an action drawn uniformly from the legal ones, else the best.

    `q_values` of illegal actions must be -inf already (see `legal`).
    """
    *lanes, num_actions = q_values.shape
    greedy = jnp.argmax(q_values, axis=-1)
    if action_mask is None:
        # One draw for both questions: whether to explore, and what.
        explore, choice = jax.random.uniform(key, (2, *lanes))
        random = jnp.floor(choice * num_actions).astype(greedy.dtype)
    else:
        explore_key, choice_key = jax.random.split(key)
        explore = jax.random.uniform(explore_key, lanes)
        choice = jax.random.uniform(choice_key, q_values.shape)
        random = jnp.argmax(legal(choice, action_mask), axis=-1)
    return jnp.where(explore < epsilon, random, greedy)
