"""Schedules: hyperparameters as functions of progress."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import AnyArray, Scalar


def linear(
    start: Scalar,
    end: Scalar,
    progress: Float[AnyArray, "*P"],
    duration: Scalar = 1.0,
) -> Float[Array, "*P"]:
    """Linear from `start` to `end` while `progress` goes from 0 to `duration`, then constant."""
    fraction = jnp.clip(progress / jnp.maximum(duration, 1e-9), 0.0, 1.0)
    return jnp.asarray(start + (end - start) * fraction)
