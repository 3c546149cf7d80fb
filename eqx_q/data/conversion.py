"""From somebody else's data to a data set of ours, a part after the other."""

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
    """What is converted as one, and becomes a shard: a file, as a rule.

    - `name`: of the shard. `run`: whose data it is, where there are several runs (seeds).
    - `blocks`: gives functions that make the next rows, to be called in any order and thread;
        it is gone through in a thread of its own.
    """

    name: str
    run: int | None
    blocks: Callable[[], Iterator[Callable[[], Rows]]]


class Source(NamedTuple):
    """Somebody else's data.

    `dtype`: in which observations are stored, where it is not the space's; see `Writer`.
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
    """Writes `source` to `out`. Where an earlier attempt was stopped it goes on after the last part
    that was finished, and what it writes does not depend on that.

    **Arguments:** `num_workers`: threads that decode, beside one that reads and decompresses files
    and one that writes; `None` for one per core. `on_rows`: called with the name of the part and
    the number of rows that were written just now.

    **Raises:** `UsageError` where there is something at `out`, the source is not what it should
    be (`CorruptFileError` where it is damaged), or the disk is full. Finished parts are kept.
    """
    workers = num_workers or len(os.sched_getaffinity(0))
    with Writer(out, source.description, dtype=source.dtype) as writer:
        done, total = writer.done, len(source.parts)
        if done:
            logger.info("%d of %d parts are there from an earlier attempt", len(done), total)
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
                "again to go on"
            ) from error


def _ahead(parts: Sequence[Part], num_workers: int) -> Iterator[tuple[Part, Rows | None]]:
    """What the blocks of parts make, in their order, and `None` where a part ends.

    While one block is written, a thread reads on, into the next part too (a file can only be
    decompressed from its beginning on), and others decode what was read. Threads suffice:
    decoders do not hold the interpreter's lock, and nothing has to be copied between processes.
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
        finally:  # who leaves early does not wait for what nobody will see
            reader.shutdown(cancel_futures=True)
            decoders.shutdown(cancel_futures=True)
