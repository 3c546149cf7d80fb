"""Records a data set with the agents of finished runs."""

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

_STEPS_PER_LANE = 10_000  # minimum, since episodes that run at the end are cut
_STEPS_PER_SHARD = 1_000_000  # maximum, which an interruption can cost


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
    """Records a data set with the agents of finished runs, in their training environment.

    Every member of every run plays at every checkpoint with every epsilon, one after the other,
    each for the same number of steps. Each makes a shard (several if there are many steps), which
    survives an interruption: the same arguments continue after it.

    **Arguments:**

    - `runs`: configurations with their directories.
    - `out`: the directory of the new data set.
    - `steps`: transitions in total.
    - `epsilons`: probabilities of a random action. One given twice gets two shares of the steps.
    - `steps_of_checkpoints`: steps of the checkpoints to use, or `"all"`; by default the agent at
        the end of the run.
    - `num_envs`: lanes.
    - `protocol`: environment options that differ from training; by default those of the run's own
        evaluations. Data sets additionally need whole games and unclipped rewards.

    **Raises:** `UsageError` for invalid input, before anything is played; `KeyboardInterrupt` after
    a signal, whose message says how to continue.
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
        # After an interruption, emulators must not repeat the games already recorded.
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
    """A shard to record: an agent of a run that plays `steps` steps.

    `path`: the file of the agent; `member`: of a population; `run`: a number for run and member.
    """

    name: str
    path: Path
    member: int | None
    run: int
    epsilon: float
    steps: int
    env_steps: int

    def agent(self) -> Agent:
        """Loads the agent."""
        agent = _agent_of(self.path)
        return agent if self.member is None else cast(Population, agent).member(self.member)

    @property
    def source(self) -> dict[str, Any]:
        """The shard's entry in the data set's header."""
        names = ("member", "epsilon", "env_steps")
        return {"agent": str(self.path.resolve())} | {name: getattr(self, name) for name in names}


def _of_one_environment(runs: Sequence[tuple[Config, Path]]) -> Config:
    """The first configuration. Raises `UsageError` if the runs differ in their environment."""
    (config, directory), *others = runs
    for other, elsewhere in others:
        if given(other["env"]) != given(config["env"]):
            raise UsageError(
                f"'{elsewhere}' was not trained in the environment of '{directory}': record runs "
                "whose env options are the same"
            )
    return config


def _parts(runs, steps, epsilons, steps_of_checkpoints) -> list[_Part]:
    """All shards to record, each with its share of the steps."""
    players = []
    number = 0
    for _, directory in runs:
        files = _agent_files(directory, steps_of_checkpoints)
        agent = _agent_of(files[0])
        for file in files[1:]:
            read_header(file)  # checks the whole file, so that damage is found before playing
        members = [None] if agent.num_members is None else list(range(agent.num_members))
        for member in members:
            for path in files:
                at = int(path.stem) if path.suffix == ".ckpt" else sum(learnt(agent).values())
                players += [(path, member, number, epsilon, at) for epsilon in epsilons]
            number += 1
    if steps < len(players):
        raise UsageError(f"steps={steps} are too few for {len(players)} agents: give more")
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
    """The files of the requested agents of a run."""
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
    """Loads the agent in a file, which may be a checkpoint."""
    tree = load(path)
    return tree if isinstance(tree, Agent) else tree.agent


def _check_disk(out: Path, env: Env, description: Description, steps: int) -> None:
    """Raises `UsageError` if the disk has too little space for the rest of the data set."""
    stack = description.stack or 1
    _, timestep = env.reset(jax.random.key(0))
    obs = [np.asarray(x) for x in jax.tree.leaves(timestep.obs)]
    # A guess: the writer decides later whether whole numbers are stored in one byte each.
    row = sum(x.size * (1 if np.array_equal(x, x.astype(np.uint8)) else x.itemsize) for x in obs)
    columns = jax.tree.leaves(description.columns._replace(obs=None))
    row = row // stack + sum(math.prod(x.shape) * x.dtype.itemsize for x in columns)
    partial = out.with_name(out.name + ".partial")
    there = sum(path.stat().st_size for path in partial.glob("*")) if partial.is_dir() else 0
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    needed, free = steps * row - there, shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(
            f"the data set takes about {steps * row / 1e9:,.3g} GB, but {free / 1e9:,.3g} GB are "
            f"free at '{place}': lower steps, or choose another place"
        )


class _Display:
    """Shows the progress of a recording, and ends it after a signal.

    **Attributes:** `part`: the shard being recorded.
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
                f"stopped: {len(self._writer.done)} of {len(self._parts)} shards are kept next to "
                f"'{self._writer.path}'; the same command continues after them"
            )

    def _done(self) -> int:
        return sum(part.steps for part in self._parts if part.name in self._writer.done)
