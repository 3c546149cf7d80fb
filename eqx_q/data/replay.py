"""Sampling from rows in the memory of the device, inside the compiled program."""

from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..spaces import Leaf, Space, cast
from ..types import Episode, Observation, Rollout, Scalar, TimeStep, Transitions

_SPAN = 1024  # priorities per partial sum: about the square root of their number


class Replay(eqx.Module):
    """Rows of a data set (see `Dataset`) in the memory of the device.

    Frame stacks, n-step rewards and clipped rewards are computed when sampling.

    **Attributes:**

    - `obs`: arrays `[R, ...]`, as stored: for stacks, each frame once.
    - `action`: `[R, ...]`; `reward`, `terminated`, `truncated`: `[R]`.
    - `start`: the row where the row's episode starts.
    - `num_rows`: the number of valid rows; later ones are padding.
    - `drawable`: `[K]`, the rows at which samples may begin; entries from `num_drawable` on are
        padding.
    - `action_mask`, `agent_mask`, `agent_reward`, `global_state`: `None`, or as in `Rows`.
    - `observation_space`, `action_space`, `stack`, `stack_start`: see `Description`.
    - `reward_clip`: whether rewards are clipped to [-1, 1] (Mnih et al. 2015, Methods).
    """

    obs: PyTree[Shaped[Array, "R ..."]]
    action: Shaped[Array, "R *action"]
    reward: Float[Array, " R"]
    terminated: Bool[Array, " R"]
    truncated: Bool[Array, " R"]
    start: Int[Array, " R"]
    num_rows: Int[Array, ""]
    drawable: Int[Array, " K"]
    num_drawable: Int[Array, ""]
    action_mask: Bool[Array, "R *M A"] | None
    agent_mask: Bool[Array, "R M"] | None
    agent_reward: Float[Array, "R M"] | None
    global_state: Float[Array, "R S"] | None
    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    stack: int | None = eqx.field(static=True)
    stack_start: str = eqx.field(static=True)
    reward_clip: bool = eqx.field(static=True)

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Int[Array, "*shape"]:
        """Draws places in `drawable` uniformly, with replacement."""
        return jax.random.randint(key, shape, 0, self.num_drawable)

    def transitions(
        self,
        place: Int[Array, " B"],
        n_step: int,
        weight: Float[Array, " B"] | None = None,
    ) -> Transitions:
        """The transitions of `n_step` steps that begin at these places of `drawable`.

        A transition ends early with its episode: `length` is its number of steps.
        """
        row = self.drawable[place]
        ended = self.terminated | self.truncated
        going = jnp.ones(row.shape, bool)  # whether the episode is still running
        rewards, length, terminated = [], jnp.zeros_like(row), jnp.zeros(row.shape, bool)
        for step in range(n_step):
            now = jnp.minimum(row + step, len(self.action) - 1)
            rewards.append(jnp.where(going, self.reward[now], 0.0))
            length += going
            terminated |= going & self.terminated[now]
            going &= ~ended[now]
        reward = self._clipped(jnp.stack(rewards, axis=-1))
        next_row = row + length
        if self.stack is not None and n_step == 1:  # the two stacks share all frames but one
            frames = self._frames(next_row, self.stack + 1)
            obs, next_obs = frames[:, :-1], frames[:, 1:]
        else:
            obs, next_obs = self._observed(row), self._observed(next_row)
        mask, next_mask = None, None
        if self.action_mask is not None:
            mask, next_mask = self.action_mask[row], self.action_mask[next_row]
        return Transitions(
            obs=obs,
            action=self.action[row],
            reward=reward,
            length=length,
            terminated=terminated,
            next_obs=next_obs,
            action_mask=mask,
            next_action_mask=next_mask,
            weight=weight,
        )

    def sequences(self, place: Int[Array, " B"], length: int) -> Rollout:
        """Sequences of `length` steps from each of these places of `drawable`, one lane per place.

        A sequence continues after the end of its episode with the next one, as in an environment
        (see `TimeStep`), though the next one may come from another lane. After the last row there
        are only `first` timesteps, so that no step is `real`. Actions of steps that are not real
        are meaningless, but legal.

        In `timesteps.episode` only `ended` is known. There is no memory: the agent chooses the one
        before the first timestep.
        """
        row = self.drawable[place] + jnp.arange(length + 1)[:, None]
        beyond = row >= self.num_rows
        row = jnp.minimum(row, self.num_rows - 1)
        first = beyond | (self.start[row] == row)
        before = jnp.maximum(row - 1, 0)  # the row of the action that led here

        def brought(x: Shaped[Array, "R *own"]) -> Shaped[Array, "T_and_1 B *own"]:
            x = x[before]
            return jnp.where(_over(first, x), jnp.zeros_like(x), x)

        def seen(x: Shaped[Array, "R *own"] | None) -> Shaped[Array, "T_and_1 B *own"] | None:
            return None if x is None else x[row]

        terminated, truncated = brought(self.terminated), brought(self.truncated)
        none = jnp.zeros(first.shape)
        timesteps = TimeStep(
            obs=self._observed(row),
            reward=self._clipped(brought(self.reward)),
            terminated=terminated,
            truncated=truncated,
            first=first,
            episode=Episode(terminated | truncated, none, none.astype(jnp.int32)),
            action_mask=seen(self.action_mask),
            agent_mask=seen(self.agent_mask),
            agent_reward=(
                None if self.agent_reward is None else self._clipped(brought(self.agent_reward))
            ),
            global_state=seen(self.global_state),
        )
        action = self.action[row[:-1]]
        reset = _over(first[1:], action)
        return Rollout(timesteps, jnp.where(reset, self._any_action(), action))

    def _clipped(self, reward: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.clip(reward, -1.0, 1.0) if self.reward_clip else reward

    def _any_action(self) -> Shaped[Array, "*action"]:
        """The first action of the space."""
        space: Any = self.action_space
        match space:
            case gymnasium.spaces.Box():
                least = space.low
            case gymnasium.spaces.MultiBinary():
                least = 0
            case _:
                least = space.start
        return jnp.broadcast_to(jnp.asarray(least, self.action.dtype), space.shape)

    def _observed(self, row: Int[Array, "*rows"]) -> Observation:
        """The observations of these rows."""
        if self.stack is not None:
            return self._frames(row, self.stack)
        return cast(self.observation_space, jax.tree.map(lambda x: x[row], self.obs))

    def _frames(self, last: Int[Array, "*rows"], num: int) -> Shaped[Array, "*rows_and_frames"]:
        """The `num` frames up to `last`, padded before the start of their episode."""
        rows = last[..., None] + jnp.arange(1 - num, 1)
        start = self.start[last][..., None]
        frames = cast(self.observation_space, self.obs[jnp.maximum(rows, start)])
        if self.stack_start == "repeat":
            return frames
        return jnp.where(_over(rows >= start, frames), frames, 0)


def _over(rows: Bool[Array, "*rows"], x: Shaped[Array, "..."]) -> Bool[Array, "*rows_and_ones"]:
    """Reshapes `rows` to broadcast over `x`."""
    return rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim))


