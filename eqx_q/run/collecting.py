"""Recording a data set from the agents that runs left behind."""

import contextlib
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from ..agents import Agent, Population
from ..data import Dataset, Description, Writer
from ..errors import UsageError
from ..loops.callbacks import Interrupt, Progress
from ..loops.recording import Recorded, describe, record
from ..saving.checkpoint import checkpoints, load, read_header
from ..wrappers import Env
from ..wrappers.host import closing
from .evaluation import trained_agent
from .making import (
    LANES_IN_JAX,
    LANES_ON_HOST,
    MOST_LANES,
    close_later,
    emulator_seed as seed_of_emulators,
    learnt,
    make_env,
)
from .settings import Config, env_name, given

_STEPS_PER_LANE = 10_000  # of a recording, at least: what is running at its end is cut
_STEPS_PER_SHARD = 1_000_000  # at most: what an interruption costs


def collect_run(
    runs: Sequence[tuple[Config, Path]],
    out: Path,
    *,
    steps: int,
    epsilons: Sequence[float] = (0.0,),
    steps_of_checkpoints: Sequence[int] | str | None = None,
    num_envs: int | None = None,
    seed: int = 0,
    protocol: Mapping[str, Any] | None = None,
) -> Dataset:
    """Records a data set from the agents that runs left behind, in the environment of theirs.

    Every run's every member at every checkpoint plays with every epsilon, one after the other, and
    all of them equally many steps. Each is a shard (several, where they are many steps), which
    survives an interruption: the same arguments go on after it.

    **Arguments:**

    - `runs`: configurations with their directories.
    - `out`: the data set's directory to be.
    - `steps`: transitions in all.
    - `epsilons`: probabilities of a random action. One given twice gets two shares of the steps.
    - `steps_of_checkpoints`: which of the checkpoints that are kept, by their step, or `"all"`;
        by default the agent at the end of the run.
    - `num_envs`: lanes.
    - `protocol`: options of the environment that differ from training; by default those of the
        run's own evaluations. A data set's own come on top: whole games, for unclipped rewards.

    **Raises:** `UsageError` for what cannot be done, before anything is played; and
    `KeyboardInterrupt` after a signal, with what is to be done to go on.
    """
    config = _of_one_environment(runs)
    parts = _parts(runs, steps, epsilons, steps_of_checkpoints)
    if num_envs is not None and num_envs > MOST_LANES:
        raise UsageError(f"{num_envs:,} lanes are too many: lower num_envs")
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(closing(make_env(config, 1)))
        most = LANES_ON_HOST if one.on_host else LANES_IN_JAX
        lanes = num_envs or int(np.clip(parts[0].steps // _STEPS_PER_LANE, 1, most))
        options = given(config["protocol"] if protocol is None else protocol)
        options |= one.recording.options
        one = stack.enter_context(closing(one.replicate(1, **options)))
        description = describe(
            one,
            env_name(config),
            source={
                "runs": [str(directory.resolve()) for _, directory in runs],
                "env_options": {**given(config["env"]), **options},
                "steps": steps,
                "epsilons": list(epsilons),
                "num_envs": lanes,
                "seed": seed,
            },
        )
        _check_disk(out, one, description, steps)
        writer = stack.enter_context(Writer(out, description, narrow=True))
        # Emulators that go on play other games than those that are there already.
        emulator_seed = seed_of_emulators(seed, f"data {len(writer.done)}")
        env = stack.enter_context(closing(one.replicate(lanes, seed=emulator_seed)))
        interrupt = stack.enter_context(Interrupt())
        display = _Display(writer, parts, close_later(stack, Progress()), interrupt)
        for index, part in enumerate(parts):
            if part.name not in writer.done:
                display.part = part
                record(
                    part.agent(),
                    env,
                    writer,
                    num_steps=part.steps,
                    key=jax.random.fold_in(jax.random.key(seed), index),
                    shard=part.name,
                    epsilon=part.epsilon,
                    run=part.run,
                    source=part.source,
                    on_chunk=display,
                )
        return writer.finish()


class _Part(NamedTuple):
    """What becomes a shard: an agent of a run, that plays `steps` steps.

    `path`: of the file that holds it; `member`: of a population; `run`: a number for both.
    """

    name: str
    path: Path
    member: int | None
    run: int
    epsilon: float
    steps: int
    env_steps: int

    def agent(self) -> Agent:
        """Loaded."""
        agent = _agent_of(self.path)
        return agent if self.member is None else cast(Population, agent).member(self.member)

    @property
    def source(self) -> dict[str, Any]:
        """For the record."""
        names = ("member", "epsilon", "env_steps")
        return {"agent": str(self.path.resolve())} | {name: getattr(self, name) for name in names}


def _of_one_environment(runs: Sequence[tuple[Config, Path]]) -> Config:
    """The configuration of the runs, as far as their environment is concerned."""
    (config, directory), *others = runs
    for other, elsewhere in others:
        if given(other["env"]) != given(config["env"]):
            raise UsageError(
                f"'{elsewhere}' was not trained in the environment of '{directory}': record runs "
                "whose env options are the same"
            )
    return config


def _parts(runs, steps, epsilons, steps_of_checkpoints) -> list[_Part]:
    """All that will play, with its share of the steps."""
    players = []
    number = 0
    for _, directory in runs:
        files = _agent_files(directory, steps_of_checkpoints)
        agent = _agent_of(files[0])
        for file in files[1:]:
            read_header(file)  # which reads it all, so that no damage stops us midway
        members = [None] if agent.num_members is None else list(range(agent.num_members))
        for member in members:
            for path in files:
                at = int(path.stem) if path.suffix == ".ckpt" else sum(learnt(agent).values())
                players += [(path, member, number, epsilon, at) for epsilon in epsilons]
            number += 1
    if steps < len(players):
        raise UsageError(f"steps={steps} are too few for {len(players)} players: give more")
    parts = []
    for index, (path, member, run, epsilon, at) in enumerate(players):
        share = steps // len(players) + (index < steps % len(players))
        pieces = -(-share // _STEPS_PER_SHARD)
        for piece in range(pieces):
            name = f"{len(parts):04d}-run{run}-step{at}-eps{epsilon:g}"
            size = share // pieces + (piece < share % pieces)
            parts.append(_Part(name, path, member, run, epsilon, size, at))
    return parts


def _agent_files(directory: Path, steps_of_checkpoints: Sequence[int] | str | None) -> list[Path]:
    """The files that hold the agents of a run which are asked for."""
    if steps_of_checkpoints is None:
        trained_agent(directory)
        return [directory / "agent.eqx"]
    found = {int(path.stem): path for path in reversed(checkpoints(directory / "checkpoints"))}
    if not found:
        raise UsageError(f"there are no checkpoints in '{directory}': leave out checkpoints")
    if isinstance(steps_of_checkpoints, str):
        return list(found.values())
    for step in steps_of_checkpoints:
        if step not in found:
            there = ", ".join(str(one) for one in found)
            raise UsageError(f"'{directory}' has no checkpoint of step {step}: there are {there}")
    return [found[step] for step in steps_of_checkpoints]


def _agent_of(path: Path) -> Agent:
    """The agent in a file, which may be a checkpoint."""
    tree = load(path)
    return tree if isinstance(tree, Agent) else tree.agent


def _check_disk(out: Path, env: Env, description: Description, steps: int) -> None:
    """Raises `UsageError` where the disk will not take what is still to be written."""
    stack = description.stack or 1
    _, timestep = env.reset(jax.random.key(0))
    obs = [np.asarray(x) for x in jax.tree.leaves(timestep.obs)]
    # Whether whole numbers are stored in a byte each is a guess of what the writer will find.
    row = sum(x.size * (1 if np.array_equal(x, x.astype(np.uint8)) else x.itemsize) for x in obs)
    columns = jax.tree.leaves(description.columns._replace(obs=None))
    row = row // stack + sum(math.prod(x.shape) * x.dtype.itemsize for x in columns)
    partial = out.with_name(out.name + ".partial")
    there = sum(path.stat().st_size for path in partial.glob("*")) if partial.is_dir() else 0
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    needed, free = steps * row - there, shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(
            f"the data set takes about {steps * row / 1e9:,.3g} GB, and {free / 1e9:,.3g} GB are "
            f"free at '{place}': lower steps, or choose another place"
        )


class _Display:
    """Shows how a recording gets on, and ends it where a signal has come.

    **Attributes:** `part`: what is playing.
    """

    def __init__(
        self, writer: Writer, parts: list[_Part], progress: Progress, interrupt: Interrupt
    ):
        self.part = parts[0]
        self._writer, self._progress, self._interrupt = writer, progress, interrupt
        self._parts = parts
        self._total = sum(part.steps for part in parts)
        self._begin = self._done()
        self._started = time.perf_counter()

    def __call__(self, recorded: Recorded) -> None:
        """Called by `record`."""
        done = self._done() + recorded.transitions
        seconds = time.perf_counter() - self._started
        metrics = {
            "env_steps": done,
            "total_steps": self._total,
            "steps_per_second": (done - self._begin) / seconds,
            "episode_return": np.nan if recorded.return_mean is None else recorded.return_mean,
            "done": done == self._total,
        }
        self._progress(None, metrics)
        if self._interrupt.received and recorded.transitions < self.part.steps:
            raise KeyboardInterrupt(
                f"stopped: {len(self._writer.done)} of {len(self._parts)} shards are kept beside "
                f"'{self._writer.path}'; the same command goes on after them"
            )

    def _done(self) -> int:
        return sum(part.steps for part in self._parts if part.name in self._writer.done)
