"""Schedules: hyperparameters as functions of progress."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Scalar


def linear(
    start: Scalar,
    end: Scalar,
    progress: Float[Array, "*P"],
    duration: Scalar = 1.0,
) -> Float[Array, "*P"]:
    """From `start` to `end` over the first `duration` (a fraction) of `progress`, then constant."""
    return start + (end - start) * jnp.clip(progress / jnp.maximum(duration, 1e-9), 0.0, 1.0)
