"""Parts of an agent, and how one is chosen: by name, by name and options, or as an object."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import UnknownNameError, UsageError

Part = TypeVar("Part")


def make_part(
    kind: str,
    given: str | Mapping[str, Any] | Part,
    table: Mapping[str, Callable[..., Part]],
    base: type[Part],
    **context: Any,
) -> Part:
    """The part that was chosen.

    **Arguments:**

    - `kind`: what it is called in messages.
    - `given`: a name of `table`, a mapping of `"name"` and options, or the part itself.
    - `table`: makes parts, by name.
    - `base`: the class of all such parts.
    - `context`: what the agent knows; each maker is given what it has a parameter for.

    **Raises:** `UsageError` for a name or an option that is not known.
    """
    if isinstance(given, base):
        return given
    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise UsageError(
            f"{kind} is {given!r}: give a name ({', '.join(table)}), a mapping of name and "
            f"options, or an object of a class derived from {base.__name__}"
        )
    options = dict(options)
    name = options.pop("name")
    if name not in table:
        raise UnknownNameError(kind, name, table)
    known = inspect.signature(table[name]).parameters
    for option in options:
        if option not in known or option in context:
            raise UnknownNameError(
                f"option of {kind} '{name}':", option, [o for o in known if o not in context]
            )
    return table[name](**options, **{key: context[key] for key in context if key in known})
