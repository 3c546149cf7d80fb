"""Writing data sets, so that what was committed survives a crash."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from ..errors import CorruptFileError, UsageError
from ..saving.files import cannot_write, write_whole
from .dataset import (
    BLOCK,
    COLUMNS,
    FORMAT,
    HEADER,
    Dataset,
    Description,
    Rows,
    Shard,
    seal,
    unseal,
)

_PROGRESS = "progress.json"
_LOCK = ".lock"
_WIDER = "wider.tmp"


class Writer:
    """Writes a data set: append rows, commit them, and at last `finish`.

    Until then the data are in `<path>.partial`. What was committed survives a crash: a writer of
    the same description goes on after it, and `done` says which shards are there.

    **Arguments:** `path`: of the directory to be. `description`: of the data. `dtype`: in which
    observations are stored, where that is narrower than the space's. `narrow`: whether they are
    stored as `uint8` as long as they are whole numbers from 0 to 255; the first that is not
    rewrites those that are there already.

    **Raises:** `UsageError` where there is something at `path` already, or where what lies in
    `<path>.partial` is of another description.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        description: Description,
        *,
        dtype: np.dtype | type | None = None,
        narrow: bool = False,
    ):
        self.path = Path(path)
        self.description = description
        self._partial = self.path.with_name(self.path.name + ".partial")
        if self.path.exists():
            raise UsageError(f"there is something at '{self.path}' already: choose another place")
        name = "obs" if description.stack is None else "frames"
        space = description.observation_space
        self._shapes = {name: description.row_shape} | dict.fromkeys(COLUMNS, ())
        self._obs, self._wide = name, np.dtype(dtype or space.dtype)
        self._narrow = narrow
        self._dtypes = {name: np.dtype(np.uint8) if narrow else self._wide} | COLUMNS
        self._num_actions = int(description.action_space.n)
        self._shards: list[Shard] = []
        self._rows = self._committed = 0
        self._checksums = dict.fromkeys(self._shapes, 0)
        self._begins, self._final_is_next = True, False
        self._files: dict[str, Any] = {}
        self._lock: Any = None
        try:
            self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise cannot_write(self._partial, error) from error
            raise

    @property
    def done(self) -> set[str]:
        """Names of the shards that are there already."""
        return {shard.name for shard in self._shards}

    def __len__(self) -> int:
        """Rows so far, with those that are not committed yet."""
        return self._rows

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the files; what was committed stays for another attempt."""
        self.close()

    def append(self, rows: Rows) -> None:
        """Adds rows.

        **Raises:** `UsageError` where they are no rows of whole episodes, one after the other, or
        where the type in which they are stored, or the disk, does not take them.
        """
        self._check_open()
        rows = self._fitted(rows)
        self._check(rows)
        try:
            for (name, file), x in zip(self._files.items(), rows, strict=True):
                data = np.ascontiguousarray(x, self._dtypes[name])
                data = data.reshape(-1).view(np.uint8).data
                file.write(data)
                self._checksums[name] = zlib.crc32(data, self._checksums[name])
        except OSError as error:
            self.close()
            raise cannot_write(self._partial, error) from error
        self._rows += len(rows.action)

    def commit(
        self, shard: str, run: int | None = None, source: Mapping[str, Any] | None = None
    ) -> None:
        """Makes what was appended since the last commit a shard, which a crash does not undo.

        **Arguments:** as in `Shard`.

        **Raises:** `UsageError` where the last episode has no final row, or the disk is full.
        """
        self._check_open()
        if not self._begins:
            raise UsageError(
                f"the last episode of '{shard}' has no final observation: append it, with action -1"
            )
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.close()
            raise cannot_write(self._partial, error) from error
        start = self._committed
        if self._rows > start:
            self._shards.append(Shard(shard, start, self._rows - start, run, source or {}))
        self._committed = self._rows
        write_whole(self._partial / _PROGRESS, [seal(self._state())])

    def finish(self) -> Dataset:
        """Writes the header, and moves the directory to its place.

        **Raises:** `UsageError` where rows are not committed, or there are none.
        """
        if self._rows != self._committed:
            raise UsageError(f"{self._rows - self._committed} rows are not committed yet")
        if not self._rows:
            raise UsageError(f"there are no data for '{self.path}': nothing is written")
        self._check_open()
        header = {"format": FORMAT, **self.description.as_json()}
        header |= {"shards": [shard._asdict() for shard in self._shards]}
        header["arrays"] = {
            name: {
                "dtype": self._dtypes[name].str,
                "shape": [self._rows, *shape],
                "crc32": self._checksums[name],
            }
            for name, shape in self._shapes.items()
        }
        try:
            for name, file in self._files.items():  # now it is known how long they are
                file.seek(0)
                file.write(self._array_header(name))
                file.flush()
                os.fsync(file.fileno())
            self._close_files()
            write_whole(self._partial / HEADER, [seal(header)])
            os.replace(self._partial, self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            self.close()  # not before: who gets the lock must find the data set at its place
        (self.path / _LOCK).unlink()
        (self.path / _PROGRESS).unlink()  # not before: a crash in between must lose nothing
        return Dataset(self.path)

    def close(self) -> None:
        """Closes the files, if they are open."""
        self._close_files()
        if self._lock is not None:
            self._lock.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk: what was committed is there
                file.close()
        self._files = {}

    def discard(self) -> None:
        """Throws away what is not finished."""
        self.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _open(self) -> None:
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._partial / _LOCK, "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UsageError(
                f"another process is writing '{self.path}': wait for it, or choose another place"
            ) from None
        if self.path.exists():  # another writer has finished it meanwhile
            self._lock.close()
            raise UsageError(f"there is something at '{self.path}' already: choose another place")
        (self._partial / _WIDER).unlink(missing_ok=True)
        progress = self._partial / _PROGRESS
        if progress.exists():
            try:
                state = unseal(json.loads(progress.read_text()))
            except ValueError as error:
                raise CorruptFileError(
                    f"'{progress}' is damaged ({error}): delete '{self._partial}'"
                ) from error
            self._continue(state)
        for name, shape in self._shapes.items():
            path = self._partial / f"{name}.npy"
            header = self._array_header(name)
            row = self._dtypes[name].itemsize * math.prod(shape)
            size = len(header) + self._committed * row
            if self._committed and (not path.exists() or path.stat().st_size < size):
                self.close()
                raise CorruptFileError(f"'{path}' is truncated: delete '{self._partial}'")
            file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            self._files[name] = file
            file.write(header)
            file.truncate(size)
            file.seek(0, os.SEEK_END)

    def _continue(self, state: dict[str, Any]) -> None:
        """Goes on where another writer stopped."""
        if self._narrow and state["dtypes"].get(self._obs) == self._wide.str:
            self._dtypes[self._obs] = self._wide  # as they turned out to be
        ours = json.loads(json.dumps(self._state()))
        if any(state[name] != ours[name] for name in ("description", "dtypes")):
            raise UsageError(
                f"'{self._partial}' holds the beginning of another data set: finish that one, "
                "delete it or choose another place"
            )
        self._shards = [Shard(**shard) for shard in state["shards"]]
        self._rows = self._committed = state["rows"]
        self._checksums = state["checksums"]

    def _state(self) -> dict[str, Any]:
        return {
            "description": self.description.as_json(),
            "dtypes": {name: dtype.str for name, dtype in self._dtypes.items()},
            "shards": [shard._asdict() for shard in self._shards],
            "rows": self._rows,
            "checksums": self._checksums,
        }

    def _fitted(self, rows: Rows) -> Rows:
        """Rows with observations as narrow as those that are stored; else makes room for them."""
        stored = self._dtypes[self._obs]
        if not self._narrow or stored == self._wide or rows.obs.dtype == stored:
            return rows
        with np.errstate(invalid="ignore"):  # what is not finite is not equal either
            narrow = rows.obs.astype(np.uint8)
        if np.array_equal(narrow, rows.obs):
            return rows._replace(obs=narrow)
        try:
            self._widen(self._partial / _WIDER)
        except OSError as error:
            self.close()
            raise cannot_write(self._partial, error) from error
        return rows

    def _widen(self, temporary: Path) -> None:
        """Stores observations as they are, those that are there already too."""
        name, wide, progress = self._obs, self._wide, self._partial / _PROGRESS
        row = math.prod(self._shapes[name])
        source, self._dtypes[name] = self._files[name], wide
        file = open(temporary, "w+b")  # noqa: SIM115
        source.seek(file.write(self._array_header(name)))
        checksums = [0]
        for rows in (self._committed, self._rows - self._committed):
            checksum, left = checksums[-1], rows * row
            while left:
                data = np.frombuffer(source.read(min(left, BLOCK)), np.uint8)
                left -= len(data)
                data = data.astype(wide).view(np.uint8).data
                file.write(data)
                checksum = zlib.crc32(data, checksum)
            checksums.append(checksum)
        self._checksums[name] = checksums[-1]
        file.flush()
        os.fsync(file.fileno())
        state = unseal(json.loads(progress.read_text())) if progress.exists() else None
        # A crash between these leaves nothing that another writer could take for whole.
        progress.unlink(missing_ok=True)
        source.close()
        os.replace(temporary, self._partial / f"{name}.npy")
        self._files[name] = file
        if state is not None:
            state["dtypes"][name], state["checksums"][name] = wide.str, checksums[1]
            write_whole(progress, [seal(state)])

    def _array_header(self, name: str) -> bytes:
        """NumPy's header, of a length that does not depend on the number of rows."""
        shape = (self._rows, *self._shapes[name])
        text = (
            f"{{'descr': '{self._dtypes[name].str}', 'fortran_order': False, 'shape': {shape}, }}"
        )
        text = text.ljust(256 - 10 - 1) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    def _check_open(self) -> None:
        """That what was written is what is in the files: a full disk closes them."""
        if not self._files:
            raise UsageError(
                f"the writer of '{self.path}' is closed: make another, which goes on after the "
                "last commit"
            )

    def _check(self, rows: Rows) -> None:
        """That these rows may follow those before."""
        if not len(rows.action):
            return
        for name in COLUMNS:
            if (shape := getattr(rows, name).shape) != (len(rows.action),):
                raise UsageError(
                    f"columns of {len(rows.action)} rows, but {name} has shape {shape}"
                )
        expected = (len(rows.action), *self.description.row_shape)
        dtype = self._dtypes["obs" if self.description.stack is None else "frames"]
        if rows.obs.shape != expected or not np.can_cast(rows.obs.dtype, dtype, "same_kind"):
            raise UsageError(
                f"observations are {rows.obs.dtype}{list(rows.obs.shape)}, not "
                f"{dtype}{list(expected)}"
            )
        ended, final = rows.terminated | rows.truncated, rows.action == -1
        follows_end = np.append(self._final_is_next, ended[:-1])
        follows_final = np.append(self._begins, final[:-1])
        for wrong, what in (
            (rows.terminated & rows.truncated, "is both terminated and truncated"),
            ((rows.action < -1) | (rows.action >= self._num_actions), "has no legal action"),
            (_overflows(rows.obs, dtype), f"has an observation that {dtype} does not hold"),
            (_overflows(rows.reward, COLUMNS["reward"]), "has a reward that float32 does not hold"),
            (~np.isfinite(rows.reward), "has a reward that is not finite"),
            (final & ((rows.reward != 0) | ended), "is a final observation with a reward or end"),
            (final != follows_end, "must be a final observation just where the row before ended"),
            (rows.first != follows_final, "must be a first one just after a final observation"),
        ):
            if np.any(wrong):
                row = self._rows + int(np.argmax(wrong))
                raise UsageError(f"row {row} {what}: mend the source of these data")
        self._final_is_next, self._begins = bool(ended[-1]), bool(final[-1])


def _overflows(values: Shaped[np.ndarray, "R *row"], dtype: np.dtype) -> Bool[np.ndarray, " R"]:
    """Where a row has a value that becomes another one in this type, but for rounding."""
    if values.dtype == dtype:
        return np.zeros(len(values), bool)
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    wrong = np.isinf(stored) & np.isfinite(values) if dtype.kind == "f" else stored != values
    return np.any(np.reshape(wrong, (len(values), -1)), axis=1)
