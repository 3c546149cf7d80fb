"""An environment with any spaces, and an agent for it; both draw everything at random."""

import dataclasses
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from eqx_q.agents import Agent, Rollouts
from eqx_q.spaces import leaves, of_actions, of_observations, shapes
from eqx_q.types import Decision, Episode, TimeStep
from eqx_q.wrappers import Env

_LONGEST = 4  # steps of an episode


def draw(space, key, *axes):
    """Samples of a space."""

    def one(leaf, key):
        shape = (*axes, *(leaf.shape or ()))
        match leaf:
            case gymnasium.spaces.Box() if leaf.dtype.kind == "f":
                x = jax.random.uniform(key, shape)
                return jnp.asarray(leaf.low) + x * (leaf.high - leaf.low)
            case gymnasium.spaces.Box():
                x = jax.random.randint(key, shape, leaf.low, leaf.high.astype(int) + 1)
            case gymnasium.spaces.Discrete():
                x = jax.random.randint(key, shape, leaf.start, leaf.start + leaf.n)
            case gymnasium.spaces.MultiDiscrete():
                x = jax.random.randint(key, shape, leaf.start, leaf.start + leaf.nvec)
            case _:
                x = jax.random.randint(key, shape, 0, 2)
        return x.astype(jax.dtypes.canonicalize_dtype(leaf.dtype))

    parts = [leaf for _, leaf in leaves(space)]
    keys = jax.random.split(key, len(parts))
    structure = jax.tree.structure(shapes(space))
    return jax.tree.unflatten(structure, [one(*x) for x in zip(parts, keys, strict=True)])


class Varied(Env):
    """Episodes of 1 to 4 steps, each second one of them truncated.

    `mask`: how many choices it says of which are legal; `state`: the size of its global state.
    """

    num_envs: int = eqx.field(static=True)
    observation_space: gymnasium.Space = eqx.field(static=True)
    action_space: gymnasium.Space = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True, default=None)
    mask: int | None = eqx.field(static=True, default=None)
    state: int | None = eqx.field(static=True, default=None)
    on_host: bool = eqx.field(static=True, default=False)
    max_episode_steps: int = eqx.field(static=True, default=_LONGEST)

    @classmethod
    def of(cls, observation_space, action_space, **options):
        """Of Gymnasium's spaces, with one lane."""
        return cls(1, of_observations(observation_space), of_actions(action_space), **options)

    def _emit(self, time, first, key):
        keys = jax.random.split(key, 7)
        lanes = (self.num_envs,)
        agents = lanes if self.num_agents is None else (*lanes, self.num_agents)
        ended = ~first & (jax.random.bernoulli(keys[0], 0.4, lanes) | (time == _LONGEST))
        by_task = jax.random.bernoulli(keys[1], 0.5, lanes)
        team = self.num_agents is not None
        paid = jax.random.normal(keys[2], agents) * ~(first[:, None] if team else first)
        timestep = TimeStep(
            obs=draw(self.observation_space, keys[3], *agents),
            reward=paid.sum(-1) if team else paid,
            terminated=ended & by_task,
            truncated=ended & ~by_task,
            first=first,
            episode=Episode(ended, jnp.zeros(lanes), time),
            action_mask=(
                None
                if self.mask is None
                else jax.random.bernoulli(keys[4], 0.7, (*agents, self.mask))
            ),
            agent_mask=jax.random.bernoulli(keys[5], 0.7, agents) if team else None,
            agent_reward=paid if team else None,
            global_state=(
                None if self.state is None else jax.random.normal(keys[6], (*lanes, self.state))
            ),
        )
        return (time, ended), timestep

    def reset(self, key):
        time = jnp.zeros(self.num_envs, jnp.int32)
        return self._emit(time, time == 0, key)

    def step(self, state, action, key):
        time, ended = state
        return self._emit(jnp.where(ended, 0, time + 1), ended, key)

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any):
        return dataclasses.replace(self, num_envs=num_envs)

    def render(self, state, lane=0):
        return None

    def close(self):
        pass


class Whim(Agent):
    """Acts at random, and remembers how often."""

    observation_space: gymnasium.Space = eqx.field(static=True)
    action_space: gymnasium.Space = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True, default=None)
    num_choices: int = eqx.field(static=True, default=2)
    num_members: None = eqx.field(static=True, default=None)
    learns_from: Rollouts = eqx.field(static=True, default=Rollouts(1))
    learnt: jax.Array = eqx.field(default_factory=lambda: jnp.zeros((), jnp.uint32))

    def update(self, experience, *, key):
        raise AssertionError("it is only asked to act")

    with_schedule = hyperparameters = with_hyperparameters = measure = update

    @classmethod
    def of(cls, env):
        """For an environment."""
        return cls(env.observation_space, env.action_space, env.num_agents)

    def initial_memory(self, num_envs):
        return jnp.zeros(num_envs, jnp.int32)

    def act(self, obs, memory=None, *, key=None, **unused):
        assert memory is not None
        team = () if self.num_agents is None else (self.num_agents,)
        lanes = len(jax.tree.leaves(obs)[0])
        action = draw(self.action_space, jax.random.fold_in(key, memory[0]), lanes, *team)
        return Decision(action, jnp.zeros(lanes), memory + 1)


def box(low, high, shape, dtype=np.float32):
    """A `Box`."""
    return gymnasium.spaces.Box(low, high, shape, dtype)


_DICT = gymnasium.spaces.Dict(
    {
        "image": box(0, 255, (2, 3), np.uint8),
        "arm": gymnasium.spaces.Dict(
            {"a/b": box(-1, 1, (2,)), "grip": gymnasium.spaces.Discrete(3, start=-1)}
        ),
    }
)
_TUPLE = gymnasium.spaces.Tuple(
    [gymnasium.spaces.MultiDiscrete([2, 300]), gymnasium.spaces.MultiBinary(3), box(-1, 1, ())]
)
VARIED = {
    "dict": Varied.of(_DICT, gymnasium.spaces.MultiDiscrete([3, 2], start=[-1, 5]), mask=5),
    "tuple": Varied.of(_TUPLE, box(np.float32([-1, 2]), np.float32([1, 3]), (2,))),
    "bits": Varied.of(gymnasium.spaces.Discrete(7), gymnasium.spaces.MultiBinary(2)),
    "team": Varied.of(_DICT, gymnasium.spaces.Discrete(3, start=-3), num_agents=2, mask=3, state=4),
}
