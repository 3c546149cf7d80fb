"""Errors that a user can fix. The message is one line that says how."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class UsageError(ValueError):
    """The caller passed something wrong; the message says how to fix it."""


class MissingExtraError(UsageError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"this needs the package '{package}', which is not installed: "
            f"run `pip install 'eqx_q[{extra}]'`"
        )


class DivergedError(UsageError):
    """Training produced a loss that is not finite.

    **Attributes:** `run_state`: the last good one, from the boundary before; `None` if it was not
    kept (a run without callbacks). Training that continues from it reaches the same loss.
    """

    def __init__(self, message: str, run_state: Any = None):
        super().__init__(message)
        self.run_state = run_state


class LaneError(UsageError):
    """The environment of a lane failed: it raised, timed out, or returned a non-finite value."""


class CorruptFileError(UsageError):
    """A file is damaged, or eqx_q did not write it."""


class UnknownNameError(UsageError):
    """A name is not one of the known names; the message lists the nearest ones."""

    def __init__(self, kind: str, name: Any, known: Iterable[str]):
        name = str(name)
        lower = {one.lower(): one for one in sorted(known)}
        near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
        shown = [lower[one] for one in near] or list(lower.values())[:40]
        hint = "the nearest are" if near else "known are"
        super().__init__(f"unknown {kind} '{name}': {hint} {', '.join(shown) or 'none'}")


@contextlib.contextmanager
def explained(problem: str) -> Iterator[None]:
    """Turns exceptions that wrong values cause inside the block into a `UsageError`.

    Its message is `problem`, followed by the original message. A `UsageError` stays as it is.
    """
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"{problem}: {error}") from error


def check_whole(*, least: int = 1, **numbers: Any) -> None:
    """Raises `UsageError` for a number that is not whole, or is below `least`."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, got {number!r}")


def in_words(options: Mapping[str, Any]) -> str:
    """Formats options for a message."""
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "no options"
