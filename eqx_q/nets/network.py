"""The network contract: what computes Q."""

import abc

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ..types import Memory


class NetworkOutput(eqx.Module):
    """What a network gives.

    **Fields:** `q_values`; `memory` after the last step; `statistics` to keep; `quantiles` of the
    return where it computes its distribution, of which `q_values` are the means; `features` that
    the last layer reads, where the network tells them.
    """

    q_values: Float[Array, "T B A"]
    memory: Memory = None
    statistics: PyTree = None
    quantiles: Float[Array, "T B A K"] | None = None
    features: Float[Array, "T B F"] | None = None


class AbstractQNetwork(eqx.Module):
    """Computes Q-values of sequences. One call serves acting (`T = 1`) and learning.

    Parameters are the module's inexact arrays. Running normalisation statistics are not
    parameters: they come in as `statistics` and go out in the output, so that gradients, `vmap`
    and checkpoints need no special case for them.
    """

    @abc.abstractmethod
    def initial_statistics(self) -> PyTree:
        """Running statistics before any data; `None` where the network keeps none."""

    @abc.abstractmethod
    def initial_memory(self, num_lanes: int) -> Memory:
        """Memory at the start of an episode, with a leading lane axis; `None` without memory."""

    @abc.abstractmethod
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
        """**Arguments:**

        - `obs`: observations, time-major, as the environment gives them (images `uint8`).
        - `statistics`: running normalisation statistics.
        - `memory`: memory before `obs[0]`.
        - `first`: where an episode starts: memory is reset *before* that observation.
        - `last_action`, `last_reward`: what led to each observation, given to networks with memory:
            -1 and 0 at an episode's start. The reward is `None` where the caller has none.
        - `batch_mask`: given in training only. Normalisation then uses (and updates the running
            statistics with) the statistics of this batch, over the rows that are `True`.
        """
