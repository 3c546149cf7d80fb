"""Drawing transitions: from rows in the memory of the device, inside the compiled program."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from ..types import Scalar, Transitions

_SPAN = 1024  # of the sums that find a priority: about the root of their number


class Replay(eqx.Module):
    """Rows of a data set in the memory of the device. See `Dataset` for what they are.

    Frame stacks, n-step rewards and clipped rewards are made when transitions are drawn.

    **Attributes:**

    - `obs`: `[R, ...]`, as they are stored: of stacks the frames, each once.
    - `action`, `reward`, `terminated`, `truncated`: `[R]`.
    - `start`: the row where the row's episode starts.
    - `drawable`: `[K]`, the rows that transitions may begin at; those from `num_drawable` on only
        fill it up.
    - `stack`, `stack_start`: see `Description`.
    - `dtype`: of observations, as the environment gives them.
    - `reward_clip`: whether rewards are clipped to [-1, 1] (Mnih et al. 2015, Methods).
    """

    obs: Shaped[Array, "R *stored"]
    action: Int[Array, " R"]
    reward: Float[Array, " R"]
    terminated: Bool[Array, " R"]
    truncated: Bool[Array, " R"]
    start: Int[Array, " R"]
    drawable: Int[Array, " K"]
    num_drawable: Int[Array, ""]
    stack: int | None = eqx.field(static=True)
    stack_start: str = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)
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
        reward = jnp.stack(rewards, axis=-1)
        if self.reward_clip:
            reward = jnp.clip(reward, -1.0, 1.0)
        obs, next_obs = self._observe(row, row + length, n_step)
        return Transitions(obs, self.action[row], reward, length, terminated, next_obs, weight)

    def _observe(
        self, row: Int[Array, " B"], next_row: Int[Array, " B"], n_step: int
    ) -> tuple[Shaped[Array, "B *obs"], Shaped[Array, "B *obs"]]:
        """What an agent sees in these rows, and in those they lead to."""
        if self.stack is None:
            return self.obs[row].astype(self.dtype), self.obs[next_row].astype(self.dtype)
        if n_step == 1:  # the stacks have all frames but one in common
            frames = self._frames(next_row, self.stack + 1)
            return frames[:, :-1], frames[:, 1:]
        return self._frames(row, self.stack), self._frames(next_row, self.stack)

    def _frames(self, last: Int[Array, " B"], num: int) -> Shaped[Array, "B num height width"]:
        """The `num` frames up to `last`; before their episode's start its padding."""
        rows = last[:, None] + jnp.arange(1 - num, 1)
        start = self.start[last][:, None]
        frames = self.obs[jnp.maximum(rows, start)].astype(self.dtype)
        if self.stack_start == "repeat":
            return frames
        return jnp.where((rows >= start)[..., None, None], frames, 0)


class Priorities(eqx.Module):
    """How likely each place of a replay is to be drawn (Schaul et al. 2016, arXiv 1511.05952).

    P(i) = p_i / Σ p with p = (|δ| + 1e-6)^exponent, and 1 of what was never drawn. The weight
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
    def create(cls, replay: Replay, exponent: Scalar, correction: Scalar) -> "Priorities":
        """All places alike."""
        padded = -(-len(replay.drawable) // _SPAN) * _SPAN
        values = (jnp.arange(padded) < replay.num_drawable).astype(jnp.float32)
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
