"""Probe environments: small and pure, with returns that are known exactly."""

from typing import Any, ClassVar

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from eqx_q.spaces import of_actions, of_observations
from eqx_q.types import Episode, TimeStep
from eqx_q.wrappers import Env


class Clock(Env):
    """Lane `i` counts to `i + shortest`, is rewarded with 1 a step, and ends; actions do nothing.

    Observes how far the count is. `limit=True` ends episodes by truncation, else by termination.
    """

    num_envs: int = eqx.field(static=True)
    shortest: int = eqx.field(static=True, default=1)
    limit: bool = eqx.field(static=True, default=False)
    num_agents: None = eqx.field(static=True, default=None)
    on_host: bool = eqx.field(static=True, default=False)
    max_episode_steps: None = eqx.field(static=True, default=None)

    @property
    def observation_space(self):
        return of_observations(gymnasium.spaces.Box(0, np.inf, (2,), np.float32))

    @property
    def action_space(self):
        return of_actions(gymnasium.spaces.Discrete(2))

    def _emit(self, count, first):
        lengths = jnp.arange(self.num_envs) + self.shortest
        ended = count >= lengths
        progress = count / lengths
        timestep = TimeStep(
            obs=jnp.stack([progress, 1 - progress], axis=-1).astype(jnp.float32),
            reward=jnp.where(first, 0.0, 1.0),
            terminated=ended & (not self.limit),
            truncated=ended & self.limit,
            first=first,
            episode=Episode(ended, count.astype(jnp.float32), count, {"half": count / 2}),
        )
        return (count, ended), timestep

    def reset(self, key):
        return self._emit(jnp.zeros(self.num_envs, jnp.int32), jnp.ones(self.num_envs, bool))

    def step(self, state, action, key):
        count, ended = state
        return self._emit(jnp.where(ended, 0, count + 1), ended)

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any):
        return Clock(num_envs, self.shortest, self.limit)

    def render(self, state, lane=0):
        return None

    def close(self):
        pass


class Guess(Env):
    """One step an episode: observes one of three signs, rewarded with 1 for naming it, else -1."""

    num_envs: int = eqx.field(static=True)
    num_agents: None = eqx.field(static=True, default=None)
    on_host: bool = eqx.field(static=True, default=False)
    max_episode_steps: int = eqx.field(static=True, default=1)

    @property
    def observation_space(self):
        return of_observations(gymnasium.spaces.Box(0, 1, (3,), np.float32))

    @property
    def action_space(self):
        return of_actions(gymnasium.spaces.Discrete(3))

    def _emit(self, sign, first, reward):
        ended = ~first
        timestep = TimeStep(
            obs=jax.nn.one_hot(sign, 3),
            reward=reward,
            terminated=ended,
            truncated=jnp.zeros(self.num_envs, bool),
            first=first,
            episode=Episode(ended, reward, ended.astype(jnp.int32)),
        )
        return (sign, ended), timestep

    def _draw(self, key):
        return jax.random.randint(key, (self.num_envs,), 0, 3)

    def reset(self, key):
        return self._emit(self._draw(key), jnp.ones(self.num_envs, bool), jnp.zeros(self.num_envs))

    def step(self, state, action, key):
        sign, ended = state
        reward = jnp.where(ended, 0.0, jnp.where(action == sign, 1.0, -1.0))
        return self._emit(jnp.where(ended, self._draw(key), sign), ended, reward)

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any):
        return Guess(num_envs)

    def render(self, state, lane=0):
        return None

    def close(self):
        pass


class MatrixGame(Env):
    """One step an episode: two agents, who see nothing, are paid by a matrix of their actions."""

    num_envs: int = eqx.field(static=True)
    payoff: tuple[tuple[float, ...], ...] = eqx.field(static=True)
    num_agents: int = eqx.field(static=True, default=2)
    on_host: bool = eqx.field(static=True, default=False)
    max_episode_steps: int = eqx.field(static=True, default=1)

    @property
    def observation_space(self):
        return of_observations(gymnasium.spaces.Box(0, 1, (1,), np.float32))

    @property
    def action_space(self):
        return of_actions(gymnasium.spaces.Discrete(len(self.payoff)))

    def _emit(self, first, reward):
        timestep = TimeStep(
            obs=jnp.ones((self.num_envs, 2, 1)),
            reward=reward,
            terminated=~first,
            truncated=jnp.zeros(self.num_envs, bool),
            first=first,
            episode=Episode(~first, reward, (~first).astype(jnp.int32)),
        )
        return ~first, timestep

    def reset(self, key):
        return self._emit(jnp.ones(self.num_envs, bool), jnp.zeros(self.num_envs))

    def step(self, state, action, key):
        reward = jnp.asarray(self.payoff)[action[:, 0], action[:, 1]]
        return self._emit(state, jnp.where(state, 0.0, reward))

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any):
        return MatrixGame(num_envs, self.payoff)

    def render(self, state, lane=0):
        return None

    def close(self):
        pass


