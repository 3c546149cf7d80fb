"""Separates trained parameters from the rest of a network."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree


class Constant(eqx.Module):
    """An array of a network that is not trained: `Constant(jnp.linspace(0, 1, 8)).value`."""

    value: Array


def split_parameters(tree: PyTree) -> tuple[PyTree[Array], PyTree]:
    """The parameters of a network or mixer, and the rest; `eqx.combine` joins them again.

    Parameters are its inexact arrays, except those in a `Constant`.
    """

    def is_constant(node: Any) -> bool:
        return isinstance(node, Constant)

    def is_trained(node: Any) -> Any:
        return jax.tree.map(lambda x: not is_constant(node) and eqx.is_inexact_array(x), node)

    return eqx.partition(tree, jax.tree.map(is_trained, tree, is_leaf=is_constant))
