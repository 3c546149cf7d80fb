"""A run as the scripts make it: from a configuration to a directory of results.

A configuration is a nested dictionary with the keys of `conf/config.yaml`. The directory has

    config.yaml  metrics.jsonl  summary.json  agent.eqx  checkpoints/  media/
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import operator
import pkgutil
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Bool, Float

from .agents import Agent, Population
from .callbacks import Checkpoint, Evaluation, Interrupt, Progress, TimeBudget, Video, restore
from .checkpoint import checkpoints, load, newest_checkpoint, save
from .data import Dataset, Writer
from .errors import DivergedError, UnknownNameError, UsageError
from .evaluation import Episodes, play_episodes
from .files import write_whole
from .media import record_episode, write_gif
from .recording import Recorded, describe, record
from .tracking import JsonlTracker, Tracker, Trackers
from .training import Metrics, RunState, train
from .wrappers import Env, make
from .wrappers.host import closing
from .wrappers.registry import SUITES

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]

_LANES_IN_JAX, _LANES_ON_HOST = 128, 8  # of an evaluation: an emulator is slow
_MOST_LANES = 2**24
_SUITE_PACKAGES = (*(suite.package for suite in SUITES.values()), "mpe2")
_STEPS_PER_LANE = 1000  # of a recording, at least: what is running at its end is cut
_STEPS_PER_SHARD = 1_000_000  # at most: what an interruption costs
_LONGEST_EPISODE = 27_000  # where the environment has no limit of its own: Atari's


def make_env(config: Config, num_envs: int) -> Env:
    """The environment that `config["env"]` describes; options that are null keep their default."""
    options = _given(config["env"])
    suite, name = options.pop("suite"), options.pop("name")
    seed = _emulator_seed(whole(config, "seed"), "training")
    return make(f"{suite}/{name}", num_envs, seed=seed, **options)


def _emulator_seed(seed: int, role: str) -> int:
    """A seed that is far from those of other runs and roles: lane `i` takes it plus `i`."""
    (spread,) = np.random.SeedSequence([seed, *role.encode()]).generate_state(1)
    return int(spread) % (2**31 - _MOST_LANES)  # with the lanes on top it fits 32 bits, signed


def make_agent(config: Config, env: Env) -> Any:
    """The agent that `config["agent"]` describes; a population where `num_seeds` is above 1.

    Member `i` starts with the parameters that a run of its own would have at `seed + i`.
    """
    options = _given(config["agent"])
    create = pkgutil.resolve_name(options.pop("_target_")).create
    known = inspect.signature(create).parameters
    for name in options:
        if name not in known:
            raise UnknownNameError("hyperparameter", name, set(known) - {"key"})
    for name in _traced(config) & set(options):
        number(config, f"agent.{name}")
    if env.num_agents is not None:
        options["num_agents"] = env.num_agents

    def member(key):
        return create(env.observation_space, env.action_space, key=key, **options)

    seeds = whole(config, "seed") + np.arange(whole(config, "num_seeds", least=1))
    if len(seeds) == 1:
        return member(_agent_key(seeds[0]))
    return Population(eqx.filter_vmap(member)(jax.vmap(_agent_key)(seeds)))


def changeable(config: Config) -> set[str]:
    """Hyperparameters that a run in progress may change: those that are leaves of the agent."""
    return _traced(config) & set(config["agent"])


def _traced(config: Config) -> set[str]:
    """Fields of the agent that hold one value, and that learning does not change: by their type."""

    def is_traced(kind: Any) -> bool:
        return getattr(kind, "dtype", None) in (Float, Bool) and kind.dim_str == ""

    fields = dataclasses.fields(pkgutil.resolve_name(config["agent"]["_target_"]))
    return {field.name for field in fields if is_traced(field.type)}


def _agent_key(seed):
    return jax.random.fold_in(jax.random.key(seed), 0)


def train_run(
    config: Config,
    directory: Path,
    *,
    resume: bool = False,
    on_start: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains as `config` says, and leaves the results in `directory`.

    **Arguments:** `on_start`: called when all that `config` asks for has been made.

    **Returns:** the summary, which is in `summary.json` too.
    **Raises:** `UsageError` for what the configuration gets wrong.
    """
    started = time.perf_counter()
    if config["devices"] != 1:
        raise UsageError(f"devices={config['devices']}: only devices=1 is supported so far")
    with contextlib.ExitStack() as stack:
        env = stack.enter_context(
            closing(make_env(config, _lanes(config, whole(config, "num_envs"))))
        )
        agent = make_agent(config, env)
        run_state = _restored(config, directory, env, agent) if resume else None
        crew = _crew(config, directory, env, run_state, stack)
        total = whole(config, "total_steps", least=1)
        on_start()
        if run_state is not None and _env_steps(run_state.agent) >= total:
            _end_again(directory, crew, run_state, total)
        else:
            try:
                train(
                    agent,
                    env,
                    total_steps=total,
                    key=jax.random.fold_in(jax.random.key(whole(config, "seed")), 1),
                    callbacks=crew.callbacks,
                    run_state=run_state,
                    log_every=whole_or_none(config, "log_every"),
                )
            except DivergedError as error:
                raise DivergedError(f"{error}; {crew.checkpoint.last_in_words()}") from None
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise UsageError(
                    "the device is out of memory: lower num_envs, num_seeds, agent.rollout_length "
                    f"or eval.num_envs; {crew.checkpoint.last_in_words()}"
                ) from error
    summary = _summary(config, crew) | {"wall_seconds": time.perf_counter() - started}
    write_json(directory / "summary.json", summary)
    return summary


