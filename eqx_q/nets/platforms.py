"""Choices that depend on the device a program is compiled for."""

from collections.abc import Callable

from jax import lax
from jaxtyping import Array


def by_platform(cpu: Callable[..., Array], default: Callable[..., Array], *args: Array) -> Array:
    """`cpu(*args)` in a program for CPUs, else `default(*args)`.

    The choice is made when the program is lowered for a device, not when it is traced. So it is
    right for an agent that is exported, compiled ahead or moved to another device. The program
    contains only the chosen branch.
    """
    # Wrapped in functions, since JAX hashes them, and a module's methods are not hashable.
    return lax.platform_dependent(*args, cpu=lambda *a: cpu(*a), default=lambda *a: default(*a))
