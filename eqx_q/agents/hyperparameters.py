"""Hyperparameters of an agent by path: `"learning_rate"`, `"value.sigma"`, `"optimizer.b1"`.

A hyperparameter is a field that holds one number or switch which learning does not change. It is
annotated as `Float[Array, ""]` or `Bool[Array, ""]`, and belongs to the agent itself or to one of
its `Part`s, whose names precede it in the path. Each entry of a `dict[str, Float[Array, ""]]`
counts as a field. Whatever is not a `Part` (the network, the mixer, statistics, the optimiser's
state) has no hyperparameters.

Every function here takes one agent, or the stacked members of a population, whose leaves have a
leading axis of members.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Shaped

from ..errors import UnknownNameError, UsageError
from ..types import AnyArray, Scalar
from .parts import Part

_Agent = TypeVar("_Agent", bound=eqx.Module)

# Valid ranges. Hyperparameters that are not listed may be any number.
_FRACTION, _POSITIVE = (0.0, 1.0), (0.0, jnp.inf)
_DECAY = (0.0, 0.999999)  # a bias-corrected moving average would never move at 1
RANGES = {
    "learning_rate": _POSITIVE,
    "learning_rate_end": _POSITIVE,
    "max_grad_norm": _POSITIVE,
    "discount": _FRACTION,
    "lambda_": _FRACTION,
    "epsilon_start": _FRACTION,
    "epsilon_end": _FRACTION,
    "epsilon_decay": _POSITIVE,
    "schedule_steps": (1.0, jnp.inf),
    "alpha": _POSITIVE,
    "td_weight": _POSITIVE,
    "epsilon": _FRACTION,
    "value.v_min": (-1e30, 1e30),
    "value.v_max": (-1e30, 1e30),
    "value.sigma": (1e-3, 1e3),
    "exploration.alpha": _POSITIVE,
    "exploration.mu": _POSITIVE,
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.b3": _DECAY,
    "optimizer.decay": _FRACTION,
    "optimizer.momentum": _FRACTION,
    "optimizer.eps": _POSITIVE,
    "optimizer.eps_root": _POSITIVE,
    "optimizer.weight_decay": _POSITIVE,
}


def leaves(agent: eqx.Module) -> dict[str, Any]:
    """All hyperparameters by path: scalars, or `[S]` for stacked members."""
    return dict(_walk(agent, ""))


def names(agent: eqx.Module | type[eqx.Module]) -> list[str]:
    """The paths of all hyperparameters.

    For a class: those that follow from its annotations. Paths that depend on the choice of parts
    need an agent, or its shapes (`eqx.filter_eval_shape`).
    """
    return [path for path, _ in _walk(agent, "")]


def get(agent: eqx.Module, path: str) -> Shaped[Array, "*S"]:
    """One hyperparameter. Raises `UnknownNameError` if it does not exist."""
    known = leaves(agent)
    if path not in known:
        raise UnknownNameError("hyperparameter", path, known)
    return known[path]


def replace(agent: _Agent, values: Mapping[str, Scalar | Shaped[AnyArray, " S"]]) -> _Agent:
    """The agent with other values, given by path.

    Values take the type and shape of those they replace: in a population, give one for all members
    or one each.

    **Raises:** `UnknownNameError` for an unknown path, `UsageError` for a value of the wrong shape
    or outside its range.
    """
    new = [_like(get(agent, path), value, path) for path, value in values.items()]
    for path, value in values.items():
        _check_range(path, value)
    return eqx.tree_at(lambda agent: [leaves(agent)[path] for path in values], agent, new)


def range_of(path: str) -> tuple[float, float]:
    """The valid range of a hyperparameter, ends included."""
    return RANGES.get(path, (-jnp.inf, jnp.inf))


def is_number(value: Any) -> bool:
    """Whether `value` is a number of Python, NumPy or JAX; a `bool` is not."""
    return eqx.is_array_like(value) and not isinstance(value, bool) and jnp.ndim(value) == 0


def check_ranges(values: Mapping[str, Any]) -> None:
    """Checks values that are known; traced values (under `vmap`) are skipped.

    **Raises:** `UsageError` for a value that is not a number, or is outside its range.
    """
    for path, value in values.items():
        if not isinstance(value, Tracer) and not is_number(value):
            raise UsageError(f"{path}={value}: give a number")
        _check_range(path, value)


def _check_range(path: str, value: Any) -> None:
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return  # its value is not known here
    (low, high), numbers = range_of(path), np.asarray(value)
    if not np.all((low <= numbers) & (numbers <= high)):
        raise UsageError(f"{path}={value} is out of range: give a value from {low:g} to {high:g}")


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields paths and their values; for a class, annotations instead of values."""
    is_class = isinstance(node, type)
    for field in dataclasses.fields(node):
        kind = _annotation(node, field)
        path, value = prefix + field.name, kind if is_class else getattr(node, field.name)
        if _is_number(kind):
            yield path, value
        elif isinstance(value, Part) or (isinstance(value, type) and issubclass(value, Part)):
            yield from _walk(value, f"{path}.")
        elif _is_mapping_of_numbers(kind) and not is_class:
            yield from ((prefix + name, number) for name, number in value.items())


def _annotation(node: Any, field: dataclasses.Field) -> Any:
    if isinstance(field.type, str):  # from a module with `from __future__ import annotations`
        return typing.get_type_hints(node if isinstance(node, type) else type(node))[field.name]
    return field.type


def _is_number(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in (Float, Bool) and kind.dim_str == ""


def _is_mapping_of_numbers(kind: Any) -> bool:
    return typing.get_origin(kind) is dict and _is_number(typing.get_args(kind)[1])


def _like(leaf: Shaped[Array, "*S"], value: Any, path: str) -> Shaped[Array, "*S"]:
    value = jnp.asarray(value, leaf.dtype)
    if value.shape not in ((), leaf.shape):
        expected = "one number" if leaf.ndim == 0 else f"one number, or {leaf.shape[0]} of them"
        raise UsageError(f"{path} cannot be of shape {value.shape}: give {expected}")
    return jnp.broadcast_to(value, leaf.shape)
