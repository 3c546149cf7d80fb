"""What files of earlier versions call things, and what those are today.

A class that moves gets a line in `MOVED`; one whose fields change, an entry in `CHANGED`. Files
in `tests/golden/saved` must go on loading.
"""

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]

# References as files hold them, `"module:qualname"`.
MOVED = {
    f"eqx_q.{name}": f"eqx_q.loops.{name}" for name in ("training:RunState", "offline:OfflineState")
}

# By today's reference: from the fields that a file holds to those of today. Each must leave fields
# alone that are today's already.
CHANGED: dict[str, Callable[[Fields], Fields]] = {}


def todays_name(reference: str) -> str:
    """What a reference of any version is called today."""
    return MOVED.get(reference, reference)


def todays_fields(reference: str, fields: Fields) -> Fields:
    """Fields of any version as those of today's class."""
    change = CHANGED.get(reference)
    return fields if change is None else change(fields)
