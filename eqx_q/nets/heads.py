"""Heads: from features `[B, features]` to Q-values `[B, A]`."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from .layers import AbstractLayer, Batch, BatchMask, Linear, gather_statistics


class Dueling(AbstractLayer):
    """`Q(s, a) = V(s) + A(s, a) - mean_a A(s, a)` (Wang et al. 2016, equation 9)."""

    value: AbstractLayer
    advantage: AbstractLayer

    def initial_statistics(self) -> PyTree:
        return gather_statistics(self.value, self.advantage)

    def __call__(
        self, x: Batch, statistics: PyTree = None, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        kept_value, kept_advantage = statistics or (None, None)
        value, kept_value = self.value(x, kept_value, batch_mask)
        advantage, kept_advantage = self.advantage(x, kept_advantage, batch_mask)
        q_values = value + advantage - jnp.mean(advantage, axis=-1, keepdims=True)
        return q_values, None if statistics is None else (kept_value, kept_advantage)


def linear(features: int, num_actions: int, *, key: PRNGKeyArray, init: str) -> Linear:
    """One linear layer."""
    return Linear(features, num_actions, key=key, init=init)


def dueling(features: int, num_actions: int, *, key: PRNGKeyArray, init: str) -> Dueling:
    """A linear layer for the value, one for the advantages."""
    value_key, advantage_key = jax.random.split(key)
    return Dueling(
        Linear(features, 1, key=value_key, init=init),
        Linear(features, num_actions, key=advantage_key, init=init),
    )


HEADS = {"linear": linear, "dueling": dueling}
