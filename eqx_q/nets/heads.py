"""Heads: from features `[B, H]` to values `[B, A, K]`, `K` numbers for each of `A` choices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .layers import AbstractLayer, Batch, BatchMask, Linear


class LinearHead(AbstractLayer):
    """One linear layer, with outputs ordered choice by choice."""

    linear: AbstractLayer
    num_values: int = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return self.linear.initial_statistics()

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        values, statistics = self.linear(x, statistics, batch_mask)
        return values.reshape(x.shape[0], -1, self.num_values), statistics


class Dueling(AbstractLayer):
    """`Q(s, a) = V(s) + A(s, a) - mean_a A(s, a)` (Wang et al. 2016, equation 9).

    The mean is over the choices of each factor of an action; all factors share the value (Tavakoli
    et al. 2018, equation 1).
    """

    value: AbstractLayer
    advantage: AbstractLayer
    choices: tuple[int, ...] = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return self.value.initial_statistics(), self.advantage.initial_statistics()

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        value, of_value = self.value(x, statistics[0], batch_mask)
        advantage, of_advantage = self.advantage(x, statistics[1], batch_mask)
        value = value[:, None]
        advantage = advantage.reshape(x.shape[0], sum(self.choices), -1)
        factors = jnp.split(advantage, np.cumsum(self.choices)[:-1], axis=1)
        values = [value + factor - jnp.mean(factor, axis=1, keepdims=True) for factor in factors]
        return jnp.concatenate(values, axis=1), (of_value, of_advantage)


def linear(
    features: int, choices: tuple[int, ...], num_values: int, *, key: PRNGKeyArray, init: str
) -> LinearHead:
    """One linear layer."""
    return LinearHead(Linear(features, sum(choices) * num_values, key=key, init=init), num_values)


def dueling(
    features: int, choices: tuple[int, ...], num_values: int, *, key: PRNGKeyArray, init: str
) -> Dueling:
    """A linear layer for the value, and one for the advantages."""
    value_key, advantage_key = jax.random.split(key)
    return Dueling(
        Linear(features, num_values, key=value_key, init=init),
        Linear(features, sum(choices) * num_values, key=advantage_key, init=init),
        choices,
    )


HEADS = {"linear": linear, "dueling": dueling}
