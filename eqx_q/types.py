"""The small types that environments, agents and loops share.

Shapes: `N` lanes (parallel environments), `M` agents of a team, `A` choices, `T` steps. A leading
time axis stands before the lane axis wherever steps are stacked.

An observation is a PyTree of arrays, shaped like its space (see `eqx_q.spaces`). An action is one
array, in the environment's own form. `A` counts the choices of all factors of an action: the `n`
actions of `Discrete(n)`, the sum over a `MultiDiscrete`, two for each bit of a `MultiBinary`.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped, UInt

AnyArray: TypeAlias = jax.Array | np.ndarray
Scalar: TypeAlias = float | int | Shaped[AnyArray, ""]
Memory: TypeAlias = PyTree[AnyArray] | None
Observation: TypeAlias = PyTree[Shaped[AnyArray, "..."]]


class Count(eqx.Module):
    """A whole number below 2^64 in two words, `high * 2**32 + low`: JAX defaults to 32 bits."""

    low: UInt[Array, "*S"]
    high: UInt[Array, "*S"]

    @classmethod
    def of(cls, low: Shaped[AnyArray, "*S"] | int) -> "Count":
        """Counts from numbers below 2^32."""
        low = jnp.asarray(low, jnp.uint32)
        return cls(low, jnp.zeros_like(low))

    def plus(self, number: Shaped[AnyArray, "*S"] | int) -> "Count":
        """Adds a number below 2^32."""
        low = self.low + jnp.asarray(number, jnp.uint32)
        return Count(low, self.high + (low < self.low))

    def rounded(self) -> Float[Array, "*S"]:
        """As `float32`."""
        return self.high.astype(jnp.float32) * 2.0**32 + self.low.astype(jnp.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """As `uint64`."""
        words = np.asarray(self.low, np.uint64), np.asarray(self.high, np.uint64)
        return np.asarray(words[0] + (words[1] << np.uint64(32)), dtype)

    def __eq__(self, other: object) -> Any:
        """Elementwise equality with a count, or with whole numbers below 2^64."""
        if isinstance(other, Count):
            return (self.low == other.low) & (self.high == other.high)
        number = np.asarray(other)
        if number.dtype.kind not in "iu":
            return NotImplemented
        high, low = np.divmod(number.astype(np.uint64), np.uint64(2**32))
        return (self.low == low.astype(np.uint32)) & (self.high == high.astype(np.uint32))

    def __int__(self) -> int:
        return int(np.asarray(self))

    def __float__(self) -> float:
        return float(np.asarray(self))


class Episode(eqx.Module):
    """Statistics of the game's own episode: rewards are unclipped, a lost life does not end it.

    `returns` and `length` accumulate during the episode; where `ended`, they are those of the
    whole episode. `metrics` holds metrics of the suite by name (a won battle, achievements).
    """

    ended: Bool[AnyArray, "*lanes"]
    returns: Float[AnyArray, "*lanes"]
    length: Int[AnyArray, "*lanes"]
    metrics: dict[str, Shaped[AnyArray, "*lanes"]] = eqx.field(default_factory=dict)


class TimeStep(eqx.Module):
    """What an environment returns from `reset` or `step`.

    Episode boundaries follow one rule, next-step reset: where `terminated` or `truncated`, `obs` is
    the true final observation. The next step ignores the action, resets the lane, and returns the
    first observation of the new episode with `first` set, reward 0 and both flags clear. The
    transition into a `first` timestep never happened and must be masked out of learning. `first`
    is also set without an ended episode before it in one case: the environment of a lane failed
    and was restarted (see `eqx_q.wrappers.guard`).

    `global_state`: a team's state, used in training only; `None` if the suite has none.
    """

    obs: Observation
    reward: Float[AnyArray, "*lanes"]
    terminated: Bool[AnyArray, "*lanes"]
    truncated: Bool[AnyArray, "*lanes"]
    first: Bool[AnyArray, "*lanes"]
    episode: Episode
    action_mask: Bool[AnyArray, "*lanes_and_actions"] | None = None
    agent_mask: Bool[AnyArray, "*lanes M"] | None = None
    agent_reward: Float[AnyArray, "*lanes M"] | None = None
    global_state: Float[AnyArray, "*lanes S"] | None = None

    @property
    def ended(self) -> Bool[AnyArray, "*lanes"]:
        """Whether the episode ended here: terminated by the task or truncated by a limit."""
        return self.terminated | self.truncated

    @classmethod
    def initial(
        cls,
        obs: Observation,
        action_mask: Bool[AnyArray, "N *M A"] | None = None,
        agent_mask: Bool[AnyArray, "N M"] | None = None,
        agent_reward: Float[AnyArray, "N M"] | None = None,
        global_state: Float[AnyArray, "N S"] | None = None,
    ) -> "TimeStep":
        """The first timestep, for a custom loop that has reset every lane.

        For a team, pass `agent_reward` of 0 if its agents have individual rewards.
        """
        num_envs = len(jax.tree.leaves(obs)[0])
        no, zero = np.zeros(num_envs, bool), np.zeros(num_envs, np.float32)
        return cls(
            obs=obs,
            reward=zero,
            terminated=no,
            truncated=no,
            first=~no,
            episode=Episode(no, zero, zero.astype(np.int32)),
            action_mask=action_mask,
            agent_mask=agent_mask,
            agent_reward=agent_reward,
            global_state=global_state,
        )

    def then(
        self,
        obs: Observation,
        reward: Shaped[AnyArray, " N"],
        terminated: Bool[AnyArray, " N"],
        truncated: Bool[AnyArray, " N"],
        action_mask: Bool[AnyArray, "N *M A"] | None = None,
        agent_mask: Bool[AnyArray, "N M"] | None = None,
        agent_reward: Float[AnyArray, "N M"] | None = None,
        global_state: Float[AnyArray, "N S"] | None = None,
    ) -> "TimeStep":
        """The next timestep of a custom loop whose lanes reset in the step after they ended.

        Gymnasium's vector environments do so by default (`AutoresetMode.NEXT_STEP`).
        """
        first = self.ended
        reward, terminated = np.float32(reward) * ~first, terminated & ~first
        truncated = truncated & ~terminated & ~first
        returns = (self.episode.returns + reward) * ~first
        length = (self.episode.length + 1) * ~first
        episode = Episode(terminated | truncated, returns, length)
        if agent_reward is not None:
            agent_reward = np.float32(agent_reward) * ~first[:, None]
        return TimeStep(
            obs,
            reward,
            terminated,
            truncated,
            first,
            episode,
            action_mask,
            agent_mask,
            agent_reward,
            global_state,
        )


class Decision(eqx.Module):
    """An agent's action, greedy value max_a Q (over legal actions), and memory."""

    action: Shaped[Array, "*lanes_and_action"]
    value: Float[Array, "*lanes"]
    memory: Memory = None


