"""The tracker contract."""

import abc
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..clock import clock

_logger = logging.getLogger(__name__)


class Tracker(abc.ABC):
    """Takes what a run reports; a callback of `eqx_q.train` too.

    It never stops the run: what goes wrong is said once, and passed over.
    """

    overlap = True  # as a callback it only observes

    @abc.abstractmethod
    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """**Arguments:**

        - `metrics`: numbers by name (`eval/...` are those of evaluation); of a population, arrays
            `[S]` with one for each member. With one more axis: samples of a distribution.
        - `step`: lane-steps so far; offline, updates.
        """

    @abc.abstractmethod
    def log_params(self, params: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Hyperparameters, versions and so on, nested as you like: the same, or of each member."""

    @abc.abstractmethod
    def log_gif(self, path: str | os.PathLike, step: int, name: str = "episode") -> None:
        """A GIF that is in a file."""

    @abc.abstractmethod
    def close(self) -> None:
        """Finishes what is under way, in bounded time. Nothing may be logged after that."""

    def __call__(self, run_state: Any, metrics: Mapping[str, Any]) -> None:
        """Logs, as a callback."""
        self.log(metrics, clock(metrics).done)


class Trackers(Tracker):
    """Several trackers as one. One that raises is left out from then on, and the others go on."""

    def __init__(self, *trackers: Tracker):
        self._trackers = list(trackers)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._each("log", metrics, step)

    def log_params(self, params: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        self._each("log_params", params)

    def log_gif(self, path: str | os.PathLike, step: int, name: str = "episode") -> None:
        self._each("log_gif", path, step, name)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self._trackers.remove(tracker)
                _logger.warning(
                    "%s failed (%r) and is left out from now on; the run goes on",
                    type(tracker).__name__,
                    error,
                )
