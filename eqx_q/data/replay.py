"""Drawing from rows in the memory of the device, inside the compiled program."""

from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..spaces import Leaf, Space, cast
from ..types import Episode, Observation, Rollout, Scalar, TimeStep, Transitions

_SPAN = 1024  # of the sums that find a priority: about the root of their number


class Replay(eqx.Module):
    """Rows of a data set in the memory of the device. See `Dataset` for what they are.

    Frame stacks, n-step rewards and clipped rewards are made when something is drawn.

    **Attributes:**

    - `obs`: arrays `[R, ...]`, as they are stored: of stacks the frames, each once.
    - `action`: `[R, ...]`; `reward`, `terminated`, `truncated`: `[R]`.
    - `start`: the row where the row's episode starts.
    - `num_rows`: how many there are; those from there on only fill up the arrays.
    - `drawable`: `[K]`, the rows that what is drawn may begin at; those from `num_drawable` on only
        fill it up.
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
        """Places in `drawable`, drawn uniformly with replacement."""
        return jax.random.randint(key, shape, 0, self.num_drawable)

    def transitions(
        self,
        place: Int[Array, " B"],
        n_step: int,
        weight: Float[Array, " B"] | None = None,
    ) -> Transitions:
        """The transitions of `n_step` steps that begin at these places of `drawable`.

        A transition is cut where its episode ends: `length` says how many steps it has.
        """
        row = self.drawable[place]
        ended = self.terminated | self.truncated
        going = jnp.ones(row.shape, bool)  # whether the episode is still on
        rewards, length, terminated = [], jnp.zeros_like(row), jnp.zeros(row.shape, bool)
        for step in range(n_step):
            now = jnp.minimum(row + step, len(self.action) - 1)
            rewards.append(jnp.where(going, self.reward[now], 0.0))
            length += going
            terminated |= going & self.terminated[now]
            going &= ~ended[now]
        reward = self._clipped(jnp.stack(rewards, axis=-1))
        next_row = row + length
        if self.stack is not None and n_step == 1:  # the stacks have all frames but one in common
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
        """The `length` steps from each of these places of `drawable` on, a lane for each place.

        A sequence goes on where its episode ends: the next one follows as it does in an environment
        (see `TimeStep`), but its first timestep need not be that of the same lane. After the last
        row there are only `first` timesteps, so that no step there is `real`. So where a step is
        not real, its action means nothing; it is a legal one.

        Of `timesteps.episode` only `ended` is known. There is no memory: that before the first
        timestep is for the agent to choose, where it does not begin an episode.
        """
        row = self.drawable[place] + jnp.arange(length + 1)[:, None]
        beyond = row >= self.num_rows
        row = jnp.minimum(row, self.num_rows - 1)
        first = beyond | (self.start[row] == row)
        before = jnp.maximum(row - 1, 0)  # where it was done what led here

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
        """One that is legal, if any is."""
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
        """What an agent sees in these rows."""
        if self.stack is not None:
            return self._frames(row, self.stack)
        return cast(self.observation_space, jax.tree.map(lambda x: x[row], self.obs))

    def _frames(self, last: Int[Array, "*rows"], num: int) -> Shaped[Array, "*rows_and_frames"]:
        """The `num` frames up to `last`; before their episode's start its padding."""
        rows = last[..., None] + jnp.arange(1 - num, 1)
        start = self.start[last][..., None]
        frames = cast(self.observation_space, self.obs[jnp.maximum(rows, start)])
        if self.stack_start == "repeat":
            return frames
        return jnp.where(_over(rows >= start, frames), frames, 0)


def _over(rows: Bool[Array, "*rows"], x: Shaped[Array, "..."]) -> Bool[Array, "*rows_and_ones"]:
    """Of each of `x`'s rows one truth value, with `x`'s number of axes."""
    return rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim))


class Priorities(eqx.Module):
    """How likely each place of a replay is to be drawn (Schaul et al. 2016, arXiv 1511.05952).

    P(i) = p_i / Σ p with p = (|δ| + 1e-6)^exponent; what comes new has the largest p that there is
    (Algorithm 1, line 6), and 1 at first. The weight
    (N P(i))^-correction, divided by the largest of the batch, undoes the bias.

    Sums over spans of places find a draw in two short searches, and never drift: those of spans
    that change are summed anew.

    **Attributes:** `values`: p of each place, 0 of those that are none. `sums`: of spans. `count`:
    of places, N. `exponent`, `correction`: α and β of the paper.
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
        """All places alike. **Arguments:** `largest`: p of each."""
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
        """Places, their spans one from each `num`-th of the total as in the paper, and weights."""
        span_key, place_key = jax.random.split(key)
        cumulated = jnp.cumsum(self.sums)
        total = cumulated[-1]
        at = (jnp.arange(num) + jax.random.uniform(span_key, (num,))) / num * total
        # Rounding must not lead to a span, nor in it to a place, that is none.
        last = (self.count - 1) // _SPAN
        span = jnp.minimum(jnp.searchsorted(cumulated, at, side="right"), last)
        # What is left of `at` would be too coarse for millions of places.
        rest = jax.random.uniform(place_key, (num,)) * self.sums[span]
        inside = self.values.reshape(-1, _SPAN)[span]
        found = jnp.sum(jnp.cumsum(inside, axis=-1) <= rest[:, None], axis=-1)
        last = _SPAN - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
        place = span * _SPAN + jnp.minimum(found, last)
        weight = (self.count * self.values[place] / total) ** -self.correction
        return place, weight / jnp.max(weight)

    def updated(self, place: Int[Array, " B"], td_error: Float[Array, " B"]) -> "Priorities":
        """With the priorities of these places set by their absolute TD errors."""
        new = (td_error + 1e-6) ** self.exponent
        values = self.values.at[place].set(new)
        span = place // _SPAN
        sums = self.sums.at[span].set(jnp.sum(values.reshape(-1, _SPAN)[span], axis=-1))
        return Priorities(values, sums, self.count, self.exponent, self.correction)