class Rollout(eqx.Module):
    """`T` steps of `N` lanes to learn from.

    **Fields:**

    - `timesteps`: stacked `[T+1, N, ...]`; `timesteps[t + 1]` is the result of `actions[t]`.
    - `actions`: in the environment's form: `[T, N]`, or `[T, N, M]` for a team, then the axes of
        the action space.
    - `memory`: the agent's memory before `timesteps[0]`; `None` if it has none.
    - `values`: `[T, N]`, the `Decision.value` from acting at `timesteps[:T]`; if `None`, `update`
        recomputes it.
    - `weight`: of each lane in the loss, if recorded sequences were not sampled uniformly.
    """

    timesteps: TimeStep
    actions: Shaped[AnyArray, "T *lanes_and_action"]
    memory: Memory = None
    values: Float[AnyArray, "T *lanes"] | None = None
    weight: Float[AnyArray, " N"] | None = None

    @classmethod
    def stack(
        cls, timesteps: Sequence[TimeStep], actions: Sequence[AnyArray], memory: Memory = None
    ) -> "Rollout":
        """Stacks `T + 1` timesteps and the `T` actions between them."""
        return cls(jax.tree.map(lambda *x: np.stack(x), *timesteps), np.stack(actions), memory)

    @property
    def real(self) -> Bool[AnyArray, "T *lanes"]:
        """Mask of the `T` real transitions: all but those into a `first` timestep."""
        return ~self.timesteps.first[1:]


class Transitions(eqx.Module):
    """`B` transitions of `n` steps to learn from, sampled from a data set.

    **Fields:**

    - `obs`, `action`: the first observation, and the action taken there.
    - `reward`: for that action and the `n - 1` after it; 0 after the end of the episode.
    - `length`: steps from `obs` to `next_obs`: `n`, or fewer if the episode ends earlier.
    - `terminated`: whether the task ended at `next_obs`; a truncated episode is bootstrapped there.
    - `next_obs`: the observation `length` steps later.
    - `action_mask`, `next_action_mask`: legal actions at `obs` and at `next_obs`; `None`: all.
    - `weight`: of each transition in the loss, if they were not sampled uniformly.
    """

    obs: Observation
    action: Shaped[AnyArray, "B *action"]
    reward: Float[AnyArray, "B n"]
    length: Int[AnyArray, " B"]
    terminated: Bool[AnyArray, " B"]
    next_obs: Observation
    action_mask: Bool[AnyArray, "B A"] | None = None
    next_action_mask: Bool[AnyArray, "B A"] | None = None
    weight: Float[AnyArray, " B"] | None = None
