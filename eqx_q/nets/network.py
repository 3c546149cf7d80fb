"""The network contract, networks composed of layers, and networks from other modules."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..errors import UsageError
from ..types import AnyArray, Observation
from .layers import AbstractLayer, one_hots
from .recurrent import AbstractRecurrence


class Inputs(eqx.Module):
    """Inputs of a network for `T` steps of `B` rows.

    **Fields:**

    - `obs`: observations, time-major, as the environment returns them (images `uint8`).
    - `first`: where an episode starts; memory is reset *before* that observation. `None`: nowhere.
    - `last_action`, `last_reward`: for networks with memory: the choice index of each factor of the
        action that led to the observation (-1 at an episode's start), and its reward (0 there).
    - `batch_mask`: in training only. Normalisation then uses the statistics of this batch, over the
        rows that are `True`, and updates the running statistics with them.
    """

    obs: Observation
    first: Bool[AnyArray, "T B"] | None = None
    last_action: Int[AnyArray, "T B F"] | None = None
    last_reward: Float[AnyArray, "T B"] | None = None
    batch_mask: Bool[AnyArray, "T B"] | None = None

    @property
    def num_steps_and_rows(self) -> tuple[int, int]:
        """`T` and `B`."""
        return jax.tree.leaves(self.obs)[0].shape[:2]


class NetworkOutput(eqx.Module):
    """A network's output.

    **Fields:** raw `values`, `K` numbers for each of the `A` choices, which the agent's value
    interprets; `memory` after the last step; `statistics` to keep; `features`, the head's input,
    if the network reports it.
    """

    values: Float[Array, "T B A K"]
    memory: PyTree = ()
    statistics: PyTree = None
    features: Float[Array, "T B H"] | None = None


class AbstractQNetwork(eqx.Module):
    """Computes values of sequences. One call serves acting (`T = 1`) and learning.

    Parameters are the module's inexact arrays. Running normalisation statistics are not parameters:
    they are passed in as `statistics` and returned in the output, so that gradients, `vmap` and
    checkpoints need no special case for them.
    """

    @abc.abstractmethod
    def initial_statistics(self) -> PyTree:
        """Running statistics before any data; a tree without leaves if there are none."""

    @abc.abstractmethod
    def initial_memory(self, num_lanes: int) -> PyTree:
        """Memory at an episode's start, with a leading axis of rows; `()` without memory."""

    @abc.abstractmethod
    def __call__(self, inputs: Inputs, statistics: PyTree, memory: PyTree) -> NetworkOutput:
        """**Arguments:**

        - `inputs`: of `T` steps of `B` rows.
        - `statistics`: running normalisation statistics.
        - `memory`: memory before the first step.
        """


class Network(AbstractQNetwork):
    """Encoder, stacked recurrences, head.

    The first recurrence reads the features of the observation, then the one-hot action that led to
    it (with `last_action`) and its reward (with `last_reward`). The memory is a tuple with one
    entry per recurrence. Without recurrences, every observation is processed on its own.

    **Attributes:** `encoder`: from observations, whose leaves are `[B, ...]`, to features `[B, H]`.
    `head`: from features to values `[B, A, K]`. `choices`: number of choices of each factor.
    """

    encoder: AbstractLayer
    recurrences: tuple[AbstractRecurrence, ...]
    head: AbstractLayer
    choices: tuple[int, ...] = eqx.field(static=True)
    last_action: bool = eqx.field(static=True, default=False)
    last_reward: bool = eqx.field(static=True, default=False)

    def initial_statistics(self) -> PyTree:
        return self.encoder.initial_statistics(), self.head.initial_statistics()

    def initial_memory(self, num_lanes: int) -> tuple[PyTree[Array], ...]:
        return tuple(recurrence.initial_memory(num_lanes) for recurrence in self.recurrences)

    def __call__(self, inputs: Inputs, statistics: PyTree, memory: PyTree) -> NetworkOutput:
        """See `AbstractQNetwork`.

        **Raises:** `UsageError` if the network needs an input that is `None`.
        """
        steps_and_rows = inputs.num_steps_and_rows
        of_encoder, of_head = statistics
        mask = None if inputs.batch_mask is None else jnp.reshape(inputs.batch_mask, -1)
        rows = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), inputs.obs)
        x, of_encoder = self.encoder(rows, of_encoder, mask)
        x = self._with_last(x.reshape(*steps_and_rows, -1), inputs)
        first = jnp.zeros(steps_and_rows, bool) if inputs.first is None else inputs.first
        after = []
        for recurrence, before in zip(self.recurrences, memory, strict=True):
            x, before = recurrence(x, before, jnp.asarray(first))
            after.append(before)
        values, of_head = self.head(x.reshape(-1, x.shape[-1]), of_head, mask)
        values = values.reshape(*steps_and_rows, *values.shape[1:])
        return NetworkOutput(values, tuple(after), (of_encoder, of_head), x)

    def _with_last(self, features: Float[Array, "T B _"], inputs: Inputs) -> Float[Array, "T B _"]:
        seen = [features]
        if self.last_action:
            action = jnp.asarray(_given("last_action", inputs.last_action))
            seen.append(one_hots(action, self.choices))
        if self.last_reward:
            seen.append(jnp.asarray(_given("last_reward", inputs.last_reward))[..., None])
        return jnp.concatenate(seen, axis=-1)


def _given(name: str, value: AnyArray | None) -> AnyArray:
    if value is None:
        raise UsageError(
            f"this network needs {name}, which is missing: pass {name}, or make the network with "
            f"{name}=False"
        )
    return value


class FromModule(AbstractQNetwork):
    """A module that maps one observation to values, for example `eqx.nn.MLP`.

    **Attributes:** `module`: returns `[A]`, `[A, K]` or `[A * K]`, ordered choice by choice.
    `num_values`: `K`.
    """

    module: Callable[[Any], Array]
    num_values: int = eqx.field(static=True, default=1)

    def initial_statistics(self) -> None:
        return None

    def initial_memory(self, num_lanes: int) -> tuple[()]:
        return ()

    def __call__(self, inputs: Inputs, statistics: PyTree, memory: PyTree) -> NetworkOutput:
        values = jax.vmap(jax.vmap(self.module))(inputs.obs)
        if math.prod(values.shape[2:]) % self.num_values:
            raise UsageError(
                f"the network returns values of shape {values.shape[2:]} for one observation: it "
                f"must return {self.num_values} for each choice"
            )
        return NetworkOutput(values.reshape(*values.shape[:2], -1, self.num_values))


def as_network(module: object, num_values: int = 1) -> AbstractQNetwork:
    """Returns a network as it is, or wraps a module to map it over time and batch.

    **Arguments:**

    - `module`: an `AbstractQNetwork`, or a module that maps *one* observation, as the environment
        returns it, to values of every choice: `[A]`, `[A, K]` or `[A * K]`.
    - `num_values`: `K`.

    **Raises:** `UsageError` if it is neither.
    """
    if isinstance(module, AbstractQNetwork):
        return module
    if isinstance(module, eqx.Module) and callable(module):
        return FromModule(module, num_values)
    raise UsageError(
        f"a network must be an Equinox module that maps one observation to Q-values, got "
        f"{module!r}: name a shipped network, or define `__call__` on an eqx.Module"
    )
