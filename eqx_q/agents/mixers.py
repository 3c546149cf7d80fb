"""Mixers: combine the values of a team's agents.

A mixer turns the values of `M` agents into `K`: one for the team, or one for each agent. A single
agent is a team of one. To add one: write a class here, and add a line to `MIXERS`.
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
    """Maps agents' values to the values that are regressed on targets.

    Its inexact arrays are parameters, trained with those of the network.

    **Attributes:** `is_joint`: whether `K` is 1: one value for the team, learnt from the team's
    reward. Otherwise each agent's value is learnt from its own reward.
    """

    is_joint: AbstractClassVar[bool]

    @abc.abstractmethod
    def mix(
        self,
        values: Float[Array, "*lanes M"],
        global_state: Float[AnyArray, "*lanes S"] | None = None,
    ) -> Float[Array, "*lanes K"]:
        """Mixes the values of chosen or best actions; values of inactive agents are 0."""


class Independent(AbstractMixer):
    """Each agent learns from its own reward if there is one, else the team's (Tan 1993)."""

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

    The team's Q is the output of a network of two layers with ELU between them, whose inputs are
    the agents' values. *Hypernetworks* of the global state output its weights and biases. Weights
    are absolute values, so the team's Q never falls when an agent's rises, and each agent's best
    action is its part of the team's best.

    The scale of states varies between environments, and the output is quadratic in it. So a state
    is first mapped to a root mean square below 1, `s / sqrt(1 + mean(s²))`, which is invertible.
    Parameters are initialised as in PyMARL, the authors' code: uniform within `1 / sqrt(inputs)`,
    biases too.
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
        - `embed_size`: hidden units of the mixing network, and of the hypernetwork for its last
            bias.
        - `hypernetwork_size`: hidden units, with ReLU, of the hypernetworks for weights. `None`:
            these are linear, as in the paper.

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
        assert global_state is not None, "QMIX needs a global state"
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
    """Linear layers of these sizes, with ReLU between them."""
    keys = jax.random.split(key, len(sizes) - 1)
    first, *rest = map(_linear, sizes[:-1], sizes[1:], keys)
    return Sequential((first, *(layer for one in rest for layer in (Activation("relu"), one))))


def _linear(inputs: int, outputs: int, key: PRNGKeyArray) -> Linear:
    """A linear layer with random biases: without, a zero state would get weights of 0 for ever."""
    layer, bound = Linear(inputs, outputs, key=key), 1 / math.sqrt(inputs)
    weight_key, bias_key = jax.random.split(key)
    weight = jax.random.uniform(weight_key, layer.weight.shape, minval=-bound, maxval=bound)
    bias = jax.random.uniform(bias_key, layer.bias.shape, minval=-bound, maxval=bound)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))


def _apply(layer: AbstractLayer, x: Float[AnyArray, "*lanes S"]) -> Float[Array, "*lanes outputs"]:
    # A layer needs a batch axis. Flattening the lanes would move them between devices.
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
    """Makes a mixer from a name, a mapping with `"name"` and options, or an object.

    **Arguments:**

    - `num_agents`: `M`; 1 without a team.
    - `state_size`: `S`, size of the global state. Without one in the environment, an agent passes
        all agents' observations concatenated.
    - `key`: for the parameters.

    **Raises:** `UsageError` for an unknown name or option.
    """
    context = {"num_agents": num_agents, "state_size": state_size, "key": key}
    return make_part("mixer", given, AbstractMixer, MIXERS, **context)
