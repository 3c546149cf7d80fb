"""Mixers: what the agents of a team learn together.

A mixer turns the values of `M` agents into `K`: one for the team, or one for each agent. An agent
on its own is a team of one. To add one: a class here, and a line in `MIXERS`.
"""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractClassVar
from jaxtyping import Array, Float, PRNGKeyArray

from ..errors import check_whole
from ..nets.layers import AbstractLayer, Activation, Linear, Sequential
from ..types import AnyArray
from .parts import make_part


class AbstractMixer(eqx.Module):
    """From agents' values to those that are regressed on targets.

    Its inexact arrays are parameters, trained with those of the network.

    **Attributes:** `is_joint`: whether `K` is 1, a value of the team that learns from the team's
    reward; else each agent's value learns from its own.
    """

    is_joint: AbstractClassVar[bool]

    @abc.abstractmethod
    def mix(
        self,
        values: Float[Array, "*lanes M"],
        global_state: Float[AnyArray, "*lanes S"] | None = None,
    ) -> Float[Array, "*lanes K"]:
        """Mixes values of actions, chosen or best; those of agents that do not act are 0."""


class Independent(AbstractMixer):
    """Each agent learns of its own reward, or the team's where there is no other (Tan 1993)."""

    is_joint: ClassVar[bool] = False

    def mix(
        self,
        values: Float[Array, "*lanes M"],
        global_state: Float[AnyArray, "*lanes S"] | None = None,
    ) -> Float[Array, "*lanes M"]:
        return values


class VDN(AbstractMixer):
    """Value decomposition (Sunehag et al. 2017): the team's Q is the sum of its agents'."""

    is_joint: ClassVar[bool] = True

    def mix(
        self,
        values: Float[Array, "*lanes M"],
        global_state: Float[AnyArray, "*lanes S"] | None = None,
    ) -> Float[Array, "*lanes 1"]:
        return jnp.sum(values, axis=-1, keepdims=True)


class QMIX(AbstractMixer):
    """A monotone mixing network (Rashid et al. 2018, arXiv 1803.11485, §4).

    The team's Q is that of a network of two layers, with ELU between them, whose inputs are the
    agents' values. Its weights and biases are outputs of *hypernetworks* of the global state, the
    weights as absolute values: the team's Q never falls where an agent's rises, and so each agent's
    best action is its part of the team's best.

    The scale of states differs much from environment to environment, and the outcome is quadratic
    in it: a state is first brought to a root mean square below 1, `s / sqrt(1 + mean(s²))`, from
    which it could be told again. Parameters start as in PyMARL, the authors' code: uniform within
    `1 / sqrt(inputs)`, biases too.
    """

    is_joint: ClassVar[bool] = True

    first_weight: AbstractLayer
    first_bias: AbstractLayer
    last_weight: AbstractLayer
    last_bias: AbstractLayer

    def __init__(
        self,
        num_agents: int,
        state_size: int,
        *,
        key: PRNGKeyArray,
        embed_size: int = 32,
        hypernetwork_size: int | None = None,
    ):
        """**Arguments:**

        - `num_agents`, `state_size`: `M` and `S`.
        - `embed_size`: units of the mixing network between its layers, and of the hidden layer of
            the hypernetwork of its last bias.
        - `hypernetwork_size`: units of the hidden layer of the hypernetworks of weights (with
            ReLU). `None`: they have none, and are linear, as in the paper.

        **Raises:** `UsageError` for sizes that are not whole numbers of at least 1.
        """
        sizes = {"num_agents": num_agents, "state_size": state_size, "embed_size": embed_size}
        if hypernetwork_size is not None:
            sizes["hypernetwork_size"] = hypernetwork_size
        check_whole(**sizes)
        keys = jax.random.split(key, 4)
        hidden = [] if hypernetwork_size is None else [hypernetwork_size]
        self.first_weight = _mlp([state_size, *hidden, num_agents * embed_size], keys[0])
        self.first_bias = _mlp([state_size, embed_size], keys[1])
        self.last_weight = _mlp([state_size, *hidden, embed_size], keys[2])
        self.last_bias = _mlp([state_size, embed_size, 1], keys[3])

    def mix(
        self,
        values: Float[Array, "*lanes M"],
        global_state: Float[AnyArray, "*lanes S"] | None = None,
    ) -> Float[Array, "*lanes 1"]:
        assert global_state is not None, "QMIX mixes by a global state"
        square = jnp.mean(jnp.square(global_state), axis=-1, keepdims=True)
        state = global_state * jax.lax.rsqrt(1 + square)
        first_weight = jnp.abs(_apply(self.first_weight, state))
        first_weight = first_weight.reshape(*values.shape, -1)
        first_bias = _apply(self.first_bias, state)
        hidden = jax.nn.elu(jnp.einsum("...m,...me->...e", values, first_weight) + first_bias)
        last_weight = jnp.abs(_apply(self.last_weight, state))
        mixed = jnp.sum(hidden * last_weight, axis=-1, keepdims=True)
        return mixed + _apply(self.last_bias, state)


def _mlp(sizes: list[int], key: PRNGKeyArray) -> AbstractLayer:
    """Linear layers between these sizes, with ReLU between them."""
    keys = jax.random.split(key, len(sizes) - 1)
    first, *rest = map(_linear, sizes[:-1], sizes[1:], keys)
    return Sequential((first, *(layer for one in rest for layer in (Activation("relu"), one))))


def _linear(inputs: int, outputs: int, key: PRNGKeyArray) -> Linear:
    """Biases are drawn as well: of a state of zeros all weights would be 0, and learn nothing."""
    layer, bound = Linear(inputs, outputs, key=key), 1 / math.sqrt(inputs)
    weight_key, bias_key = jax.random.split(key)
    weight = jax.random.uniform(weight_key, layer.weight.shape, minval=-bound, maxval=bound)
    bias = jax.random.uniform(bias_key, layer.bias.shape, minval=-bound, maxval=bound)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))


def _apply(layer: AbstractLayer, x: Float[AnyArray, "*lanes S"]) -> Float[Array, "*lanes outputs"]:
    # A layer wants a batch. To make one axis of all lanes would mix those of several devices.
    return layer(jnp.asarray(x)[None], layer.initial_statistics())[0][0]


MIXERS: dict[str, Callable[..., AbstractMixer]] = {
    "independent": Independent,
    "vdn": VDN,
    "qmix": QMIX,
}


def make_mixer(
    given: str | Mapping[str, Any] | AbstractMixer,
    *,
    num_agents: int,
    state_size: int,
    key: PRNGKeyArray,
) -> AbstractMixer:
    """A mixer: a name of `MIXERS`, a mapping of `"name"` and options, or an object.

    **Arguments:**

    - `num_agents`: `M`; 1 where there is no team.
    - `state_size`: `S`, of the global state. Where an environment has none, an agent gives all
        agents' observations side by side.
    - `key`: for the parameters.

    **Raises:** `UsageError` for a name or an option that is not known.
    """
    context = {"num_agents": num_agents, "state_size": state_size, "key": key}
    return make_part("mixer", given, AbstractMixer, MIXERS, **context)
