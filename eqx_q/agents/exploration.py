"""Explorations: how an agent deviates from its best action.

To add one: write a class here, and add a line to `EXPLORATIONS`.

An action has `F` factors with up to `C` choices each; `Discrete` has one factor. ε is the
probability that a factor explores. At 0 every exploration is greedy, so agents are evaluated alike,
however they were trained. The classes differ in what they do with probability ε.

Each factor explores on its own, as in the authors' code of decoupled Q-networks (Seyde et al. 2023,
arXiv 2210.12566): factors that do not explore stay greedy, so one action explores few of them.
"""

import abc
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ..errors import UsageError, check_whole
from ..types import Scalar
from .hyperparameters import check_ranges
from .parts import Part, make_part


def epsilon_greedy(
    q_values: Float[Array, "*lanes A"],
    epsilon: Float[Array, "..."] | Scalar,
    key: PRNGKeyArray,
    action_mask: Bool[Array, "*lanes A"] | None = None,
) -> Int[Array, "*lanes"]:
    """With probability `epsilon` a uniformly random legal action, else the best.

    `q_values` of illegal actions must be -inf already (see `Model.q_values`).
    """
    *lanes, num_actions = q_values.shape
    greedy = jnp.argmax(q_values, axis=-1)
    if action_mask is None:
        # One draw for both: whether to explore, and which action.
        explore, choice = jax.random.uniform(key, (2, *lanes))
        random = jnp.floor(choice * num_actions).astype(greedy.dtype)
    else:
        explore_key, choice_key = jax.random.split(key)
        explore = jax.random.uniform(explore_key, lanes)
        random = _uniform(choice_key, action_mask)
    return jnp.where(explore < epsilon, random, greedy)


def _uniform(key: PRNGKeyArray, is_legal: Bool[Array, "*lanes A"]) -> Int[Array, "*lanes"]:
    """A uniformly random legal action."""
    return jnp.argmax(jnp.where(is_legal, jax.random.uniform(key, is_legal.shape), -1.0), axis=-1)


class AbstractExploration(Part):
    """Draws actions, given Q-values and ε."""

    @abc.abstractmethod
    def initial_memory(self, num_rows: int, num_factors: int = 1) -> PyTree[Array]:
        """Memory before the first step, with `num_rows` on the leading axis of every leaf.

        `()` without memory.
        """

    @abc.abstractmethod
    def __call__(
        self,
        q_values: Float[Array, "R F C"],
        epsilon: Scalar,
        key: PRNGKeyArray,
        memory: PyTree[Array],
        first: Bool[Array, " R"] | None = None,
        is_legal: Bool[Array, "R F C"] | None = None,
    ) -> tuple[Int[Array, "R F"], PyTree[Array]]:
        """Draws actions.

        **Arguments:**

        - `q_values`: of all rows, which are lanes, or a team's agents lane by lane; -inf where a
            choice is illegal or padding.
        - `epsilon`: the probability that each factor explores.
        - `memory`: from `initial_memory`, or from the previous call.
        - `first`: rows in which an episode starts, which resets their memory.
        - `is_legal`: mask of the choices that may be drawn; `None` if all may, which is cheaper.

        **Returns:** the index of each factor's choice, and the new memory.
        """


def _scalar(value: Scalar) -> Float[Array, ""]:
    return jnp.asarray(value, jnp.float32)


class EpsilonGreedy(AbstractExploration):
    """With probability ε a uniformly random legal choice, else the best."""

    def initial_memory(self, num_rows: int, num_factors: int = 1) -> tuple[()]:
        return ()

    def __call__(
        self,
        q_values: Float[Array, "R F C"],
        epsilon: Scalar,
        key: PRNGKeyArray,
        memory: PyTree[Array],
        first: Bool[Array, " R"] | None = None,
        is_legal: Bool[Array, "R F C"] | None = None,
    ) -> tuple[Int[Array, "R F"], PyTree[Array]]:
        return epsilon_greedy(q_values, epsilon, key, is_legal), memory


class LaneEpsilons(AbstractExploration):
    """ε-greedy with a different ε in each row (Ape-X, Horgan et al. 2018, §4).

    Row `i` of `R` has `ε ** (1 + alpha * i / (R - 1))`: from ε in the first down to
    `ε ** (1 + alpha)` in the last. So some rows always explore, while others are nearly greedy. The
    rows of a team are its agents, lane by lane, so the agents of one lane have nearly the same ε.

    **Attributes:** `alpha`: *traced*; 0 is ε-greedy.
    """

    alpha: Float[Array, ""] = eqx.field(default=7.0, converter=_scalar)

    def __check_init__(self):
        check_ranges({"exploration.alpha": self.alpha})

    def initial_memory(self, num_rows: int, num_factors: int = 1) -> tuple[()]:
        return ()

    def __call__(
        self,
        q_values: Float[Array, "R F C"],
        epsilon: Scalar,
        key: PRNGKeyArray,
        memory: PyTree[Array],
        first: Bool[Array, " R"] | None = None,
        is_legal: Bool[Array, "R F C"] | None = None,
    ) -> tuple[Int[Array, "R F"], PyTree[Array]]:
        num_rows = q_values.shape[0]  # symbolic in an exported agent
        place = jnp.arange(num_rows) / jnp.maximum(num_rows - 1, 1)
        epsilons = jnp.power(jnp.asarray(epsilon, jnp.float32), 1 + self.alpha * place)
        return epsilon_greedy(q_values, epsilons[:, None], key, is_legal), memory


