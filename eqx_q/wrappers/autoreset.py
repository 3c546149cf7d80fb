"""Implements the boundary rule, next-step reset."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..types import AnyArray, Episode, Observation, TimeStep


class Report(eqx.Module):
    """A suite's report of a step or a reset, of one lane or of all. `None`: not available.

    After a reset, rewards and flags are ignored. `game_reward` is summed into `episode.returns`, if
    it differs from the learner's `reward`. `broken`: lanes whose environment failed and was
    restarted; their report is that of a reset.
    """

    obs: Observation
    reward: Float[Array, "*lanes"]
    terminated: Bool[Array, "*lanes"]
    truncated: Bool[Array, "*lanes"]
    metrics: dict[str, Shaped[AnyArray, "*lanes"]] = eqx.field(default_factory=dict)
    action_mask: Bool[Array, "*lanes_and_actions"] | None = None
    agent_mask: Bool[Array, "*lanes M"] | None = None
    agent_reward: Float[Array, "*lanes M"] | None = None
    game_reward: Float[Array, "*lanes"] | None = None
    global_state: Float[Array, "*lanes S"] | None = None
    broken: Bool[Array, "*lanes"] | None = None


class Running(eqx.Module):
    """The part of a timestep that the next one depends on."""

    ended: Bool[Array, " N"]
    returns: Float[Array, " N"]
    length: Int[Array, " N"]

    @classmethod
    def start(cls, num_envs: int) -> "Running":
        """The state before the first report, as if every lane had just ended."""
        return cls(jnp.ones(num_envs, bool), jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))

    def follow(self, report: Report) -> tuple["Running", TimeStep]:
        """Turns a report of all lanes into a timestep, under the boundary rule.

        `first` is set where the previous timestep ended or the lane is broken, whatever the suite
        reports; rewards and flags are cleared there. Termination overrides truncation.
        """
        first = self.ended if report.broken is None else self.ended | report.broken
        reward, agent_reward = jnp.where(first, 0.0, report.reward), report.agent_reward
        if agent_reward is not None:
            agent_reward = jnp.where(first[:, None], 0.0, agent_reward)
        terminated = report.terminated & ~first
        truncated = report.truncated & ~report.terminated & ~first
        ended = terminated | truncated
        counted = report.reward if report.game_reward is None else report.game_reward
        returns = jnp.where(first, 0.0, self.returns + counted)
        length = jnp.where(first, 0, self.length + 1)
        timestep = TimeStep(
            report.obs,
            reward,
            terminated,
            truncated,
            first,
            Episode(ended, returns, length, report.metrics),
            report.action_mask,
            report.agent_mask,
            agent_reward,
            report.global_state,
        )
        return Running(ended, returns, length), timestep


ResetLane = Callable[[PRNGKeyArray], tuple[PyTree, Report]]
StepLane = Callable[[PyTree, Shaped[Array, "*M_and_action"], PRNGKeyArray], tuple[PyTree, Report]]


class Lasting(eqx.Module):
    """A part of a lane's state that outlives episodes: a reset does not change it."""

    value: PyTree


class LaneState(eqx.Module):
    """The state of every lane of a JAX-native suite."""

    inner: PyTree
    running: Running


@eqx.filter_jit  # often called outside jit, where each operation would be compiled on its own
def reset(reset_lane: ResetLane, key: PRNGKeyArray, num_envs: int) -> tuple[LaneState, TimeStep]:
    """Starts an episode in every lane, given a function for one lane."""
    inner, report = _strong(jax.vmap(reset_lane)(jax.random.split(key, num_envs)))
    running, timestep = Running.start(num_envs).follow(report)
    return LaneState(inner, running), timestep


def step(
    reset_lane: ResetLane,
    step_lane: StepLane,
    state: LaneState,
    action: Shaped[Array, "N *M_and_action"],
    key: PRNGKeyArray,
    *,
    resets_at_once: int | None = None,
) -> tuple[LaneState, TimeStep]:
    """Acts in the lanes whose episode is running, and resets those whose episode has ended.

    A lane uses its key for one of the two, never for both.

    **Arguments:**

    - `resets_at_once`: `None` computes a reset in every lane and selects where it applies. This is
        faster for cheap resets: with many lanes, some episode has nearly always just ended. A
        number, for expensive resets, computes them in batches of that many lanes, and only for the
        lanes that have ended. The results are the same.
    """
    ended = state.running.ended
    keys = jax.random.split(key, ended.shape[0])

    def lane(ended: Bool[Array, ""], inner: PyTree, action: Any, key: PRNGKeyArray):
        fresh, stepped = reset_lane(key), step_lane(inner, action, key)
        return _renew(lambda old, new: jnp.where(ended, new, old), stepped, fresh)

    if resets_at_once is None:
        inner, report = _strong(jax.vmap(lane)(ended, state.inner, action, keys))
    else:
        stepped = _strong(jax.vmap(step_lane)(state.inner, action, keys))
        inner, report = _reset_in_batches(reset_lane, resets_at_once, ended, keys, stepped)
    running, timestep = state.running.follow(report)
    return LaneState(inner, running), timestep


def _reset_in_batches(
    reset_lane: ResetLane,
    size: int,
    ended: Bool[Array, " N"],
    keys: Shaped[Array, "N *key"],
    stepped: tuple[PyTree, Report],
) -> tuple[PyTree, Report]:
    """`stepped`, except that the lanes that have `ended` start an episode."""
    nobody = ended.shape[0]
    (lanes,) = jnp.nonzero(ended, size=nobody + size, fill_value=nobody)

    def remain(carry):
        done, _ = carry
        return lanes[done] < nobody

    def reset_some(carry):
        done, tree = carry
        some = jax.lax.dynamic_slice_in_dim(lanes, done, size)
        fresh = jax.vmap(reset_lane)(keys.at[some].get(mode="clip"))
        tree = _renew(lambda old, new: old.at[some].set(new, mode="drop"), tree, fresh)
        return done + size, tree

    return jax.lax.while_loop(remain, reset_some, (0, stepped))[1]


def _renew(renew: Callable[[Array, Array], Array], stepped: PyTree, fresh: PyTree) -> PyTree:
    """`stepped`, with each leaf renewed from `fresh`, except those in a `Lasting`."""

    def lasts(node: Any) -> bool:
        return isinstance(node, Lasting)

    def one(old: Any, new: Any) -> Any:
        return old if lasts(old) else renew(old, new)

    return jax.tree.map(one, stepped, fresh, is_leaf=lasts)


def _strong(tree: PyTree[Array]) -> PyTree[Array]:
    """Removes weak types, which would differ between reset and step and break a scan."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)
