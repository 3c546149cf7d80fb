"""The search space of a configuration."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx

from ..errors import MissingExtraError, UnknownNameError, UsageError
from ..wrappers import Env
from .making import make_agent, traced
from .parts import check_of_chosen
from .settings import Config, flat, with_values

VARIED = ("agent", "num_envs", "sampling")  # keys that may vary; the rest defines the task


@dataclasses.dataclass(frozen=True)
class Space:
    """The hyperparameters that a search varies, by key in the configuration.

    **Attributes:**

    - `distributions`: Optuna's.
    - `traced`: those that are array leaves of the agent, so that they vary inside a population. The
        others are static: a population shares them.
    - `structured`: those whose choices are not plain values. Optuna gets them as JSON.
    """

    distributions: Mapping[str, Any]
    traced: frozenset[str]
    structured: frozenset[str]

    def static(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a trial that a population shares."""
        return {name: value for name, value in params.items() if name not in self.traced}

    def leaves(self, params: Mapping[str, Any]) -> dict[str, float]:
        """The parameters of a trial that are array leaves of the agent, by path in it."""
        return {name.removeprefix("agent."): float(params[name]) for name in sorted(self.traced)}

    def apply(self, config: Config, params: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with a trial's parameters."""
        for name, value in params.items():
            value = json.loads(value) if name in self.structured else value
            config = with_values(config, {name: value})
        return dict(config)


def read_space(config: Config) -> Space:
    """Reads `config["search"]`, which is like the configuration, with sets instead of values.

        {"agent": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "num_epochs": [1, 2]}}

    A list holds choices. `low` and `high` bound a range, optionally with `step`, or `log: True`; it
    is of whole numbers if both are, and the hyperparameter is static. `None` varies nothing.

    **Raises:** `UsageError` for an unknown name, an invalid set, or an option of a part not chosen.
    """
    known = flat({key: config.get(key) for key in VARIED}).keys()
    leaves = {f"agent.{name}" for name in traced(config)}
    nodes = {name: node for name, node in _nodes(config["search"] or {}) if node is not None}
    for name in nodes:
        if name not in known:
            raise UnknownNameError("hyperparameter of the space", name, known - {"agent._target_"})
        also = nodes.get(f"{name.rpartition('.')[0]}.name", ())
        check_of_chosen(config["agent"], name.removeprefix("agent."), also)
    if not nodes:
        raise UsageError(
            "the search space is empty: choose one (search=pqn), or write one "
            "(search.agent.learning_rate=[1e-4,1e-3])"
        )
    return Space(
        distributions={name: _distribution(name, node, leaves) for name, node in nodes.items()},
        traced=frozenset(nodes.keys() & leaves),
        structured=frozenset(name for name, node in nodes.items() if _is_structured(node)),
    )


def check_space(config: Config, space: Space, env: Env) -> None:
    """Raises `UsageError` if one of the values, on its own, is invalid for the agent."""
    one = {**config, "num_seeds": 1}
    for name, distribution in space.distributions.items():
        ends = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
        for value in ends:
            tried = space.apply(one, {name: value})
            eqx.filter_eval_shape(lambda tried=tried: make_agent(tried, env))


def _distribution(name: str, node: Any, leaves: set[str]) -> Any:
    distributions = import_optuna().distributions
    is_range = _is_range(node)
    plain = list(node.values()) if is_range else node
    if name in leaves and not all(_is_number(x) for x in plain):
        raise UsageError(f"search.{name}={node}: give numbers")
    if not is_range:
        if not node:
            raise UsageError(f"search.{name}=[]: give at least one choice")
        choices = [json.dumps(x) for x in node] if _is_structured(node) else node
        return distributions.CategoricalDistribution(choices)
    options = dict(node)
    low, high = options.pop("low"), options.pop("high")
    if not (_is_number(low) and _is_number(high)) or not options.keys() <= {"log", "step"}:
        raise UsageError(f"search.{name}={dict(node)}: give numbers low and high, with log or step")
    whole = name not in leaves and isinstance(low, int) and isinstance(high, int)
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    try:
        return kind(low, high, **options)
    except ValueError as error:
        raise UsageError(f"search.{name}: {error}") from None


def _nodes(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields sets of values with their keys. Raises `UsageError` for anything else."""
    for key, node in tree.items():
        name = prefix + key
        if isinstance(node, Mapping) and not _is_range(node):
            yield from _nodes(node, f"{name}.")
        elif node is None or isinstance(node, list) or _is_range(node):
            yield name, node
        else:
            raise UsageError(
                f"search.{name}={node}: give a list of choices, or low and high: "
                f"'search.{name}=[1,2]' or 'search.{name}={{low: 1, high: 2}}'"
            )


def _is_range(node: Any) -> bool:
    return isinstance(node, Mapping) and "low" in node and "high" in node


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_structured(node: Any) -> bool:
    return isinstance(node, list) and any(isinstance(x, list | dict) for x in node)


def import_optuna() -> Any:
    """Imports Optuna, which only searches need. Raises `MissingExtraError`."""
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "tune") from None
    return optuna
