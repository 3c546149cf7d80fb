"""Writes event files. `tensorboard --logdir tensorboard` shows them."""

import importlib
import itertools
import struct
import time
from pathlib import Path
from typing import Any


class Run:
    """See `eqx_q.tracking.worker.Run`. `id` is the directory below `tensorboard/`."""

    def __init__(self, info: Any):
        board: Any = importlib.import_module("tensorboardX")
        self._summary = board.summary
        self._event, self._proto = board.proto.event_pb2.Event, board.proto.summary_pb2.Summary
        store = Path(info.repo) / "tensorboard"
        name = "/".join(filter(None, [info.experiment, info.name]))
        self.id = info.resume_id or _new(store, name)
        (store / self.id).mkdir(parents=True, exist_ok=True)  # it may have been deleted
        # `SummaryWriter` would write in a thread, where the error of a full disk is lost.
        self._writer = board.event_file_writer.EventsWriter(str(store / self.id / "events"))
        self._params: dict[str, Any] = {}
        self._params_written = False
        if not info.resume_id:
            text = "\n\n".join([info.description, *info.tags])
            self._write(self._summary.text("description", text), 0)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self._write_params()
        for name, value in values.items():
            self._write(self._summary.scalar(name, value), step)
        self._writer.flush()

    def histogram(self, name: str, counts: list[int], ends: list[float], step: int) -> None:
        start, end = ends
        width = (end - start) / len(counts)
        limits = [start + width * (i + 1) for i in range(len(counts))]
        centres = [limit - width / 2 for limit in limits]
        total = sum(n * x for n, x in zip(counts, centres, strict=True))
        squares = sum(n * x * x for n, x in zip(counts, centres, strict=True))
        self._write(
            self._summary.histogram_raw(
                name, start, end, sum(counts), total, squares, limits, counts
            ),
            step,
        )

    def params(self, nested: dict[str, Any], flat: dict[str, Any]) -> None:
        self._params |= {
            name: x if isinstance(x, bool | int | float) else str(x) for name, x in flat.items()
        }

    def gif(self, path: str, name: str, step: int) -> None:
        """Writes the file unchanged, since browsers play GIFs."""
        picture = Path(path).read_bytes()
        width, height = struct.unpack("<HH", picture[6:10])
        image = self._proto.Image(
            width=width, height=height, colorspace=3, encoded_image_string=picture
        )
        self._write(self._proto(value=[self._proto.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        self._write_params()
        self._writer.close()

    def _write_params(self) -> None:
        """Writes the hyperparameters before the first metrics: TensorBoard reads them once."""
        if not self._params_written:
            self._params_written = True
            metrics = dict.fromkeys(("eval/return", "train/return"), 0)
            for summary in self._summary.hparams(self._params, metrics):
                self._write(summary, 0)

    def _write(self, summary: Any, step: int) -> None:
        self._writer.write_event(self._event(summary=summary, step=step, wall_time=time.time()))


def _new(store: Path, name: str) -> str:
    """Creates a directory of that name; a number is appended if another run has that name."""
    for number in itertools.count(1):
        found = name if number == 1 else f"{name} ({number})"
        try:
            (store / found).mkdir(parents=True)
        except FileExistsError:
            continue
        return found
    raise AssertionError
