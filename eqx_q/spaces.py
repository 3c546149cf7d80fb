"""Gymnasium spaces that can be static fields of a PyTree: hashable, and quick to compare.

Gymnasium's own spaces define equality without a hash, so `jit` cannot key on them.

Observations of a space are PyTrees of arrays, its *leaves*: a `Dict` is a dict, a `Tuple` a tuple,
and any other space one array: `Discrete` a whole number, `MultiDiscrete` and `MultiBinary` arrays
of whole numbers. Paths of leaves are written with dots: `"image"`, `"arm.joints"`, `"0"`; the only
leaf of a plain space has the path `""`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import gymnasium
import jax
import numpy as np
from jaxtyping import PyTree, Shaped

from .errors import UnknownNameError, UsageError
from .types import AnyArray, Observation


class Box(gymnasium.spaces.Box):
    """A hashable [`gymnasium.spaces.Box`][]."""

    def __init__(self, space: gymnasium.spaces.Box):
        super().__init__(space.low, space.high, space.shape, space.dtype.type)
        self._hash = hash((self.shape, self.dtype.str, self.low.tobytes(), self.high.tobytes()))

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)

    def __hash__(self) -> int:
        return self._hash


class Discrete(gymnasium.spaces.Discrete):
    """A hashable [`gymnasium.spaces.Discrete`][]."""

    def __init__(self, space: gymnasium.spaces.Discrete):
        super().__init__(int(space.n), start=int(space.start))

    def __hash__(self) -> int:
        return hash((int(self.n), int(self.start)))


class MultiDiscrete(gymnasium.spaces.MultiDiscrete):
    """A hashable [`gymnasium.spaces.MultiDiscrete`][]."""

    def __init__(self, space: gymnasium.spaces.MultiDiscrete):
        super().__init__(space.nvec, dtype=space.dtype.type, start=space.start)

    def __hash__(self) -> int:
        return hash((self.nvec.shape, self.nvec.tobytes(), self.start.tobytes()))


class MultiBinary(gymnasium.spaces.MultiBinary):
    """A hashable [`gymnasium.spaces.MultiBinary`][]."""

    def __init__(self, space: gymnasium.spaces.MultiBinary):
        super().__init__(space.n)

    def __hash__(self) -> int:
        return hash(self.shape)


class Dict(gymnasium.spaces.Dict):
    """A hashable [`gymnasium.spaces.Dict`][], sorted by its keys."""

    def __init__(self, space: Any):
        super().__init__({name: hashable(space[name]) for name in sorted(space)})

    def __hash__(self) -> int:
        return hash(tuple(self.spaces.items()))


class Tuple(gymnasium.spaces.Tuple):
    """A hashable [`gymnasium.spaces.Tuple`][]."""

    def __init__(self, space: Any):
        super().__init__([hashable(child) for child in space.spaces])

    def __hash__(self) -> int:
        return hash(self.spaces)


_MOST_CHOICES = 2**16  # for one integer component of an action

Leaf: TypeAlias = Box | Discrete | MultiDiscrete | MultiBinary
Space: TypeAlias = gymnasium.Space  # one of these kinds; runtime checkers cannot express `Dict`

KINDS: dict[type, type] = {
    gymnasium.spaces.Box: Box,
    gymnasium.spaces.Discrete: Discrete,
    gymnasium.spaces.MultiDiscrete: MultiDiscrete,
    gymnasium.spaces.MultiBinary: MultiBinary,
    gymnasium.spaces.Dict: Dict,
    gymnasium.spaces.Tuple: Tuple,
}
_WRAP = "wrap the environment in gymnasium.wrappers.TransformObservation"


def hashable(space: gymnasium.Space, path: str = "", in_dict: bool = False) -> Space:
    """Converts `space` to the hashable kinds of this module.

    **Arguments:** `path`, `in_dict`: its path for messages, and whether it is an entry of a `Dict`.

    **Raises:** `UsageError` for a part that is not supported (`Text`, `Sequence`, `Graph`,
    `OneOf`); the message names its path.
    """
    if type(space) in KINDS.values():
        return space
    for theirs, ours in KINDS.items():
        if isinstance(space, theirs):
            is_dict = isinstance(space, gymnasium.spaces.Dict)
            for name, child in _children(space):
                hashable(child, f"{path}.{name}".lstrip("."), is_dict)  # its error names the path
            return ours(space)
    kind = type(space).__name__
    mend = f"leave it out by its name (leave_out=['{path}'])" if in_dict else _WRAP
    what = f" ('{path}')" if path else ""
    raise UsageError(f"a space of kind {kind}{what} is not supported: {mend}")


def of_observations(space: gymnasium.Space) -> Space:
    """Converts an observation space to `hashable` kinds with the dtypes that JAX uses.

    A `Box` has `uint8`, `int32` or `float32`.

    **Raises:** `UsageError` as `hashable` does, and for an empty space.
    """
    space = map_leaves(lambda path, leaf: _cast(leaf), hashable(space))
    empty = [path for path, leaf in leaves(space) if not math.prod(leaf.shape or ())]
    if "" in empty or len(empty) == len(list(leaves(space))):
        raise UsageError(f"observations of {space} are empty: give a space with at least one value")
    if empty:
        raise UsageError(
            f"'{empty[0]}' of an observation is empty: leave it out by its name "
            f"(leave_out={empty}), or, if it is an entry of a Tuple, {_WRAP}"
        )
    return space


def of_actions(space: gymnasium.Space) -> Leaf:
    """Converts an action space: `Discrete`, `MultiDiscrete`, `MultiBinary`, or a bounded `Box`.

    A `Box` of integers becomes a `MultiDiscrete`; any other has `float32`, and bounds inside those
    of `space`.

    **Raises:** `UsageError` for an unsupported space.
    """
    kinds = (gymnasium.spaces.Dict, gymnasium.spaces.Tuple)
    if isinstance(space, kinds) or not isinstance(space, tuple(KINDS)):
        raise UsageError(
            f"actions must be Discrete, MultiDiscrete, MultiBinary or a bounded Box, got {space}: "
            "wrap the environment in gymnasium.wrappers.TransformAction"
        )
    space = hashable(space)
    if isinstance(space, Box) and not space.is_bounded():
        raise UsageError(
            f"a Box of actions is divided into bins, but {space} has no bounds: wrap the "
            "environment in gymnasium.wrappers.RescaleAction"
        )
    if isinstance(space, Box):
        low, high = space.low.astype(float), space.high.astype(float)
        if np.any(np.maximum(high - low, np.maximum(high, -low)) > np.finfo(np.float32).max):
            raise UsageError(
                f"the bounds of {space}, or the distance between them, exceed float32: wrap the "
                "environment in gymnasium.wrappers.RescaleAction"
            )
    assert isinstance(space, Leaf)
    if not math.prod(space.shape or ()):
        raise UsageError(f"actions of {space} are empty: give a space with at least one action")
    if not isinstance(space, Box):
        return space
    return _inside(space) if space.dtype.kind == "f" else _whole(space)


def _inside(space: Box) -> Box:
    """The same space in `float32`, rounded inwards.

    If no `float32` lies between the bounds, each bound is rounded to the nearest.
    """
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    up = np.where(low < space.low, np.nextafter(low, np.float32(np.inf)), low)
    down = np.where(high > space.high, np.nextafter(high, np.float32(-np.inf)), high)
    low, high = np.where(up > down, (low, high), (up, down))
    return Box(gymnasium.spaces.Box(low, high, space.shape, np.float32))


def _whole(space: Box) -> MultiDiscrete:
    low = space.low.astype(np.int64)
    choices = space.high.astype(np.int64) - low + 1
    if (choices > _MOST_CHOICES).any():
        raise UsageError(
            f"actions of {space} have more than {_MOST_CHOICES} choices: wrap the environment in "
            "gymnasium.wrappers.TransformAction"
        )
    return MultiDiscrete(gymnasium.spaces.MultiDiscrete(choices, start=low))


def factors(actions: Leaf) -> tuple[int, ...]:
    """The number of choices of each factor of an action. A `Box` has no factors."""
    if isinstance(actions, Discrete):
        return (int(actions.n),)
    if isinstance(actions, MultiDiscrete):
        return tuple(int(n) for n in actions.nvec.ravel())
    return (2,) * math.prod(actions.shape) if isinstance(actions, MultiBinary) else ()


def map_leaves(function: Callable[[str, Leaf], Leaf], space: Space, path: str = "") -> Space:
    """`space` with `function(path, leaf)` in place of each leaf."""
    if isinstance(space, Dict):
        return Dict({x: map_leaves(function, space[x], f"{path}.{x}".lstrip(".")) for x in space})
    if isinstance(space, Tuple):
        children = enumerate(space.spaces)
        mapped = [map_leaves(function, one, f"{path}.{i}".lstrip(".")) for i, one in children]
        return Tuple(gymnasium.spaces.Tuple(mapped))
    assert isinstance(space, Leaf)
    return function(path, space)


def _cast(leaf: Leaf) -> Leaf:
    if not isinstance(leaf, Box) or leaf.dtype in (np.uint8, np.int32, np.float32):
        return leaf
    if leaf.dtype.kind == "f":
        dtype = np.float32
        with np.errstate(over="ignore"):  # the largest float64 becomes infinite
            low, high = leaf.low.astype(dtype), leaf.high.astype(dtype)
    else:
        dtype, whole = np.int32, np.iinfo(np.int32)
        low, high = (np.clip(x, whole.min, whole.max).astype(dtype) for x in (leaf.low, leaf.high))
    return Box(gymnasium.spaces.Box(low, high, leaf.shape, dtype))


def leaves(space: gymnasium.Space, path: str = "") -> Iterator[tuple[str, Leaf]]:
    """Yields the leaves of a space with their paths, in the order of JAX's flattening."""
    if isinstance(space, (gymnasium.spaces.Dict, gymnasium.spaces.Tuple)):
        for name, child in _children(space):
            yield from leaves(child, f"{path}.{name}".lstrip("."))
    else:
        yield path, space  # pyright: ignore[reportReturnType]


