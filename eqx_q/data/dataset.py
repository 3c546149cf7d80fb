"""Data sets: a directory of plain arrays for memory-mapping, and a header that describes them.

    frames.npy  or  obs.npy   uint8[R, height, width], unstacked; or observations, [R, ...]
    action.npy                int32[R, ...]; -1 in the row of an episode's final observation
    reward.npy                float32[R], the game's own
    terminated.npy  truncated.npy  first.npy    bool[R]
    header.json               environment, spaces, preprocessing, source, shards, checksums

Row t holds an observation, the action taken there, and that action's reward and ending (aligned as
in RLDS and Minari). An episode's final observation has a row of its own. So the action in row t led
to the observation in row t + 1.

If observations have several parts, each has a file: `obs.image.npy`, `obs.arm.joints.npy`. Actions
of a `Box` are floats, with NaN instead of -1. A team's observations and actions have an axis of
agents after that of rows. Optional data of the environment are in further columns:

    action_mask.npy           bool[R, (M,) A]: legal actions at that observation
    agent_mask.npy            bool[R, M]: agents of a team that are alive
    agent_reward.npy          float32[R, M]: each agent's own reward for that action
    global_state.npy          float32[R, S]
"""

import dataclasses
import json
import os
import tokenize
import urllib.parse
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gymnasium
import jax
import numpy as np
from jaxtyping import Bool, Float32, PyTree, Shaped

from ..errors import CorruptFileError, UsageError
from ..saving.files import unseal
from ..spaces import hashable, leaves, shapes
from ..types import Observation

FORMATS = (2, 3)  # the second has features of later versions: see `Description.format`
HEADER = "header.json"
COLUMNS = {
    "action": np.dtype("<i4"),  # a Box has its own type
    "reward": np.dtype("<f4"),
    "terminated": np.dtype("|b1"),
    "truncated": np.dtype("|b1"),
    "first": np.dtype("|b1"),
}
EXTRAS = {
    "action_mask": np.dtype("|b1"),
    "agent_mask": np.dtype("|b1"),
    "agent_reward": np.dtype("<f4"),
    "global_state": np.dtype("<f4"),
}
BLOCK = 1 << 24  # bytes that a checksum reads at a time
# Exceptions that NumPy raises for a damaged `.npy`. It tokenises the header, which is Python.
NPY_DAMAGE = (OSError, EOFError, ValueError, TypeError, SyntaxError, tokenize.TokenError)


class Rows(NamedTuple):
    """Consecutive rows of a data set. `obs` holds single frames if observations are stacks.

    A row with an action holds the outcome of that action: `reward`, `agent_reward` and the ending.
    All else is from the moment in which it was chosen. The last four columns exist if they are in
    the description's `extras`.
    """

    obs: Observation
    action: Shaped[np.ndarray, "R *action"]
    reward: Float32[np.ndarray, " R"]
    terminated: Bool[np.ndarray, " R"]
    truncated: Bool[np.ndarray, " R"]
    first: Bool[np.ndarray, " R"]
    action_mask: Bool[np.ndarray, "R *M A"] | None = None
    agent_mask: Bool[np.ndarray, "R M"] | None = None
    agent_reward: Float32[np.ndarray, "R M"] | None = None
    global_state: Float32[np.ndarray, "R S"] | None = None

    @classmethod
    def of_episode(
        cls,
        obs: Observation,
        action: Shaped[np.ndarray, "L *action"],
        reward: Shaped[np.ndarray, " L"],
        *,
        terminated: bool,
        action_mask: Bool[np.ndarray, "L_and_1 *M A"] | None = None,
        agent_mask: Bool[np.ndarray, "L_and_1 M"] | None = None,
        agent_reward: Shaped[np.ndarray, "L M"] | None = None,
        global_state: Shaped[np.ndarray, "L_and_1 S"] | None = None,
    ) -> "Rows":
        """The rows of a whole episode, including its final observation.

        **Arguments:** `terminated`: whether the task ended it; else it was truncated. `obs`, the
        masks and `global_state` have one entry more than actions and rewards.
        """
        length = len(action)
        last = np.arange(length + 1) == length - 1
        if agent_reward is not None:
            agent_reward = _with_last(agent_reward, 0).astype(np.float32)
        if action.dtype.kind != "f":
            action = action.astype(np.int32)
        return cls(
            obs=obs,
            action=_with_last(action, no_action(action.dtype)),
            reward=_with_last(reward, 0).astype(np.float32),
            terminated=last & terminated,
            truncated=last & (not terminated),
            first=np.arange(length + 1) == 0,
            action_mask=action_mask,
            agent_mask=agent_mask,
            agent_reward=agent_reward,
            global_state=None if global_state is None else global_state.astype(np.float32),
        )

    @property
    def acted(self) -> Bool[np.ndarray, " R"]:
        """For whole episodes: mask of rows with an action, all but the final observations."""
        return np.append(~self.first[1:], False)

    def part(self, start: int, stop: int) -> "Rows":
        """The rows from `start` to `stop`, excluding the latter."""
        return jax.tree.map(lambda x: x[start:stop], self)


