"""Options that several suites share, and checks of options."""

import numbers
from collections.abc import Iterable
from typing import Any, Literal

from ..errors import UnknownNameError, UsageError

TeamReward = Literal["sum", "mean", "shared"]
OnError = Literal["stop", "restart"]
TimeLimit = Literal["truncate", "terminate"]


def require_choice(option: str, value: Any, choices: Iterable[str]) -> None:
    """Raises `UnknownNameError` unless `value` is one of `choices`."""
    if value not in tuple(choices):
        raise UnknownNameError(option, value, choices)


def require_count(option: str, value: Any) -> None:
    """Raises `UsageError` unless `value` is a whole number of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{option}={value!r}: give a whole number, 1 or more")
