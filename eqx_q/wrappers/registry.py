"""Environments by name: `make("suite/name", num_envs)`."""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from ..errors import MissingExtraError, UnknownNameError, UsageError
from . import custom
from .env import Env
from .guard import Guard
from .observe import Observe


class Suite(NamedTuple):
    """A suite's module, the package it needs, and the extra that installs it.

    The module has

    - `ids() -> list[str]`: the names it knows;
    - `accepts(source) -> bool`: whether it can wrap this object of the caller (or the result of
        the caller's function);
    - `make(source, num_envs, *, seed, **options) -> Env`: from a name or such an object.

    **Attributes:**

    - `leaves_out`: whether `make` takes `leave_out` itself.
    - `guards`: whether each lane is a Python environment, and `make` takes a `guard`.
    - `own_options`: if the suite takes functions, options of `make` that are not for the function.
    """

    module: str
    package: str
    extra: str | None
    leaves_out: bool = False
    guards: bool = False
    own_options: tuple[str, ...] | None = None


_TEAM = ("pad", "team_reward", "global_state")

# To add a suite: write one file, and add one line here.
SUITES = {
    "gymnax": Suite(".gymnax", "gymnax", "jax-envs"),
    "craftax": Suite(".craftax", "craftax", "jax-envs"),
    "envpool": Suite(".envpool", "envpool", "atari", True),
    "jaxmarl": Suite(".jaxmarl", "jaxmarl", "multi-agent"),
    "pettingzoo": Suite(".pettingzoo", "pettingzoo", "multi-agent", True, True, _TEAM),
    "gymnasium": Suite(".gymnasium", "gymnasium", None, True, True, ("vectorization",)),
    "custom": Suite(".custom", "eqx_q", None),
}


def make(
    source: Any,
    num_envs: int,
    *,
    seed: int = 0,
    leave_out: Sequence[str] = (),
    observe: Any = None,
    on_error: str = "stop",
    timeout: float | None = None,
    max_restarts: int = 10,
    **options: Any,
) -> Env:
    """Makes a vectorised environment.

    **Arguments:**

    - `source`: `"suite/name"`, a name given by `eqx_q.register`, or what can be registered: a
        gymnax environment, a pair of one and its parameters, or a function that returns a
        `gymnasium.Env`, a PettingZoo environment or, from `num_envs`, an `Env`.
    - `num_envs`: lanes.
    - `seed`: of emulators and Python environments. JAX-native ones use the key of `reset`.
    - `leave_out`: entries of `Dict` observations that the agent does not see, by path:
        `["mission", "arm.velocity"]`. They may be of unsupported kinds.
    - `observe`: the entries of the observation's last axis that the agent sees: `[0, 2]` hides
        CartPole's velocities. If observations have several arrays, such lists by path:
        `{"image": [0]}`. `None`: all.
    - `on_error`, `timeout`, `max_restarts`: what to do when a lane's Python environment fails; see
        `eqx_q.wrappers.guard.Guard`.
    - `options`: of the suite.

    **Raises:** `UsageError` for unknown or invalid input; the message says what is valid.
    """
    if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
        raise UsageError(f"num_envs={num_envs!r}: give a whole number of lanes, 1 or more")
    if isinstance(leave_out, str) or not all(isinstance(path, str) for path in leave_out):
        raise UsageError(f"leave_out={leave_out!r}: give a list of paths, such as ['mission']")
    name, source = _suite_of(source, options)
    suite, leave_out = _load(name), tuple(leave_out)
    if leave_out and SUITES[name].leaves_out:
        options, leave_out = options | {"leave_out": leave_out}, ()
    guard = Guard(on_error, timeout, max_restarts)
    if SUITES[name].guards:  # hidden entries need not be finite
        options["guard"] = dataclasses.replace(guard, finite=observe is None)
    elif guard != Guard():
        raise UsageError(
            f"lanes of {name} are not separate Python environments, so they cannot be restarted or "
            "timed: leave out on_error, timeout and max_restarts"
        )
    env = suite.make(source, num_envs, seed=seed, **options)
    return Observe(env, observe, leave_out) if leave_out or observe is not None else env


def _suite_of(source: Any, options: dict[str, Any]) -> tuple[str, Any]:
    """The suite that can make an environment from `source`, and the source to pass to it."""
    if isinstance(source, str):
        own = custom.find(source.removeprefix("custom/"))
        if own is None:
            return _named(source)
        source = own
    name = _accepting(source, SUITES)
    if name is not None:
        return name, source
    if callable(source) and not isinstance(source, type):
        function = _Called(source, options)
        takers = {x: suite for x, suite in SUITES.items() if suite.own_options is not None}
        name = _accepting(function.first, takers)
        if name is not None:
            return name, function
        kind = type(function.first).__name__
        raise UsageError(
            f"the function must return a gymnasium.Env or a PettingZoo environment, not a {kind}"
        )
    raise UsageError(
        f"cannot make an environment of {source!r}: give 'suite/name', a gymnax environment "
        "(alone or with its parameters), or a function that returns a gymnasium.Env "
        "or a PettingZoo environment"
    )


def _named(source: str) -> tuple[str, str]:
    """The suite and the name in it of `"suite/name"`."""
    suite, slash, name = source.partition("/")
    if not slash:
        raise UsageError(
            f"'{source}' has no suite: write 'suite/name', for example 'gymnax/CartPole-v1'"
        )
    if suite not in SUITES:
        own = [one for one in custom.ids() if one.startswith(f"{suite}/")]
        if own:
            raise UnknownNameError("environment", source, own)
        raise UnknownNameError("suite", suite, SUITES)
    return suite, name


def _accepting(source: Any, suites: Mapping[str, Suite]) -> str | None:
    """The suite that can wrap `source`: the package of an existing object is already imported."""
    for name, suite in suites.items():
        if suite.package in sys.modules and _load(name).accepts(source):
            return name
    return None


class _Called:
    """A function that was called once to check its result, which the first call then returns."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        own = {option for suite in SUITES.values() for option in suite.own_options or ()}
        self._function = function
        self._options = {name: value for name, value in options.items() if name not in own}
        try:
            self.first = function(**self._options)
        except UsageError:
            raise
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"{function!r} cannot make an environment: {what}") from error

    def __call__(self, **options: Any) -> Any:
        """Calls the function, or returns the first result."""
        first, self.first = self.first, None
        if first is not None and options == self._options:
            return first
        return self._function(**options)


def env_ids(suite: str) -> list[str]:
    """The names of a suite's environments, or of those registered in a namespace, for `make`."""
    if own := [name for name in custom.ids() if name.startswith(f"{suite}/")]:
        return own
    if suite not in SUITES:
        raise UnknownNameError("suite", suite, SUITES)
    return [f"{suite}/{name}" for name in _load(suite).ids()]


def _load(name: str) -> ModuleType:
    suite = SUITES[name]
    if suite.extra is not None and importlib.util.find_spec(suite.package) is None:
        raise MissingExtraError(suite.package, suite.extra)
    # JaxMARL's import prints which of its parts are not installed, and replaces a redirected
    # output stream by Python's own.
    unseen = io.StringIO()
    silently = mock.patch.multiple(sys, stdout=unseen, __stdout__=unseen)
    with silently, contextlib.redirect_stderr(sys.stderr):
        return importlib.import_module(suite.module, __package__)
