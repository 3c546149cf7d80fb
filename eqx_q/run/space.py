"""What a search varies, as a configuration says it."""

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

VARIED = ("agent", "num_envs", "sampling")  # of a configuration; the rest is the task


@dataclasses.dataclass(frozen=True)
class Space:
    """The hyperparameters that a search varies, by their key in the configuration.

    **Attributes:**

    - `distributions`: Optuna's.
    - `traced`: those that are array leaves of the agent, and so vary inside a population. The
        others are static: a population shares them.
    - `structured`: those whose choices are no plain values. Optuna knows them as JSON.
    """

    distributions: Mapping[str, Any]
    traced: frozenset[str]
    structured: frozenset[str]

    def static(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Of a trial's parameters those that a population shares."""
        return {name: value for name, value in params.items() if name not in self.traced}

    def leaves(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Of a trial's parameters the agent's array leaves, by their path in it."""
        return {name.removeprefix("agent."): float(params[name]) for name in sorted(self.traced)}

    def apply(self, config: Config, params: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with a trial's parameters."""
        for name, value in params.items():
            value = json.loads(value) if name in self.structured else value
            config = with_values(config, {name: value})
        return dict(config)


def read_space(config: Config) -> Space:
    """What `config["search"]` says: like the configuration itself, with sets for values.

        {"agent": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "num_epochs": [1, 2]}}

    A list has the choices; `low` and `high` bound a range, of whole numbers where both are and the
    hyperparameter is static; with `step`, or `log: True`. `None` varies nothing.

    **Raises:** `UsageError` for what is unknown, no set of values, or of a part not chosen.
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
            "there is nothing to search: choose a space (search=pqn), or write one "
            "(search.agent.learning_rate=[1e-4,1e-3])"
        )
    return Space(
        distributions={name: _distribution(name, node, leaves) for name, node in nodes.items()},
        traced=frozenset(nodes.keys() & leaves),
        structured=frozenset(name for name, node in nodes.items() if _is_structured(node)),
    )


def check_space(config: Config, space: Space, env: Env) -> None:
    """Raises `UsageError` where one of the values cannot be the agent's, on its own."""
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
    """Sets of values by their key. Raises `UsageError` for what is none."""
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
    """The package, which nothing but a search needs. Raises `MissingExtraError`."""
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "tune") from None
    return optuna
