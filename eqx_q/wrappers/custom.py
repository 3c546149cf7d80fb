"""People's own environments by name: `register("mine/Env", factory)`."""

import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import UnknownNameError, UsageError
from .env import Env

GROUP = "eqx_q.environments"  # of entry points

_registered: dict[str, Any] = {}


def register(name: str, factory: Any) -> None:
    """Gives an environment a name for `eqx_q.make` and for `env=custom env.name=NAME`.

        eqx_q.register("mine/Maze", Maze)

    A later registration of the same name replaces the earlier one. A package registers its
    environments by itself with entry points of the group `eqx_q.environments`, such as
    `"mine/Maze" = "my_package.mazes:Maze"`.

    **Arguments:**

    - `name`: `"namespace/Name"`.
    - `factory`: anything that `eqx_q.make` takes: a function that returns a `gymnasium.Env` or a
        PettingZoo environment, a gymnax environment, a pair of one and its parameters; or a
        function (a class) that takes `num_envs` and returns an `eqx_q.Env` with as many lanes. If
        it takes `seed`, it gets that too. Options of `make` are passed on to functions.

    **Raises:** `UsageError` for another form of name, or one of a suite of eqx_q.
    """
    namespace, slash, rest = name.partition("/")
    if not (namespace and slash and rest):
        raise UsageError(f"'{name}' has no namespace: register 'namespace/Name'")
    from .registry import SUITES  # which imports this module

    if namespace in SUITES:
        raise UsageError(f"'{namespace}' is a suite of eqx_q: register '{name}' under another name")
    _registered[name] = factory


def ids() -> list[str]:
    """The names that are registered, here or by installed packages."""
    return sorted({*_registered, *_of_packages()})


def find(name: str) -> Any:
    """What is registered under a name, or `None`.

    **Raises:** `UsageError` if a package registers it, but cannot load it.
    """
    if name in _registered:
        return _registered[name]
    point = _of_packages().get(name)
    if point is None:
        return None
    try:
        return point.load()
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"'{name}' is registered as {point.value}, which fails: {what}") from error


def accepts(source: Any) -> bool:
    """Whether `source` is a function that takes a number of lanes."""
    return callable(source) and "num_envs" in _parameters(source)


def make(source: Any, num_envs: int, *, seed: int = 0, **options: Any) -> Env:
    """Makes an environment with a function that takes `num_envs`.

    **Arguments:** `seed` is passed on if the function takes one, and `options` are.
    """
    if isinstance(source, str):
        raise UnknownNameError("environment of your own", source, ids())
    parameters = _parameters(source)
    takes_all = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())
    for option in options:
        if option not in parameters and not takes_all:
            raise UnknownNameError("option", option, set(parameters) - {"num_envs", "seed"})
    if "seed" in parameters or takes_all:
        options["seed"] = seed
    env = source(num_envs=num_envs, **options)
    if not isinstance(env, Env) or env.num_envs != num_envs:
        found = f"{env.num_envs} lanes" if isinstance(env, Env) else f"a {type(env).__name__}"
        raise UsageError(
            f"{source!r} must return an eqx_q.Env with {num_envs} lanes, but returned {found}"
        )
    return env


def _of_packages() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # built into Python
        return {}
