"""Trains as a configuration describes, online or offline."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..agents import Agent, Batches
from ..clock import clock
from ..data import Dataset
from ..errors import DivergedError, LaneError, UsageError
from ..loops.callbacks import (
    Checkpoint,
    Evaluation,
    Interrupt,
    Progress,
    TimeBudget,
    Video,
    last_in_words,
    with_env,
)
from ..loops.evolution import PopulationBasedTraining, spread, with_followers
from ..loops.offline import blocks_of, start_offline, train_offline
from ..loops.running import Metrics
from ..loops.source import check_shares
from ..loops.training import check_lanes, train
from ..processes import is_first_process
from ..saving.checkpoint import load_latest, save
from ..saving.files import alone_in
from ..sharding import OneDevice, Placement, place_on
from ..tracking import JsonlTracker, Tracker, Trackers, read_metrics
from ..wrappers import Env, Exact
from ..wrappers.host import closing
from ..wrappers.registry import SUITES
from .making import (
    LANES_IN_JAX,
    LANES_ON_HOST,
    close_later,
    emulator_seed,
    episode_cap,
    lanes_of_all,
    learnt,
    make_agent,
    make_env,
    make_sampling,
)
from .replaying import keep_diverged
from .settings import ONLINE, Config, Kind, PBTSettings, Settings, env_name, given, read_settings
from .summary import episode_means, provenance, read_json, write_json
from .trackers import make_trackers

logger = logging.getLogger(__name__)


def train_run(
    config: Config,
    directory: Path,
    *,
    resume: bool = False,
    command: str = "",
    on_start: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Trains as `config` describes, and writes the results to `directory`.

    **Arguments:** `command`: the overrides of the command line, for trackers to show. `on_start`:
    called once everything in `config` has been made.

    **Returns:** the summary, which is also in `summary.json`. With several processes (see
    `eqx_q.processes`), the first one writes all files, and the others return `None`.
    **Raises:** `UsageError` for an invalid configuration.
    """
    started = time.perf_counter()
    settings = read_settings(config)
    place = place_on(settings.devices)
    checkpoints = directory / "checkpoints"
    with _naming_checkpoint(checkpoints), contextlib.ExitStack() as stack:
        if is_first_process():  # the one that writes
            stack.enter_context(alone_in(directory))
        dataset = None if settings.data is None else Dataset(settings.data)
        shared = OneDevice() if dataset else place
        lanes = lanes_of_all(settings, settings.num_envs)
        logger.info("making %s lanes of %s", f"{lanes:,}", env_name(config))
        env = stack.enter_context(closing(make_env(config, lanes, shared)))
        agent = make_agent(config, env)
        check_kind(settings, agent)
        env = _exact(settings, agent, env)
        evolution, pbt = None, settings.pbt
        if pbt is not None:
            settings, evolution = _in_rounds(settings, pbt, agent)
            evolution.check(agent)
            agent = spread(agent, pbt.hyperparameters, pbt.spread, settings.seed)
        run_state = _restored(settings, directory, env, agent) if resume else None
        key = jax.random.fold_in(jax.random.key(settings.seed), 1)
        how: dict[str, Any] = {
            "key": key,
            "run_state": run_state,
            "log_every": settings.log_every,
            "devices": settings.devices,
        }
        check_shares(place, agent)
        if dataset is None:
            check_lanes(place, agent, env)
            learn = functools.partial(train, agent, env, total_steps=settings.total, **how)
        else:
            how["sampling"] = make_sampling(settings)
            check_data(config, env, dataset)
            start_offline(agent, dataset, key=key)  # these raise if the data do not fit
            blocks_of(run_state, dataset, how["sampling"])
            logger.info("reading the data to verify checksums")
            dataset.verify()
            learn = functools.partial(
                train_offline, agent, dataset, num_updates=settings.total, **how
            )
        has_learnt = run_state is not None and _done(run_state) >= settings.total
        if not is_first_process():  # the first one writes, evaluates, and decides when to stop
            told = contextlib.suppress(DivergedError)  # reported by the first one
            with Interrupt(place) as interrupt, told:
                if not has_learnt:
                    learn(callbacks=[interrupt])
            return None
        crew = _crew(settings, directory, command, env, run_state, evolution, place, stack)
        on_start()
        if has_learnt:
            _end_again(settings, crew, run_state)
        else:
            logger.info("compiling and taking the first steps")
            try:
                learn(callbacks=crew.callbacks)
            except DivergedError as error:
                message = f"{error}; {last_in_words(checkpoints)}"
                if keep_diverged(directory, error, env):
                    message += f"; `python scripts/replay.py run={directory}` shows what led to it"
                raise DivergedError(message) from None
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise UsageError(
                    f"the device is out of memory: lower {settings.kind.sizes}, num_seeds or "
                    f"eval.num_envs; {last_in_words(checkpoints)}"
                ) from error
    summary = _summary(settings, crew, dataset) | {"wall_seconds": time.perf_counter() - started}
    write_json(directory / "summary.json", summary)
    return summary