def no_action(dtype: np.dtype) -> float | int:
    """The placeholder for the action in the row of a final observation."""
    return np.nan if dtype.kind == "f" else -1


def _with_last(x: np.ndarray, value: float) -> np.ndarray:
    return np.concatenate([x, np.full((1, *x.shape[1:]), value, x.dtype)])


@dataclasses.dataclass(frozen=True)
class Column:
    """An array of a data set: the name of its file, and the shape and type of a row."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Shard(NamedTuple):
    """A part of a data set with one origin: a file of its source, or a member of a population.

    `run`: the number of the run (seed), if the source has several. `source`: further details of its
    origin.
    """

    name: str
    start: int
    rows: int
    run: int | None = None
    source: Mapping[str, Any] = {}


class Description(NamedTuple):
    """The description of a data set.

    - `env`: the environment's id, `"<suite>/<name>"`.
    - `observation_space`, `action_space`: of one lane (in a team, of one agent), as the agent sees
        them.
    - `stack`: number of frames of an observation `[stack, height, width]`; `None` if observations
        are stored as they are.
    - `stack_start`: padding before an episode's first frame: `"zeros"`, or `"repeat"` of it.
    - `preprocessing`: the processing of observations and actions, by option. Data sets with
        different preprocessing cannot be mixed.
    - `source`: where the data came from.
    - `num_agents`: `None`, or the number of agents of the team.
    - `extras`: those of `action_mask`, `agent_mask`, `agent_reward` and `global_state` that exist,
        with the shape of each in a row.
    """

    env: str
    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    stack: int | None = None
    stack_start: str = "zeros"
    preprocessing: Mapping[str, Any] = {}
    source: Mapping[str, Any] = {}
    num_agents: int | None = None
    extras: Mapping[str, tuple[int, ...]] = {}

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The stored shape of an observation that is one array; for a stack, that of a frame."""
        shape = self.observation_space.shape
        assert shape is not None
        return shape if self.stack is None else shape[1:]

    @property
    def columns(self) -> Any:
        """All columns: `Rows` of `Column`s.

        **Raises:** `UsageError` if two parts of observations would share a file.
        """
        team = () if self.num_agents is None else (self.num_agents,)
        action = self.action_space
        dtype = COLUMNS["action"]
        if isinstance(action, gymnasium.spaces.Box):
            dtype = np.result_type(action.dtype, np.float32)
        rest = {name: Column(name, (), dtype) for name, dtype in COLUMNS.items()}
        rest["action"] = Column("action", (*team, *(action.shape or ())), dtype)
        for name, shape in self.extras.items():
            rest[name] = Column(name, tuple(shape), EXTRAS[name])
        return Rows(self._parts(team), **rest)  # pyright: ignore[reportArgumentType]

    def _parts(self, team: tuple[int, ...]) -> PyTree[Column]:
        """The columns of observations."""
        space = self.observation_space
        if self.stack is not None:
            assert space.dtype is not None
            return Column("frames", (*team, *self.row_shape), space.dtype)
        parts = []
        for path, leaf in leaves(space):
            # Keys of a `Dict` may have characters that file names may not have.
            name = f"obs.{urllib.parse.quote(path, safe='')}" if path else "obs"
            if name in [part.name for part in parts]:
                raise UsageError(f"two parts of observations have the path '{path}': rename one")
            parts.append(Column(name, (*team, *(leaf.shape or ())), np.dtype(leaf.dtype)))
        return jax.tree.unflatten(jax.tree.structure(shapes(space)), parts)

    @property
    def format(self) -> int:
        """The first format that supports all of this."""
        plain = isinstance(self.observation_space, gymnasium.spaces.Box) and _counts_from_0(
            self.action_space
        )
        return 2 if plain and self.num_agents is None and not self.extras else 3

    def as_json(self) -> dict[str, Any]:
        """The JSON for the header."""
        space: Any = self.action_space
        content = {
            "env": self.env,
            "observation_space": _space_as_json(self.observation_space),
            **(
                {"num_actions": int(space.n)}
                if _counts_from_0(space)
                else {"action_space": _space_as_json(space)}
            ),
            "stack": self.stack,
            "stack_start": self.stack_start,
            "preprocessing": dict(self.preprocessing),
            "source": dict(self.source),
        }
        if self.num_agents is not None:
            content["num_agents"] = self.num_agents
        if self.extras:
            content["extras"] = {name: list(shape) for name, shape in self.extras.items()}
        return content

    @classmethod
    def from_json(cls, header: Mapping[str, Any]) -> "Description":
        """The inverse of `as_json`."""
        if "action_space" in header:
            action_space = _space_of_json(header["action_space"])
        else:
            action_space = gymnasium.spaces.Discrete(header["num_actions"])
        extras = {name: tuple(shape) for name, shape in header.get("extras", {}).items()}
        if unknown := extras.keys() - EXTRAS.keys():
            raise ValueError(f"unknown extras {sorted(unknown)}")
        return cls(
            env=header["env"],
            observation_space=hashable(_space_of_json(header["observation_space"])),
            action_space=hashable(action_space),
            stack=header["stack"],
            stack_start=header["stack_start"],
            preprocessing=header["preprocessing"],
            source=header["source"],
            num_agents=header.get("num_agents"),
            extras=extras,
        )


