"""Converts between an agent's choices and an environment's actions.

An action has one or more factors, each with its own choices: `Discrete` has one factor,
`MultiDiscrete` one per entry, `MultiBinary` one per bit, and a bounded `Box` one per dimension,
divided into bins. The value of a joint action is the mean of its factors' values, so that the best
joint action consists of the best choice of each factor (decoupled Q-networks, Seyde et al. 2023,
arXiv 2210.12566, equation 3).
"""

import math
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from ..errors import UsageError
from ..spaces import Box, Leaf, factors
from ..types import AnyArray

Bins = int | tuple[int, ...]


class Actions(eqx.Module):
    """Converts actions of a space to choices of `F` factors, and back.

    **Attributes:**

    - `space`: one agent's action space.
    - `bins`: choices per dimension of a `Box`, evenly spaced from its lower to its upper bound: 2
        are its ends (bang-bang control, Seyde et al. 2021, arXiv 2111.02552). One number for all
        dimensions, or one each.
    """

    space: Leaf = eqx.field(static=True)
    bins: Bins = eqx.field(static=True, default=2)

    def __check_init__(self):
        if isinstance(self.bins, int) or not isinstance(self.space, Box):
            return
        size = math.prod(self.space.shape)
        if len(self.bins) != size:
            raise UsageError(
                f"bins={list(self.bins)} are {len(self.bins)} numbers, but actions have {size} "
                "dimensions: give one number each, or one for all"
            )

    @property
    def choices(self) -> tuple[int, ...]:
        """The number of choices of each factor."""
        if not isinstance(self.space, Box):
            return factors(self.space)
        size = math.prod(self.space.shape)
        return (self.bins,) * size if isinstance(self.bins, int) else self.bins

    @property
    def num_factors(self) -> int:
        """`F`."""
        return len(self.choices)

    @property
    def num_choices(self) -> int:
        """`A`: the choices of all factors together."""
        return sum(self.choices)

    @property
    def has_padding(self) -> bool:
        """Whether `by_factor` pads, because factors have different numbers of choices."""
        return len(set(self.choices)) > 1

    @property
    def is_rounded(self) -> bool:
        """Whether `encode` rounds, because the space has more actions than choices."""
        return isinstance(self.space, Box)

    def decode(self, index: Int[Array, "*lanes F"]) -> Shaped[Array, "*lanes_and_action"]:
        """The action for these choices, in the environment's form."""
        lanes, space = index.shape[:-1], self.space
        if isinstance(space, Box):
            low, step, _ = self._bins()
            high = space.high.reshape(-1).astype(np.float32)
            is_last = index == np.asarray(self.choices) - 1
            action = jnp.where(is_last, high, low + step * index)  # the exact upper bound
            return action.reshape(*lanes, *space.shape)
        return (index + self._starts).reshape(*lanes, *(space.shape or ()))

    def encode(self, action: Shaped[AnyArray, "*lanes_and_action"]) -> Int[Array, "*lanes F"]:
        """The choices for an action; for a `Box`, the nearest bins."""
        action, space = jnp.asarray(action), self.space
        own = len(space.shape or ())
        lanes = action.shape[: action.ndim - own]
        action = action.reshape(*lanes, self.num_factors)
        if isinstance(space, Box):
            low, _, width = self._bins()
            index = jnp.round((action - low) / width).astype(jnp.int32)
            return jnp.clip(index, 0, jnp.asarray(self.choices) - 1)
        return action.astype(jnp.int32) - self._starts

    def rounding(self, action: Shaped[AnyArray, "*lanes_and_action"]) -> Float[Array, "*lanes"]:
        """Root mean square distance from an action to the nearest one that has a choice.

        Each dimension is measured in units of its range; 0 except for a `Box`.
        """
        if not isinstance(self.space, Box):
            lanes = jnp.ndim(action) - len(self.space.shape or ())
            return jnp.zeros(jnp.shape(action)[:lanes])
        _, _, width = self._bins()
        range_ = (width * (np.asarray(self.choices) - 1)).astype(np.float32)
        difference = self.decode(self.encode(action)) - jnp.asarray(action)
        difference = difference / range_.reshape(self.space.shape)
        axes = tuple(range(difference.ndim - len(self.space.shape), difference.ndim))
        return jnp.sqrt(jnp.mean(jnp.square(difference), axis=axes))

    def by_factor(
        self, x: Shaped[Array, "*lanes A"], padding: float | bool
    ) -> Shaped[Array, "*lanes F C"]:
        """Splits the axis of choices by factor; factors with fewer than `C` are padded."""
        if not self.has_padding:
            return x.reshape(*x.shape[:-1], self.num_factors, -1)
        choices = np.asarray(self.choices)
        place = np.arange(choices.max()) + (np.cumsum(choices) - choices)[:, None]
        is_there = np.arange(choices.max()) < choices[:, None]
        return jnp.where(is_there, x[..., np.where(is_there, place, 0)], padding)

    def legal(self, mask: Bool[AnyArray, "*lanes A"] | None) -> Bool[Array, "*lanes F C"] | None:
        """Mask of legal choices by factor, without padding; `None` if every choice is legal.

        If a factor has no legal choice (as in some games at the end), all of its choices are legal.
        """
        if mask is None:
            if not self.has_padding:
                return None
            return self.by_factor(jnp.ones(self.num_choices, bool), False)
        by_factor = self.by_factor(jnp.asarray(mask), False)
        over = ~jnp.any(by_factor, axis=-1, keepdims=True)
        if not self.has_padding:
            return by_factor | over
        return by_factor | (over & self.by_factor(jnp.ones(self.num_choices, bool), False))

    def take(
        self, x: Float[Array, "*lanes A K"], index: Int[Array, "*lanes F"]
    ) -> Float[Array, "*lanes F K"]:
        """Selects the entries of each factor's chosen choice; NaN for a choice that is none."""
        by_factor = self.by_factor(jnp.moveaxis(x, -1, -2), 0.0)
        # As a sum, since its gradient then is no scatter, which would take three kernels.
        is_taken = index[..., None, :, None] == jnp.arange(by_factor.shape[-1])
        taken = jnp.sum(jnp.where(is_taken, by_factor, 0.0), axis=-1)
        is_choice = (index >= 0) & (index < np.asarray(self.choices))
        return jnp.moveaxis(jnp.where(is_choice[..., None, :], taken, jnp.nan), -2, -1)

    @property
    def _starts(self) -> Int[np.ndarray, "#F"]:
        """The environment's number for the first choice of each factor."""
        return np.reshape(getattr(self.space, "start", 0), -1).astype(np.int32)

    def _bins(self) -> tuple[Float[np.ndarray, " F"], ...]:
        """The lowest bin of each dimension, the distance between bins, and a nonzero divisor.

        The divisor is the distance, or 1 where that is 0.
        """
        assert isinstance(self.space, Box)
        low = self.space.low.reshape(-1).astype(np.float32)
        high = self.space.high.reshape(-1).astype(np.float32)
        step = (high - low) / (np.asarray(self.choices, np.float32) - 1)
        return low, step, np.where(step > 0, step, np.float32(1))  # 0 if the bounds are equal


def as_bins(given: Any) -> Bins:
    """Converts `bins` to Python numbers, so that it can be a static field.

    **Raises:** `UsageError` unless it is a whole number of at least 2, or a sequence of them.
    """
    is_list = isinstance(given, Iterable)
    sizes: tuple[Any, ...] = tuple(given) if is_list else (given,)
    if not all(isinstance(size, int | np.integer) and size >= 2 for size in sizes):
        raise UsageError(f"bins={given}: give a whole number of at least 2, or a list of them")
    sizes = tuple(map(int, sizes))
    return sizes if is_list else sizes[0]
