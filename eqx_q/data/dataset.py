"""Data sets: a directory of plain arrays that memory-map, and a header that says what they are.

    frames.npy  or  obs.npy   uint8[R, height, width], unstacked; or what was observed, [R, ...]
    action.npy                int32[R]; -1 in the row of an episode's final observation
    reward.npy                float32[R], as the game gave it
    terminated.npy  truncated.npy  first.npy    bool[R]
    header.json               environment, spaces, preprocessing, source, shards, checksums

Row t holds an observation, the action taken on it, and that action's reward and ending (as RLDS
and Minari align them). An episode's final observation is a row of its own. So whatever action
row t holds led to the observation in row t + 1.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped

from ..errors import CorruptFileError, UsageError
from ..files import cannot_write, write_whole
from ..spaces import Box, Discrete

_FORMAT = 1
_HEADER = "header.json"
_PROGRESS = "progress.json"
_LOCK = ".lock"
_WIDER = "wider.tmp"
_COLUMNS = {
    "action": np.dtype("<i4"),
    "reward": np.dtype("<f4"),
    "terminated": np.dtype("|b1"),
    "truncated": np.dtype("|b1"),
    "first": np.dtype("|b1"),
}
_BLOCK = 1 << 24  # bytes that a checksum reads at a time


class Rows(NamedTuple):
    """Consecutive rows of a data set. Frames where its observations are stacks of them."""

    obs: Shaped[np.ndarray, "R *obs"]
    action: Int[np.ndarray, " R"]
    reward: Float32[np.ndarray, " R"]
    terminated: Bool[np.ndarray, " R"]
    truncated: Bool[np.ndarray, " R"]
    first: Bool[np.ndarray, " R"]

    @classmethod
    def of_episode(
        cls,
        obs: Shaped[np.ndarray, "L_and_1 *obs"],
        action: Shaped[np.ndarray, " L"],
        reward: Shaped[np.ndarray, " L"],
        *,
        terminated: bool,
    ) -> "Rows":
        """The rows of a whole episode, its final observation among them.

        **Arguments:** `terminated`: whether the task ended it; else it was truncated.
        """
        length = len(action)
        last = np.arange(length + 1) == length - 1
        return cls(
            obs=obs,
            action=np.append(action, -1).astype(np.int32),
            reward=np.append(reward, 0).astype(np.float32),
            terminated=last & terminated,
            truncated=last & (not terminated),
            first=np.arange(length + 1) == 0,
        )


class Shard(NamedTuple):
    """A part of a data set that came as one: a file of its source, or a member of a population.

    `run`: whose data it is, where a source holds several runs (seeds). `source`: what else is
    known of where it came from.
    """

    name: str
    start: int
    rows: int
    run: int | None = None
    source: Mapping[str, Any] = {}


class Description(NamedTuple):
    """What a data set is of.

    - `env`: the environment's id, `"<suite>/<name>"`.
    - `observation_space`, `action_space`: of one lane, as an agent sees it.
    - `stack`: how many frames an observation `[stack, height, width]` has; `None` where
        observations are stored as they are.
    - `stack_start`: what stands before an episode's first frame: `"zeros"`, or `"repeat"` of it.
    - `preprocessing`: what was done to observations and actions, by option. Data sets that differ
        in it do not mix.
    - `source`: where the data came from.
    """

    env: str
    observation_space: gymnasium.spaces.Box
    action_space: gymnasium.spaces.Discrete
    stack: int | None = None
    stack_start: str = "zeros"
    preprocessing: Mapping[str, Any] = {}
    source: Mapping[str, Any] = {}

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of what a row holds of an observation: of a stack one frame."""
        shape = self.observation_space.shape
        return shape if self.stack is None else shape[1:]

    def as_json(self) -> dict[str, Any]:
        """For the header."""
        space = self.observation_space
        return {
            "env": self.env,
            "observation_space": {
                "shape": list(space.shape),
                "dtype": space.dtype.str,
                "low": _bound(space.low),
                "high": _bound(space.high),
            },
            "num_actions": int(self.action_space.n),
            "stack": self.stack,
            "stack_start": self.stack_start,
            "preprocessing": dict(self.preprocessing),
            "source": dict(self.source),
        }

    @classmethod
    def from_json(cls, header: Mapping[str, Any]) -> "Description":
        """As `as_json` gave it."""
        space = header["observation_space"]
        shape, dtype = tuple(space["shape"]), np.dtype(space["dtype"])
        low, high = (
            np.broadcast_to(np.array(space[name], dtype), shape) for name in ("low", "high")
        )
        return cls(
            env=header["env"],
            observation_space=Box(gymnasium.spaces.Box(low, high, shape, dtype.type)),
            action_space=Discrete(gymnasium.spaces.Discrete(header["num_actions"])),
            stack=header["stack"],
            stack_start=header["stack_start"],
            preprocessing=header["preprocessing"],
            source=header["source"],
        )


