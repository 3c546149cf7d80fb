"""Heads: from features `[B, H]` to values `[B, A, K]`, `K` numbers for each of `A` choices."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from ..errors import check_whole
from .layers import (
    AbstractLayer,
    Activation,
    Batch,
    BatchMask,
    Linear,
    Sequential,
    make_norm,
)


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


class Hidden(NamedTuple):
    """Hidden layers of a head: their sizes, normalisation and activation."""

    sizes: tuple[int, ...] = ()
    norm: str = "layer_norm"
    activation: str = "relu"

    def stream(self, inputs: int, outputs: int, *, key: PRNGKeyArray, init: str) -> AbstractLayer:
        """Hidden layers, and a linear layer to `outputs` numbers."""
        check_whole(**{f"head_sizes[{i}]": size for i, size in enumerate(self.sizes)})
        if not self.sizes:
            return Linear(inputs, outputs, key=key, init=init)
        keys = jax.random.split(key, len(self.sizes) + 1)
        layers: list[AbstractLayer] = []
        for size, k in zip(self.sizes, keys, strict=False):
            layers.append(Linear(inputs, size, key=k, init=init))
            layers += [make_norm(self.norm, (size,)), Activation(self.activation)]
            inputs = size
        return Sequential((*layers, Linear(inputs, outputs, key=keys[-1], init=init)))


_DIRECT = Hidden()


def linear(
    features: int,
    choices: tuple[int, ...],
    num_values: int,
    *,
    key: PRNGKeyArray,
    init: str,
    hidden: Hidden = _DIRECT,
) -> LinearHead:
    """One linear layer, after the hidden ones."""
    outputs = sum(choices) * num_values
    return LinearHead(hidden.stream(features, outputs, key=key, init=init), num_values)


def dueling(
    features: int,
    choices: tuple[int, ...],
    num_values: int,
    *,
    key: PRNGKeyArray,
    init: str,
    hidden: Hidden = _DIRECT,
) -> Dueling:
    """A linear layer for the value and one for the advantages, each with its own hidden layers."""
    value_key, advantage_key = jax.random.split(key)
    return Dueling(
        hidden.stream(features, num_values, key=value_key, init=init),
        hidden.stream(features, sum(choices) * num_values, key=advantage_key, init=init),
        choices,
    )


HEADS = {"linear": linear, "dueling": dueling}
