"""The gradient step that every agent takes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..types import Scalar
from .optimizers import Optimizer


def descend(
    loss: Callable[..., Any],
    parameters: PyTree[Array],
    optimizer: Optimizer,
    optimizer_state: PyTree[Array],
    learning_rate: Scalar,
    max_grad_norm: Scalar,
    *arguments: Any,
) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array], dict[str, Array]]:
    """One step down the gradient of `loss(parameters, *arguments)`.

    **Arguments:** `loss` returns its value and `(statistics, metrics, scale)`. Gradients and
    metrics are multiplied by `scale`.

    **Returns:** parameters, the optimiser's state, statistics, and metrics with `grad_norm`.
    """
    gradients, (statistics, metrics, scale) = jax.grad(loss, has_aux=True)(parameters, *arguments)
    gradients, metrics = jax.tree.map(lambda x: scale * x, (gradients, metrics))
    gradients, metrics["grad_norm"] = clip_by_global_norm(gradients, max_grad_norm)
    updates, optimizer_state = optimizer.step(gradients, optimizer_state, parameters, learning_rate)
    parameters = jax.tree.map(jnp.add, parameters, updates)
    return parameters, optimizer_state, statistics, metrics


def clip_by_global_norm(
    gradients: PyTree[Array], max_norm: Scalar
) -> tuple[PyTree[Array], Float[Array, ""]]:
    """Scales gradients down to a global norm of `max_norm`; also returns their norm before.

    Like `optax.clip_by_global_norm`, but with dot products for the norm: on CPU, XLA runs those in
    half the time of a sum of squares.
    """
    norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradients)))
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda x: scale * x, gradients), norm
