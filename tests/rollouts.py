"""Helpers for tests of environments: act at random and record what follows."""

import equinox as eqx
import jax
import numpy as np

from eqx_q.spaces import Box, MultiBinary, MultiDiscrete
from eqx_q.types import TimeStep
from eqx_q.wrappers import Env

CHUNK = 20  # always the same, so that little is compiled
traces = {"roll": 0}


def agents(env: Env) -> tuple[int, ...]:
    """The axis of a team's agents, where there is a team."""
    return () if env.num_agents is None else (env.num_agents,)


def sample(space, key, *axes: int) -> jax.Array:
    """Actions at random, behind `axes`."""
    shape = (*axes, *space.shape)
    if isinstance(space, Box):
        return jax.random.uniform(key, shape, minval=space.low, maxval=space.high)
    if isinstance(space, MultiBinary):
        return jax.random.randint(key, shape, 0, 2)
    sizes = space.nvec if isinstance(space, MultiDiscrete) else int(space.n)
    return jax.random.randint(key, shape, 0, sizes) + space.start


@eqx.filter_jit
def roll(env: Env, state, key):
    """`CHUNK` random steps. Returns the state, and the actions and the timesteps, stacked."""
    traces["roll"] += 1

    def step(state, key):
        action_key, step_key = jax.random.split(key)
        action = sample(env.action_space, action_key, env.num_envs, *agents(env))
        state, timestep = env.step(state, action, step_key)
        return state, (action, timestep)

    return jax.lax.scan(step, state, jax.random.split(key, CHUNK))


def play(env: Env, seed: int, chunks: int) -> tuple[np.ndarray, TimeStep]:
    """Actions `[T, N, *M]`, and the timesteps `[T+1, N]` from reset on, as NumPy."""
    reset_key, *keys = jax.random.split(jax.random.key(seed), chunks + 1)
    state, timestep = env.reset(reset_key)
    actions, timesteps = [], [jax.tree.map(lambda x: np.asarray(x)[None], timestep)]
    for key in keys:
        state, (action, timestep) = roll(env, state, key)
        actions.append(np.asarray(action))
        timesteps.append(jax.tree.map(np.asarray, timestep))
    return np.concatenate(actions), jax.tree.map(lambda *x: np.concatenate(x), *timesteps)


def lane_keys(seed: int, chunks: int, num_envs: int) -> jax.Array:
    """The keys `[T+1, N]` that `play` hands to the lanes: those of reset, and of each step."""
    reset_key, *keys = jax.random.split(jax.random.key(seed), chunks + 1)
    steps = [jax.random.split(step)[1] for key in keys for step in jax.random.split(key, CHUNK)]
    return jax.numpy.stack([jax.random.split(key, num_envs) for key in (reset_key, *steps)])


def assert_equal(a: TimeStep, b: TimeStep):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def cart_column(picture: np.ndarray) -> float:
    """Where CartPole's cart is drawn: black, and higher than the line it runs on."""
    return float(np.flatnonzero((picture == 0).all(-1).sum(0) > 5).mean())
