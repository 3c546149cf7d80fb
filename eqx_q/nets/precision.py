"""Precision of a network's products.

In `bfloat16`, the operands of products with weights are rounded to bfloat16, forwards and
backwards. Results are accumulated and kept in float32 (those of convolutions by `lax.conv` are
rounded), and so is everything else: parameters, normalisation, attention, optimiser and targets.

The setting is JAX's own (`jax.default_matmul_precision`), since compiled programs are told apart by
it. On CPUs and GPUs it does not change products of other people's layers by itself; on a GPU, they
lose a higher precision that was set.
"""

import contextlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..errors import UnknownNameError
from .platforms import by_platform

# By name: JAX's setting. In float32 it stays as the user set it (also if that is "bfloat16"); on a
# GPU its default is TensorFloat-32, which rounds operands to 10 bits after the point.
PRECISIONS: dict[str, str | None] = {"float32": None, "bfloat16": "bfloat16"}

Axes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # to sum over, of both operands
Multiply: TypeAlias = Callable[[Array, Array, Axes], Array]


def check_precision(precision: str) -> None:
    """Raises `UnknownNameError` unless `precision` is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)


def products_in(precision: str) -> contextlib.AbstractContextManager:
    """While it is entered, networks are traced with products of this precision."""
    setting = PRECISIONS[precision]
    return contextlib.nullcontext() if setting is None else jax.default_matmul_precision(setting)


def in_bfloat16() -> bool:
    """Whether products are computed in bfloat16."""
    setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return setting == PRECISIONS["bfloat16"]


def multiplication() -> Multiply:
    """The product of the current precision. It is not to be differentiated: see `product`."""
    return _in_bfloat16 if in_bfloat16() else _in_float32


def product(
    x: Float[Array, "*rows inputs"], weight: Float[Array, "_ _"], *, transposed: bool = False
) -> Float[Array, "*rows outputs"]:
    """`x @ weight`, or `x @ weight.T`, in the current precision."""
    if in_bfloat16():
        return _rounded_product(x, weight, transposed)
    return _in_float32(x, weight, _of_rows(x.ndim, transposed))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x, weight, transposed):
    return _in_bfloat16(x, weight, _of_rows(x.ndim, transposed))


def _forwards(x, weight, transposed):
    return _rounded_product(x, weight, transposed), (x, weight)


def _backwards(transposed, residuals, gradient):
    # JAX would multiply the gradient as it is, in float32.
    x, weight = residuals
    rows = tuple(range(x.ndim - 1))
    of_x = _in_bfloat16(gradient, weight, _of_rows(x.ndim, not transposed))
    left, right = (gradient, x) if transposed else (x, gradient)
    return of_x, _in_bfloat16(left, right, (rows, rows))


_rounded_product.defvjp(_forwards, _backwards)


def _of_rows(ndim: int, transposed: bool) -> Axes:
    return (ndim - 1,), (1 if transposed else 0,)


def _in_float32(x: Array, y: Array, axes: Axes) -> Array:
    return lax.dot_general(x, y, (axes, ((), ())))


def _in_bfloat16(x: Array, y: Array, axes: Axes) -> Array:
    def cast(x, y):
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=jnp.float32)

    def rounded(x, y):
        # Equal: float32 holds the product of two rounded numbers exactly. XLA would drop a cast
        # there and back.
        x, y = (lax.reduce_precision(operand, 8, 7) for operand in (x, y))
        return lax.dot_general(x, y, (axes, ((), ())))

    return cast(x, y) if cpu_has_bfloat16() else by_platform(rounded, cast, x, y)


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16; without, products in float32 are faster."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)
