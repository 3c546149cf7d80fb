"""Networks without memory, and people's own modules as networks."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ..errors import UsageError
from ..types import Memory
from .layers import AbstractLayer, gather_statistics
from .network import AbstractQNetwork, NetworkOutput


class FeedForward(AbstractQNetwork):
    """Every observation by itself.

    **Attributes:** `encoder`: from observations `[B, ...]` to features `[B, F]`. `head`: from those
    to Q-values `[B, A]`.
    """

    encoder: AbstractLayer
    head: AbstractLayer

    def initial_statistics(self) -> PyTree:
        return gather_statistics(self.encoder, self.head)

    def initial_memory(self, num_lanes: int) -> None:
        return None

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
        rows = obs.reshape(-1, *obs.shape[2:])
        mask = None if batch_mask is None else batch_mask.reshape(-1)
        kept_encoder, kept_head = statistics or (None, None)
        features, kept_encoder = self.encoder(rows, kept_encoder, mask)
        q_values, kept_head = self.head(features, kept_head, mask)
        return NetworkOutput(
            q_values.reshape(*obs.shape[:2], -1),
            statistics=None if statistics is None else (kept_encoder, kept_head),
            features=features.reshape(*obs.shape[:2], -1),
        )


class FromModule(AbstractQNetwork):
    """A module that maps one observation to Q-values `[A]`, `eqx.nn.MLP` for example."""

    module: Callable[[Array], Array]

    def initial_statistics(self) -> None:
        return None

    def initial_memory(self, num_lanes: int) -> None:
        return None

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
        return NetworkOutput(jax.vmap(jax.vmap(self.module))(obs))


def as_network(module: object) -> AbstractQNetwork:
    """The module itself if it is a network, else one that maps it over time and batch.

    **Arguments:**

    - `module`: an `AbstractQNetwork`, or a module that maps *one* observation, as the environment
        gives it, to Q-values `[A]`.

    **Raises:** `UsageError` where it is neither.
    """
    if isinstance(module, AbstractQNetwork):
        return module
    if isinstance(module, eqx.Module) and callable(module):
        return FromModule(module)
    raise UsageError(
        f"a network is an Equinox module that maps one observation to Q-values, got {module!r}: "
        "name a shipped network, or define `__call__` on an eqx.Module"
    )
