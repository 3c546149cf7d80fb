"""Packs trees of arrays, so that compiled loops carry and record them in few arrays."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Shaped, UInt32

from ..errors import UsageError

_WORDS = (jnp.bool_, jnp.int32, jnp.uint32, jnp.float32)


class Packed(eqx.Module):
    """A tree of arrays, whose leaves with one flag or 32-bit number per lane share an array.

    A GPU reads and writes all of them with one kernel, instead of one each.

    **Attributes:** `words`: of these leaves, bit by bit; `arrays`: the other leaves; `dtypes`: of
    each leaf in `words`, else `None`.
    """

    words: UInt32[Array, "*steps leaves N"]
    arrays: tuple[Array, ...]
    dtypes: tuple[Any, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)

    @classmethod
    def of(cls, tree: PyTree[Array], num_lanes: int) -> "Packed":
        """Packs a tree."""
        leaves, structure = jax.tree.flatten(tree)
        small = [x.shape == (num_lanes,) and x.dtype in _WORDS for x in leaves]
        words = [_as_word(x) for x, fits in zip(leaves, small, strict=True) if fits]
        return cls(
            jnp.stack(words) if words else jnp.zeros((0, num_lanes), jnp.uint32),
            tuple(x for x, fits in zip(leaves, small, strict=True) if not fits),
            tuple(x.dtype if fits else None for x, fits in zip(leaves, small, strict=True)),
            structure,
        )

    @property
    def tree(self) -> PyTree[Array]:
        """The tree. Its leaves have the leading axis of steps, if this is a record."""
        words, arrays = iter(jnp.moveaxis(self.words, -2, 0)), iter(self.arrays)
        leaves = [
            next(arrays) if dtype is None else _from_word(next(words), dtype)
            for dtype in self.dtypes
        ]
        return jax.tree.unflatten(self.structure, leaves)

    def blank(self, num_steps: int) -> "Packed":
        """A record of `num_steps` trees like this one, to be written."""
        return jax.tree.map(lambda x: jnp.zeros((num_steps, *x.shape), x.dtype), self)

    def write(self, step: int | Int[Array, ""], packed: "Packed") -> "Packed":
        """The record with this tree at `step`. In a loop it is written in place.

        **Raises:** `UsageError` if its types or shapes are not those of the record.
        """
        _check_alike(jax.eval_shape(lambda: self.at(0).tree), jax.eval_shape(lambda: packed.tree))
        return jax.tree.map(lambda record, x: record.at[step].set(x), self, packed)

    def at(self, step: int | Int[Array, ""]) -> "Packed":
        """The tree at `step` of a record."""
        return jax.tree.map(lambda record: record[step], self)


def _check_alike(first: PyTree, later: PyTree) -> None:
    """Raises `UsageError` if a later step has other leaves, types or shapes than the first."""

    def kinds(tree: PyTree) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}

    before, after = kinds(first), kinds(later)
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            raise UsageError(
                f"a timestep differs from the first one: {name} is {after.get(name)}, not "
                f"{before.get(name)}; let the environment's reset and step return the same types "
                "and shapes"
            )


def _as_word(x: Shaped[Array, " N"]) -> UInt32[Array, " N"]:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _from_word(x: UInt32[Array, "*steps N"], dtype: Any) -> Shaped[Array, "*steps N"]:
    return x != 0 if dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, dtype)
