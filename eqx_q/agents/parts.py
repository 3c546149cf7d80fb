"""Parts of an agent, chosen by name, by name with options, or as an object."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import equinox as eqx

from ..errors import UnknownNameError, UsageError, explained, in_words


class Part(eqx.Module):
    """A part of an agent whose scalar fields are hyperparameters of the agent.

    See `hyperparameters`. Networks and mixers are not `Part`s: their arrays are trained.
    """


_Chosen = TypeVar("_Chosen", bound=eqx.Module)


def make_part(
    kind: str,
    given: str | Mapping[str, Any] | _Chosen,
    base: type[_Chosen],
    known: Mapping[str, Callable[..., _Chosen]],
    **context: Any,
) -> _Chosen:
    """Makes a part from its name, from a mapping `{"name": ..., **options}`, or returns an object.

    Options that are `None` keep their default.

    **Arguments:** `kind`: its name in messages; `base`: the class of all such parts; `known`: the
    makers by name; `context`: arguments that the agent supplies to makers with such a parameter.

    **Raises:** `UnknownNameError` for an unknown name or option, `UsageError` for an invalid value
    of an option.
    """
    if isinstance(given, base):
        return given
    name, options = name_and_options(kind, given, known)
    parameters = inspect.signature(known[name]).parameters
    own = {each: parameter for each, parameter in parameters.items() if each not in context}
    check_options(kind, name, options, own)
    context = {each: value for each, value in context.items() if each in parameters}
    with explained(f"{kind} '{name}' cannot have {in_words(options)}"):
        return known[name](**options, **context)


def name_and_options(kind: str, given: Any, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Splits a name, or a mapping with `"name"`, into name and options that are not `None`."""
    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise UsageError(
            f"{kind}={given!r} is not a name: give one of {', '.join(sorted(known))}, "
            'or a mapping {"name": ..., **options}'
        )
    options = {option: value for option, value in options.items() if value is not None}
    name = options.pop("name")
    if name not in known:
        raise UnknownNameError(kind, name, known)
    return name, options


def check_options(
    kind: str, name: str, options: Mapping[str, Any], known: Mapping[str, inspect.Parameter]
) -> None:
    """Raises `UnknownNameError` for an unknown option, `UsageError` for a switch that is not a
    `bool`.
    """
    for option, value in options.items():
        if option not in known:
            raise UnknownNameError(f"option of {kind} '{name}':", option, known)
        if isinstance(known[option].default, bool) and not isinstance(value, bool):
            raise UsageError(f"{kind}.{option}={value}: give true or false")


def with_default(given: Any, known: Mapping[str, Callable[..., Any]], **defaults: Any) -> Any:
    """Adds `defaults` to a name or mapping for options that it leaves out."""
    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or options.get("name") not in known:
        return given
    parameters = inspect.signature(known[options["name"]]).parameters
    missing = {
        name: default
        for name, default in defaults.items()
        if name in parameters and options.get(name) is None
    }
    return {**options, **missing}
