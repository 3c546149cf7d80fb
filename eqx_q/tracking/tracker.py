"""The tracker contract."""

import abc
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..clock import clock

_logger = logging.getLogger(__name__)


class Tracker(abc.ABC):
    """Logs metrics, hyperparameters and GIFs of a run. Also a callback of `eqx_q.train`.

    A tracker should not stop the run: `Trackers` drops one that raises, with a warning.
    """

    overlap = True  # the callback only observes

    @abc.abstractmethod
    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Logs the metrics of one step.

        **Arguments:**

        - `metrics`: numbers by name; names of evaluation metrics start with `eval/`. A population
            has arrays `[S]` with one number for each member. One more axis holds the samples of a
            distribution.
        - `step`: environment steps over all lanes so far; offline, updates.
        """

    @abc.abstractmethod
    def log_params(self, params: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Logs hyperparameters, versions and the like, as nested dictionaries.

        **Arguments:** `params`: one dictionary for all members, or a list with one for each member.
        """

    @abc.abstractmethod
    def log_gif(self, path: str | os.PathLike, step: int, name: str = "episode") -> None:
        """Logs a GIF.

        **Arguments:** `path`: the file. `step`: as in `log`. `name`: what it shows.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Writes what is pending, in bounded time. Nothing may be logged afterwards."""

    def __call__(self, run_state: Any, metrics: Mapping[str, Any]) -> None:
        """Logs the metrics, as a callback of `eqx_q.train`."""
        self.log(metrics, clock(metrics).done)


class Trackers(Tracker):
    """Combines several trackers. A tracker that raises is dropped, and the others continue."""

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
                    "%s failed (%r) and is dropped; the run goes on",
                    type(tracker).__name__,
                    error,
                )