def shapes(space: gymnasium.Space, *axes: Any) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes, with leading `axes`, and types of an observation's arrays in JAX."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: shapes(child, *axes) for name, child in _children(space)}
    if isinstance(space, gymnasium.spaces.Tuple):
        return tuple(shapes(child, *axes) for child in space.spaces)
    assert space.shape is not None and space.dtype is not None
    dtype = jax.dtypes.canonicalize_dtype(space.dtype)
    return jax.ShapeDtypeStruct((*axes, *space.shape), dtype)


def without(space: gymnasium.Space, names: Iterable[str]) -> gymnasium.Space:
    """`space` without the entries of its `Dict`s at these paths.

    **Raises:** `UnknownNameError` for an unknown path; `UsageError` for an entry of a `Tuple`,
    since later entries would move up and `select` could not find them.
    """
    for name in names:
        children = dict(_children(space))
        heads = [key for key in children if f"{name}.".startswith(f"{key}.")]
        if not heads:
            raise UnknownNameError("entry of observations", name, map(str, children))
        head = max(heads, key=lambda key: len(str(key)))  # keys may contain dots
        rest = name[len(str(head)) + 1 :]
        if rest:
            children[head] = without(children[head], [rest])
        elif isinstance(space, gymnasium.spaces.Dict):
            del children[head]
        else:
            raise UsageError(f"'{name}', an entry of a Tuple, cannot be left out: {_WRAP}")
        if isinstance(space, gymnasium.spaces.Dict):
            space = gymnasium.spaces.Dict(children)
        else:
            space = gymnasium.spaces.Tuple([*children.values()])
    return space


