"""A run as the scripts make it: from a configuration to a directory of results.

A configuration is a nested dictionary with the keys of `conf/config.yaml`. The directory has

    config.yaml  metrics.jsonl  summary.json  agent.eqx  checkpoints/  media/
"""

import contextlib
import inspect
import json
import logging
import pkgutil
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .agents import Agent, Population
from .callbacks import Checkpoint, Evaluation, Interrupt, Log, Progress, TimeBudget, Video, restore
from .checkpoint import load, save
from .errors import DivergedError, UnknownNameError, UsageError
from .evaluate import evaluate
from .train import Metrics, RunState, train
from .wrappers import Env, make

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]

_LANES_IN_JAX, _LANES_ON_HOST = 128, 8  # of an evaluation: an emulator is slow
_LONGEST_EPISODE = 27_000  # where the environment has no limit of its own: Atari's


def make_env(config: Config, num_envs: int) -> Env:
    """The environment that `config["env"]` describes; options that are null keep their default."""
    options = _given(config["env"])
    name = f"{options.pop('suite')}/{options.pop('name')}"
    return make(name, num_envs, seed=whole(config, "seed"), **options)


def make_agent(config: Config, env: Env) -> Agent:
    """The agent that `config["agent"]` describes; a population where `num_seeds` is above 1.

    Member `i` starts with the parameters that a run of its own would have at `seed + i`.
    """
    options = _given(config["agent"])
    create = pkgutil.resolve_name(options.pop("_target_")).create
    known = inspect.signature(create).parameters
    for name in options:
        if name not in known:
            raise UnknownNameError("hyperparameter", name, set(known) - {"key"})

    def member(key):
        return create(env.observation_space, env.action_space, key=key, **options)

    seeds = whole(config, "seed") + np.arange(whole(config, "num_seeds", least=1))
    if len(seeds) == 1:
        return member(_agent_key(seeds[0]))
    return Population(eqx.filter_vmap(member)(jax.vmap(_agent_key)(seeds)))


def _agent_key(seed):
    return jax.random.fold_in(jax.random.key(seed), 0)


def train_run(config: Config, directory: Path, *, resume: bool = False) -> dict[str, Any]:
    """Trains as `config` says, and leaves the results in `directory`.

    **Returns:** the summary, which is in `summary.json` too.
    **Raises:** `UsageError` for what the configuration gets wrong.
    """
    total_steps, seed = whole(config, "total_steps", least=1), whole(config, "seed")
    if config["devices"] != 1:
        raise UsageError(f"devices={config['devices']}: only devices=1 is supported so far")
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        env = _closing(stack, make_env(config, _lanes(config, whole(config, "num_envs"))))
        agent = make_agent(config, env)
        run_state = restore(directory / "checkpoints", env) if resume else None
        budget = TimeBudget(config["eval"]["time_fraction"])
        tracker = _closing(stack, _make_tracker(config, directory))
        interrupt = stack.enter_context(Interrupt())
        evaluation = _evaluation(config, env, budget, stack)
        checkpoint = _checkpoint(config, env, directory)
        last: Metrics = {}
        callbacks = [
            interrupt,
            evaluation,
            lambda run_state, metrics: last.update(metrics),
            checkpoint,
            Log(tracker),
            _closing(stack, Progress()),
            _video(config, env, directory, tracker, budget, stack),
        ]
        try:
            agent, _ = train(
                agent,
                env,
                total_steps=total_steps,
                key=jax.random.fold_in(jax.random.key(seed), 1),
                callbacks=[callback for callback in callbacks if callback is not None],
                run_state=run_state,
                log_every=config["log_every"],
            )
        except DivergedError as error:
            kept = f"the last good checkpoint is {checkpoint.last}" if checkpoint.last else ""
            raise DivergedError(f"{error} {kept or '(there was no checkpoint yet)'}") from None
    save(directory / "agent.eqx", agent)
    summary = _summary(config, last, evaluation)
    summary["status"] = "stopped" if interrupt.received and last["env_steps"] < total_steps else "done"
    summary["wall_seconds"] = time.perf_counter() - started
    write_json(directory / "summary.json", summary)
    return summary


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
    video: bool = False,
) -> dict[str, Any]:
    """Evaluates the agent that a run left behind, in the environment that it was trained in.

    **Arguments:** `episodes`, `num_envs`: per member. `protocol`: options of the environment that
    differ from training; by default those of the run's own evaluations.

    **Returns:** returns per member with their statistics, and how they were come by.
    """
    agent = load(directory / "agent.eqx")
    members = agent.num_members or 1
    with contextlib.ExitStack() as stack:
        one = _closing(stack, make_env(config, members))
        lanes = num_envs or min(episodes, _LANES_ON_HOST if one.on_host else _LANES_IN_JAX)
        options = _given(config["protocol"] if protocol is None else protocol)
        env = _closing(stack, one.replicate(members * lanes, seed=seed, **options))
        cap = max_episode_steps or _episode_cap(env)
        key = jax.random.key(seed)
        returns = evaluate(
            agent, env, num_episodes=episodes, key=key, epsilon=epsilon, max_episode_steps=cap
        )
        if video:
            scene = _closing(stack, one.replicate(members, seed=seed, **options))
            frames = record_episode(agent, scene, key=key)
            path = directory / "media" / "evaluation.gif"
            if frames is not None:
                write_gif(path, frames)
    returns = np.atleast_2d(returns)
    return {
        "env": f"{config['env']['suite']}/{config['env']['name']}",
        "env_options": options,
        "env_steps": int(np.max(agent.env_steps)),
        "episodes": returns.shape[1],
        "epsilon": epsilon,
        "seed": seed,
        "max_episode_steps": cap,
        "return_mean": float(returns.mean()),
        "return_per_seed": returns.mean(1).tolist(),
        "return_std_per_seed": returns.std(1).tolist(),
        "returns": returns.tolist(),
        **_provenance(),
    }


