"""Probe environments: small, pure, with returns that can be worked out by hand."""

from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from eqx_q.spaces import action_discrete, observation_box
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
        return observation_box(gymnasium.spaces.Box(0, np.inf, (2,), np.float32))

    @property
    def action_space(self):
        return action_discrete(gymnasium.spaces.Discrete(2))

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
            episode=Episode(ended, count.astype(jnp.float32), count),
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
        return observation_box(gymnasium.spaces.Box(0, 1, (3,), np.float32))

    @property
    def action_space(self):
        return action_discrete(gymnasium.spaces.Discrete(3))

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
