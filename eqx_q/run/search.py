"""Hyperparameter search: Optuna proposes batches of trials, each trained as one population."""

import contextlib
import csv
import dataclasses
import functools
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from ..agents import Population
from ..clock import clock
from ..data import Dataset
from ..errors import LaneError, MissingExtraError, UnknownNameError, UsageError
from ..loops.callbacks import Evaluation, Interrupt, TimeBudget
from ..loops.offline import train_offline
from ..loops.running import Metrics
from ..loops.training import train
from ..progress import Display
from ..saving.files import write_whole
from ..sharding import OneDevice, place_on
from ..tracking import Trackers
from ..wrappers import Env
from ..wrappers.host import closing
from .making import (
    close_later,
    lanes_of_all,
    learnt,
    make_agent,
    make_env,
    make_sampling,
)
from .settings import Config, Settings, env_name, read_settings, whole
from .space import VARIED, Space, check_space, import_optuna, read_space
from .study import SharedStudy
from .summary import provenance, write_json
from .trackers import make_trackers
from .training import check_data, check_kind, make_evaluation

logger = logging.getLogger(__name__)

_EVALUATED = ("eval/return", "eval/return_std", "eval/length")
_RECENT = 0.1  # last fraction of the training, over which logged values are averaged


def search_run(
    config: Config,
    directory: Path,
    *,
    defaults: Config | None = None,
    command: str = "",
    on_start: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Searches as `config` describes, and writes the results to `directory`.

    If the directory holds a search already, this one continues it, or joins it if another process
    is running it.

        study.journal  trials.csv  best.yaml  summary.json  history.png  importances.png

    **Arguments:**

    - `config`: the keys of `conf/tune.yaml`.
    - `defaults`: the same without tuned values; `best.yaml` lists the differences from it.
    - `command`: the overrides of the command line, for trackers to show.
    - `on_start`: called once `config` has been checked.

    **Returns:** the summary, which is also in `summary.json`.
    **Raises:** `UsageError` for an invalid configuration.
    """
    started = time.perf_counter()
    asked = _read(config, command)
    with contextlib.ExitStack() as stack:
        search = _Search(asked, stack)
        on_start()
        study = SharedStudy(
            directory,
            search.space,
            sampler=config["sampler"],
            maximize=asked.maximize,
            seed=asked.settings.seed,
        )
        close_later(stack, study)
        progress = close_later(stack, _Progress(study, asked.trials))
        interrupt = stack.enter_context(Interrupt())
        while not interrupt.received and (batch := study.ask(asked.trials, asked.population)):
            try:
                search.learn(batch, study, [interrupt, progress])
            finally:
                for trial in batch:
                    study.give_up(trial)
            _write_results(asked, defaults or {}, directory, search.space, study)
        _write_results(asked, defaults or {}, directory, search.space, study)  # of all processes
        progress.close()
        summary = {
            **_summary(asked, study),
            "status": "stopped" if interrupt.received else "done",
            "preempted": interrupt.noticed,
            **search.seconds,
            "wall_seconds": time.perf_counter() - started,
        }
        if study.best is None and not interrupt.received and search.failure is not None:
            raise UsageError(f"every trial failed, the last one with: {search.failure}")
        _draw(directory, study)
    write_json(directory / "summary.json", summary)
    return summary


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The checked values of a search's configuration.

    **Attributes:** those with names of keys in `conf/tune.yaml` have the same meaning. `rungs`: the
    steps at which trials are pruned, then the total. `command`: see `search_run`.
    """

    settings: Settings
    trials: int
    population: int
    metric: str
    maximize: bool
    rungs: list[int]
    eta: int
    command: str


def _read(config: Config, command: str) -> _Asked:
    settings = read_settings(config)
    if settings.pbt is not None:
        raise UsageError("a search cannot use population-based training: leave out pbt")
    if config["direction"] not in ("maximize", "minimize"):
        raise UsageError(f"direction={config['direction']}: choose maximize or minimize")
    rungs, eta = whole(config, "halving.rungs"), whole(config, "halving.eta", least=2)
    total = settings.total
    if eta**rungs > total:
        raise UsageError(
            f"halving.rungs={rungs} are too many for {settings.kind.total}={total}: lower "
            "halving.rungs"
        )
    return _Asked(
        settings=settings,
        trials=whole(config, "trials", least=1),
        population=whole(config, "population", least=1),
        metric=str(config["metric"]),
        maximize=config["direction"] == "maximize",
        rungs=[math.ceil(total / eta**rung) for rung in range(rungs, -1, -1)],
        eta=eta,
        command=command,
    )


class _Fatal(UsageError):
    """An error that would affect every trial, not only those of a batch."""


class _Arena(NamedTuple):
    """The environments in which a number of members learn and are evaluated."""

    settings: Settings
    env: Env
    evaluation: Evaluation | None


class _Search:
    """Trains batches of trials. Raises `UsageError` for input that is invalid in every trial."""

    def __init__(self, asked: _Asked, stack: contextlib.ExitStack):
        settings, config = asked.settings, asked.settings.config
        self.space = read_space(config)
        self.failure: UsageError | None = None
        self.seconds = {"compile_seconds": 0.0, "train_seconds": 0.0}
        self.seeds = settings.num_seeds
        self._asked = asked
        self._config = _for_rungs(config, settings.total)
        self._dataset = None if settings.data is None else Dataset(settings.data)
        self._check(settings)
        self._stack = stack.enter_context(contextlib.ExitStack())
        self._static: dict[str, Any] | None = None
        self._arenas: dict[int, _Arena] = {}

    def learn(self, batch: list[Any], study: SharedStudy, callbacks: list[Any]) -> None:
        """Trains a batch of trials as one population, and reports the results to the study.

        It does not report interrupted trials.
        """
        began = time.perf_counter()
        tracker = _tracker(self._config, batch, self.space, self._asked.command)
        try:
            self._climb(batch, study, callbacks, tracker, began)
        except (_Fatal, LaneError):
            raise
        except UsageError as error:  # due to these static values; others may work
            self.failure = error
            logger.warning("trials %s failed: %s", [t.number for t in batch], error)
            for trial in study.unfinished(batch):
                study.tell(trial, None, error=str(error))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UsageError(
                "the device is out of memory: lower population, num_seeds or "
                f"{self._asked.settings.kind.sizes}"
            ) from error
        finally:
            tracker.close()

    def _climb(self, batch, study, callbacks, tracker, began) -> None:
        """Trains from rung to rung, each with the trials that are good enough for it."""
        interrupt, progress = callbacks
        config = self.space.apply(self._config, self.space.static(batch[0].params))
        values = [self.space.leaves(trial.params) for trial in batch]
        key = jax.random.fold_in(jax.random.key(self._asked.settings.seed), batch[0].number)
        done, alive = 0, np.arange(len(batch))
        arena = self._arena(config, len(batch) * self.seeds)
        agent = make_agent(config, arena.env, values)
        steps = agent.learns_from.units(arena.settings.num_envs)
        rungs = sorted({-(-until // steps) * steps for until in self._asked.rungs})
        for rung, until in enumerate(rungs):
            arena = self._arena(config, len(alive) * self.seeds)
            progress.begin(len(batch), done, rungs[-1])
            check = _CheckMetric(self._asked.metric, agent)
            agent, history = self._train(
                arena, agent, until - done, jax.random.fold_in(key, rung), [check, *callbacks]
            )
            if interrupt.received:
                return
            (done,) = learnt(agent).values()
            per_seed = _recent(history, self._asked.metric).reshape(len(alive), self.seeds)
            scores = per_seed.mean(1)
            tracker.log(_per_trial(history[-1], alive, len(batch), self.seeds), done)
            order = np.argsort(np.where(np.isfinite(scores), scores * self._sign, -np.inf))[::-1]
            is_last = until == rungs[-1]
            num_kept = len(alive) if is_last else self._num_kept(len(alive))
            for place, index in enumerate(order):
                trial, score = batch[alive[index]], float(scores[index])
                told = {"per_seed": per_seed[index].tolist(), "steps": done}
                told["seconds"] = time.perf_counter() - began
                if math.isfinite(score):
                    trial.report(score, done)
                if is_last or place >= num_kept:
                    study.tell(trial, score if is_last and math.isfinite(score) else None, **told)
            kept = np.sort(order[:num_kept])
            alive = alive[kept]
            members = (kept[:, None] * self.seeds + np.arange(self.seeds)).reshape(-1)
            agent = agent.select(members)

    @property
    def _sign(self) -> int:
        return 1 if self._asked.maximize else -1

    def _num_kept(self, number: int) -> int:
        return max(1, number // self._asked.eta)

    def _train(
        self, arena: _Arena, agent: Population, steps: int, key: Any, callbacks: list[Any]
    ) -> tuple[Any, list[Metrics]]:
        callbacks = [x for x in (arena.evaluation, *callbacks) if x is not None]
        how: dict[str, Any] = {"key": key, "callbacks": callbacks}
        how["log_every"] = arena.settings.log_every
        how["devices"] = arena.settings.devices
        if self._dataset is None:
            learn = functools.partial(train, agent, arena.env, total_steps=steps, **how)
        else:
            how["sampling"] = make_sampling(arena.settings)
            learn = functools.partial(train_offline, agent, self._dataset, num_updates=steps, **how)
        learnt_agent, history = learn()
        for name in self.seconds:
            self.seconds[name] += history[-1][name]
        return learnt_agent, history

    def _arena(self, config: Config, members: int) -> _Arena:
        """Reused while the static values stay the same, since compiled programs are bound to it."""
        static = {name: config[name] for name in VARIED}
        if static != self._static:
            self._stack.close()
            self._arenas, self._static = {}, static
        if members not in self._arenas:
            devices = math.gcd(place_on(config["devices"]).num_devices, members)
            settings = read_settings({**config, "num_seeds": members, "devices": devices})
            lanes = lanes_of_all(settings, settings.num_envs)
            shared = OneDevice() if self._dataset else place_on(devices)
            env = self._stack.enter_context(closing(make_env(config, lanes, shared)))
            evaluation = make_evaluation(settings, env, TimeBudget(math.inf), self._stack)
            self._arenas[members] = _Arena(settings, env, evaluation)
        return self._arenas[members]

    def _check(self, settings: Settings) -> None:
        """Checks everything that can be checked before the first trial."""
        config, metric = settings.config, self._asked.metric
        place = place_on(settings.devices)
        if place.num_devices > 1:
            logger.info("members share %d devices", place.num_devices)
        with closing(make_env(config, 1)) as env:
            check_kind(settings, make_agent({**config, "num_seeds": 1}, env))
            check_space(config, self.space, env)
            if self._dataset is not None:
                check_data(config, env, self._dataset)
                self._dataset.verify()
            if metric.startswith("eval/"):
                _, timestep = env.reset(jax.random.key(0))
                names = {*_EVALUATED, *(f"eval/{name}" for name in timestep.episode.metrics)}
                if settings.eval.every == 0:
                    raise UsageError(
                        f"metric={metric} needs evaluations, but eval.every=0: leave that out, or "
                        "choose another metric"
                    )
                if metric not in names:
                    raise UnknownNameError("metric", metric, names)


class _CheckMetric:
    """Ends a search at the first boundary if its metric is not logged."""

    def __init__(self, metric: str, agent: Population):
        self._metric, self._members = metric, agent.num_members

    def __call__(self, run_state: Any, metrics: Metrics) -> None:
        known = {n for n, x in metrics.items() if np.shape(x) == (self._members,)}
        if self._metric not in {*known, *_EVALUATED} and not self._metric.startswith("eval/"):
            known = {*known, *_EVALUATED}
            raise _Fatal(str(UnknownNameError("metric", self._metric, known)))


class _Progress:
    """A progress bar of trials; outside a terminal, a line every half minute."""

    overlap = True

    def __init__(self, study: SharedStudy, num_trials: int):
        self._study, self._total = study, num_trials
        self._display = Display(seconds_between_lines=30.0)

    def begin(self, size: int, done: int, end: int) -> None:
        """Starts a rung of a batch of `size` trials, from step `done` of `end`."""
        self._size, self._done, self._end = size, done, end

    def __call__(self, run_state: Any, metrics: Metrics) -> None:
        """Shows the progress of the search, including the current batch."""
        best, finished = self._study.best, len(self._study.finished)
        share = min(1.0, (self._done + clock(metrics).done) / self._end)
        state = "" if best is None else f"best {best.value:.4g} (trial {best.number})"
        line = f"{finished}/{self._total} trials, {share:.0%} of the next {self._size}  {state}"
        done = min(self._total, finished + int(share * self._size))
        self._display(done, self._total, "trial", state, line)

    def close(self) -> None:
        """Closes the bar and leaves it on the screen."""
        self._display.close()


def _for_rungs(config: Config, total: int) -> dict[str, Any]:
    """The configuration with schedules over the whole training, and evaluations only at rungs."""
    agent = dict(config["agent"])
    if "schedule_steps" in agent and agent["schedule_steps"] is None:
        agent["schedule_steps"] = total
    every = 0 if config["eval"]["every"] == 0 else total
    return {**config, "agent": agent, "eval": {**config["eval"], "every": every}}


def _recent(history: list[Metrics], metric: str) -> Float[np.ndarray, " S"]:
    """The mean of a metric over the last part of a training, for each member."""
    begin = (1 - _RECENT) * clock(history[-1]).done
    rows = [row[metric] for row in history if metric in row and clock(row).done > begin]
    values = np.stack(rows).astype(float)
    finite = np.isfinite(values)
    total, count = np.where(finite, values, 0).sum(0), finite.sum(0)
    return np.where(count, total / np.maximum(count, 1), np.nan)


def _per_trial(
    metrics: Metrics, alive: np.ndarray, num_trials: int, seeds: int
) -> dict[str, np.ndarray]:
    """Means over the seeds of each trial of a batch; NaN for pruned trials."""
    told = {}
    for name, values in metrics.items():
        if np.shape(values) == (len(alive) * seeds,):
            told[name] = np.full(num_trials, np.nan)
            told[name][alive] = np.reshape(values, (-1, seeds)).mean(1)
    return told


def _tracker(config: Config, batch: list[Any], space: Space, command: str) -> Trackers:
    """A tracker with a run for each trial and its parameters."""
    names = [f"trial {trial.number}" for trial in batch]
    made = make_trackers(config, None, command=command, num_members=len(batch), names=names)
    tracker = Trackers(*made)
    more = provenance()
    tracker.log_params(
        [{**space.apply(config, t.params), "trial": t.number, **more} for t in batch]
    )
    return tracker


def _write_results(
    asked: _Asked, defaults: Config, directory: Path, space: Space, study: SharedStudy
) -> None:
    """Writes the results of all processes; locked, so that older results do not overwrite newer."""
    with study.alone:
        if study.best is not None:
            _write_best(asked.settings, defaults, directory, space, study)
        _write_table(directory / "trials.csv", space, study)


def _write_best(
    settings: Settings, defaults: Config, directory: Path, space: Space, study: SharedStudy
) -> None:
    """Writes the best trial's configuration as a file of tuned values."""
    import yaml  # installed with Optuna

    best, config = study.best, settings.config
    assert best is not None
    found = space.apply(config, best.params)
    tuned: dict[str, Any] = {settings.kind.total: settings.total}
    if settings.data is None:
        tuned["num_envs"] = found["num_envs"]
    for group in ("agent", "sampling"):
        if differing := _differing(found[group], defaults.get(group, {"_target_": None})):
            tuned[group] = differing
    head = (
        "# @package _global_\n"
        f"# {config['metric']} {best.value:.4g}, the best of {len(study.finished)} trials "
        f"with {settings.num_seeds} seeds each\n"
    )
    text = head + yaml.safe_dump(tuned, sort_keys=False, default_flow_style=None)
    write_whole(directory / "best.yaml", [text.encode()])


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `ours` that differ from `theirs`, at any depth."""
    found = {}
    for name, value in ours.items():
        other = theirs.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            value, other = _differing(value, other), {}
        if value != other:
            found[name] = value
    return found


def _write_table(path: Path, space: Space, study: SharedStudy) -> None:
    """Writes a line for each finished trial."""
    text = io.StringIO()
    names = list(space.distributions)
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "state", "value", "per_seed", "steps", "seconds", *names])
    for trial in study.finished:
        told = trial.user_attrs
        per_seed = " ".join(f"{x:.6g}" for x in told.get("per_seed", []))
        row = [trial.number, trial.state.name.lower(), trial.value, per_seed]
        row += [told.get("steps"), told.get("seconds")]
        table.writerow([*row, *(trial.params[name] for name in names)])
    write_whole(path, [text.getvalue().encode()])


def _summary(asked: _Asked, study: SharedStudy) -> dict[str, Any]:
    settings, config, best = asked.settings, asked.settings.config, study.best
    return {
        "agent": config["agent"]["_target_"],
        "env": env_name(config),
        "chosen": config.get("chosen"),
        "metric": config["metric"],
        "direction": config["direction"],
        "num_seeds": settings.num_seeds,
        settings.kind.total: settings.total,
        "trials": len(study.finished),
        "pruned": len(study.finished) - len(study.complete),
        "best": best
        and {
            "trial": best.number,
            "value": best.value,
            "per_seed": best.user_attrs["per_seed"],
            "params": best.params,
        },
        **provenance(),
    }


def _draw(directory: Path, study: SharedStudy) -> None:
    """Plots the results in their order, and the importance of hyperparameters."""
    if not study.complete:
        return
    optuna = import_optuna()
    try:
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError("matplotlib", "tune") from None
    from optuna.visualization import matplotlib as draw

    importances = optuna.importance.PedAnovaImportanceEvaluator
    with pyplot.rc_context({"backend": "agg"}), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        figures = {"history": draw.plot_optimization_history(study.study)}
        if len({trial.value for trial in study.complete}) > 1:  # else importances are undefined
            axes = draw.plot_param_importances(study.study, evaluator=importances())
            figures["importances"] = axes
        for name, axes in figures.items():
            figure = axes.get_figure(root=True)
            assert figure is not None
            figure.savefig(directory / f"{name}.png", dpi=80, bbox_inches="tight")
            pyplot.close(figure)
