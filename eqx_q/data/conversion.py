"""Converts data in other formats to a data set, part by part."""

import collections
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from ..errors import UsageError
from .dataset import Dataset, Description, Rows
from .writer import Writer

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """A part that becomes a shard: usually a file.

    - `name`: of the shard. `run`: the number of the run (seed), if there are several.
    - `blocks`: yields functions that make the next rows, to be called in any order and thread. It
        is iterated in a thread of its own.
    """

    name: str
    run: int | None
    blocks: Callable[[], Iterator[Callable[[], Rows]]]


class Source(NamedTuple):
    """Data in another format.

    `dtype`: the type to store observations in, if it differs from the space's; see `Writer`.
    """

    description: Description
    parts: Sequence[Part]
    dtype: PyTree[np.dtype] = None


def convert(
    source: Source,
    out: str | os.PathLike,
    *,
    num_workers: int | None = None,
    on_rows: Callable[[str, int], None] = lambda part, rows: None,
) -> Dataset:
    """Writes `source` to `out`. After an interruption it continues after the last finished part,
    with the same result.

    **Arguments:** `num_workers`: threads that decode, in addition to one that reads and
    decompresses files and one that writes; `None` for one per core. `on_rows`: called with the name
    of the part and the number of rows just written.

    **Raises:** `UsageError` if `out` exists, the source is invalid (`CorruptFileError` if it is
    damaged), or the disk is full. Finished parts are kept.
    """
    workers = num_workers or len(os.sched_getaffinity(0))
    with Writer(out, source.description, dtype=source.dtype) as writer:
        done, total = writer.done, len(source.parts)
        if done:
            logger.info("%d of %d parts are done from an earlier attempt", len(done), total)
        try:
            for part, rows in _ahead([x for x in source.parts if x.name not in done], workers):
                if rows is None:
                    writer.commit(part.name, part.run)
                else:
                    writer.append(rows)
                    on_rows(part.name, len(rows.action))
            return writer.finish()
        except UsageError as error:
            disk_is_full = type(error) is UsageError and isinstance(error.__cause__, OSError)
            if not (disk_is_full or writer.done):
                raise
            raise type(error)(
                f"{error}; {len(writer.done)} of {total} parts are converted and kept: run this "
                "again to continue"
            ) from error


def _ahead(parts: Sequence[Part], num_workers: int) -> Iterator[tuple[Part, Rows | None]]:
    """Yields the rows of the blocks of parts, in their order, and `None` at the end of a part.

    While one block is written, a thread reads ahead, also into the next part (a file can only be
    decompressed from its start), and others decode the data. Threads suffice: decoders release the
    interpreter's lock, and nothing has to be copied between processes.
    """

    def blocks() -> Iterator[tuple[Part, Callable[[], Rows | None]]]:
        for part in parts:
            for block in part.blocks():
                yield part, block
            yield part, lambda: None

    def read() -> tuple[Part, Future[Rows | None]] | None:
        found = next(remaining, None)
        return None if found is None else (found[0], decoders.submit(found[1]))

    remaining = blocks()
    with ThreadPoolExecutor(num_workers) as decoders, ThreadPoolExecutor(1) as reader:
        waiting = collections.deque(reader.submit(read) for _ in range(2 * num_workers))
        try:
            while (found := waiting.popleft().result()) is not None:
                waiting.append(reader.submit(read))
                part, rows = found
                yield part, rows.result()
        finally:  # after an early exit, the remaining work is cancelled
            reader.shutdown(cancel_futures=True)
            decoders.shutdown(cancel_futures=True)
