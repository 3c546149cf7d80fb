"""Explorations: how an agent strays from its best action.

To add one: a class here, and a line in `EXPLORATIONS`.

An action has `F` factors, each of which chooses among `C`; that of a `Discrete` space has one. ε is
the probability with which a factor explores: at 0 every one of them is greedy, so that agents are
evaluated alike, whatever they were trained with. Classes differ in what is done with probability ε.

Each factor explores on its own, as in the authors' code of decoupled Q-networks (Seyde et al. 2023,
arXiv 2210.12566): factors that are not explored stay greedy, and one action tries out few of them.
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
    """With probability `epsilon` an action drawn uniformly from the legal ones, else the best.

    `q_values` of illegal actions must be -inf already (see `Model.q_values`).
    """
    *lanes, num_actions = q_values.shape
    greedy = jnp.argmax(q_values, axis=-1)
    if action_mask is None:
        # One draw for both questions: whether to explore, and what.
        explore, choice = jax.random.uniform(key, (2, *lanes))
        random = jnp.floor(choice * num_actions).astype(greedy.dtype)
    else:
        explore_key, choice_key = jax.random.split(key)
        explore = jax.random.uniform(explore_key, lanes)
        random = _uniform(choice_key, action_mask)
    return jnp.where(explore < epsilon, random, greedy)


def _uniform(key: PRNGKeyArray, is_legal: Bool[Array, "*lanes A"]) -> Int[Array, "*lanes"]:
    """An action drawn uniformly from the legal ones."""
    return jnp.argmax(jnp.where(is_legal, jax.random.uniform(key, is_legal.shape), -1.0), axis=-1)


class AbstractExploration(Part):
    """How actions are drawn, given Q-values and ε."""

    @abc.abstractmethod
    def initial_memory(self, num_rows: int, num_factors: int = 1) -> PyTree[Array]:
        """What is remembered before the first step, `num_rows` on the leading axis of every leaf.

        `()` where nothing is.
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

        - `q_values`: of all rows, which are lanes, or the agents of a team in lane after lane; -inf
            where a choice is illegal, or only fills up a factor that has fewer than `C`.
        - `epsilon`: the probability with which each factor explores.
        - `memory`: from `initial_memory`, or from the call before.
        - `first`: where an episode starts: what is remembered of the one before is forgotten.
        - `is_legal`: the choices that may be drawn; `None` if all may, which is cheaper.

        **Returns:** the index of what each factor chooses, and what to remember.
        """


def _scalar(value: Scalar) -> Float[Array, ""]:
    return jnp.asarray(value, jnp.float32)


class EpsilonGreedy(AbstractExploration):
    """With probability ε a legal choice drawn uniformly, else the best."""

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
    """ε-greedy with another ε in each row (Ape-X, Horgan et al. 2018, §4).

    That of row `i` of `R` is `ε ** (1 + alpha * i / (R - 1))`: from ε in the first down to
    `ε ** (1 + alpha)` in the last. Some rows explore all along, others go deep. The rows of a team
    are its agents, lane after lane, so that the agents of one lane have nearly the same ε.

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
        num_rows = q_values.shape[0]  # any, in an exported agent
        place = jnp.arange(num_rows) / jnp.maximum(num_rows - 1, 1)
        epsilons = jnp.power(jnp.asarray(epsilon, jnp.float32), 1 + self.alpha * place)
        return epsilon_greedy(q_values, epsilons[:, None], key, is_legal), memory


class Repeating(eqx.Module):
    """What `EpsilonZGreedy` remembers: what each factor repeats, and for how many steps more."""

    choice: Int[Array, "R F"]
    remaining: Int[Array, "R F"]


class EpsilonZGreedy(AbstractExploration):
    """Temporally extended ε-greedy (Dabney et al. 2020, arXiv 2006.01782).

    With probability ε a legal choice is drawn uniformly, and is repeated for `n` steps in all,
    where `n` is drawn from a zeta distribution: its probability is in proportion to `n ** -mu`. A
    new episode ends the repetition, and so does a step in which the choice is not legal: what to do
    is then decided anew. An ε that has fallen to 0 begins no repetition, and ends none.

    **Attributes:**

    - `mu`: *traced*; the larger, the shorter: 2 is the paper's, and 0 makes all durations alike.
    - `max_duration`: longer durations are not drawn. Each step computes as many probabilities.
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
                f"exploration remembers {memory.choice.shape} rows and factors, not "
                f"{tuple(shape)}: give what initial_memory or the call before gave"
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
        """Whole numbers from 1 on, by the inverse of their cumulative distribution."""
        weights = jnp.arange(1.0, self.max_duration + 1) ** -self.mu
        cumulative = jnp.cumsum(weights)
        drawn = jax.random.uniform(key, shape) * cumulative[-1]
        # The last one is never exceeded, whatever is rounded.
        return 1 + jnp.searchsorted(cumulative[:-1], drawn, side="right").astype(jnp.int32)


EXPLORATIONS: dict[str, type[AbstractExploration]] = {
    "epsilon_greedy": EpsilonGreedy,
    "lane_epsilons": LaneEpsilons,
    "ez_greedy": EpsilonZGreedy,
}


def make_exploration(given: str | Mapping[str, Any] | AbstractExploration) -> AbstractExploration:
    """An exploration: a name of `EXPLORATIONS`, a mapping of `"name"` and options, or an object.

    **Raises:** `UsageError` for a name or an option that is not known.
    """
    return make_part("exploration", given, AbstractExploration, EXPLORATIONS)