class Priorities(eqx.Module):
    """The priority of each place of a replay (Schaul et al. 2016, arXiv 1511.05952).

    P(i) = p_i / Σ p with p = (|δ| + 1e-6)^exponent. New places have the largest p so far (Algorithm
    1, line 6), initially 1. The weight (N P(i))^-correction, divided by the largest of the batch,
    corrects the bias.

    Sums over spans of places find a sample in two short searches. They do not drift, since the
    spans that change are summed again.

    **Attributes:** `values`: p of each place, 0 for padding. `sums`: over spans. `count`: number of
    places, N. `exponent`, `correction`: α and β of the paper.
    """

    values: Float[Array, " padded"]
    sums: Float[Array, " spans"]
    count: Int[Array, ""]
    exponent: Float[Array, ""]
    correction: Float[Array, ""]

    @classmethod
    def create(
        cls, replay: Replay, exponent: Scalar, correction: Scalar, largest: Scalar = 1.0
    ) -> "Priorities":
        """Equal priorities. **Arguments:** `largest`: p of each place."""
        padded = -(-len(replay.drawable) // _SPAN) * _SPAN
        values = jnp.where(jnp.arange(padded) < replay.num_drawable, largest, 0.0)
        return cls(
            values,
            jnp.sum(values.reshape(-1, _SPAN), axis=-1),
            replay.num_drawable,
            jnp.asarray(exponent, jnp.float32),
            jnp.asarray(correction, jnp.float32),
        )

    def draw(self, key: PRNGKeyArray, num: int) -> tuple[Int[Array, " num"], Float[Array, " num"]]:
        """Draws places and their weights; their spans are stratified as in the paper."""
        span_key, place_key = jax.random.split(key)
        cumulated = jnp.cumsum(self.sums)
        total = cumulated[-1]
        at = (jnp.arange(num) + jax.random.uniform(span_key, (num,))) / num * total
        # Rounding must not lead to a padding span, nor to a padding place in it.
        last = (self.count - 1) // _SPAN
        span = jnp.minimum(jnp.searchsorted(cumulated, at, side="right"), last)
        # The remainder of `at` would be too coarse for millions of places.
        rest = jax.random.uniform(place_key, (num,)) * self.sums[span]
        inside = self.values.reshape(-1, _SPAN)[span]
        found = jnp.sum(jnp.cumsum(inside, axis=-1) <= rest[:, None], axis=-1)
        last = _SPAN - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
        place = span * _SPAN + jnp.minimum(found, last)
        weight = (self.count * self.values[place] / total) ** -self.correction
        return place, weight / jnp.max(weight)

    def updated(self, place: Int[Array, " B"], td_error: Float[Array, " B"]) -> "Priorities":
        """Sets the priorities of these places from their absolute TD errors."""
        new = (td_error + 1e-6) ** self.exponent
        values = self.values.at[place].set(new)
        span = place // _SPAN
        sums = self.sums.at[span].set(jnp.sum(values.reshape(-1, _SPAN)[span], axis=-1))
        return Priorities(values, sums, self.count, self.exponent, self.correction)