class Dataset:
    """A finished data set on disk, memory-mapped.

    **Attributes:** `path`; `description`; `shards`; `rows`: the arrays, as long as the data set;
    `num_transitions`, `num_episodes`.

    **Raises:** `CorruptFileError` where the directory is no data set, or a damaged one. Of frames
    and observations only the size is checked: `verify` reads them.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        header = _read_header(self.path)
        try:
            self.description = Description.from_json(header)
            self.shards = [Shard(**shard) for shard in header["shards"]]
            self._checksums = {name: x["crc32"] for name, x in header["arrays"].items()}
            arrays = {
                name: _map(self.path / f"{name}.npy", x) for name, x in header["arrays"].items()
            }
            obs = arrays.pop("obs") if self.description.stack is None else arrays.pop("frames")
            self.rows = Rows(obs, **arrays)
            for name, x in self.rows._asdict().items():
                row = self.description.row_shape if name == "obs" else ()
                if x.shape != (len(self), *row):
                    raise ValueError(f"{name} has shape {x.shape}")
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise CorruptFileError(
                f"'{self.path}' has a header that makes no sense ({error!r})"
            ) from error
        self._verify(_COLUMNS)
        self.num_transitions = int(np.sum(self.rows.action >= 0))
        self.num_episodes = len(self.rows.action) - self.num_transitions

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows.action)

    def episodes(self) -> Iterator[Rows]:
        """One after the other, each with the row of its final observation."""
        starts = np.flatnonzero(self.rows.first)
        for start, stop in zip(starts, [*starts[1:], len(self)], strict=True):
            yield Rows(*(x[start:stop] for x in self.rows))

    def verify(self) -> None:
        """Reads everything. Raises `CorruptFileError` where a checksum is wrong."""
        self._verify(self._checksums)

    def _verify(self, names) -> None:
        for name in names:
            path = self.path / f"{name}.npy"
            if _checksum(path) != self._checksums[name]:
                raise CorruptFileError(
                    f"'{path}' is damaged: its checksum is wrong; make the data set anew"
                )


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
        self._shapes = {name: description.row_shape} | dict.fromkeys(_COLUMNS, ())
        self._obs, self._wide = name, np.dtype(dtype or space.dtype)
        self._narrow = narrow
        self._dtypes = {name: np.dtype(np.uint8) if narrow else self._wide} | _COLUMNS
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
        where the disk does not take them.
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
        write_whole(self._partial / _PROGRESS, [_dump(self._state())])

    def finish(self) -> Dataset:
        """Writes the header, and moves the directory to its place.

        **Raises:** `UsageError` where rows are not committed, or there are none.
        """
        if self._rows != self._committed:
            raise UsageError(f"{self._rows - self._committed} rows are not committed yet")
        if not self._rows:
            raise UsageError(f"there are no data for '{self.path}': nothing is written")
        self._check_open()
        header = {"format": _FORMAT, **self.description.as_json()}
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
            self.close()
            write_whole(self._partial / _HEADER, [_dump(header)])
            os.replace(self._partial, self.path)
        except OSError as error:
            self.close()
            raise cannot_write(self.path, error) from error
        (self.path / _LOCK).unlink()
        (self.path / _PROGRESS).unlink()  # not before: a crash in between must lose nothing
        return Dataset(self.path)

    def close(self) -> None:
        """Closes the files, if they are open."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk: what was committed is there
                file.close()
        self._files = {}
        if self._lock is not None:
            self._lock.close()

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
        (self._partial / _WIDER).unlink(missing_ok=True)
        progress = self._partial / _PROGRESS
        if progress.exists():
            try:
                self._continue(json.loads(progress.read_text()))
            except (KeyError, TypeError, ValueError) as error:
                if isinstance(error, UsageError):
                    raise
                raise CorruptFileError(
                    f"'{progress}' is damaged ({error!r}): delete '{self._partial}'"
                ) from error
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
        ours = json.loads(_dump(self._state()))
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
                data = np.frombuffer(source.read(min(left, _BLOCK)), np.uint8)
                left -= len(data)
                data = data.astype(wide).view(np.uint8).data
                file.write(data)
                checksum = zlib.crc32(data, checksum)
            checksums.append(checksum)
        self._checksums[name] = checksums[-1]
        file.flush()
        os.fsync(file.fileno())
        state = json.loads(progress.read_text()) if progress.exists() else None
        # A crash between these leaves nothing that another writer could take for whole.
        progress.unlink(missing_ok=True)
        source.close()
        os.replace(temporary, self._partial / f"{name}.npy")
        self._files[name] = file
        if state is not None:
            state["dtypes"][name], state["checksums"][name] = wide.str, checksums[1]
            write_whole(progress, [_dump(state)])

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
        for name in _COLUMNS:
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
            (~np.isfinite(rows.reward), "has a reward that is not finite"),
            (final & ((rows.reward != 0) | ended), "is a final observation with a reward or end"),
            (final != follows_end, "must be a final observation just where the row before ended"),
            (rows.first != follows_final, "must be a first one just after a final observation"),
        ):
            if np.any(wrong):
                row = self._rows + int(np.argmax(wrong))
                raise UsageError(f"row {row} {what}: mend the source of these data")
        self._final_is_next, self._begins = bool(ended[-1]), bool(final[-1])


