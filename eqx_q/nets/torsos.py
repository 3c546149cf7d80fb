"""Torsos: from an encoder's features `[B, inputs]` to features `[B, size]` for memory and head."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree

from ..errors import UsageError, check_whole
from .layers import AbstractLayer, Activation, Batch, BatchMask, Linear, Sequential, make_norm


class MultiSkip(AbstractLayer):
    """Residual blocks that all see the first features.

    Multi-skip residual connections (Castanyer et al. 2025, arXiv 2506.15544, §5):

        z = first(x),    h_0 = z,    h_i = h_{i-1} + block_i(h_{i-1}) + z

    The last `h` is activated. The skip from `z` keeps gradients alive in deep torsos.
    """

    first: AbstractLayer
    blocks: tuple[AbstractLayer, ...]
    activation: AbstractLayer

    def initial_statistics(self) -> PyTree:
        first = self.first.initial_statistics()
        return first, tuple(block.initial_statistics() for block in self.blocks)

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        of_first, of_blocks = statistics
        z, of_first = self.first(x, of_first, batch_mask)
        h, updated = z, []
        for block, kept in zip(self.blocks, of_blocks, strict=True):
            y, kept = block(h, kept, batch_mask)
            h = h + y + z
            updated.append(kept)
        y, _ = self.activation(h, None)
        return y, (of_first, tuple(updated))


class Simplicial(AbstractLayer):
    """Simplicial embedding: a softmax over each group of neighbouring features.

    Lavoie et al. 2022 (arXiv 2204.00616); for reinforcement learning, Obando-Ceron et al. 2025
    (arXiv 2510.13704). Features become sparse: those of a group are positive and add up to 1.
    """

    group: int = eqx.field(static=True)
    temperature: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        if not self.temperature > 0:
            raise UsageError(f"simplex_temperature={self.temperature}: give a positive number")

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        groups = x.reshape(x.shape[0], -1, self.group)
        return jax.nn.softmax(groups / self.temperature, axis=-1).reshape(x.shape), None


def multi_skip(
    inputs: int,
    *,
    key: PRNGKeyArray,
    size: int = 512,
    num_blocks: int = 3,
    norm: str = "layer_norm",
    activation: str = "relu",
    init: str = "orthogonal",
) -> MultiSkip:
    """`MultiSkip` of `num_blocks` blocks with two linear layers of `size` each."""
    check_whole(size=size, num_blocks=num_blocks)
    first_key, *keys = jax.random.split(key, 1 + 2 * num_blocks)
    linear = partial(Linear, init=init)

    def layer(inputs: int, key: PRNGKeyArray) -> tuple[AbstractLayer, ...]:
        return linear(inputs, size, key=key), make_norm(norm, (size,))

    act = Activation(activation)
    blocks = [
        Sequential((act, *layer(size, first), act, *layer(size, second)))
        for first, second in zip(keys[::2], keys[1::2], strict=True)
    ]
    return MultiSkip(Sequential(layer(inputs, first_key)), tuple(blocks), act)


TORSOS: dict[str, Callable[..., AbstractLayer]] = {"multi_skip": multi_skip}