class Repeating(eqx.Module):
    """Memory of `EpsilonZGreedy`: the choice that each factor repeats, and the steps left."""

    choice: Int[Array, "R F"]
    remaining: Int[Array, "R F"]


class EpsilonZGreedy(AbstractExploration):
    """Temporally extended ε-greedy (Dabney et al. 2020, arXiv 2006.01782).

    With probability ε a legal choice is drawn uniformly and repeated for `n` steps in total. `n` is
    drawn from a zeta distribution, with probability proportional to `n ** -mu`. The repetition
    also ends at a new episode, or when its choice becomes illegal; the factor then decides afresh.
    When ε falls to 0, no new repetition begins, but a running one continues.

    **Attributes:**

    - `mu`: *traced*; the larger, the shorter: 2 is the paper's, 0 makes all durations equally
        likely.
    - `max_duration`: the longest duration. Each step computes that many probabilities.
    """

    mu: Float[Array, ""] = eqx.field(default=2.0, converter=_scalar)
    max_duration: int = eqx.field(default=1000, static=True)

    def __check_init__(self):
        check_ranges({"exploration.mu": self.mu})
        check_whole(max_duration=self.max_duration)

    def initial_memory(self, num_rows: int, num_factors: int = 1) -> Repeating:
        none = jnp.zeros((num_rows, num_factors), jnp.int32)
        return Repeating(none, none)

    def __call__(
        self,
        q_values: Float[Array, "R F C"],
        epsilon: Scalar,
        key: PRNGKeyArray,
        memory: PyTree[Array],
        first: Bool[Array, " R"] | None = None,
        is_legal: Bool[Array, "R F C"] | None = None,
    ) -> tuple[Int[Array, "R F"], PyTree[Array]]:
        *shape, num_choices = q_values.shape
        if memory.choice.shape != tuple(shape):
            raise UsageError(
                f"exploration memory has {memory.choice.shape} rows and factors, not "
                f"{tuple(shape)}: pass the result of initial_memory or the previous call"
            )
        explore_key, choice_key, duration_key = jax.random.split(key, 3)
        repeats = memory.remaining > 0
        if first is not None:
            repeats &= ~first[:, None]
        if is_legal is None:
            random = jax.random.randint(choice_key, shape, 0, num_choices)
        else:
            random = _uniform(choice_key, is_legal)
            still = jnp.take_along_axis(is_legal, memory.choice[..., None], axis=-1)[..., 0]
            repeats &= still
        begins = ~repeats & (jax.random.uniform(explore_key, shape) < epsilon)
        drawn = self._durations(duration_key, shape)
        index = jnp.where(begins, random, jnp.argmax(q_values, axis=-1)).astype(jnp.int32)
        index = jnp.where(repeats, memory.choice, index)
        remaining = jnp.where(begins, drawn, jnp.where(repeats, memory.remaining, 1)) - 1
        return index, Repeating(index, remaining)

    def _durations(self, key: PRNGKeyArray, shape: list[int]) -> Int[Array, "R F"]:
        """Draws durations from 1 on, by inverting their cumulative distribution."""
        weights = jnp.arange(1.0, self.max_duration + 1) ** -self.mu
        cumulative = jnp.cumsum(weights)
        drawn = jax.random.uniform(key, shape) * cumulative[-1]
        # Without the last entry, rounding cannot exceed the longest duration.
        return 1 + jnp.searchsorted(cumulative[:-1], drawn, side="right").astype(jnp.int32)


EXPLORATIONS: dict[str, type[AbstractExploration]] = {
    "epsilon_greedy": EpsilonGreedy,
    "lane_epsilons": LaneEpsilons,
    "ez_greedy": EpsilonZGreedy,
}


def make_exploration(given: str | Mapping[str, Any] | AbstractExploration) -> AbstractExploration:
    """Makes an exploration from a name, a mapping with `"name"` and options, or an object.

    **Raises:** `UsageError` for an unknown name or option.
    """
    return make_part("exploration", given, AbstractExploration, EXPLORATIONS)