def _read_header(path: Path) -> dict[str, Any]:
    if not path.exists() and path.with_name(path.name + ".partial").exists():
        raise UsageError(
            f"'{path}' is not finished: run the command that makes it again, and it goes on"
        )
    try:
        header = json.loads((path / _HEADER).read_text())
    except (OSError, NotADirectoryError):
        raise UsageError(
            f"'{path}' is no data set: there is no header.json in it; make one with "
            "scripts/collect.py or scripts/convert.py"
        ) from None
    except ValueError as error:
        raise CorruptFileError(f"'{path / _HEADER}' is damaged: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CorruptFileError(
            f"'{path}' is no data set that this eqx_q reads (format {_FORMAT}): make it anew"
        )
    return header


def _map(path: Path, expected: dict[str, Any]) -> np.ndarray:
    """Maps an array, and compares it with what the header says."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorruptFileError(f"'{path}' is damaged: {error}; make the data set anew") from error
    if array.dtype.str != expected["dtype"] or list(array.shape) != expected["shape"]:
        raise CorruptFileError(
            f"'{path}' holds {array.dtype.str}{list(array.shape)}, but the header says "
            f"{expected['dtype']}{expected['shape']}: make the data set anew"
        )
    return array


def _checksum(path: Path) -> int:
    """Of an array's data."""
    checksum = 0
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _bound(values: np.ndarray) -> Any:
    """A bound of a space for JSON: one number where it is the same everywhere."""
    same = values.size and np.all(values == values.flat[0])
    return json.loads(
        json.dumps((values.flat[0] if same else values).tolist()),
        parse_constant=lambda name: name.replace("Infinity", "inf"),
    )


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