def whole(config: Config, name: str, *, least: int = 0) -> int:
    """A whole number of the configuration, also where it is written `5e5`.

    **Raises:** `UsageError` where it is something else, or below `least`.
    """
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise UsageError(f"{name}={value}: give a whole number")
    if value < least:
        raise UsageError(f"{name}={value}: give a whole number of at least {least}")
    return int(value)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON; what is not finite becomes `null`."""
    path.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _evaluation(config, env, budget, stack) -> Evaluation | None:
    options = config["eval"]
    if options["every"] == 0:
        return None
    lanes = options["num_envs"] or (_LANES_ON_HOST if env.on_host else _LANES_IN_JAX)
    seed = whole(config, "seed") + 1
    env = env.replicate(_lanes(config, lanes), seed=seed, **_given(config["protocol"]))
    return Evaluation(
        _closing(stack, env),
        every=_every(config, "eval", parts=20),
        num_episodes=options["num_episodes"] or lanes,
        seed=seed,
        epsilon=options["epsilon"],
        max_episode_steps=options["max_episode_steps"] or _episode_cap(env),
        budget=budget,
    )


def _checkpoint(config, env, directory) -> Checkpoint:
    return Checkpoint(
        directory / "checkpoints",
        every=_every(config, "checkpoint", parts=10),
        keep=config["checkpoint"]["keep"],
        with_env=not env.on_host,
    )


def _video(config, env, directory, tracker, budget, stack) -> Video | None:
    if config["video"]["every"] == 0:
        return None
    env = env.replicate(_lanes(config, 1), seed=whole(config, "seed") + 2)
    return Video(
        _closing(stack, env),
        directory / "media",
        every=_every(config, "video", parts=4),
        tracker=tracker,
        max_steps=config["video"]["max_steps"],
        budget=budget,
    )


def _every(config: Config, section: str, *, parts: int) -> int:
    """Steps between rounds: as configured, else so many rounds in a run."""
    every = config[section]["every"]
    return whole(config[section], "every", least=1) if every else max(
        1, whole(config, "total_steps") // parts
    )


def _lanes(config: Config, per_seed: int) -> int:
    return per_seed * whole(config, "num_seeds", least=1)


def _episode_cap(env: Env) -> int | None:
    """Where an evaluation cuts an episode: nowhere if the environment has a limit of its own."""
    return None if env.max_episode_steps else _LONGEST_EPISODE


def _summary(config: Config, last: Metrics, evaluation: Evaluation | None) -> dict[str, Any]:
    returns = None if evaluation is None else evaluation.returns
    per_seed = None if returns is None else np.atleast_2d(returns).mean(1).tolist()
    lane_steps = last["env_steps"] 
    return {
        "agent": config["agent"]["_target_"],
        "env": f"{config['env']['suite']}/{config['env']['name']}",
        "seed": config["seed"],
        "num_seeds": config["num_seeds"],
        **{name: last[name] for name in ("env_steps", "transitions")},
        "eval_return_mean": None if per_seed is None else float(np.mean(per_seed)),
        "eval_return_per_seed": per_seed,
        **_provenance(),
    }


def _provenance() -> dict[str, Any]:
    """The device, and the versions of what matters where it is installed."""
    versions = {"python": platform.python_version()}
    for package in ("eqx_q", "jax", "jaxlib", "equinox", "optax", "numpy", *_SUITE_PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"device": jax.devices()[0].device_kind, "versions": versions}


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
