"""A test agent built from parts, which learns nothing from its data."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqx_q import spaces
from eqx_q.agents import Agent, Batches, hyperparameters
from eqx_q.agents.parts import Part


class Blur(Part):
    """A part with a number that may change, and one that may not."""

    sigma: Float[Array, ""]
    bins: int = eqx.field(static=True)


class Parted(Agent):
    """Remembers how often it has learnt, in sequences where it is asked to."""

    learning_rate: Float[Array, ""]
    blur: Blur
    learnt: jax.Array
    observation_space: Any = eqx.field(static=True)
    action_space: Any = eqx.field(static=True)
    learns_from: Batches = eqx.field(static=True)
    num_agents: None = None
    num_choices: int = eqx.field(static=True, default=2)
    num_members: None = None

    @classmethod
    def create(
        cls, observation_space, action_space, *, key, blur, learning_rate=0.1, sequence_length=None
    ) -> "Parted":
        blur = Blur(jnp.asarray(blur["sigma"], jnp.float32), blur.get("bins", 3))
        rate = jnp.asarray(learning_rate, jnp.float32)
        batches = Batches(4, sequence_length=sequence_length)
        learnt, actions = jnp.zeros((), jnp.uint32), spaces.of_actions(action_space)
        return cls(rate, blur, learnt, observation_space, actions, batches)

    def initial_memory(self, num_envs):
        return jnp.zeros(num_envs)

    def act(self, obs, memory=None, **options):
        raise AssertionError("it is only asked to learn")

    def with_schedule(self, steps):
        return self

    def hyperparameters(self):
        return hyperparameters.leaves(self)

    def with_hyperparameters(self, values):
        return hyperparameters.replace(self, values)

    def measure(self, fn, rollout):
        return fn(rollout)

    def update(self, experience, *, key):
        obs = experience.timesteps.obs
        told = {
            "loss": jnp.mean(obs) + jnp.sum(experience.memory),
            "seen": obs[..., 0],
            "priority": obs[0, :, 0],
        }
        return eqx.tree_at(lambda agent: agent.learnt, self, self.learnt + 1), told
