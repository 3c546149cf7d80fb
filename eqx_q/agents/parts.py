"""Parts that an agent is made of, and how one is chosen: by name, with options, or as an object."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import equinox as eqx

from ..errors import UnknownNameError, UsageError, explained, in_words


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
    **context: Any,
) -> _Chosen:
    """A part by its name, by a mapping `{"name": ..., **options}`, or the one that is given.

    Options that are `None` keep their default.

    **Arguments:** `kind`: what messages call it; `base`: the class of all such parts; `known`: how
    to make those that have a name; `context`: arguments that the agent supplies; each maker gets
    those that it has a parameter for.

    **Raises:** `UnknownNameError` for a name or an option that there is not, `UsageError` for what
    an option cannot be.
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
    kind: str, name: str, options: Mapping[str, Any], known: Mapping[str, inspect.Parameter]
) -> None:
    """Raises `UnknownNameError` for an option that is not known, `UsageError` where a switch
    is neither true nor false.
    """
    for option, value in options.items():
        if option not in known:
            raise UnknownNameError(f"option of {kind} '{name}':", option, known)
        if isinstance(known[option].default, bool) and not isinstance(value, bool):
            raise UsageError(f"{kind}.{option}={value}: give true or false")


def with_default(given: Any, known: Mapping[str, Callable[..., Any]], **defaults: Any) -> Any:
    """The given name or mapping, completed by `defaults` for options that it leaves out."""
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