def _restored(config: Config, directory: Path, env: Env, fresh: Agent) -> RunState:
    """Where the run stands, with the hyperparameters of a fresh agent where those may change."""
    run_state = restore(directory / "checkpoints", env)
    done, total = _env_steps(run_state.agent), whole(config, "total_steps")
    if done >= total and _has_results(directory, done):
        raise UsageError(
            f"this run has made its {done:,} steps: give a larger total_steps to go on"
        )
    if done >= total:
        return run_state
    names = sorted(_traced(config))

    def values(agent):
        members = getattr(agent, "members", agent)
        return [getattr(members, name) for name in names]

    return eqx.tree_at(lambda s: values(s.agent), run_state, values(fresh))


def _has_results(directory: Path, env_steps: int) -> bool:
    """Whether the agent and the summary of a run that made so many steps are there."""
    try:
        summary = json.loads((directory / "summary.json").read_text())
        return summary["env_steps"] >= env_steps and (directory / "agent.eqx").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _end_again(directory: Path, crew: "_Crew", run_state: RunState, total_steps: int) -> None:
    """What was left to do where a run was killed after its last checkpoint.

    How long training took is not known any more.
    """
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        crew.recorder(run_state, json.loads(line) | {"total_steps": total_steps})
    metrics = {
        "env_steps": _env_steps(run_state.agent),
        "total_steps": total_steps,
        "transitions": np.asarray(run_state.transitions),
        "compile_seconds": np.nan,
        "train_seconds": np.nan,
        "done": True,
    }
    for callback in (crew.evaluation, crew.keeper):
        if callback is not None:
            callback(run_state, metrics)
    crew.recorder.last = metrics


class _Crew(NamedTuple):
    """The callbacks of a run; those that are asked something afterwards, by name."""

    callbacks: list[Any]
    interrupt: Interrupt
    evaluation: Evaluation | None
    keeper: "_Keeper"
    checkpoint: Checkpoint
    recorder: "_Recorder"


def _crew(config, directory, env, run_state, stack: contextlib.ExitStack) -> _Crew:
    """What a run needs beside learning. Those that add metrics come before those that log them."""
    budget = TimeBudget(fraction(config, "eval.time_fraction"))
    begin = 0 if run_state is None else _env_steps(run_state.agent)
    tracker = _closing(stack, _tracker(config, directory, begin))
    interrupt = stack.enter_context(Interrupt())
    evaluation = _evaluation(config, env, budget, stack)
    recorder = _Recorder(begin)
    keeper = _Keeper(directory / "agent.eqx")
    checkpoint = _checkpoint(config, env, directory)
    callbacks = [
        interrupt,
        evaluation,
        recorder,
        keeper,
        checkpoint,
        tracker,
        _closing(stack, Progress()),
        _video(config, env, directory, tracker, budget, stack),
    ]
    present = [callback for callback in callbacks if callback is not None]
    return _Crew(present, interrupt, evaluation, keeper, checkpoint, recorder)