class Relay(Env):
    """A team of two: `[time, agent, draw]` is seen, with a draw per episode; 4 steps an episode.

    The first is dead from step `dies` on, when it must do 2. Who is alive is paid what it does. The
    second loses 100 for whatever anybody does that is not legal.
    """

    num_envs: int = eqx.field(static=True)
    limit: bool = eqx.field(static=True, default=False)
    dies: int = eqx.field(static=True, default=2)
    num_agents: int = eqx.field(static=True, default=2)
    on_host: bool = eqx.field(static=True, default=False)
    max_episode_steps: int = eqx.field(static=True, default=4)

    @property
    def observation_space(self):
        return of_observations(gymnasium.spaces.Box(0, 10, (3,), np.float32))

    @property
    def action_space(self):
        return of_actions(gymnasium.spaces.Discrete(3))

    def _masks(self, time):
        alive = jnp.stack([time < self.dies, time >= 0], -1)
        odd = time[:, None] % 2 == 1
        usual = jnp.stack([alive, odd & alive, jnp.zeros_like(alive)], -1)
        return alive, usual | (~alive[..., None] & (jnp.arange(3) == 2))

    def _emit(self, time, draw, first, agent_reward):
        ended = time == 4
        alive, legal = self._masks(time)
        obs = [jnp.broadcast_to(x, (self.num_envs, 2)) for x in (time[:, None], jnp.arange(2))]
        obs = jnp.stack([*obs, jnp.repeat(draw[:, None], 2, 1)], -1).astype(jnp.float32)
        reward = agent_reward.sum(-1)
        timestep = TimeStep(
            obs=obs,
            reward=reward,
            terminated=ended & (not self.limit),
            truncated=ended & self.limit,
            first=first,
            episode=Episode(ended, reward, time),
            action_mask=legal,
            agent_mask=alive,
            agent_reward=agent_reward,
        )
        return (time, draw), timestep

    def reset(self, key):
        draw = jax.random.randint(key, (self.num_envs,), 0, 10)
        time = jnp.zeros(self.num_envs, jnp.int32)
        return self._emit(time, draw, time == 0, jnp.zeros((self.num_envs, 2)))

    def step(self, state, action, key):
        time, draw = state
        alive, legal = self._masks(time)
        broken = ~jnp.take_along_axis(legal, action[..., None], -1)[..., 0]
        paid = jnp.where(alive, action, 0).at[:, 1].add(-100 * broken.sum(-1))
        over = time == 4
        draw = jnp.where(over, jax.random.randint(key, draw.shape, 0, 10), draw)
        paid = jnp.where(over[:, None], 0, paid).astype(jnp.float32)
        return self._emit(jnp.where(over, 0, time + 1), draw, over, paid)

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any):
        return Relay(num_envs, self.limit, self.dies)

    def render(self, state, lane=0):
        return None

    def close(self):
        pass


class TwoStep(Env):
    """The two-step game of Rashid et al. 2018, §6.1: two agents, who both see the state.

    In the first step the first agent chooses the state of the second, unpaid: 2A by its action 0,
    2B by 1. There the team is paid by a matrix of both actions: 7 whatever they do in 2A; in 2B 0,
    1, 1 or 8. The best is 8, and who believes in sums (VDN) goes for 7. Beyond the end the state is
    of zeros.
    """

    num_envs: int = eqx.field(static=True)
    num_agents: int = eqx.field(static=True, default=2)
    on_host: bool = eqx.field(static=True, default=False)
    max_episode_steps: int = eqx.field(static=True, default=2)

    PAYOFFS: ClassVar = np.array([[[7, 7], [7, 7]], [[0, 1], [1, 8]]], np.float32)
    START, END = 0, 3  # 2A and 2B are between

    @property
    def observation_space(self):
        return of_observations(gymnasium.spaces.Box(0, 1, (3,), np.float32))

    @property
    def action_space(self):
        return of_actions(gymnasium.spaces.Discrete(2))

    @property
    def state_size(self):
        return 3

    def _emit(self, place, first, reward):
        ended = place == self.END
        state = jax.nn.one_hot(place, 3)
        timestep = TimeStep(
            obs=jnp.repeat(state[:, None], 2, axis=1),
            reward=reward,
            terminated=ended,
            truncated=jnp.zeros(self.num_envs, bool),
            first=first,
            episode=Episode(ended, reward, jnp.clip(place, 0, 1) + ended),
            global_state=state,
        )
        return place, timestep

    def reset(self, key):
        start = jnp.full(self.num_envs, self.START)
        return self._emit(start, start == self.START, jnp.zeros(self.num_envs))

    def step(self, state, action, key):
        in_second = (state != self.START) & (state != self.END)
        paid = jnp.asarray(self.PAYOFFS)[jnp.clip(state - 1, 0, 1), action[:, 0], action[:, 1]]
        place = jnp.where(in_second, self.END, 1 + action[:, 0])
        over = state == self.END
        place = jnp.where(over, self.START, place)
        return self._emit(place, over, jnp.where(in_second, paid, 0.0))

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any):
        return TwoStep(num_envs)

    def render(self, state, lane=0):
        return None

    def close(self):
        pass
