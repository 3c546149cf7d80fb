"""Makes the environment and the agent that a configuration describes."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence, Set
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ..agents import Agent, Population, hyperparameters
from ..agents.hyperparameters import RANGES
from ..agents.parts import Part
from ..data import Sampling
from ..errors import UnknownNameError, UsageError
from ..sharding import OneDevice, Placement
from ..wrappers import Env, make, make_for
from .parts import chosen_options
from .settings import (
    Config,
    Settings,
    env_name,
    flat,
    given,
    number,
    whole,
    with_values,
)

LANES_IN_JAX, LANES_ON_HOST = 128, 8  # defaults of evaluations; emulators are slow
MOST_LANES = 2**24
_WHERE_IT_BREAKS = {
    "on_env_error": "on_error",
    "env_timeout": "timeout",
    "max_env_restarts": "max_restarts",
}
_LONGEST_EPISODE = 27_000  # if the environment has no limit of its own: Atari's


def make_env(config: Config, num_envs: int, place: Placement = OneDevice()) -> Env:  # noqa: B008
    """Makes the environment that `config["env"]` describes; options that are null keep defaults.

    **Arguments:** `place`: the devices that share it.
    """
    options = given(config["env"])
    suite, name = options.pop("suite"), options.pop("name")
    module = options.pop("import", None)
    if module is not None and module not in sys.modules:  # a configuration may be of anybody
        raise UsageError(
            f"'{name}' is registered by the module {module}, which is not imported: import it "
            f"first, if you trust its author (in scripts: +imports=[{module}])"
        )
    breaks = {option: config.get(key) for key, option in _WHERE_IT_BREAKS.items()}
    options |= given(breaks)

    def of_lanes(num_envs: int, seed: int) -> Env:
        return make(f"{suite}/{name}", num_envs, seed=seed, **options)

    seed = emulator_seed(whole(config, "seed"), "training")
    return make_for(place, of_lanes, num_envs, seed=seed)


def emulator_seed(seed: int, role: str) -> int:
    """A seed that is far from those of other runs and roles; lane `i` uses it plus `i`."""
    (spread,) = np.random.SeedSequence([seed, *role.encode()]).generate_state(1)
    return int(spread) % (2**31 - MOST_LANES)  # plus the lane, it fits a signed 32-bit integer


def make_agent(
    config: Config, env: Env, values: Sequence[Mapping[str, float]] | None = None
) -> Any:
    """Makes the agent that `config["agent"]` describes; a population if `num_seeds` is above 1.

    Its members share `seed`, but each has its own initial parameters; no other `seed` repeats them.

    **Arguments:** `values`: values of the same hyperparameters, by path, for each trial. The agent
    is then a population with `num_seeds` consecutive members per trial.
    """
    options = chosen_options(given(config["agent"]))
    create: Any = named_class(options.pop("_target_"), Agent).create
    known = set(inspect.signature(create).parameters)
    for name in options:
        if name not in known:
            raise UnknownNameError("hyperparameter", name, known - {"key"})
    _check_numbers(options, RANGES.keys())  # before `traced`, which makes parts with them
    _check_numbers(options, traced(config))
    if env.num_agents is not None:
        if "num_agents" not in known:
            raise UsageError(
                f"this agent does not support teams, but {env_name(config)} is for a team: choose "
                "agent=pqn_vdn"
            )
        options |= {"num_agents": env.num_agents, "state_size": env.state_size}
        network = dict(options.get("network_options", {}))
        if network.get("share_parameters") == "kind":
            network.setdefault("agent_kinds", env.agent_kinds)
            options["network_options"] = network

    def member(key, values):
        spaces = env.observation_space, env.action_space
        return create(*spaces, key=key, **chosen_options(with_values(options, values)))

    key = jax.random.fold_in(jax.random.key(whole(config, "seed")), 0)
    num_seeds = whole(config, "num_seeds", least=1)
    if values is None and num_seeds == 1:
        return member(key, {})
    choices = [{}] if values is None else values
    each = key[None] if num_seeds == 1 else jax.random.split(key, num_seeds)
    keys = jnp.tile(each, len(choices))
    stacked = jax.tree.map(lambda *x: np.repeat(np.asarray(x, np.float32), num_seeds), *choices)
    return Population(eqx.filter_vmap(member)(keys, stacked))


def make_sampling(settings: Settings) -> Sampling:
    """How transitions are drawn; rewards are clipped if the environment's are."""
    options = given(settings.config["sampling"])
    options.setdefault("reward_clip", bool(settings.config["env"].get("reward_clip", False)))
    return Sampling(seed=settings.seed, **options)


def named_class(target: Any, base: type) -> type:
    """The class that a `_target_` names.

    A configuration may come from an untrusted source, so modules outside eqx_q must already be
    imported.

    **Raises:** `UsageError` if the module is not imported, or it is not a class of this kind.
    """
    module, _, name = str(target).rpartition(".")
    if module.partition(".")[0] != "eqx_q" and module not in sys.modules:
        raise UsageError(
            f"_target_={target} is not part of eqx_q: import {module or target} first, if you "
            f"trust its author (in scripts: +imports=[{module or target}])"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"_target_={target} does not exist ({error}): correct it") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(f"_target_={target} is not a subclass of {base.__name__}: choose one")
    return found


def changeable(config: Config) -> set[str]:
    """Hyperparameters that a resumed run may change, by path in `config["agent"]`."""
    return traced(config) & flat(chosen_options(config["agent"])).keys()


def traced(config: Config) -> set[str]:
    """Paths of the hyperparameters of the agent and its parts."""
    options = chosen_options(given(config["agent"]))
    cls: Any = named_class(options["_target_"], Agent)
    parts = {field.name: options[field.name] for field in _parts(cls) if field.name in options}
    spaces = gymnasium.spaces.Box(0, 1, (1,)), gymnasium.spaces.Discrete(2)  # arbitrary
    create = functools.partial(cls.create, *spaces, **parts)
    agent = eqx.filter_eval_shape(lambda key: create(key=key), jax.eval_shape(jax.random.key, 0))
    return set(hyperparameters.names(agent))


def _check_numbers(options: Mapping[str, Any], paths: Set[str]) -> None:
    """Raises `UsageError` if an option at one of the paths is not a number."""
    for path in flat(options).keys() & paths:
        number({"agent": options}, f"agent.{path}")


def _parts(cls: type) -> list[dataclasses.Field]:
    """The fields of a class of agents that are parts with hyperparameters."""
    fields = dataclasses.fields(cls)
    return [x for x in fields if isinstance(x.type, type) and issubclass(x.type, Part)]


def lanes_of_all(settings: Settings, per_seed: int) -> int:
    """The lanes of all seeds. Raises `UsageError` if there are too many."""
    lanes = per_seed * settings.num_seeds
    if lanes > MOST_LANES:
        raise UsageError(f"{lanes:,} lanes are too many: lower num_envs or num_seeds")
    return lanes


def episode_cap(env: Env) -> int | None:
    """The step at which evaluations cut an episode; `None` if the environment has a limit."""
    return None if env.max_episode_steps else _LONGEST_EPISODE


def learnt(agent: Agent) -> dict[str, int]:
    """How much an agent has learnt: `env_steps`, or `num_updates` for an offline agent."""
    return {agent.learns_from.unit: int(np.max(agent.learnt))}


def close_later(stack: contextlib.ExitStack, thing: Any) -> Any:
    """Returns `thing`, which the stack will close."""
    stack.callback(thing.close)
    return thing
