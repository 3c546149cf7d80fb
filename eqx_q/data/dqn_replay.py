"""Google's DQN Replay data set (Agarwal et al. 2020, arXiv 1907.04543): Dopamine's replay buffer.

    <game>/<run>/replay_logs/$store$_{observation,action,reward,terminal}_ckpt.<N>.gz

Each is a compressed `.npy`, usually of a million rows. According to the code that wrote them
(`circular_replay_buffer.py` of Dopamine, `logged_replay_buffer.py` of google-research/batch_rl):

- A terminal row is the last of its episode, and the next row begins another one: the final
  observation is not stored. Here it is a copy of the last frame, which is never bootstrapped from.
- Up to three rows of zeros precede an episode's first frame. They are not transitions.
- The buffer is a ring. Rows from its cursor on (`add_count` modulo its size) are older ones, which
  another file holds: one row in a full file, nearly all in the last file of a run.
- Games were cut after 27,000 steps, but marked terminal, too. Here they are truncated.
- Rewards were clipped to [-1, 1] before they were stored.

If the outcome of the last action is unknown (the game was cut, or the file ends), the frame before
that action is the final observation of a truncated episode. An episode that continues in the next
file becomes two episodes.
"""

import contextlib
import functools
import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from ..errors import CorruptFileError, UsageError
from . import atari
from .conversion import Part, Source
from .dataset import NPY_DAMAGE, Description, Rows

_COLUMNS = ("observation", "action", "reward", "terminal")
_PATTERN = "*/replay_logs/$store$_*_ckpt.*.gz"
_NAME = re.compile(r"\$store\$_(\w+?)_ckpt\.(\d+)\.gz")
_BLOCK = 1024  # frames at a time
_CHUNK = 1 << 20  # bytes at a time
_PADDING = atari.STACK - 1
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Columns(NamedTuple):
    """The columns of a file except the frames, up to the cursor or a limit."""

    action: Int[np.ndarray, " R"]
    reward: Float32[np.ndarray, " R"]
    terminal: Bool[np.ndarray, " R"]


def from_dqn_replay(
    source: str | os.PathLike,
    *,
    run: int | Sequence[int] | None = None,
    shards: Sequence[int] | None = None,
    rows_per_shard: int | None = None,
    env: str | None = None,
    num_actions: int | None = None,
) -> Source:
    """The data in a game's folder, for `convert`.

    **Arguments:** `source`: the folder, named after the game. `run`, `shards`: numbers, `None` for
    all. `rows_per_shard`: convert only the first rows; the rest is still read, since the checksum
    is at the end of a file. `env`: the expected environment. `num_actions`: of the game, if EnvPool
    is not installed.

    **Raises:** `UsageError` if the files are missing, or are of another game.
    """
    atari.check_limit(rows_per_shard)
    folder = atari.game_folder(Path(source), _PATTERN)
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob(_PATTERN):
        name, run_name = _NAME.fullmatch(path.name), path.parent.parent.name
        if name and name[1] in _COLUMNS and run_name.isdecimal():
            found.setdefault(int(run_name), {})[int(name[2])] = path.parent
    chosen = atari.choose(found, folder, run, shards)
    for _, shard, logs in chosen:
        for column in _COLUMNS:
            if not (path := _file(logs, column, shard)).exists():
                raise UsageError(f"'{path}' is missing: fetch it, or leave out shard {shard}")
    _, shard, logs = chosen[0]
    with _Array(_file(logs, "observation", shard)) as frames:
        if frames.dtype != np.uint8 or len(frames.shape) != 3:
            raise UsageError(
                f"'{frames.path}' holds {frames.dtype}{list(frames.shape)}, not "
                "uint8[rows, height, width]: give a file of the DQN Replay data set"
            )
        frame_shape = (frames.shape[1], frames.shape[2])
    description = atari.describe(
        folder,
        frame_shape,
        env=env,
        num_actions=num_actions,
        reward_clip=True,
        source={"format": "dqn_replay", "rows_per_shard": rows_per_shard},
    )
    parts = [
        Part(
            f"run_{one}-ckpt.{shard}",
            one,
            functools.partial(_blocks, logs, shard, description, rows_per_shard),
        )
        for one, shard, logs in chosen
    ]
    return Source(description, parts)


def read_columns(logs: str | os.PathLike, shard: int, limit: int | None = None) -> Columns:
    """The columns of a shard except its frames.

    **Arguments:** `logs`: the folder of the files. `limit`: the maximum number of rows.

    **Raises:** `CorruptFileError` if a file is damaged, or the files do not match.
    """
    logs = Path(logs)
    with _Array(_file(logs, "action", shard)) as array:
        capacity = array.shape[0]
        rows = min(_cursor(logs, shard, capacity), capacity if limit is None else limit)
        columns = [array.read(rows)]
        array.check_rest()
    for name in ("reward", "terminal"):
        with _Array(_file(logs, name, shard)) as array:
            if array.shape != (capacity,):
                raise CorruptFileError(
                    f"'{array.path}' has shape {list(array.shape)}, but there are {capacity} "
                    "actions: fetch the files of this shard again"
                )
            columns.append(array.read(rows))
            array.check_rest()
    action, reward, terminal = columns
    return Columns(action.astype(np.int64), reward.astype(np.float32), terminal.astype(bool))


