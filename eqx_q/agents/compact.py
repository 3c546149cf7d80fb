"""Compact parameters, so that an optimiser updates them with few kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .optimizers import Optimizer


class Compact(NamedTuple):
    """Parameters, or as many other numbers, in few arrays.

    **Fields:** `matrices`: the leaves with several axes; `vector`: all others, one after the other.
    """

    matrices: list[Array]
    vector: Float[Array, " size"]


class Layout(NamedTuple):
    """How the arrays of parameters lie while they are trained: functions there and back.

    Trees may contain such parameters, as the state of an optimiser does.
    """

    pack: Callable[[PyTree[Array]], PyTree[Array]]
    unpack: Callable[[PyTree[Array]], PyTree[Array]]


AS_IT_IS = Layout(lambda tree: tree, lambda tree: tree)


def layout(optimizer: Optimizer, parameters: PyTree[Array]) -> Layout:
    """The layout of parameters as a `Compact`; as they are, if that would change the optimiser.

    A GPU updates each array with a kernel of its own, and small agents are bound by their number.
    """
    leaves, structure = jax.tree.flatten(parameters)
    if not optimizer.is_elementwise or len(leaves) < 2:
        return AS_IT_IS
    is_vector = [x.ndim < 2 for x in leaves]
    _, unravel = ravel_pytree([x for x, small in zip(leaves, is_vector, strict=True) if small])

    def are_parameters(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    def pack(node: Any) -> Any:
        if not are_parameters(node):
            return node
        leaves = list(zip(structure.flatten_up_to(node), is_vector, strict=True))
        vector, _ = ravel_pytree([x for x, small in leaves if small])
        return Compact([x for x, small in leaves if not small], vector)

    def unpack(node: Any) -> Any:
        if not isinstance(node, Compact):
            return node
        vectors, matrices = iter(unravel(node.vector)), iter(node.matrices)
        return structure.unflatten([next(vectors if small else matrices) for small in is_vector])

    return Layout(
        lambda tree: jax.tree.map(pack, tree, is_leaf=are_parameters),
        lambda tree: jax.tree.map(unpack, tree, is_leaf=lambda node: isinstance(node, Compact)),
    )
