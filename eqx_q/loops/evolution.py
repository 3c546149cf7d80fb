"""Population-based training: poor members copy good ones, then perturb hyperparameters.

Jaderberg et al., "Population Based Training of Neural Networks", 2017 (arXiv 1711.09846).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..agents import Agent, Population
from ..agents.hyperparameters import range_of
from ..errors import UnknownNameError, UsageError
from .running import Metrics

_FOLLOWERS = {"learning_rate": "learning_rate_end"}


class PopulationBasedTraining:
    """A callback of `eqx_q.train`: the worst members copy the best, then perturb their copies.

    A member is copied whole: parameters, optimiser state, statistics, hyperparameters ("exploit").
    Then each of its `hyperparameters` is multiplied by one of `factors` ("explore"). Lanes stay
    with their member index, with the memory of their episodes.

    Randomness is folded from the update counter, and rounds keep no state, so that a resumed run is
    the same. For that the metrics must not depend on the machine's speed: give `train` a
    `log_every`.

    **Arguments:**

    - `hyperparameters`: paths of numeric hyperparameters: `learning_rate`, `value.sigma`.
    - `every`: lane-steps (per member) between rounds.
    - `fitness`: a per-member metric of the chunk that ends with the round. Members without a value
        (no episode ended) neither copy nor are copied.
    - `fraction`: of members that copy; the same number are copied.
    - `factors`: each hyperparameter draws one of them.

    **Raises:** `UsageError`: when called, for an unknown name or too small a population.
    """

    def __init__(
        self,
        hyperparameters: Sequence[str],
        *,
        every: int,
        fitness: str = "episode_return",
        fraction: float = 0.25,
        factors: Sequence[float] = (0.8, 1.2),
        seed: int = 0,
    ):
        if not 0 < fraction <= 0.5:
            raise UsageError(f"fraction={fraction}: give a number above 0, of at most 0.5")
        if not factors or not all(factor > 0 for factor in factors):
            raise UsageError(f"factors={list(factors)}: give positive numbers")
        self.every = every
        self._names, self._fitness = list(hyperparameters), fitness
        self._fraction, self._factors, self._seed = fraction, list(factors), seed

    def __call__(self, run_state: Any, metrics: Metrics) -> Any:
        """Replaces the worst members, unless the run is over. Adds `pbt/` metrics."""
        population = run_state.agent
        self.check(population)
        if self._fitness not in metrics:
            of_members = {n for n, x in metrics.items() if np.shape(x) == (population.num_members,)}
            raise UnknownNameError("metric", self._fitness, of_members)
        fitness = np.asarray(metrics[self._fitness], float)
        known = np.flatnonzero(np.isfinite(fitness))
        number = min(self._number(len(fitness)), len(known) // 2)
        if metrics["done"] or not number:
            return None
        rng = np.random.default_rng([self._seed, int(run_state.num_updates)])
        order = known[np.argsort(fitness[known], kind="stable")]
        parents = np.arange(len(fitness))
        parents[order[:number]] = rng.choice(order[-number:], number)
        copied = parents != np.arange(len(fitness))
        drawn = {name: rng.choice(self._factors, len(fitness)) for name in self._names}
        factors = {name: np.where(copied, factor, 1.0) for name, factor in drawn.items()}
        population = scale(population.select(parents), factors)
        metrics["pbt/parent"] = parents
        metrics |= {f"pbt/{n}": x for n, x in _values(population, self._names).items()}
        return eqx.tree_at(lambda state: state.agent, run_state, population)

    def check(self, agent: Agent) -> None:
        """Raises `UsageError` if `agent` is too small a population or lacks a hyperparameter."""
        number = agent.num_members or 1
        if self._number(number) < 1:
            raise UsageError(
                f"population-based training with fraction={self._fraction:g} replaces none of "
                f"{number} members: train at least {int(np.ceil(1 / self._fraction))}"
            )
        _values(agent, self._names)

    def _number(self, members: int) -> int:
        return int(members * self._fraction)


def scale(population: Population, factors: Mapping[str, Float[np.ndarray, " S"]]) -> Population:
    """The population with hyperparameters multiplied, clipped to their ranges.

    The end of the learning rate's schedule is multiplied too: see `with_followers`.

    **Raises:** `UnknownNameError` for a name that is not a numeric hyperparameter.
    """
    factors = with_followers(population, factors)
    scaled = {
        path: jnp.clip(value * jnp.asarray(factors[path], jnp.float32), *range_of(path))
        for path, value in _values(population, factors).items()
    }
    return population.with_hyperparameters(scaled)


def with_followers(agent: Agent, factors: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the factors of hyperparameters that follow another one.

    So the learning rate's schedule keeps its shape, unless its end has a factor of its own.
    """
    known = agent.hyperparameters()
    followers = {_FOLLOWERS.get(name): factor for name, factor in factors.items()}
    return {name: x for name, x in followers.items() if name in known} | dict(factors)


def spread(population: Population, names: Sequence[str], factor: float, seed: int) -> Population:
    """The population with hyperparameters multiplied by random factors.

    Each member draws its own, log-uniformly from `1 / factor` to `factor`.
    """
    rng = np.random.default_rng(seed)
    size = population.num_members
    return scale(population, {name: factor ** rng.uniform(-1, 1, size) for name in names})


def _values(agent: Agent, names: Iterable[str]) -> dict[str, jax.Array]:
    """Values of hyperparameters, one per member. Raises `UnknownNameError`."""
    leaves = agent.hyperparameters()
    known = {path: x for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    for name in names:
        if name not in known:
            raise UnknownNameError("hyperparameter", name, known)
    return {name: known[name] for name in names}
