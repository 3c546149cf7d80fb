"""Metrics as lines of JSON."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..clock import clock
from ..saving.files import cannot_write, sealed, unseal, write_whole
from .tracker import Tracker

_logger = logging.getLogger(__name__)


class JsonlTracker(Tracker):
    """Appends one JSON object to a file for each call of `log`. The file is valid at any moment.

    Values that are not finite become `null`. Samples of a distribution become a few statistics.
    `crc32` is a checksum of the line. Damaged or incomplete lines of an existing file are dropped,
    with a warning. If the disk is full, lines are lost and the run goes on.

    **Arguments:**

    - `path`: the file. Its directory is created.
    - `num_members`: the size of a population; `None` for a single agent.
    - `resume_step`: the step from which a run is resumed; later lines are dropped. By default all
        lines are kept.

    **Raises:** `UsageError` if the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        num_members: int | None = None,
        resume_step: int | None = None,
    ):
        self._path = Path(path)
        self._value_axes = 0 if num_members is None else 1
        self._warned = False
        lines = (
            line
            for line, row in _good_lines(self._path)
            if resume_step is None or clock(row).done <= resume_step
        )
        write_whole(self._path, lines)
        try:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Appends a line."""
        values = {name: self._plain(value) for name, value in metrics.items()}
        unit = clock({"env_steps": step, **metrics}).unit
        row = json.loads(json.dumps({unit: step, **values}, default=str))
        line = json.dumps(sealed(row)).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) < len(line):
                raise OSError("the disk is full")
        except OSError as error:
            self._file.truncate(end)  # else the next line would follow an incomplete one
            if not self._warned:
                self._warned = True
                _logger.warning(
                    "%s; metrics are lost, the run goes on", cannot_write(self._path, error)
                )

    def log_params(self, params: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Does nothing: the run directory has the configuration in `config.yaml`."""

    def log_gif(self, path: str | os.PathLike, step: int, name: str = "episode") -> None:
        """Does nothing: the GIF is a file already."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _plain(self, value: Any) -> Any:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            return value
        if array.ndim > self._value_axes:
            samples = array.reshape(*array.shape[: self._value_axes], -1)
            quartiles = np.percentile(samples, [0, 25, 50, 75, 100], axis=-1)
            names = ("min", "q25", "median", "q75", "max")
            statistics = dict(zip(names, quartiles, strict=True), mean=samples.mean(-1))
            return {name: _finite(x) for name, x in statistics.items()}
        return _finite(array)


def _finite(array: Any) -> Any:
    array = np.asarray(array)
    is_finite = np.isfinite(array)
    if is_finite.all():
        return array.tolist()
    values = array.astype(object)
    values[~is_finite] = None
    return values.tolist()


def read_metrics(path: str | os.PathLike, until: int = 0) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file of `JsonlTracker`, and warns of damaged or missing lines.

    **Arguments:** `until`: the step that the last line should have reached.
    """
    done = 0
    for _, row in _good_lines(Path(path)):
        done = max(done, clock(row).done)
        yield row
    if done < until:
        _logger.warning("'%s' ends at %d of %d: later lines are missing", path, done, until)


def _good_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the undamaged lines of a file, as bytes and parsed."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = unseal(json.loads(line), required=False)  # earlier versions have no checksum
                clock(row)
            except (ValueError, KeyError, TypeError):  # not metrics of eqx_q
                _logger.warning(
                    "line %d of '%s' is damaged or incomplete, and is left out", number, path
                )
                continue
            yield line.removesuffix(b"\n") + b"\n", row