def _counts_from_0(space: gymnasium.Space) -> bool:
    return isinstance(space, gymnasium.spaces.Discrete) and not space.start


def _space_as_json(space: Any) -> dict[str, Any]:
    kind = type(hashable(space)).__name__
    match space:
        case gymnasium.spaces.Box():  # the first supported kind is stored without a name
            return {
                "shape": list(space.shape),
                "dtype": space.dtype.str,
                "low": _bound(space.low),
                "high": _bound(space.high),
            }
        case gymnasium.spaces.Discrete():
            return {"kind": kind, "n": int(space.n), "start": int(space.start)}
        case gymnasium.spaces.MultiDiscrete():
            nvec, start = space.nvec.tolist(), space.start.tolist()
            return {"kind": kind, "nvec": nvec, "start": start, "dtype": space.dtype.str}
        case gymnasium.spaces.MultiBinary():
            return {"kind": kind, "n": np.asarray(space.n).tolist()}
        case gymnasium.spaces.Dict():
            return {"kind": kind, "spaces": {x: _space_as_json(space[x]) for x in space}}
        case _:
            return {"kind": kind, "spaces": [_space_as_json(x) for x in space]}


def _space_of_json(content: Mapping[str, Any]) -> gymnasium.Space:
    """The inverse of `_space_as_json`."""
    match content:
        case {"kind": "Discrete", "n": n, "start": start}:
            return gymnasium.spaces.Discrete(n, start=start)
        case {"kind": "MultiDiscrete", "nvec": nvec, "start": start, "dtype": dtype}:
            return gymnasium.spaces.MultiDiscrete(
                np.array(nvec), np.dtype(dtype).type, start=np.array(start)
            )
        case {"kind": "MultiBinary", "n": n}:
            return gymnasium.spaces.MultiBinary(n)
        case {"kind": "Dict", "spaces": spaces}:
            return gymnasium.spaces.Dict({x: _space_of_json(y) for x, y in spaces.items()})
        case {"kind": "Tuple", "spaces": spaces}:
            return gymnasium.spaces.Tuple([_space_of_json(x) for x in spaces])
        case {"shape": _, "dtype": _, "low": _, "high": _}:
            shape, dtype = tuple(content["shape"]), np.dtype(content["dtype"])
            low, high = (
                np.broadcast_to(np.array(content[name], dtype), shape) for name in ("low", "high")
            )
            return gymnasium.spaces.Box(low, high, shape, dtype.type)
    raise ValueError(f"unknown space {dict(content)}")


