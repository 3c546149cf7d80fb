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

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped

from ..errors import CorruptFileError, UsageError
from ..spaces import Box, Discrete

FORMAT = 2
HEADER = "header.json"
COLUMNS = {
    "action": np.dtype("<i4"),
    "reward": np.dtype("<f4"),
    "terminated": np.dtype("|b1"),
    "truncated": np.dtype("|b1"),
    "first": np.dtype("|b1"),
}
BLOCK = 1 << 24  # bytes that a checksum reads at a time


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
        self._verify(COLUMNS)
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


def _read_header(path: Path) -> dict[str, Any]:
    if not path.exists() and path.with_name(path.name + ".partial").exists():
        raise UsageError(
            f"'{path}' is not finished: run the command that makes it again, and it goes on"
        )
    try:
        header = json.loads((path / HEADER).read_text())
    except (OSError, NotADirectoryError):
        raise UsageError(
            f"'{path}' is no data set: there is no header.json in it; make one with "
            "scripts/collect.py or scripts/convert.py"
        ) from None
    except ValueError as error:
        raise _damaged_header(path, error) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CorruptFileError(
            f"'{path}' is no data set that this eqx_q reads (format {FORMAT}): make it anew"
        )
    try:
        return unseal(header)
    except ValueError as error:
        raise _damaged_header(path, error) from error


def _damaged_header(path: Path, error: ValueError) -> CorruptFileError:
    return CorruptFileError(f"'{path / HEADER}' is damaged: {error}; make the data set anew")


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
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _bound(values: np.ndarray) -> Any:
    """A bound of a space for JSON: one number where it is the same everywhere."""
    same = values.size and np.all(values == values.flat[0])
    return json.loads(
        json.dumps((values.flat[0] if same else values).tolist()),
        parse_constant=lambda name: name.replace("Infinity", "inf"),
    )


def seal(content: dict[str, Any]) -> bytes:
    """JSON with a checksum of itself."""
    return _dump({**content, "crc32": zlib.crc32(_dump(content))})


def unseal(sealed: Any) -> dict[str, Any]:
    """What was sealed, of the JSON that was read. Raises `ValueError` where it has changed."""
    if not isinstance(sealed, dict) or "crc32" not in sealed:
        raise ValueError("it has no checksum")
    content = {name: value for name, value in sealed.items() if name != "crc32"}
    if zlib.crc32(_dump(content)) != sealed["crc32"]:
        raise ValueError("its checksum is wrong")
    return content


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