def _blocks(
    logs: Path, shard: int, description: Description, limit: int | None
) -> Iterator[Callable[[], Rows]]:
    """Yields the rows of a shard, a few at a time."""
    columns = read_columns(logs, shard, limit)
    atari.check_actions(columns.action, description, _file(logs, "action", shard))
    segments = _Segments(columns)
    with _Array(_file(logs, "observation", shard)) as frames:
        if frames.shape[1:] != description.row_shape:
            raise UsageError(
                f"'{frames.path}' has frames of {list(frames.shape[1:])}, but earlier ones are of "
                f"{list(description.row_shape)}: convert data with different preprocessing "
                "separately"
            )
        for start in range(0, len(columns.action), _BLOCK):
            block = frames.read(min(_BLOCK, len(columns.action) - start))
            rows = segments.rows(block, start)
            yield lambda rows=rows: rows
        frames.check_rest()  # raises before a damaged file is committed


class _Segments:
    """Converts a buffer's rows to ours, block by block."""

    def __init__(self, columns: Columns):
        self.columns = columns
        size = len(columns.action)
        begins = np.append(0, np.flatnonzero(columns.terminal) + 1)
        t = np.arange(size)
        self.begin = begins[np.searchsorted(begins, t, side="right") - 1]
        self.may_pad = (
            (t - self.begin < _PADDING)
            & (columns.action == 0)
            & (columns.reward == 0)
            & ~columns.terminal
        )
        self.padding = 0  # padding rows at the start of the current episode

    def rows(self, frames: UInt8[np.ndarray, "B height width"], start: int) -> Rows:
        """The rows of the next block, which begins with the buffer's row `start`."""
        columns, last = self.columns, len(self.columns.action) - 1
        t = np.arange(start, start + len(frames))
        is_padding, padding = self._find_padding(frames, t)
        terminal = columns.terminal[t]
        length = t - self.begin[t] + 1 - padding  # of the episode, including this row
        unknown = self._unknown(t, length)  # the outcome of this row's action
        truncated = ~is_padding & ~terminal & (t < last)
        truncated &= self._unknown(np.minimum(t + 1, last), length + 1)
        terminated = terminal & ~unknown
        # A single observation is not a transition.
        kept = ~is_padding & ~(unknown & (length == 1))
        # An ending adds a row for the final observation.
        index = np.repeat(np.arange(len(t)), kept * (1 + terminated))
        copy = np.append(False, index[1:] == index[:-1])
        final = copy | unknown[index]
        return Rows(
            obs=frames if len(index) == len(t) and not copy.any() else frames[index],
            action=np.where(final, -1, columns.action[t][index]).astype(np.int32),
            reward=np.where(final, 0, columns.reward[t][index]).astype(np.float32),
            terminated=terminated[index] & ~copy,
            truncated=truncated[index] & ~final,
            first=(length[index] == 1) & ~copy,
        )

    def _unknown(self, t: Int[np.ndarray, " B"], length: Int[np.ndarray, " B"]):
        """Mask of rows t whose action has an unknown outcome."""
        terminal = self.columns.terminal[t]
        is_last = t == len(self.columns.action) - 1
        return np.where(terminal, length == atari.LONGEST_GAME, is_last)

    def _find_padding(self, frames: UInt8[np.ndarray, "B height width"], t: Int[np.ndarray, " B"]):
        """Mask of padding rows, and the number of padding rows at each row's episode start."""
        is_padding, padding = np.zeros(len(t), bool), np.zeros(len(t), np.int64)
        offset, done = t - self.begin[t], 0
        for i in np.flatnonzero(offset <= _PADDING):  # other rows cannot be padding
            padding[done:i], done = self.padding, i
            if offset[i] == 0:
                self.padding = 0
            all_before = self.padding == offset[i]
            is_padding[i] = all_before and self.may_pad[t[i]] and not frames[i].any()
            self.padding += int(is_padding[i])
        padding[done:] = self.padding
        return is_padding, padding


class _Array:
    """A compressed `.npy` whose first rows can be read without the others.

    **Raises:** `CorruptFileError` if it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._damage():
            self._file = gzip.open(path)  # noqa: SIM115
            version = np.lib.format.read_magic(self._file)
            if version not in _HEADERS:
                raise ValueError(f"its version {version} is unknown")
            self.shape, fortran, self.dtype = _HEADERS[version](self._file)
            if fortran or self.dtype.hasobject:
                raise ValueError("its rows are not contiguous")
            self._left = math.prod(self.shape) * self.dtype.itemsize

    def __enter__(self) -> "_Array":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(self, rows: int = 1) -> np.ndarray:
        """Reads the next rows; for an array without axes, all of it."""
        shape = (rows, *self.shape[1:]) if self.shape else ()
        size = math.prod(shape) * self.dtype.itemsize
        with self._damage():
            data = self._file.read(size)
            if len(data) < size:
                raise EOFError("it is shorter than its header says")
        self._left -= size
        return np.frombuffer(data, self.dtype).reshape(shape)

    def check_rest(self) -> None:
        """Reads to the end, which verifies the checksum."""
        with self._damage():
            while data := self._file.read(_CHUNK):
                self._left -= len(data)
            if self._left:
                raise EOFError("its length differs from its header")

    @contextlib.contextmanager
    def _damage(self):
        try:
            yield
        except (*NPY_DAMAGE, zlib.error) as error:
            raise CorruptFileError(f"'{self.path}' is damaged ({error}): fetch it again") from error


def _file(logs: Path, column: str, shard: int) -> Path:
    return logs / f"$store$_{column}_ckpt.{shard}.gz"


def _cursor(logs: Path, shard: int, capacity: int) -> int:
    """The number of valid rows of a file. Without the count, that of a full file."""
    path = logs / f"add_count_ckpt.{shard}.gz"
    if not path.exists():
        return capacity - 1
    with _Array(path) as array:
        count = int(array.read())
        array.check_rest()
    return count % capacity if count % capacity or not count else capacity
