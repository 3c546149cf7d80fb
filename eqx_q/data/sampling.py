"""Selects the part of a data set to learn from, and loads it in blocks that fit into memory."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from ..errors import UnknownNameError, UsageError, check_whole
from ..spaces import of_actions, of_observations
from .dataset import Dataset
from .replay import Replay

_SHARE = 0.5  # fraction of the free memory that data may take
_WAYS = ("shard", "episode", "transition")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How transitions, or starts of sequences, are sampled from a data set.

    **Attributes:**

    - `fraction`: the fraction of the data to learn from.
    - `by`: how to choose it: the first part of each `"shard"` (as slimCQL takes a tenth), whole
        `"episode"`s or single `"transition"`s at random.
    - `runs`: the runs to learn from, if the data set holds several.
    - `shards_per_block`: number of random shards to learn from at a time (slimCQL: 3).
    - `updates_per_block`: updates before the next block is used, if there are several.
    - `memory_gb`: memory for data on each device; larger data are split into blocks. By default
        half of the free memory.
    - `reward_clip`: whether rewards are clipped to [-1, 1].
    - `priority_exponent`: 0 samples uniformly, more by TD error (see `Priorities`).
    - `priority_correction`: strength of the correction of the resulting bias.
    - `seed`: of all random choices here.
    """

    fraction: float = 1.0
    by: str = "shard"
    runs: Sequence[int] | None = None
    shards_per_block: int | None = None
    updates_per_block: int = 62_500
    memory_gb: float | None = None
    reward_clip: bool = False
    priority_exponent: float = 0.0
    priority_correction: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise UsageError(f"fraction={self.fraction}: give a number above 0, up to 1")
        if self.by not in _WAYS:
            raise UnknownNameError("by", self.by, _WAYS)
        if self.runs is not None and not len(self.runs):
            raise UsageError("runs is empty: name at least one, or leave it out")
        for name, least in (("shards_per_block", 1), ("updates_per_block", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None:
                check_whole(**{name: value}, least=least)
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise UsageError(f"memory_gb={self.memory_gb}: give more than 0")
        if not 0 <= self.priority_exponent < np.inf:
            raise UsageError(f"priority_exponent={self.priority_exponent}: give 0 or more")
        if not 0 <= self.priority_correction <= 1:
            raise UsageError(f"priority_correction={self.priority_correction}: give 0 to 1")


class Blocks:
    """The parts of a data set that are in memory in turn; one part if all of it fits.

    All have the same shapes, so that one compiled program learns from each. The `i`-th block
    depends only on `i` and the seed.

    **Arguments:** `num_blocks`: the previous number, in a resumed run; by default as few as fit
    into the free memory.

    **Attributes:** `num_blocks`: blocks in one pass, after which the data are reshuffled.
    `num_transitions`: to learn from.

    **Raises:** `UsageError` if there is nothing to learn from, or it does not fit.
    """

    def __init__(self, dataset: Dataset, sampling: Sampling, *, num_blocks: int | None = None):
        self._dataset, self._sampling = dataset, sampling
        rows = dataset.rows
        self._starts = np.flatnonzero(rows.first)
        self._stops = np.append(self._starts[1:], len(dataset))
        self._drawable = self._choose(rows.acted)
        self.num_transitions = int(self._drawable.sum())
        if not self.num_transitions:
            raise UsageError(
                f"fraction={sampling.fraction} leaves nothing of '{dataset.path}': give more"
            )
        counts = np.add.reduceat(self._drawable, self._starts)
        self._episodes = np.flatnonzero(counts)
        self._lengths = (self._stops - self._starts)[self._episodes]
        self._counts = counts[self._episodes]
        arrays = jax.tree.leaves(rows)
        self._row_bytes = sum(x.dtype.itemsize * int(np.prod(x.shape[1:])) for x in arrays) + 8
        self._groups = self._shards_of_episodes()
        self.num_blocks = self._count_blocks() if num_blocks is None else num_blocks
        self._num_rows, self._num_drawable = self._largest()
        if num_blocks is not None:
            self._check_known()

    def load(self, index: int) -> Replay:
        """Loads the `index`-th block into the memory of the device."""
        chosen = np.sort(self._members(index))
        starts = self._starts[self._episodes[chosen]]
        stops = self._stops[self._episodes[chosen]]
        rows = self._dataset.rows
        lengths = stops - starts
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        description = self._dataset.description

        ranges = _joined(starts, stops)

        def whole(x: Shaped[np.ndarray, "R *row"]) -> Shaped[Array, "padded *row"]:
            parts = [x[start:stop] for start, stop in ranges]
            missing = self._num_rows - int(lengths.sum())
            if missing:
                parts.append(np.zeros((missing, *x.shape[1:]), x.dtype))
            return jnp.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts))

        drawable = np.concatenate([self._drawable[start:stop] for start, stop in ranges])
        drawable = np.flatnonzero(drawable)
        begins = np.repeat(first, lengths)
        arrays = {name: jax.tree.map(whole, x) for name, x in rows._asdict().items()}
        del arrays["first"]  # replaced by `start`
        return Replay(
            **arrays,
            start=_padded(begins, self._num_rows),
            num_rows=jnp.asarray(lengths.sum(), jnp.int32),
            drawable=_padded(drawable, self._num_drawable),
            num_drawable=jnp.asarray(len(drawable), jnp.int32),
            observation_space=of_observations(description.observation_space),
            action_space=of_actions(description.action_space),
            stack=description.stack,
            stack_start=description.stack_start,
            reward_clip=self._sampling.reward_clip,
        )

    def _choose(self, is_transition: Bool[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
        """Mask of rows at which transitions may begin."""
        sampling, shards = self._sampling, self._dataset.shards
        if sampling.runs is not None:
            there = sorted({shard.run for shard in shards if shard.run is not None})
            missing = set(sampling.runs) - set(there)
            if missing:
                raise UsageError(
                    f"'{self._dataset.path}' has no run {', '.join(map(str, sorted(missing)))}: "
                    f"it has {', '.join(map(str, there)) or 'none by number'}"
                )
        among = np.zeros_like(is_transition)
        for shard in shards:
            if sampling.runs is None or shard.run in sampling.runs:
                share = sampling.fraction if sampling.by == "shard" else 1.0
                among[shard.start : shard.start + round(share * shard.rows)] = True
        among &= is_transition
        if sampling.by == "shard" or sampling.fraction == 1:
            return among
        rng = np.random.default_rng([sampling.seed, 0])
        if sampling.by == "transition":
            rows = np.flatnonzero(among)
            chosen = rng.choice(rows, round(sampling.fraction * len(rows)), replace=False)
            among[:] = False
            among[chosen] = True
            return among
        counts = np.add.reduceat(among, self._starts)
        order = rng.permutation(np.flatnonzero(counts))
        enough = np.searchsorted(np.cumsum(counts[order]), sampling.fraction * counts.sum())
        kept = np.zeros(len(counts), bool)
        kept[order[: enough + 1]] = True
        return among & np.repeat(kept, self._stops - self._starts)

    def _shards_of_episodes(self) -> Int[np.ndarray, " episodes"]:
        starts = [shard.start for shard in self._dataset.shards]
        return np.searchsorted(starts, self._starts[self._episodes], side="right") - 1

    def _count_blocks(self) -> int:
        sampling = self._sampling
        free = _free_memory() * _SHARE if sampling.memory_gb is None else sampling.memory_gb * 2**30
        if sampling.shards_per_block is not None:
            shards = len(np.unique(self._groups))
            if sampling.shards_per_block > shards:
                raise UsageError(
                    f"shards_per_block={sampling.shards_per_block}, but there are {shards} shards "
                    f"to learn from: give at most {shards}"
                )
            num_blocks = -(-shards // sampling.shards_per_block)
            size = self._largest()[0] * self._row_bytes * min(2, num_blocks)
            if size > free:
                raise UsageError(
                    f"shards_per_block={sampling.shards_per_block} takes {size / 2**30:.2g} GB, "
                    f"including the next block, but data may take {free / 2**30:.2g} GB: lower "
                    "shards_per_block, or raise memory_gb"
                )
            return num_blocks
        size = int(self._lengths.sum()) * self._row_bytes
        if size <= free:
            return 1
        # Two blocks at a time: the next one is loaded while the current one is in use. If no
        # episode takes more than a fifth, each is shorter than a block, so no block is empty.
        longest = int(self._lengths.max()) * self._row_bytes
        if longest > free / 5:
            raise UsageError(
                f"an episode of '{self._dataset.path}' alone takes {longest / 2**30:.2g} GB, but "
                f"data may take {free / 2**30:.2g} GB: raise memory_gb"
            )
        return int(np.ceil(size / (free / 2 - longest)))

    def _check_known(self) -> None:
        """Raises `UsageError` if the previous number of blocks is no longer possible."""
        size, free = self._num_rows * self._row_bytes * min(2, self.num_blocks), _free_memory()
        if self.num_blocks > len(self._episodes) or size > free:
            raise UsageError(
                f"the run had its data in {self.num_blocks} blocks, but '{self._dataset.path}' has "
                f"{len(self._episodes)} episodes, the blocks take {size / 2**30:.2g} GB, and "
                f"{free / 2**30:.2g} GB are free: give memory_gb to split it again"
            )

    def _members(self, index: int) -> Int[np.ndarray, " episodes"]:
        """Indices of the episodes of a block."""
        num_episodes = len(self._episodes)
        if self._sampling.shards_per_block is not None:
            rng = np.random.default_rng([self._sampling.seed, 1, index])
            shards = np.unique(self._groups)
            shards = rng.choice(shards, self._sampling.shards_per_block, replace=False)
            return np.flatnonzero(np.isin(self._groups, shards))
        if self.num_blocks == 1:
            return np.arange(num_episodes)
        turn, part = divmod(index, self.num_blocks)
        order = np.random.default_rng([self._sampling.seed, 1, turn]).permutation(num_episodes)
        through = np.cumsum(self._lengths[order]) / self._lengths.sum() * self.num_blocks
        return order[np.minimum(np.ceil(through) - 1, self.num_blocks - 1) == part]

    def _largest(self) -> tuple[int, int]:
        """The number of rows and of places that suffice for every block."""
        if self._sampling.shards_per_block is not None:
            totals = (
                np.sort(np.bincount(self._groups, weights=x)) for x in (self._lengths, self._counts)
            )
            rows, places = (int(x[-self._sampling.shards_per_block :].sum()) for x in totals)
            return rows, places
        if self.num_blocks == 1:
            return int(self._lengths.sum()), int(self._counts.sum())
        rows = -(-int(self._lengths.sum()) // self.num_blocks) + int(self._lengths.max())
        return rows, rows


def _padded(x: Int[np.ndarray, " some"], length: int) -> Int[Array, " length"]:
    return jnp.asarray(np.pad(x, (0, length - len(x))), jnp.int32)


def _joined(starts, stops) -> list[tuple[int, int]]:
    """Ranges, with adjacent ones merged."""
    breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
    return [
        (int(starts[part[0]]), int(stops[part[-1]]))
        for part in np.split(np.arange(len(starts)), breaks)
    ]


def _free_memory() -> float:
    """Free bytes per device, since each holds the data; devices of a CPU share its memory."""
    devices = jax.local_devices()
    statistics = devices[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return _free_memory_of_host() / len(devices)


def _free_memory_of_host() -> float:
    with contextlib.suppress(OSError, StopIteration):  # Linux: includes reclaimable caches
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