class _Keeper:
    """Saves the agent at the end; before the checkpoint, which is larger and may not fit."""

    overlap = True

    def __init__(self, path: Path):
        self._path = path

    def __call__(self, run_state: RunState, metrics: Metrics) -> None:
        if metrics["done"]:
            save(self._path, run_state.agent)


class _Recorder:
    """Remembers what a summary tells: the last metrics, and returns in the last tenth of a run."""

    def __init__(self, begin: int):
        self.last: Metrics = {}
        self._begin = begin
        self._episodes, self._returns = 0.0, 0.0

    def __call__(self, run_state: RunState, metrics: Metrics) -> None:
        self.last = metrics
        if metrics["env_steps"] > 0.9 * metrics["total_steps"]:
            episodes = np.atleast_1d(metrics["episodes"])
            returns = np.nan_to_num(np.array(metrics["episode_return"], float, ndmin=1))
            self._episodes = self._episodes + episodes
            self._returns = self._returns + episodes * returns

    @property
    def steps_per_second(self) -> float:
        """Of one member."""
        return (self.last["env_steps"] - self._begin) / self.last["train_seconds"]

    @property
    def returns(self) -> list[float | None]:
        """Mean training return per member, over the episodes that ended in the last tenth."""
        episodes, returns = np.atleast_1d(self._episodes), np.atleast_1d(self._returns)
        return [float(r / n) if n else None for r, n in zip(returns, episodes, strict=True)]