def select(space: gymnasium.Space, obs: Any) -> Observation:
    """The parts of an observation that `space` has: a dict may have more. Keeps array types.

    **Raises:** `UsageError` if something is missing.
    """
    if isinstance(space, gymnasium.spaces.Dict):
        missing = set(space) - set(obs) if isinstance(obs, dict) else set(space)
        if missing:
            found = f"only {sorted(obs)}" if isinstance(obs, dict) else type(obs).__name__
            raise UsageError(f"an observation lacks {sorted(missing)}: it has {found}")
        return {name: select(child, obs[name]) for name, child in _children(space)}
    if isinstance(space, gymnasium.spaces.Tuple):
        if not isinstance(obs, tuple | list) or len(obs) != len(space.spaces):
            raise UsageError(f"an observation must be a tuple of {len(space.spaces)} entries")
        return tuple(select(child, one) for child, one in zip(space.spaces, obs, strict=True))
    return obs if isinstance(obs, jax.Array) else np.asarray(obs)


def leading_axes(space: gymnasium.Space, obs: Observation) -> tuple[int, ...]:
    """The leading axes that all arrays of an observation share, before those of their spaces.

    **Raises:** `UsageError` if an array does not match its space's shape.
    """
    found: tuple[int, ...] | None = None
    for (path, leaf), x in zip(leaves(space), jax.tree.leaves(obs), strict=True):
        own = leaf.shape or ()
        axes = tuple(x.shape[: len(x.shape) - len(own)])
        if tuple(x.shape) != (*axes, *own):
            what = f"obs['{path}']" if path else "obs"
            raise UsageError(
                f"{what} has shape {tuple(x.shape)}: it must end with its space's shape {own}, "
                "after any lane axes"
            )
        if found is not None and axes != found:
            raise UsageError(
                f"the parts of an observation have different leading axes: {found} and {axes}"
            )
        found = axes
    assert found is not None
    return found


def as_rows(space: gymnasium.Space, obs: Observation, *axes: int) -> PyTree[AnyArray]:
    """Reshapes the leading axes of an observation's arrays to `axes` (one may be -1)."""
    own = [leaf.shape or () for _, leaf in leaves(space)]
    arrays, structure = jax.tree.flatten(obs)
    rows = [x.reshape(*axes, *shape) for x, shape in zip(arrays, own, strict=True)]
    return jax.tree.unflatten(structure, rows)


def cast(space: gymnasium.Space, obs: Observation) -> PyTree[Shaped[jax.Array, "..."]]:
    """Converts an observation's arrays to JAX arrays of their spaces' types."""
    kinds = [jax.dtypes.canonicalize_dtype(leaf.dtype) for _, leaf in leaves(space)]
    arrays, structure = jax.tree.flatten(obs)
    cast = [jax.numpy.asarray(x, kind) for x, kind in zip(arrays, kinds, strict=True)]
    return jax.tree.unflatten(structure, cast)


def _children(space: gymnasium.Space) -> Iterator[tuple[Any, gymnasium.Space]]:
    if isinstance(space, gymnasium.spaces.Dict):
        yield from sorted(space.spaces.items())
    elif isinstance(space, gymnasium.spaces.Tuple):
        yield from enumerate(space.spaces)