class Dataset:
    """A finished data set on disk, memory-mapped.

    **Attributes:** `path`; `description`; `shards`; `rows`: the arrays, as long as the data set;
    `num_transitions`, `num_episodes`.

    **Raises:** `CorruptFileError` if the directory is not a data set, or is damaged. For frames and
    observations only the size is checked; `verify` also reads them.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        header = _read_header(self.path)
        try:
            self.description = Description.from_json(header)
            self.shards = [Shard(**shard) for shard in header["shards"]]
            self._checksums = {name: x["crc32"] for name, x in header["arrays"].items()}
            columns = self.description.columns
            arrays = [
                _map(self.path / f"{column.name}.npy", header["arrays"][column.name])
                for column in jax.tree.leaves(columns)
            ]
            if len(arrays) < len(header["arrays"]):
                raise ValueError(f"arrays are {sorted(header['arrays'])}")
            self.rows: Rows = jax.tree.unflatten(jax.tree.structure(columns), arrays)
            for column, x in zip(jax.tree.leaves(columns), arrays, strict=True):
                if x.shape != (len(self), *column.shape):
                    raise ValueError(f"{column.name} has shape {x.shape}")
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise CorruptFileError(
                f"'{self.path}' has an invalid header ({error!r}): make the data set again"
            ) from error
        self._verify(COLUMNS)
        self.num_transitions = int(np.sum(self.rows.acted))
        self.num_episodes = len(self.rows.action) - self.num_transitions

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows.action)

    @property
    def checksum(self) -> str:
        """A checksum of all arrays: equal for data sets with the same rows."""
        text = json.dumps(self._checksums, indent=1) + "\n"
        return f"{zlib.crc32(text.encode()):08x}"

    def episodes(self) -> Iterator[Rows]:
        """Yields the episodes, each with the row of its final observation."""
        starts = np.flatnonzero(self.rows.first).tolist()
        for start, stop in zip(starts, [*starts[1:], len(self)], strict=True):
            yield self.rows.part(start, stop)

    def verify(self) -> None:
        """Reads everything. Raises `CorruptFileError` if a checksum is wrong."""
        self._verify(self._checksums)

    def _verify(self, names) -> None:
        for name in names:
            path = self.path / f"{name}.npy"
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                is_whole = checksum(file) == self._checksums[name]
            if not is_whole:
                raise CorruptFileError(
                    f"'{path}' is damaged, its checksum is wrong: make the data set again"
                )


def _read_header(path: Path) -> dict[str, Any]:
    if not path.exists() and path.with_name(path.name + ".partial").exists():
        raise UsageError(
            f"'{path}' is not finished: run the command that makes it again to continue"
        )
    try:
        header = json.loads((path / HEADER).read_text())
    except (OSError, NotADirectoryError):
        raise UsageError(
            f"'{path}' is not a data set, since it has no header.json: make one with "
            "scripts/collect.py or scripts/convert.py"
        ) from None
    except ValueError as error:
        raise _damaged_header(path, error) from error
    if not isinstance(header, dict) or header.get("format") not in FORMATS:
        raise CorruptFileError(
            f"'{path}' is not a data set in a format of this eqx_q ({FORMATS[0]} or "
            f"{FORMATS[1]}): make it again"
        )
    try:
        return unseal(header)
    except ValueError as error:
        raise _damaged_header(path, error) from error


def _damaged_header(path: Path, error: ValueError) -> CorruptFileError:
    return CorruptFileError(f"'{path / HEADER}' is damaged ({error}): make the data set again")


def _map(path: Path, expected: dict[str, Any]) -> np.ndarray:
    """Memory-maps an array, and compares its shape and type with the header."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_DAMAGE as error:
        raise CorruptFileError(f"'{path}' is damaged ({error}): make the data set again") from error
    if array.dtype.str != expected["dtype"] or list(array.shape) != expected["shape"]:
        raise CorruptFileError(
            f"'{path}' holds {array.dtype.str}{list(array.shape)}, but the header says "
            f"{expected['dtype']}{expected['shape']}: make the data set again"
        )
    return array


def checksum(file: BinaryIO) -> int:
    """The checksum of the rest of a file."""
    crc = 0
    while block := file.read(BLOCK):
        crc = zlib.crc32(block, crc)
    return crc


def _bound(values: np.ndarray) -> Any:
    """A bound of a space for JSON: one number if it is the same everywhere."""
    same = values.size and np.all(values == values.flat[0])
    return json.loads(
        json.dumps((values.flat[0] if same else values).tolist()),
        parse_constant=lambda name: name.replace("Infinity", "inf"),
    )
