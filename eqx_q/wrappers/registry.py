"""Environments by name: `make("suite/name", num_envs)`."""

import contextlib
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import MissingExtraError, UnknownNameError, UsageError
from .env import Env
from .observe import Observe


class Suite(NamedTuple):
    """Where a suite lives, the package it needs, and the extra that installs it.

    The module has

    - `ids() -> list[str]`: the names it knows;
    - `accepts(source, options) -> bool`: whether it can wrap this object of the caller's own;
    - `make(source, num_envs, *, seed, **options) -> Env`: from a name or such an object.
    """

    module: str
    package: str
    extra: str | None
    takes_functions: bool = False  # which may import the package only when called


# To add a suite: one file, and one line here.
SUITES = {
    "gymnax": Suite(".gymnax", "gymnax", "jax-envs"),
    "craftax": Suite(".craftax", "craftax", "jax-envs"),
    "envpool": Suite(".envpool", "envpool", "atari"),
    "jaxmarl": Suite(".jaxmarl", "jaxmarl", "multi-agent"),
    "pettingzoo": Suite(".pettingzoo", "pettingzoo", "multi-agent", takes_functions=True),
    "gymnasium": Suite(".gymnasium", "gymnasium", None),  # last: it accepts any function
}


def make(source: Any, num_envs: int, *, seed: int = 0, observe: Any = None, **options: Any) -> Env:
    """Makes a vectorised environment.

    **Arguments:**

    - `source`: `"suite/name"`, or one's own: a gymnax environment, a pair of it and its
        parameters, or a function that returns a `gymnasium.Env` or a PettingZoo environment. Where
        PettingZoo is installed, a function is called once more, to see what it makes.
    - `num_envs`: lanes.
    - `seed`: of emulators and Python environments. JAX-native ones take theirs from `reset(key)`.
    - `observe`: a list of those entries of the observation's last axis that are not hidden:
        `[0, 2]` leaves CartPole without velocities. `None`: all.
    - `options`: of the suite.

    **Raises:** `UsageError` for what is unknown or cannot be done, with what would have been right.
    """
    if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
        raise UsageError(f"num_envs is {num_envs!r}: give a whole number of lanes, 1 or more")
    env = _make(source, num_envs, seed, options)
    return env if observe is None else Observe(env, observe)


def _make(source: Any, num_envs: int, seed: int, options: dict[str, Any]) -> Env:
    if isinstance(source, str):
        suite, slash, name = source.partition("/")
        if not slash:
            raise UsageError(
                f"'{source}' names no suite: write 'suite/name', for example 'gymnax/CartPole-v1'"
            )
        if suite not in SUITES:
            raise UnknownNameError("suite", suite, SUITES)
        return _load(suite).make(name, num_envs, seed=seed, **options)
    for name, suite in SUITES.items():
        if _may_hold(suite, source) and _load(name).accepts(source, options):
            return _load(name).make(source, num_envs, seed=seed, **options)
    raise UsageError(
        f"cannot make an environment of {source!r}: give 'suite/name', a gymnax environment "
        "(alone or with its parameters), or a function that returns a gymnasium.Env "
        "or a PettingZoo environment"
    )


def _may_hold(suite: Suite, source: Any) -> bool:
    """Whether it can be of the suite: whoever holds an object of a package has imported it.

    A function may do so only when it is called.
    """
    is_imported = suite.package in sys.modules
    if is_imported or not (suite.takes_functions and callable(source)):
        return is_imported
    return importlib.util.find_spec(suite.package) is not None


def env_ids(suite: str) -> list[str]:
    """The names that a suite knows, each as `make` takes it."""
    if suite not in SUITES:
        raise UnknownNameError("suite", suite, SUITES)
    return [f"{suite}/{name}" for name in _load(suite).ids()]


def _load(name: str) -> ModuleType:
    suite = SUITES[name]
    if suite.extra is not None and importlib.util.find_spec(suite.package) is None:
        raise MissingExtraError(suite.package, suite.extra)
    # JaxMARL's import puts Python's own streams in the place of whatever catches the output.
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        return importlib.import_module(suite.module, __package__)
