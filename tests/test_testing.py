"""`check_env`: a right environment passes, and planted faults are found and named."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_q
from eqx_q.errors import UsageError
from eqx_q.spaces import of_actions, of_observations
from eqx_q.testing import check_env
from eqx_q.wrappers import autoreset

pytestmark = pytest.mark.quick


class Corridor(eqx_q.Env):
    """A walk from the left end, paid at the right one; cut after 12 steps.

    `fault` changes what a step returns: `fault(env, state, action, (state, timestep))`.
    """

    num_envs: int = eqx.field(static=True, default=3)
    fault: Callable[..., Any] | None = eqx.field(static=True, default=None)
    space: Any = eqx.field(static=True, default=None)
    extra: Any = eqx.field(static=True, default=None)
    mask: tuple[bool, ...] | None = eqx.field(static=True, default=None)
    lanes_of_replicas: int = eqx.field(static=True, default=0)
    num_agents: None = eqx.field(static=True, default=None)
    on_host: bool = eqx.field(static=True, default=False)
    max_episode_steps: int | None = eqx.field(static=True, default=12)

    @property
    def observation_space(self):
        space = gymnasium.spaces.Box(0, 1, (4,), np.float32)
        return of_observations(space) if self.space is None else self.space

    @property
    def action_space(self):
        return of_actions(gymnasium.spaces.Discrete(2))

    def reset(self, key):
        state, timestep = autoreset.reset(self.begin, key, self.num_envs)
        return (state if self.extra is None else (state, self.extra)), timestep

    def step(self, state, action, key):
        after = autoreset.step(self.begin, self.walk, state, action, key)
        return after if self.fault is None else self.fault(self, state, action, after)

    def begin(self, key):
        place, time = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return (place, time), self.report(place, time)

    def walk(self, state, action, key):
        place, time = state
        place = jnp.clip(place + 2 * action - 1, 0, 3)
        return (place, time + 1), self.report(place, time + 1)

    def report(self, place, time):
        arrived = place == 3
        return autoreset.Report(
            jax.nn.one_hot(place, 4),
            arrived.astype(jnp.float32),
            arrived,
            time >= 12,
            action_mask=None if self.mask is None else jnp.array(self.mask),
        )

    def replicate(self, num_envs, *, seed=0, **options):
        return dataclasses.replace(self, num_envs=self.lanes_of_replicas or num_envs)

    def render(self, state, lane=0):
        return None

    def close(self):
        pass


def changed(**changes):
    """A fault that changes fields of the timestep."""

    def fault(env, state, action, after):
        timestep = after[1]
        for name, change in changes.items():  # without checks of types
            value, part = change(after[1], action), operator.attrgetter(name)
            timestep = eqx.tree_at(part, timestep, value, is_leaf=lambda x: x is None)
        return after[0], timestep

    return fault


def of_episode(**changes):
    """A fault that changes the statistics of the episode."""
    return changed(
        episode=lambda t, _: dataclasses.replace(
            t.episode, **{name: change(t) for name, change in changes.items()}
        )
    )


def deciding(env, state, action, after):
    if action[0] > 0:
        return after
    return after[0], after[1]


def restless(env, state, action, after):
    """The state gets another type in every step."""
    return dataclasses.replace(
        after[0], inner=jax.tree.map(lambda x: x.astype(jnp.float32), after[0].inner)
    ), after[1]


def at_start(x, t):
    """`x` where an episode begins, as a reset in the step that ends would report it."""
    return jnp.where(t.ended[:, None], jax.nn.one_hot(0, 4), x)


FAULTS = {
    "a reward for the reset": (
        {"fault": changed(reward=lambda t, _: jnp.where(t.first, 1.0, t.reward))},
        "reward must be 0 in the step that resets a lane",
    ),
    "a reset in the step that ends": (
        {"fault": changed(obs=lambda t, _: at_start(t.obs, t))},
        "obs must be the final observation where an episode ended",
    ),
    "first is missing": (
        {"fault": changed(first=lambda t, _: jnp.zeros_like(t.first))},
        "first must be true exactly in the step after terminated or truncated (next-step reset), "
        "but is False in step",
    ),
    "another type of reward": (
        {"fault": changed(reward=lambda t, _: t.reward.astype(jnp.int32))},
        "after a step, timestep.reward is int32[3], but after reset float32[3]",
    ),
    "an object in the state": (
        {"extra": "a name", "fault": lambda env, state, action, after: after},
        "the state is no PyTree of arrays: state[1] is a str",
    ),
    "observations outside of their space": (
        {"fault": changed(obs=lambda t, _: 2 * t.obs)},
        "obs is not in observation_space in step 1, lane 0",
    ),
    "a state that changes its type": (
        {"fault": restless},
        "after a step, state.inner[0] is float32[3], but after reset int32[3]",
    ),
    "an end that goes on": (
        {"fault": changed(truncated=lambda t, _: t.truncated | (t.first & ~t.terminated))},
        "terminated and truncated must be false in the step that resets a lane",
    ),
    "both ends": (
        {"fault": changed(truncated=lambda t, _: t.truncated | t.terminated)},
        "terminated and truncated must not both be true",
    ),
    "a wrong length": (
        {"fault": of_episode(length=lambda t: t.episode.length + t.episode.ended)},
        "steps were taken in the episode",
    ),
    "a wrong return": (
        {"fault": of_episode(returns=lambda t: t.episode.returns + t.episode.ended)},
        "but rewards of",
    ),
    "episodes that end alone": (
        {"fault": of_episode(ended=lambda t: ~t.first)},
        "episode.ended must only be true where terminated or truncated",
    ),
    "a reset that minds the action": (
        {"fault": changed(obs=lambda t, a: jnp.where(a[:, None] > 0, t.obs, t.obs[:, ::-1]))},
        "the step that resets a lane must ignore the action",
    ),
    "a limit that is passed": ({"max_episode_steps": 7}, "but max_episode_steps is 7"),
    "a replica of another size": ({"lanes_of_replicas": 3}, "replicate(4) makes 3 lanes"),
    "decisions in Python": ({"fault": deciding}, "step (traced, as in jax.jit) fails: Tracer"),
    "a space that is not hashable": (
        {"space": gymnasium.spaces.Box(0, 1, (4,), np.float32)},
        "make it by eqx_q.spaces.of_observations",
    ),
    "a space of another shape": (
        {"space": of_observations(gymnasium.spaces.Box(0, 1, (5,), np.float32))},
        "obs is float32[3, 4], but its space is for float32[3, 5]",
    ),
    "rewards that are no numbers": (
        {"fault": changed(reward=lambda t, _: jnp.where(t.ended, jnp.nan, t.reward))},
        "reward is not finite in step",
    ),
    "a mask that comes later": (
        {"fault": changed(action_mask=lambda t, _: jnp.ones((3, 2), bool))},
        "after a step, timestep.action_mask is bool[3, 2], but after reset none",
    ),
    "no legal action": ({"mask": (False, False)}, "action_mask has no legal action in step 0"),
}


def test_a_right_environment_passes():
    check_env(Corridor())
    check_env(eqx_q.make("gymnax/CartPole-v1", 2, max_steps_in_episode=9), num_steps=40)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    fields, message = FAULTS[fault]
    with pytest.raises(UsageError) as error:
        check_env(Corridor(**fields), num_steps=100)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_pure_is_found():
    counter = iter(range(10**6))

    def fault(env, state, action, after):
        told = jax.experimental.io_callback(
            lambda: np.float32(next(counter) % 2), jax.ShapeDtypeStruct((), jnp.float32)
        )
        return after[0], dataclasses.replace(after[1], obs=after[1].obs * told)

    with pytest.raises(UsageError, match="step and reset must be pure"):
        check_env(Corridor(fault=fault), num_steps=30)


def test_what_is_no_environment_is_told():
    with pytest.raises(UsageError, match=r"it is a CartPoleEnv, no eqx_q\.Env: subclass that"):
        check_env(gymnasium.make("CartPole-v1").unwrapped)


def test_episodes_that_never_end_are_told():
    with pytest.warns(UserWarning, match="no episode ended in 2 steps"):
        check_env(Corridor(), num_steps=2)
