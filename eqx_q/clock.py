"""The progress of a run, read from its metrics."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Clock(NamedTuple):
    """The progress of a run: `done` of `total` (0 if unknown), counted in `unit`.

    `unit` names the metric that counts: `env_steps` (per member), or `num_updates` offline.
    """

    done: int
    total: int
    unit: str

    @property
    def noun(self) -> str:
        """The unit as a readable noun: `steps`, `updates`."""
        return self.unit.split("_")[-1]


def clock(metrics: Mapping[str, Any]) -> Clock:
    """Returns the progress of the run that reported these metrics."""
    unit = "num_updates" if "num_updates" in metrics else "env_steps"
    total = metrics.get("total_updates" if unit == "num_updates" else "total_steps", 0)
    return Clock(int(np.max(metrics[unit])), int(total), unit)