@contextlib.contextmanager
def _naming_checkpoint(checkpoints: Path) -> Iterator[None]:
    """Adds the last checkpoint to the message of a `LaneError`."""
    try:
        yield
    except LaneError as error:
        raise LaneError(f"{error}; {last_in_words(checkpoints)}") from error


def _in_rounds(
    settings: Settings, pbt: PBTSettings, agent: Any
) -> tuple[Settings, PopulationBasedTraining]:
    """Sets up population-based training, and cuts the run into chunks of whole rounds.

    Members are judged by a chunk: it must not depend on the machine's speed, nor be a short rest of
    a round after an evaluation.
    """
    steps = agent.learns_from.units(settings.num_envs)
    updates = -(-pbt.every // steps)
    every = updates * steps

    def whole_rounds(section):
        return dataclasses.replace(section, every=-(-section.every // every) * every)

    evaluations = whole_rounds(settings.eval)
    if pbt.fitness.startswith("eval/") and evaluations.every != 0:
        evaluations = dataclasses.replace(evaluations, every=every, time_fraction=None)
    in_rounds = dataclasses.replace(
        settings,
        log_every=settings.log_every or updates,
        eval=evaluations,
        video=whole_rounds(settings.video),
    )
    evolution = PopulationBasedTraining(
        pbt.hyperparameters,
        every=every,
        fitness=pbt.fitness,
        fraction=pbt.fraction,
        factors=pbt.factors,
        seed=settings.seed,
    )
    return in_rounds, evolution


def _done(run_state: Any) -> int:
    """The progress of a run, in its unit."""
    (done,) = learnt(run_state.agent).values()
    return done


def check_data(config: Config, env: Env, dataset: Dataset) -> None:
    """Logs a description of the data; raises `UsageError` if their game is not that of `env`."""
    of_data = dataset.description
    logger.info(
        "data: %s, %s transitions in %s episodes of %s",
        dataset.path,
        f"{dataset.num_transitions:,}",
        f"{dataset.num_episodes:,}",
        of_data.env,
    )
    suite, _, name = of_data.env.partition("/")
    if suite in SUITES and name != config["env"]["name"]:
        raise UsageError(
            f"'{dataset.path}' is of {of_data.env}, but the environment is {env_name(config)}: "
            f"choose that of the data with env.name={name}"
        )
    ours = {**env.recording.preprocessing, **given(config["protocol"])}
    for option in sorted(ours.keys() & of_data.preprocessing.keys()):
        theirs = of_data.preprocessing[option]
        if ours[option] != theirs:
            logger.warning(
                "the data were recorded with %s=%s, but evaluations use %s",
                option,
                theirs,
                ours[option],
            )


def check_kind(settings: Settings, agent: Agent) -> None:
    """Raises `UsageError` if the agent is offline without data, or online with data."""
    is_offline = isinstance(agent.learns_from, Batches)
    if is_offline and settings.data is None:
        raise UsageError(
            "this agent learns from recorded data: give data=DIR (scripts/collect.py and "
            "scripts/convert.py make one), or choose agent=pqn"
        )
    if not is_offline and settings.data is not None:
        raise UsageError(
            "this agent learns from environments, so data=... is not supported: leave it out, "
            "or choose agent=cql, dqn or bc"
        )


def _exact(settings: Settings, agent: Any, env: Env) -> Env:
    """Wraps `env` in `Exact`, to keep its actions for a resume, if `exact_resume` needs it."""
    if not (settings.exact_resume and env.on_host and settings.data is None):
        return env
    if jax.process_count() > 1:
        raise UsageError("exact_resume=true is for one process: leave out it or distributed")
    config = settings.config
    if config.get("env_timeout") is not None or config.get("on_env_error", "stop") != "stop":
        raise UsageError(
            "exact_resume=true cannot replay failures of environments: leave it out, or leave out "
            "on_env_error=restart and env_timeout"
        )
    if settings.pbt is not None and settings.pbt.fitness.startswith("eval/"):
        raise UsageError(
            "exact_resume=true does not repeat evaluations, on which "
            f"pbt.fitness={settings.pbt.fitness} depends: give pbt.fitness=episode_return"
        )
    updates = math.ceil(settings.total / agent.learns_from.units(settings.num_envs))
    return Exact(env, updates * agent.learns_from.length)


def _restored(settings: Settings, directory: Path, env: Env, fresh: Agent) -> Any:
    """The saved run state, with the hyperparameters of `fresh` that may change."""
    run_state, path = load_latest(directory / "checkpoints")
    done, total, kind = _done(run_state), settings.total, settings.kind
    if done >= total and _has_results(kind, directory, done):
        unit = kind.unit.split("_")[-1]
        raise UsageError(
            f"this run has completed its {done:,} {unit}: give a larger {kind.total} to continue"
        )
    if done >= total:
        return run_state
    logger.info("resuming from %s", path)
    run_state: Any = with_env(run_state, env)
    named = settings.pbt.hyperparameters if settings.pbt else []
    evolving = with_followers(fresh, dict.fromkeys(named))
    todays = {path: x for path, x in fresh.hyperparameters().items() if path not in evolving}
    agent = run_state.agent.with_hyperparameters(todays)
    return dataclasses.replace(run_state, agent=agent)


def _has_results(kind: Kind, directory: Path, done: int) -> bool:
    """Whether the agent and the summary of a run with `done` steps exist."""
    try:
        summary = read_json(directory / "summary.json")
        return summary[kind.unit] >= done and (directory / "agent.eqx").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _end_again(settings: Settings, crew: "_Crew", run_state: Any) -> None:
    """Finishes a run that was killed after its last checkpoint.

    The duration of its training is unknown.
    """
    kind, total = settings.kind, settings.total
    metrics = {
        kind.unit: _done(run_state),
        kind.metric: total,
        "compile_seconds": np.nan,
        "train_seconds": np.nan,
        "done": True,
    }
    if kind is ONLINE:
        metrics["transitions"] = np.asarray(run_state.transitions)
    for callback in (crew.evaluation, crew.recorder, crew.keeper):
        if callback is not None:
            callback(run_state, metrics)


class _Crew(NamedTuple):
    """The callbacks of a run; those that are used afterwards, by name."""

    callbacks: list[Any]
    interrupt: Interrupt
    evaluation: Evaluation | None
    keeper: "_Keeper"
    checkpoint: Checkpoint
    recorder: "_Recorder"


def _crew(
    settings: Settings,
    directory: Path,
    command: str,
    env: Env,
    run_state: Any,
    evolution: PopulationBasedTraining | None,
    place: Placement,
    stack: contextlib.ExitStack,
) -> _Crew:
    """Makes the callbacks of a run. Those that add metrics come before those that log them."""
    limit = settings.eval.time_fraction
    budget = TimeBudget(np.inf if limit is None else limit)
    begin = 0 if run_state is None else _done(run_state)
    tracker = close_later(stack, _tracker(settings, directory, command, begin))
    evaluation = make_evaluation(settings, env, budget, stack)
    recorder = _Recorder(begin)
    for row in read_metrics(directory / "metrics.jsonl", begin):  # from before a resume
        recorder(run_state, row | {settings.kind.metric: settings.total})
    keeper = _Keeper(directory / "agent.eqx")
    checkpoint = _checkpoint(settings, env, directory)
    interrupt = stack.enter_context(Interrupt(place))
    callbacks = [
        interrupt,
        evaluation,
        evolution,
        recorder,
        tracker,  # before the checkpoint: a resume needs its line, and drops later ones
        keeper,
        checkpoint,
        close_later(stack, Progress()),
        _video(settings, env, directory, tracker, budget, stack),
    ]
    present = [callback for callback in callbacks if callback is not None]
    return _Crew(present, interrupt, evaluation, keeper, checkpoint, recorder)


class _Keeper:
    """Saves the agent at the end, before the checkpoint, which is larger and may not fit."""

    overlap = True

    def __init__(self, path: Path):
        self._path = path

    def __call__(self, run_state: Any, metrics: Metrics) -> None:
        if metrics["done"]:
            save(self._path, run_state.agent)


class _Recorder:
    """Collects data for the summary.

    These are the last metrics, returns in the last tenth of the training, and the best evaluation
    of each member, with its step.
    """

    def __init__(self, begin: int):
        self.last: Metrics = {}
        self.best: dict[str, Any] | None = None
        self._begin = begin
        self._episodes, self._returns = 0.0, 0.0

    def __call__(self, run_state: Any, metrics: Metrics) -> None:
        self.last = metrics
        now = clock(metrics)
        if now.done > 0.9 * now.total and "episodes" in metrics:
            episodes = np.atleast_1d(metrics["episodes"])
            returns = np.nan_to_num(np.array(metrics["episode_return"], float, ndmin=1))
            self._episodes = self._episodes + episodes
            self._returns = self._returns + episodes * returns
        self.remember_best(metrics)

    def remember_best(self, metrics: Metrics) -> None:
        """Records each member's best evaluation so far."""
        if "eval/return" in metrics:
            now = clock(metrics)
            returns = np.atleast_1d(np.array(metrics["eval/return"], float))
            best = self.best or {
                "returns": np.full_like(returns, -np.inf),
                "at": [0] * len(returns),
            }
            better = returns > best["returns"]
            self.best = {
                "returns": np.where(better, returns, best["returns"]),
                "at": np.where(better, now.done, best["at"]).tolist(),
            }

    @property
    def rate(self) -> float:
        """Steps or updates per second, of one member."""
        return (clock(self.last).done - self._begin) / self.last["train_seconds"]

    @property
    def returns(self) -> list[float | None]:
        """Mean training return per member, over the episodes that ended in the last tenth."""
        episodes, returns = np.atleast_1d(self._episodes), np.atleast_1d(self._returns)
        return [float(r / n) if n else None for r, n in zip(returns, episodes, strict=True)]


def make_evaluation(
    settings: Settings, env: Env, budget: TimeBudget, stack: contextlib.ExitStack
) -> Evaluation | None:
    """Makes the callback and its environment, which the stack closes; `None` without `every`."""
    chosen = settings.eval
    if chosen.every == 0:
        return None
    lanes = chosen.num_envs or (LANES_ON_HOST if env.on_host else LANES_IN_JAX)
    env = env.replicate(
        lanes_of_all(settings, lanes),
        seed=emulator_seed(settings.seed, "evaluation"),
        **given(settings.config["protocol"]),
    )
    return Evaluation(
        stack.enter_context(closing(env)),
        every=chosen.every,
        num_episodes=chosen.num_episodes or lanes,
        seed=settings.seed + 1,
        epsilon=chosen.epsilon,
        max_episode_steps=chosen.max_episode_steps or episode_cap(env),
        min_steps=chosen.min_steps,
        budget=budget,
    )


def _checkpoint(settings: Settings, env, directory) -> Checkpoint:
    return Checkpoint(
        directory / "checkpoints",
        every=settings.checkpoint.every,
        keep=settings.checkpoint.keep,
        with_env=settings.data is not None or not env.on_host or isinstance(env, Exact),
    )


def _video(settings: Settings, env, directory, tracker, budget, stack) -> Video | None:
    if settings.video.every == 0:
        return None
    env = env.replicate(lanes_of_all(settings, 1), seed=emulator_seed(settings.seed, "video"))
    return Video(
        stack.enter_context(closing(env)),
        directory / "media",
        every=settings.video.every,
        tracker=tracker,
        max_steps=settings.video.max_steps,
        budget=budget,
    )


def _tracker(settings: Settings, directory: Path, command: str, begin: int) -> Tracker:
    """Makes the tracker of `metrics.jsonl`, and those of the key `tracker`."""
    config = settings.config
    members = None if settings.num_seeds == 1 else settings.num_seeds
    others = make_trackers(config, directory, command=command, num_members=members)
    lines = JsonlTracker(directory / "metrics.jsonl", num_members=members, resume_step=begin)
    tracker = Trackers(lines, *others)
    tracker.log_params({**config, **provenance()})
    return tracker


def _of_data(dataset: Dataset) -> dict[str, Any]:
    """A description of a data set for the summary."""
    return {
        "path": str(dataset.path),
        "env": dataset.description.env,
        "transitions": dataset.num_transitions,
        "episodes": dataset.num_episodes,
        "source": dict(dataset.description.source),
        "checksum": dataset.checksum,
    }


def _summary(settings: Settings, crew: _Crew, dataset: Dataset | None) -> dict[str, Any]:
    last, played = crew.recorder.last, crew.evaluation and crew.evaluation.last
    eval_returns = None if played is None else np.atleast_2d(played.returns).mean(1)
    best, kind, config = crew.recorder.best, settings.kind, settings.config
    done, total, _ = clock(last)
    if dataset is None:
        told = {
            "transitions": last["transitions"],
            "train_return_per_seed": crew.recorder.returns,
            "steps_per_second": crew.recorder.rate * settings.num_seeds,
        }
    else:
        told = {"data": _of_data(dataset), "updates_per_second": crew.recorder.rate}
    return {
        "status": "done" if done >= total else "stopped",
        "preempted": crew.interrupt.noticed,
        "agent": config["agent"]["_target_"],
        "env": env_name(config),
        "chosen": config.get("chosen"),
        "seed": settings.seed,
        "num_seeds": settings.num_seeds,
        kind.unit: done,
        **told,
        "eval_return_mean": None if eval_returns is None else eval_returns.mean(),
        "eval_return_per_seed": eval_returns,
        "eval_per_seed": None if played is None else episode_means(played),
        "best_eval_return_per_seed": None if best is None else best["returns"],
        f"best_eval_{kind.unit}_per_seed": None if best is None else best["at"],
        "compile_seconds": last["compile_seconds"],
        "train_seconds": last["train_seconds"],
        **provenance(),
    }