def evaluate_run(
    config: Config,
    directory: Path,
    *,
    episodes: int,
    num_envs: int | None = None,
    seed: int = 0,
    epsilon: float = 0.0,
    max_episode_steps: int | None = None,
    protocol: Mapping[str, Any] | None = None,
    video: Path | None = None,
) -> dict[str, Any]:
    """Evaluates the agent that a run left behind, in the environment that it was trained in.

    **Arguments:** `episodes`, `num_envs`: per member. `protocol`: options of the environment that
    differ from training; by default those of the run's own evaluations. `video`: a file for the
    GIF of an episode.

    **Returns:** returns per member with their statistics, and how they were come by.
    """
    agent = _trained_agent(directory)
    members = agent.num_members or 1
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(closing(make_env(config, members)))
        lanes = num_envs or min(episodes, _LANES_ON_HOST if one.on_host else _LANES_IN_JAX)
        options = _given(config["protocol"] if protocol is None else protocol)
        emulator_seed = _emulator_seed(seed, "afterwards")
        env = stack.enter_context(
            closing(one.replicate(members * lanes, seed=emulator_seed, **options))
        )
        cap = max_episode_steps or _episode_cap(env)
        key = jax.random.key(seed)
        played = play_episodes(
            agent, env, num_episodes=episodes, key=key, epsilon=epsilon, max_episode_steps=cap
        )
        if video:
            scene = stack.enter_context(
                closing(one.replicate(members, seed=emulator_seed, **options))
            )
            frames, _ = record_episode(agent, scene, key=key)
            if frames:
                write_gif(video, frames)
                logger.info("written to %s", video)
            else:
                logger.warning("no video: %s cannot be drawn", _env_name(config))
    returns = np.atleast_2d(played.returns)
    return {
        "env": _env_name(config),
        "env_options": options,
        "env_steps": _env_steps(agent),
        "episodes": returns.shape[1],
        "epsilon": epsilon,
        "seed": seed,
        "max_episode_steps": cap,
        "return_mean": float(returns.mean()),
        "return_per_seed": returns.mean(1).tolist(),
        "return_std_per_seed": returns.std(1).tolist(),
        "per_seed": _episode_means(played),
        "returns": returns.tolist(),
        **_provenance(),
    }


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
    if num_envs is not None and num_envs > _MOST_LANES:
        raise UsageError(f"{num_envs:,} lanes are too many: lower num_envs")
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(closing(make_env(config, 1)))
        most = _LANES_ON_HOST if one.on_host else _LANES_IN_JAX
        lanes = num_envs or int(np.clip(parts[0].steps // _STEPS_PER_LANE, 1, most))
        options = _given(config["protocol"] if protocol is None else protocol)
        options |= one.recording.options
        one = stack.enter_context(closing(one.replicate(1, **options)))
        description = describe(
            one,
            _env_name(config),
            source={
                "runs": [str(directory) for _, directory in runs],
                "env_options": {**_given(config["env"]), **options},
                "steps": steps,
                "epsilons": list(epsilons),
                "num_envs": lanes,
                "seed": seed,
            },
        )
        _check_disk(out, one, steps)
        writer = stack.enter_context(Writer(out, description, narrow=True))
        # Emulators that go on play other games than those that are there already.
        emulator_seed = _emulator_seed(seed, f"data {len(writer.done)}")
        env = stack.enter_context(closing(one.replicate(lanes, seed=emulator_seed)))
        interrupt = stack.enter_context(Interrupt())
        display = _Display(writer, parts, _closing(stack, Progress()), interrupt)
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
        return {"agent": str(self.path)} | {name: getattr(self, name) for name in names}


def _of_one_environment(runs: Sequence[tuple[Config, Path]]) -> Config:
    """The configuration of the runs, as far as their environment is concerned."""
    (config, directory), *others = runs
    for other, elsewhere in others:
        if _given(other["env"]) != _given(config["env"]):
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
        members = [None] if agent.num_members is None else list(range(agent.num_members))
        for member in members:
            for path in files:
                at = _env_steps(agent) if steps_of_checkpoints is None else int(path.stem)
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
        _trained_agent(directory)
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
    return tree.agent if isinstance(tree, RunState) else tree


def _check_disk(out: Path, env: Env, steps: int) -> None:
    """Raises `UsageError` where the disk will not take what is still to be written."""
    _, timestep = env.reset(jax.random.key(0))
    obs = np.asarray(timestep.obs)
    stack = env.recording.stack or 1
    whole = np.array_equal(obs, obs.astype(np.uint8))  # a guess of what the writer will find
    row = obs[0].size // stack * (1 if whole else obs.itemsize) + 11
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


def _trained_agent(directory: Path) -> Agent:
    path = directory / "agent.eqx"
    if not path.exists() and newest_checkpoint(directory / "checkpoints"):
        raise UsageError(
            f"the run in '{directory}' has not come to its end: finish it with "
            f"`python scripts/train.py resume={directory}`"
        )
    return load(path)


def whole(config: Config, name: str, *, least: int = 0) -> int:
    """A whole number of the configuration, also where it is written `5e5`.

    **Arguments:** `name`: of the key, with dots between levels.

    **Raises:** `UsageError` where it is something else, or below `least`.
    """
    value = _at(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
        raise UsageError(f"{name}={value}: give a whole number")
    if value < least:
        raise UsageError(f"{name}={value}: give a whole number of at least {least}")
    return int(value)


def number(config: Config, name: str) -> float:
    """A number of the configuration. Raises `UsageError` where it is something else."""
    value = _at(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name}={value}: give a number")
    return float(value)


def fraction(config: Config, name: str) -> float:
    """A number from 0 to 1. Raises `UsageError` where it is something else."""
    value = number(config, name)
    if not 0 <= value <= 1:
        raise UsageError(f"{name}={value}: give a number from 0 to 1")
    return value


def whole_or_none(config: Config, name: str) -> int | None:
    """Like `whole`, of at least 1, where the key may be null."""
    given = _at(config, name) is not None
    return whole(config, name, least=1) if given else None


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON; what is not finite becomes `null`."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
    write_whole(path, [text.encode()])


def _evaluation(config, env, budget, stack) -> Evaluation | None:
    if config["eval"]["every"] == 0:
        return None
    lanes = whole_or_none(config, "eval.num_envs") or (
        _LANES_ON_HOST if env.on_host else _LANES_IN_JAX
    )
    seed = whole(config, "seed")
    env = env.replicate(
        _lanes(config, lanes),
        seed=_emulator_seed(seed, "evaluation"),
        **_given(config["protocol"]),
    )
    return Evaluation(
        stack.enter_context(closing(env)),
        every=_every(config, "eval", parts=20),
        num_episodes=whole_or_none(config, "eval.num_episodes") or lanes,
        seed=seed + 1,
        epsilon=fraction(config, "eval.epsilon"),
        max_episode_steps=whole_or_none(config, "eval.max_episode_steps") or _episode_cap(env),
        budget=budget,
    )


def _checkpoint(config, env, directory) -> Checkpoint:
    return Checkpoint(
        directory / "checkpoints",
        every=_every(config, "checkpoint", parts=10),
        keep=whole(config, "checkpoint.keep", least=1),
        with_env=not env.on_host,
    )


def _video(config, env, directory, tracker, budget, stack) -> Video | None:
    if config["video"]["every"] == 0:
        return None
    seed = _emulator_seed(whole(config, "seed"), "video")
    env = env.replicate(_lanes(config, 1), seed=seed)
    return Video(
        stack.enter_context(closing(env)),
        directory / "media",
        every=_every(config, "video", parts=4),
        tracker=tracker,
        max_steps=whole(config, "video.max_steps", least=1),
        budget=budget,
    )


def _tracker(config: Config, directory: Path, begin: int) -> Tracker:
    """`metrics.jsonl` always, and on top what `config["tracker"]` says."""
    seeds = whole(config, "num_seeds")
    members = None if seeds == 1 else seeds
    trackers: list[Tracker] = [
        JsonlTracker(directory / "metrics.jsonl", num_members=members, resume_step=begin)
    ]
    options = _given(config["tracker"])
    if "_target_" in options:
        create = pkgutil.resolve_name(options.pop("_target_"))
        trackers.append(create(directory, num_members=members, **options))
    tracker = Trackers(*trackers)
    tracker.log_params({**config, **_provenance()})
    return tracker


def _every(config: Config, section: str, *, parts: int) -> int:
    """Steps between rounds: as configured, else so many rounds in a run."""
    if config[section]["every"] is not None:
        return whole(config, f"{section}.every", least=1)
    return max(1, whole(config, "total_steps") // parts)


def _at(config: Config, name: str) -> Any:
    return functools.reduce(operator.getitem, name.split("."), config)


def _env_steps(agent: Any) -> int:
    return int(np.max(agent.env_steps))


def _lanes(config: Config, per_seed: int) -> int:
    lanes = per_seed * whole(config, "num_seeds", least=1)
    if lanes > _MOST_LANES:
        raise UsageError(f"{lanes:,} lanes are too many: lower num_envs or num_seeds")
    return lanes


def _episode_cap(env: Env) -> int | None:
    """Where an evaluation cuts an episode: nowhere if the environment has a limit of its own."""
    return None if env.max_episode_steps else _LONGEST_EPISODE


def _summary(config: Config, crew: _Crew) -> dict[str, Any]:
    last, played = crew.recorder.last, crew.evaluation and crew.evaluation.last
    eval_returns = None if played is None else np.atleast_2d(played.returns).mean(1)
    return {
        "status": "done" if last["env_steps"] >= last["total_steps"] else "stopped",
        "agent": config["agent"]["_target_"],
        "env": _env_name(config),
        "chosen": config.get("chosen"),
        "seed": config["seed"],
        "num_seeds": config["num_seeds"],
        "env_steps": last["env_steps"],
        "transitions": last["transitions"],
        "train_return_per_seed": crew.recorder.returns,
        "eval_return_mean": None if eval_returns is None else eval_returns.mean(),
        "eval_return_per_seed": eval_returns,
        "eval_per_seed": None if played is None else _episode_means(played),
        "steps_per_second": crew.recorder.steps_per_second * config["num_seeds"],
        "compile_seconds": last["compile_seconds"],
        "train_seconds": last["train_seconds"],
        **_provenance(),
    }


def _episode_means(played: Episodes) -> dict[str, list[float]]:
    """Per member, of the length and of what the suite says of episodes."""
    values = {"length": played.lengths, **played.metrics}
    return {name: np.atleast_2d(x).mean(1).tolist() for name, x in values.items()}


def _env_name(config: Config) -> str:
    return f"{config['env']['suite']}/{config['env']['name']}"


def _provenance() -> dict[str, Any]:
    """The device, the versions of what matters where it is installed, and our commit."""
    versions = {"python": platform.python_version()}
    for package in ("eqx_q", "jax", "jaxlib", "equinox", "optax", "numpy", *_SUITE_PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = jax.devices()[0].device_kind
    return {"device": device, "versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """Of the checkout that this file is in, `-dirty` where files differ; `None` outside of one."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return (
            subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not null, at any depth."""
    return {
        name: _given(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if value is not None
    }


def _closing(stack: contextlib.ExitStack, thing: Any) -> Any:
    stack.callback(thing.close)
    return thing


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_finite(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
