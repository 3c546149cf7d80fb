"""Google's DQN Replay data set (Agarwal et al. 2020, arXiv 1907.04543): Dopamine's replay buffer.

    <game>/<run>/replay_logs/$store$_{observation,action,reward,terminal}_ckpt.<N>.gz

Each is a compressed `.npy`, of a million rows as a rule. What the code that wrote them says
(`circular_replay_buffer.py` of Dopamine, `logged_replay_buffer.py` of google-research/batch_rl):

- A terminal row is the last of its episode, and the next row begins another one: the final
  observation is not stored. Here it is a copy of the last frame, which is never bootstrapped from.
- Up to three rows of zeros stand before an episode's first frame. They are no transitions.
- The buffer is a ring, and rows from its cursor (`add_count` modulo its size) on are older ones,
  which another file has: one in a full file, nearly all in the last file of a run.
- Games were cut after 27,000 steps, and then marked terminal too. Here they are truncated.
- Rewards were clipped to [-1, 1] before they were stored.

Where nothing is known of what the last action led to (the game was cut, or the file ends), the
frame before that action is the final observation of a truncated episode. An episode that goes on
in the next file is two here.
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
    """What a file has but the frames, up to the cursor or to where it is cut."""

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
    """The data in a game's folder, to be given to `convert`.

    **Arguments:** `source`: the folder; its name is that of the game. `run`, `shards`: numbers,
    `None` for all that are there. `rows_per_shard`: only the first so many become data; the rest
    is read all the same, since the checksum of a file stands at its end. `env`: the environment
    that is expected. `num_actions`: of the game, where EnvPool is not installed.

    **Raises:** `UsageError` where these files are not there, or are of another game.
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
                "uint8[rows, height, width]: it is not of the DQN Replay data set"
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
    """The columns of a shard but its frames.

    **Arguments:** `logs`: the folder of the files. `limit`: on the number of rows.

    **Raises:** `CorruptFileError` where a file is damaged, or they do not fit together.
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
    """The rows of a shard, a few at a time."""
    columns = read_columns(logs, shard, limit)
    atari.check_actions(columns.action, description, _file(logs, "action", shard))
    segments = _Segments(columns)
    with _Array(_file(logs, "observation", shard)) as frames:
        if frames.shape[1:] != description.row_shape:
            raise UsageError(
                f"'{frames.path}' has frames of {list(frames.shape[1:])}, but those before are of "
                f"{list(description.row_shape)}: data with different preprocessing do not mix, "
                "convert them apart"
            )
        for start in range(0, len(columns.action), _BLOCK):
            block = frames.read(min(_BLOCK, len(columns.action) - start))
            rows = segments.rows(block, start)
            yield lambda rows=rows: rows
        frames.check_rest()  # what is damaged is not committed


class _Segments:
    """Makes rows of a buffer's, block by block."""

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
        self.padding = 0  # rows of it that the present episode begins with

    def rows(self, frames: UInt8[np.ndarray, "B height width"], start: int) -> Rows:
        """Of the next block, which begins with the buffer's row `start`."""
        columns, last = self.columns, len(self.columns.action) - 1
        t = np.arange(start, start + len(frames))
        is_padding, padding = self._find_padding(frames, t)
        terminal = columns.terminal[t]
        length = t - self.begin[t] + 1 - padding  # of the episode, with this row
        unknown = self._unknown(t, length)  # where this row's action led to
        truncated = ~is_padding & ~terminal & (t < last)
        truncated &= self._unknown(np.minimum(t + 1, last), length + 1)
        terminated = terminal & ~unknown
        # A lone observation is no transition.
        kept = ~is_padding & ~(unknown & (length == 1))
        # An ending brings another row: its final observation.
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
        """Whether it is unknown what the action of row t led to."""
        terminal = self.columns.terminal[t]
        is_last = t == len(self.columns.action) - 1
        return np.where(terminal, length == atari.LONGEST_GAME, is_last)

    def _find_padding(self, frames: UInt8[np.ndarray, "B height width"], t: Int[np.ndarray, " B"]):
        """Which rows are padding, and how many rows of it each row's episode begins with."""
        is_padding, padding = np.zeros(len(t), bool), np.zeros(len(t), np.int64)
        offset, done = t - self.begin[t], 0
        for i in np.flatnonzero(offset <= _PADDING):  # the others cannot be padding
            padding[done:i], done = self.padding, i
            if offset[i] == 0:
                self.padding = 0
            all_before = self.padding == offset[i]
            is_padding[i] = all_before and self.may_pad[t[i]] and not frames[i].any()
            self.padding += int(is_padding[i])
        padding[done:] = self.padding
        return is_padding, padding


class _Array:
    """A compressed `.npy`, of which the first rows can be read without the others.

    **Raises:** `CorruptFileError` where it is damaged.
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
                raise ValueError("its rows do not follow each other")
            self._left = math.prod(self.shape) * self.dtype.itemsize

    def __enter__(self) -> "_Array":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(self, rows: int = 1) -> np.ndarray:
        """The next so many rows; all of an array without rows."""
        shape = (rows, *self.shape[1:]) if self.shape else ()
        size = math.prod(shape) * self.dtype.itemsize
        with self._damage():
            data = self._file.read(size)
            if len(data) < size:
                raise EOFError("it is shorter than it says")
        self._left -= size
        return np.frombuffer(data, self.dtype).reshape(shape)

    def check_rest(self) -> None:
        """Reads on to the end, where the checksum of all that was read stands."""
        with self._damage():
            while data := self._file.read(_CHUNK):
                self._left -= len(data)
            if self._left:
                raise EOFError("its length is not what it says")

    @contextlib.contextmanager
    def _damage(self):
        try:
            yield
        except (*NPY_DAMAGE, zlib.error) as error:
            raise CorruptFileError(f"'{self.path}' is damaged ({error}): fetch it again") from error


def _file(logs: Path, column: str, shard: int) -> Path:
    return logs / f"$store$_{column}_ckpt.{shard}.gz"


def _cursor(logs: Path, shard: int, capacity: int) -> int:
    """How many rows of a file are its own. Without the count, as many as in a full one."""
    path = logs / f"add_count_ckpt.{shard}.gz"
    if not path.exists():
        return capacity - 1
    with _Array(path) as array:
        count = int(array.read())
        array.check_rest()
    return count % capacity if count % capacity or not count else capacity
