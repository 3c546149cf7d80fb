"""Writes data sets so that committed data survive a crash."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
from jaxtyping import Bool, PyTree, Shaped

from ..errors import CorruptFileError, UsageError
from ..saving.files import cannot_write, move, seal, unseal, write_whole
from ..spaces import select
from .dataset import (
    BLOCK,
    COLUMNS,
    EXTRAS,
    HEADER,
    Column,
    Dataset,
    Description,
    Rows,
    Shard,
    checksum,
    no_action,
)

_PROGRESS = "progress.json"
_LOCK = ".lock"
_WIDER = "wider.tmp"


class Writer:
    """Writes a data set: append rows, commit them, and at last `finish`.

    Until then the data are in `<path>.partial`. Committed data survive a crash: a writer with the
    same description continues after them, and `done` names the existing shards.

    **Arguments:** `path`: of the new directory. `description`: of the data. `dtype`: the type to
    store observations in, if narrower than the space's (one per part, in their structure).
    `narrow`: whether to store observations as `uint8` while they are whole numbers from 0 to 255;
    the first that is not rewrites the earlier ones.

    **Raises:** `UsageError` if `path` exists, or if `<path>.partial` has another description.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        description: Description,
        *,
        dtype: PyTree[np.dtype | type] = None,
        narrow: bool = False,
    ):
        self.path = Path(path)
        self.description = description
        self._partial = self.path.with_name(self.path.name + ".partial")
        if self.path.exists():
            raise UsageError(f"'{self.path}' exists already: choose another place")
        self._columns = description.columns
        columns: list[Column] = jax.tree.leaves(self._columns)
        self._shapes = {column.name: column.shape for column in columns}
        self._dtypes = {column.name: column.dtype for column in columns}
        parts: list[Column] = jax.tree.leaves(self._columns.obs)
        dtypes = [part.dtype for part in parts] if dtype is None else jax.tree.leaves(dtype)
        self._wide: dict[str, np.dtype] = {
            part.name: np.dtype(one) for part, one in zip(parts, dtypes, strict=True)
        }  # types of observations
        self._dtypes |= dict.fromkeys(self._wide, np.dtype(np.uint8)) if narrow else self._wide
        self._narrow = narrow
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
        """Names of the committed shards."""
        return {shard.name for shard in self._shards}

    def __len__(self) -> int:
        """The number of rows so far, including those not committed yet."""
        return self._rows

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the files; committed data are kept for another attempt."""
        self.close()

    def append(self, rows: Rows) -> None:
        """Adds rows.

        **Raises:** `UsageError` if they are not rows of whole episodes, one after the other, if
        values do not fit the stored type, or if writing fails.
        """
        self._check_open()
        if self.description.stack is None:
            rows = rows._replace(obs=select(self.description.observation_space, rows.obs))
        self._check_shapes(rows)
        rows = self._fitted(rows)
        self._check(rows)
        try:
            for (name, file), x in zip(self._files.items(), jax.tree.leaves(rows), strict=True):
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
        """Makes the rows since the last commit a shard, which survives a crash.

        **Arguments:** as in `Shard`.

        **Raises:** `UsageError` if the last episode has no final row, or the disk is full.
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

        **Raises:** `UsageError` if rows are not committed, or there are none.
        """
        if self._rows != self._committed:
            raise UsageError(
                f"{self._rows - self._committed} rows are not committed: call commit first"
            )
        if not self._rows:
            raise UsageError(f"there are no data for '{self.path}': append rows first")
        self._check_open()
        header = {"format": self.description.format, **self.description.as_json()}
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
            for name, file in self._files.items():  # now their lengths are known
                file.seek(0)
                file.write(self._array_header(name))
                file.flush()
                os.fsync(file.fileno())
            self._close_files()
            write_whole(self._partial / HEADER, [seal(header)])
            move(self._partial, self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            self.close()  # last: the next holder of the lock must find the data set at its place
        (self.path / _LOCK).unlink()
        (self.path / _PROGRESS).unlink()  # last: a crash before must not lose anything
        return Dataset(self.path)

    def close(self) -> None:
        """Closes the files, if they are open."""
        self._close_files()
        if self._lock is not None:
            self._lock.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk; committed data are safe
                file.close()
        self._files = {}

    def discard(self) -> None:
        """Deletes the unfinished data set."""
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
            raise UsageError(f"'{self.path}' exists already: choose another place")
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
            if checksum(file) != self._checksums[name]:
                raise CorruptFileError(
                    f"'{path}' is damaged, its checksum is wrong: delete '{self._partial}'"
                )
            file.seek(0, os.SEEK_END)

    def _continue(self, state: dict[str, Any]) -> None:
        """Continues where another writer stopped."""
        for name, wide in self._wide.items():
            if self._narrow and state["dtypes"].get(name) == wide.str:
                self._dtypes[name] = wide  # the other writer has widened them
        ours = json.loads(json.dumps(self._state()))
        if any(state[name] != ours[name] for name in ("description", "dtypes")):
            raise UsageError(
                f"'{self._partial}' is the beginning of another data set: finish that one, "
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
        """Rows with observations in the stored type; widens that if they do not fit."""
        return rows._replace(obs=jax.tree.map(self._fitted_part, self._columns.obs, rows.obs))

    def _fitted_part(self, column: Column, x: Shaped[np.ndarray, "R *obs"]) -> np.ndarray:
        stored = self._dtypes[column.name]
        if not self._narrow or stored == self._wide[column.name] or x.dtype == stored:
            return x
        with np.errstate(invalid="ignore"):  # non-finite numbers compare as unequal
            narrow = x.astype(np.uint8)
        if np.array_equal(narrow, x):
            return narrow
        try:
            self._widen(column.name, self._partial / _WIDER)
        except OSError as error:
            self.close()
            raise cannot_write(self._partial, error) from error
        return x

    def _widen(self, name: str, temporary: Path) -> None:
        """Rewrites the stored observations of a part in the wide type."""
        wide, progress = self._wide[name], self._partial / _PROGRESS
        row = math.prod(self._shapes[name])
        source, self._dtypes[name] = self._files[name], wide
        file = open(temporary, "w+b")  # noqa: SIM115
        source.seek(file.write(self._array_header(name)))
        checksums = [0]
        for rows in (self._committed, self._rows - self._committed):
            crc, left = checksums[-1], rows * row
            while left:
                data = np.frombuffer(source.read(min(left, BLOCK)), np.uint8)
                left -= len(data)
                data = data.astype(wide).view(np.uint8).data
                file.write(data)
                crc = zlib.crc32(data, crc)
            checksums.append(crc)
        self._checksums[name] = checksums[-1]
        file.flush()
        os.fsync(file.fileno())
        state = unseal(json.loads(progress.read_text())) if progress.exists() else None
        # A crash in between leaves nothing that another writer could mistake for valid.
        progress.unlink(missing_ok=True)
        source.close()
        move(temporary, self._partial / f"{name}.npy")
        self._files[name] = file
        if state is not None:
            state["dtypes"][name], state["checksums"][name] = wide.str, checksums[1]
            write_whole(progress, [seal(state)])

    def _array_header(self, name: str) -> bytes:
        """NumPy's header, with a length that does not depend on the number of rows."""
        shape = (self._rows, *self._shapes[name])
        text = (
            f"{{'descr': '{self._dtypes[name].str}', 'fortran_order': False, 'shape': {shape}, }}"
        )
        text = text.ljust(256 - 10 - 1) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    def _check_open(self) -> None:
        """Raises `UsageError` if the files are closed, as after a failed write."""
        if not self._files:
            raise UsageError(
                f"the writer of '{self.path}' is closed: make another, which continues after the "
                "last commit"
            )

    def _check_shapes(self, rows: Rows) -> None:
        """Raises `UsageError` if rows do not match the description."""
        extras = {name for name in EXTRAS if getattr(rows, name) is not None}
        if extras != self.description.extras.keys():
            raise UsageError(
                f"rows have {', '.join(sorted(extras)) or 'no extras'}, but the description has "
                f"extras={dict(self.description.extras)}: correct the description"
            )
        for column, x in zip(jax.tree.leaves(self._columns), jax.tree.leaves(rows), strict=True):
            shape = (len(rows.action), *column.shape)
            is_obs = column.name in self._wide
            dtype = self._wide[column.name] if is_obs else column.dtype
            if x.shape == shape and np.can_cast(x.dtype, dtype, "same_kind"):
                continue
            found, expected = f"{x.dtype}{list(x.shape)}", f"{dtype}{list(shape)}"
            what = "observations are" if column.name in ("obs", "frames") else f"{column.name} is"
            raise UsageError(f"{what} {found}: give {expected}")

    def _check(self, rows: Rows) -> None:
        """Raises `UsageError` if these rows cannot follow the previous ones."""
        if not len(rows.action):
            return
        ended = rows.terminated | rows.truncated
        follows_end = np.append(self._final_is_next, ended[:-1])
        legal, final = self._legal(rows.action), _is_none(rows.action)
        none = np.full((1, *rows.action.shape[1:]), no_action(rows.action.dtype))
        if np.all(self._legal(none)):
            final &= follows_end  # elsewhere the placeholder is an action
        follows_final = np.append(self._begins, final[:-1])
        paid = _any(rows.reward != 0)
        if rows.agent_reward is not None:
            paid = paid | _any(rows.agent_reward != 0)
        for wrong, what in (
            (rows.terminated & rows.truncated, "is both terminated and truncated"),
            (~legal & ~final, "has no legal action"),
            *self._overflowing(rows),
            (final & (paid | ended), "is a final observation with a reward or end"),
            (final != follows_end, "must be a final observation exactly if the previous row ended"),
            (rows.first != follows_final, "must be marked first exactly after a final observation"),
        ):
            if np.any(wrong):
                row = self._rows + int(np.argmax(wrong))
                raise UsageError(f"row {row} {what}: correct the source of these data")
        self._final_is_next, self._begins = bool(ended[-1]), bool(final[-1])

    def _overflowing(self, rows: Rows) -> Iterator[tuple[Bool[np.ndarray, " R"], str]]:
        """Yields masks of rows with values that do not fit their type, and a description."""
        for name, x in zip(self._wide, jax.tree.leaves(rows.obs), strict=True):
            dtype = self._dtypes[name]
            yield _overflows(x, dtype), f"has an observation that does not fit {dtype}"
        for name in ("reward", "agent_reward", "global_state"):
            x = getattr(rows, name)
            if x is not None:
                what = name.replace("_", " ")
                a = "an" if what.startswith("a") else "a"
                yield _overflows(x, COLUMNS["reward"]), f"has {a} {what} that does not fit float32"
                yield _any(~np.isfinite(x)), f"has {a} {what} that is not finite"

    def _legal(self, action: Shaped[np.ndarray, "R *action"]) -> Bool[np.ndarray, " R"]:
        """Mask of rows with a legal action."""
        match self.description.action_space:
            case gymnasium.spaces.Discrete(n=n, start=start):
                legal = (action >= start) & (action < start + n)
            case gymnasium.spaces.MultiDiscrete(nvec=nvec, start=start):
                legal = (action >= start) & (action < start + nvec)
            case gymnasium.spaces.MultiBinary():
                legal = (action == 0) | (action == 1)
            case _:  # rounding may exceed the bounds of a `Box`
                legal = np.isfinite(action)
        return ~_any(~legal)


def _any(x: Bool[np.ndarray, "R *row"]) -> Bool[np.ndarray, " R"]:
    """Whether any entry of each row is true."""
    return np.any(x, axis=tuple(range(1, x.ndim)))


def _is_none(action: Shaped[np.ndarray, "R *action"]) -> Bool[np.ndarray, " R"]:
    """Mask of rows without an action."""
    return ~_any(~(np.isnan(action) if action.dtype.kind == "f" else action == -1))


def _overflows(values: Shaped[np.ndarray, "R *row"], dtype: np.dtype) -> Bool[np.ndarray, " R"]:
    """Mask of rows with a value that this type cannot hold, apart from rounding."""
    if values.dtype == dtype:
        return np.zeros(len(values), bool)
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    wrong = np.isinf(stored) & np.isfinite(values) if dtype.kind == "f" else stored != values
    return _any(wrong)
