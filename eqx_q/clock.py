"""How far a run is, by its metrics."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Clock(NamedTuple):
    """How far a run is: `done` of `total` (0 where nobody said), counted in what `unit` says.

    `unit` is the metric that counts: `env_steps` (of each member), or offline `num_updates`.
    """

    done: int
    total: int
    unit: str

    @property
    def noun(self) -> str:
        """What is counted, for people: `steps`, `updates`."""
        return self.unit.split("_")[-1]


def clock(metrics: Mapping[str, Any]) -> Clock:
    """How far a run was when it told these metrics."""
    unit = "num_updates" if "num_updates" in metrics else "env_steps"
    total = metrics.get("total_updates" if unit == "num_updates" else "total_steps", 0)
    return Clock(int(np.max(metrics[unit])), int(total), unit)
