"""Training on the device: repeatedly draws experience from a source and learns from it.

This part is compiled. The host's part is `eqx_q.loops.running`.
"""

import abc
import dataclasses
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..agents import Agent
from ..errors import UsageError
from ..sharding import Lay, Placement
from ..types import Rollout, Transitions
from ..wrappers import Env

ByName = dict[str, Array]


class AbstractRunState(eqx.Module):
    """The complete state of a run: a saved run continues from it, bit for bit.

    **Attributes:** the `agent`; the `key` of all future randomness; `num_updates` so far.
    """

    agent: AbstractVar[Agent]
    key: AbstractVar[PRNGKeyArray]
    num_updates: AbstractVar[Int[Array, ""]]

    @abc.abstractmethod
    def spread(self, lay: Lay) -> Any:
        """Replaces each part by `lay(part, axis)`, where `axis` is that of lanes or members.

        Devices share this axis; `None`: every device has the whole part.
        """


def check_fits(agent: Agent, env: Env, mend: str) -> None:
    """Raises `UsageError` if an agent's spaces or team differ from the environment's.

    **Arguments:** `mend`: the advice in the message; `{}` stands for the name that differs.
    """
    for name in ("observation_space", "action_space", "num_agents"):
        ours, theirs = getattr(agent, name), getattr(env, name)
        if ours != theirs:
            raise UsageError(
                f"the agent's {name} is {ours}, the environment's {theirs}: {mend.format(name)}"
            )


State = TypeVar("State", bound=AbstractRunState)


class UpdateMetrics(NamedTuple):
    """Metrics of updates: `means` and `sums` over them, and the last `samples`.

    A sum named `episode_...` is over episodes, and reported as their mean.
    """

    means: ByName
    sums: ByName
    samples: ByName

    @classmethod
    def of(cls, agent: Agent, metrics: ByName, sums: ByName, samples: ByName) -> "UpdateMetrics":
        """Metrics of one update. Entries with more than one number per agent are distributions."""
        axes = 0 if agent.num_members is None else 1
        means = {name: x for name, x in metrics.items() if x.ndim <= axes}
        wide = {name: x for name, x in metrics.items() if x.ndim > axes}
        return cls(means, sums, wide | samples)

    def averaged(self, num_updates: int | Int[Array, ""]) -> ByName:
        """The metrics after `num_updates` updates."""
        count = jnp.maximum(num_updates, 1)
        metrics = {name: total / count for name, total in self.means.items()}
        for name, total in self.sums.items():
            per_episode = name.startswith("episode_")
            metrics[name] = total / self.sums["episodes"] if per_episode else total
        return metrics | self.samples


class AbstractSource(eqx.Module, Generic[State]):
    """The source of an agent's experience: the lanes of an environment, or a data set."""

    @abc.abstractmethod
    def draw(self, state: State, key: PRNGKeyArray) -> tuple[Rollout | Transitions, Any]:
        """Draws the next experience to learn from, and data for `follow`."""

    @abc.abstractmethod
    def follow(self, state: State, drawn: Any, metrics: ByName) -> tuple[State, UpdateMetrics]:
        """The state after `drawn`, from which its agent has learnt and reported `metrics`."""


def advance_from(
    source: AbstractSource[State], state: State, num_updates: int | Int[Array, ""]
) -> tuple[State, ByName]:
    """Draws and learns `num_updates` times. Returns the new state, and metrics of all updates."""
    arrays, rest = eqx.partition(state, eqx.is_array)  # a custom network may hold functions

    @jax.jit  # traced once for the shapes below and for the loop
    def update(arrays):
        state, told = _update(source, eqx.combine(arrays, rest))
        return eqx.filter(state, eqx.is_array), told

    _, shapes = jax.eval_shape(update, arrays)
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def stacked(told: UpdateMetrics) -> Float[Array, "metrics *S"]:
        return jnp.stack(jax.tree.leaves((told.means, told.sums)))

    def body(_, carry):
        arrays, totals, _ = carry
        arrays, told = update(arrays)
        # In one array, since each takes a kernel to add; its members lie on their devices.
        return arrays, totals + stacked(told), told.samples

    carry = arrays, stacked(blank), blank.samples
    arrays, totals, samples = jax.lax.fori_loop(0, num_updates, body, carry)
    means, sums = jax.tree.unflatten(jax.tree.structure((blank.means, blank.sums)), totals)
    return eqx.combine(arrays, rest), UpdateMetrics(means, sums, samples).averaged(num_updates)


def next_update(
    source: AbstractSource[State], state: State
) -> tuple[Rollout | Transitions, Any, PRNGKeyArray, PRNGKeyArray]:
    """The next experience, the data for `follow`, the key for the update, and the next key."""
    key, draw_key, update_key = jax.random.split(state.key, 3)
    return *source.draw(state, draw_key), update_key, key


def _update(source: AbstractSource[State], state: State) -> tuple[State, UpdateMetrics]:
    experience, drawn, update_key, key = next_update(source, state)
    agent, metrics = state.agent.update(experience, key=update_key)
    learnt: Any = {"agent": agent, "key": key, "num_updates": state.num_updates + 1}
    return source.follow(dataclasses.replace(state, **learnt), drawn, metrics)


@eqx.filter_jit(donate="all-except-first")
def advance_chunk(
    fixed: tuple[AbstractSource[State], Placement], state: State, num_updates: Int[Array, ""]
) -> tuple[State, ByName]:
    """`advance_from`, compiled, on the devices of a run. Donates the given state."""
    source, place = fixed
    state, metrics = advance_from(source, state.spread(place.constrain), num_updates)
    return _strong(state.spread(place.constrain)), metrics


def _strong(tree: PyTree) -> PyTree:
    """Removes weak types, which an environment's arrays may have, to avoid recompilation."""
    strong = lambda x: jax.lax.convert_element_type(x, x.dtype) if eqx.is_array(x) else x  # noqa: E731
    return jax.tree.map(strong, tree)


def check_shares(place: Placement, agent: Agent) -> None:
    """Raises `UsageError` if the devices cannot share the agent's work."""
    if agent.num_members is None:
        place.check_divides(*agent.learns_from.shared)
    else:
        place.check_divides(agent.num_members, "members (num_seeds)")
