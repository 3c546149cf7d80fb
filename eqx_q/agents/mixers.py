"""Mixers: what the agents of a team learn together.

A mixer makes `K` values of those of `M` agents: one for the team, or one for each. An agent on its
own is a team of one.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..errors import UnknownNameError, UsageError
from ..types import TimeStep


class AbstractMixer(eqx.Module):
    """From agents' values to those that are regressed on targets. It has no parameters."""

    def __check_init__(self):
        if jax.tree.leaves(eqx.filter(self, eqx.is_array)):
            raise UsageError(f"{type(self).__name__} holds arrays, and a mixer is not trained")

    @abc.abstractmethod
    def mix(self, values: Float[Array, "*lanes M"]) -> Float[Array, "*lanes K"]:
        """Mixes values of actions, chosen or best; those of agents that do not act are 0."""

    @abc.abstractmethod
    def reward(self, timestep: TimeStep) -> Float[Array, "*lanes K"]:
        """What each mixed value is to predict the sum of (`K` may be 1 for all alike)."""

    @abc.abstractmethod
    def acts(self, acting: Bool[Array, "*lanes M"]) -> Bool[Array, "*lanes K"]:
        """Which mixed values there is something to learn of, given which agents acted."""


class VDN(AbstractMixer):
    """Value decomposition (Sunehag et al. 2017): the team's Q is the sum of its agents'."""

    def mix(self, values: Float[Array, "*lanes M"]) -> Float[Array, "*lanes 1"]:
        return jnp.sum(values, axis=-1, keepdims=True)

    def reward(self, timestep: TimeStep) -> Float[Array, "*lanes 1"]:
        return jnp.asarray(timestep.reward)[..., None]

    def acts(self, acting: Bool[Array, "*lanes M"]) -> Bool[Array, "*lanes 1"]:
        return jnp.any(acting, axis=-1, keepdims=True)


class Independent(AbstractMixer):
    """Each agent learns of its own reward, or the team's where there is no other (Tan 1993)."""

    def mix(self, values: Float[Array, "*lanes M"]) -> Float[Array, "*lanes M"]:
        return values

    def reward(self, timestep: TimeStep) -> Float[Array, "*lanes K"]:
        if timestep.agent_reward is None:
            return jnp.asarray(timestep.reward)[..., None]
        return jnp.asarray(timestep.agent_reward)

    def acts(self, acting: Bool[Array, "*lanes M"]) -> Bool[Array, "*lanes M"]:
        return acting


MIXERS = {"vdn": VDN, "independent": Independent}


def make_mixer(name: str) -> AbstractMixer:
    """A mixer of `MIXERS`, by name."""
    if name not in MIXERS:
        raise UnknownNameError("mixer", name, MIXERS)
    return MIXERS[name]()
