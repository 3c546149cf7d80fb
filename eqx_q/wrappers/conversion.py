"""Converts observations, masks and actions between JAX and environments outside it."""

import dataclasses
import itertools
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import gymnasium
import jax
import numpy as np
from jaxtyping import Bool, PyTree, Shaped

from .. import spaces
from ..errors import UsageError
from ..spaces import Box, Leaf, MultiBinary, MultiDiscrete, Space, factors
from ..types import AnyArray


def as_taken(space: gymnasium.Space, action: AnyArray) -> Shaped[np.ndarray, "..."]:
    """Converts actions to the type and bounds of `space`, the environment's own."""
    action = np.asarray(action).astype(space.dtype)
    if isinstance(space, gymnasium.spaces.Box):  # rounding may have exceeded its bounds
        action = np.clip(action, space.low, space.high)
    return action


def read_mask(actions: Leaf, given: Any) -> Bool[np.ndarray, " A"]:
    """Converts a mask, in any of the usual forms, to one flag per choice.

    For `Discrete` it is an array; for `MultiDiscrete` arrays nested like its choices, or one for
    all; for `MultiBinary` the same (off and on of each bit), or Gymnasium's array with the value
    that each bit must have, and 2 for either.

    **Raises:** `UsageError` if it has another number of choices.
    """
    sizes = factors(actions)
    mask = np.concatenate([np.ravel(np.asarray(part)) for part in jax.tree.leaves(given)])
    if isinstance(actions, MultiBinary) and len(mask) == len(sizes):
        mask = np.stack([mask != 1, mask != 0], axis=-1).ravel()
    if len(mask) != sum(sizes):
        raise UsageError(
            f"an action mask has {len(mask)} entries, but there are {sum(sizes)} choices: give one "
            "entry per choice"
        )
    return np.asarray(complete(actions, mask.astype(bool), np))


def complete(
    actions: Leaf, mask: Bool[AnyArray, "*lanes A"], numpy: ModuleType
) -> Bool[AnyArray, "*lanes A"]:
    """`mask`, with all choices of a factor legal if none is (as when a game is over)."""
    ends = itertools.accumulate(factors(actions), initial=0)
    parts = [mask[..., start:end] for start, end in itertools.pairwise(ends)]
    return numpy.concatenate([x | ~x.any(-1, keepdims=True) for x in parts], axis=-1)


def write_mask(actions: Leaf, mask: Bool[AnyArray, " A"]) -> Any:
    """Converts `mask` to Gymnasium's form, for `actions.sample`."""
    flags = np.asarray(mask, np.int8)
    if isinstance(actions, MultiDiscrete):
        parts = iter(np.split(flags, np.cumsum(factors(actions))[:-1]))
        return _nested(actions.nvec.shape, parts)
    if isinstance(actions, MultiBinary):
        off, on = np.moveaxis(flags.reshape(*actions.shape, 2), -1, 0)
        return np.where(off & on, 2, on).astype(np.int8)
    return flags


def _nested(shape: tuple[int, ...], parts: Any) -> tuple:
    if len(shape) == 1:
        return tuple(next(parts) for _ in range(shape[0]))
    return tuple(_nested(shape[1:], parts) for _ in range(shape[0]))


def legal_action(actions: Leaf, mask: Bool[AnyArray, " A"] | None) -> Shaped[np.ndarray, "..."]:
    """The first legal action."""
    if isinstance(actions, Box):
        return actions.low
    sizes = factors(actions)
    parts = [np.ones(n) for n in sizes]
    if mask is not None:
        parts = np.split(np.asarray(mask), np.cumsum(sizes)[:-1])
    chosen = np.reshape([int(np.argmax(part)) for part in parts], actions.shape or ())
    start = getattr(actions, "start", 0)
    return np.asarray(chosen + start, actions.dtype)


def arrays(space: Space, obs: Any, *axes: int) -> PyTree[np.ndarray]:
    """The parts of an observation in `space`, as NumPy arrays of its types with leading `axes`.

    **Raises:** `UsageError` if a part is missing or has another shape.
    """
    found, structure = jax.tree.flatten(spaces.select(space, obs))
    cast = []
    for (path, leaf), x in zip(spaces.leaves(space), found, strict=True):
        if x.shape != (*axes, *(leaf.shape or ())):
            where = f" at '{path}'" if path else ""
            raise UsageError(
                f"an observation has shape {x.shape[len(axes) :]}{where}, but its space has shape "
                f"{leaf.shape}: correct the environment's observation_space"
            )
        cast.append(np.asarray(x, jax.dtypes.canonicalize_dtype(leaf.dtype)))
    return jax.tree.unflatten(structure, cast)


@dataclasses.dataclass(frozen=True)
class Senses:
    """Splits an environment's observations into what the agent sees and its action mask.

    **Attributes:**

    - `space`: the space of what the agent sees.
    - `actions`: its action space.
    - `tells_mask`: whether observations are a `Dict` with an entry `"action_mask"` of one number
        per choice. The agent does not see this entry.
    - `sees_one`: whether the only other entry is `"observation"`, by convention. The agent then
        sees its content instead of a `Dict`.
    """

    space: Space
    actions: Leaf
    tells_mask: bool
    sees_one: bool

    @classmethod
    def of(cls, space: gymnasium.Space, actions: Leaf, leave_out: Iterable[str] = ()) -> "Senses":
        """The `Senses` of an environment, without the entries `leave_out`, given by path."""
        space = spaces.without(space, leave_out)
        tells_mask = sees_one = False
        if isinstance(space, gymnasium.spaces.Dict) and "action_mask" in space.spaces:
            mask = (np.prod(leaf.shape or ()) for _, leaf in spaces.leaves(space["action_mask"]))
            tells_mask = sum(mask) in _mask_lengths(actions)
        if tells_mask:
            space = spaces.without(space, ["action_mask"])
            assert isinstance(space, gymnasium.spaces.Dict)
            sees_one = list(space) == ["observation"]
            space = space["observation"] if sees_one else space
        return cls(spaces.of_observations(space), actions, tells_mask, sees_one)

    def seen(self, obs: Any) -> Any:
        """The visible part of an observation, possibly with extra entries."""
        return obs["observation"] if self.sees_one else obs

    def see(self, obs: Any, *axes: int) -> PyTree[np.ndarray]:
        """The visible arrays of an observation, with leading `axes`."""
        return arrays(self.space, self.seen(obs), *axes)

    def mask(self, obs: Any, info: Any) -> Bool[np.ndarray, " A"] | None:
        """The mask of legal actions, from one lane's observation or `info["action_mask"]`."""
        given = obs["action_mask"] if self.tells_mask else info.get("action_mask")
        return None if given is None else read_mask(self.actions, given)

    def expect_no_mask(self, info: Any) -> None:
        """Raises `UsageError` if `info` has a mask, though the first reset had none."""
        if info.get("action_mask") is not None and factors(self.actions):
            raise UsageError(
                "info['action_mask'] first appears after the first reset, which is too late: "
                "include it in the info of every reset, too"
            )


def _mask_lengths(actions: Leaf) -> tuple[int, ...]:
    sizes = factors(actions)
    if isinstance(actions, MultiBinary):
        return sum(sizes), len(sizes)
    return (sum(sizes),) if sizes else ()
