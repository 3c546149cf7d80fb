"""Parts that an agent is made of, and how one is chosen."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import equinox as eqx

from ..errors import UnknownNameError, UsageError


class Part(eqx.Module):
    """A part of an agent whose scalar fields are hyperparameters of the agent.

    See `hyperparameters`. Networks and mixers are none: what they hold is trained.
    """


_Chosen = TypeVar("_Chosen", bound=eqx.Module)


def make_part(
    kind: str,
    given: str | Mapping[str, Any] | _Chosen,
    base: type[_Chosen],
    known: Mapping[str, Callable[..., _Chosen]],
) -> _Chosen:
    """A part by its name, by a mapping `{"name": ..., **options}`, or the one that is given.

    Options that are `None` keep their default.

    **Arguments:** `kind`: what messages call it; `base`: the class of all such parts; `known`: how
    to make those that have a name.

    **Raises:** `UnknownNameError` for a name or an option that there is not.
    """
    if isinstance(given, base):
        return given
    name, options = name_and_options(kind, given, known)
    check_options(kind, name, options, inspect.signature(known[name]).parameters)
    return known[name](**options)


def name_and_options(kind: str, given: Any, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a name, or a mapping with one, asks for, without what is `None`."""
    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise UsageError(
            f"{kind}={given!r} names nothing: give one of {', '.join(sorted(known))}, "
            'or a mapping {"name": ..., **options}'
        )
    options = {option: value for option, value in options.items() if value is not None}
    name = options.pop("name")
    if name not in known:
        raise UnknownNameError(kind, name, known)
    return name, options


def check_options(
    kind: str, name: str, options: Mapping[str, Any], known: Mapping[str, Any]
) -> None:
    """Raises `UnknownNameError` for an option that is not known."""
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of {kind} '{name}':", option, known)
