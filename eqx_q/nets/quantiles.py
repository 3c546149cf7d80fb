"""Networks that compute the distribution of the return (Dabney et al. 2018, arXiv 1710.10044)."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ..types import Memory
from .network import AbstractQNetwork, NetworkOutput


class Quantiles(AbstractQNetwork):
    """`K` quantiles of the return of each action; their mean is its Q-value (QR-DQN, §4).

    **Attributes:** `network`: gives `A * K` values, those of one action side by side.
    """

    network: AbstractQNetwork
    num_quantiles: int = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return self.network.initial_statistics()

    def initial_memory(self, num_lanes: int) -> Memory:
        return self.network.initial_memory(num_lanes)

    def __call__(
        self,
        obs: Shaped[Array, "T B *obs"],
        statistics: PyTree,
        memory: Memory = None,
        *,
        first: Bool[Array, "T B"] | None = None,
        last_action: Int[Array, "T B"] | None = None,
        last_reward: Float[Array, "T B"] | None = None,
        batch_mask: Bool[Array, "T B"] | None = None,
    ) -> NetworkOutput:
        output = self.network(
            obs,
            statistics,
            memory,
            first=first,
            last_action=last_action,
            last_reward=last_reward,
            batch_mask=batch_mask,
        )
        quantiles = output.q_values.reshape(*output.q_values.shape[:2], -1, self.num_quantiles)
        return dataclasses.replace(
            output, q_values=jnp.mean(quantiles, axis=-1), quantiles=quantiles
        )
