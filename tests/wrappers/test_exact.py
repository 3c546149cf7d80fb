"""Host environments that are restored continue as if never interrupted."""

import dataclasses

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from rollouts import CHUNK, assert_equal, roll

import eqx_q.wrappers as wrappers
from eqx_q.errors import UsageError
from eqx_q.saving.checkpoint import load, save
from eqx_q.spaces import of_actions
from eqx_q.wrappers import Exact, exact

KEYS = jax.random.split(jax.random.key(0), 3)


class Drift(gymnasium.Env):
    """A random walk that ends at random: each step and each reset draw, `luck` from no seed."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(3, start=-1)

    def __init__(self, luck=None):
        self.luck = luck

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        return self.place, {}

    def step(self, action):
        random = self.luck or self.np_random
        self.place = self.place + np.float32(action) + random.normal(size=2).astype(np.float32)
        return self.place, float(self.place[0]), self.np_random.random() < 0.2, False, {}


def breakout(**options):
    small = {"img_height": 21, "img_width": 21, "max_episode_steps": 15}
    return wrappers.make("envpool/Breakout-v5", 2, seed=3, **small, **options)


MAKE = {
    "gymnasium": lambda: wrappers.make(Drift, 2, seed=3),
    "gymnasium, in processes": lambda: wrappers.make(Drift, 2, seed=3, vectorization="async"),
    "gymnasium, vectorised": lambda: wrappers.make("gymnasium/CartPole-v1", 2, seed=3),
    "gymnasium, continuous": lambda: wrappers.make(
        "gymnasium/Pendulum-v1", 2, seed=3, max_episode_steps=9, observe=[1, 2]
    ),
    "envpool": lambda: breakout(episodic_life=True, reward_clip=True, num_threads=2),
    "envpool, sticky": lambda: breakout(repeat_action_probability=0.25),
    "envpool, called back": lambda: wrappers.make("envpool/Ant-v4", 2, seed=3, max_episode_steps=9),
    "pettingzoo": lambda: wrappers.make("pettingzoo/mpe2.simple_spread_v3", 2, seed=3),
}


def begun(make, steps=2 * CHUNK):
    """An environment that has made a chunk of steps, and its state."""
    env = Exact(make(), steps)
    return env, roll(env, env.reset(KEYS[0])[0], KEYS[1])[0]


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_what_is_brought_back_goes_on_in_the_same_way(make, tmp_path):
    env, state = begun(make)
    save(tmp_path / "past", state)
    last, (actions, expected) = roll(env, state, KEYS[2])
    env.close()
    again = Exact(make(), 3 * CHUNK)  # to be longer
    state, (same, seen) = roll(again, again.resume(load(tmp_path / "past")), KEYS[2])
    again.close()
    np.testing.assert_array_equal(same, actions)
    assert_equal(seen, expected)
    np.testing.assert_array_equal(state.digest, last.digest)
    np.testing.assert_array_equal(state.actions[:, : 2 * CHUNK], last.actions)


def test_what_does_not_do_the_same_again_is_told():
    luck = np.random.default_rng()
    env, state = begun(lambda: wrappers.make(lambda: Drift(luck), 2))
    env.close()
    env = Exact(wrappers.make(lambda: Drift(luck), 2), 2 * CHUNK)
    with pytest.raises(UsageError, match=r"2 of 2 lanes \(the first is 0\) behaved differently"):
        env.resume(state)
    env.close()


def test_other_actions_are_told():
    """Also long ago: new episodes have begun since then, which no action changes."""
    env, state = begun(MAKE["envpool"])
    env.close()
    wrong = dataclasses.replace(state, actions=state.actions.at[1, :3].add(1).at[1, :3].min(1))
    env = Exact(MAKE["envpool"](), 2 * CHUNK)
    with pytest.raises(UsageError, match=r"1 of 2 lanes \(the first is 1\).*exact_resume=false"):
        env.resume(wrong)
    env.close()


def test_what_cannot_be_replayed_is_refused():
    env = Exact(wrappers.make(Drift, 2), 9)
    state, _ = env.reset(KEYS[0])
    state = dataclasses.replace(state, steps=state.steps + 10)
    with pytest.raises(
        UsageError, match=r"10 steps of 2 lanes .* in 2 lanes with room for 9 steps: resume"
    ):
        env.resume(state)
    env.close()
    env = Exact(wrappers.make(Drift, 3), 99)
    with pytest.raises(UsageError, match="10 steps of 2 lanes cannot be replayed in 3"):
        env.resume(state)
    env.close()
    with pytest.raises(UsageError, match="in JAX resumes exactly by itself"):
        Exact(wrappers.make("gymnax/CartPole-v1", 2), 9)


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (Discrete(18), np.uint8),
        (Discrete(257), np.uint16),
        (Discrete(3, start=-1), np.int8),
        (MultiDiscrete([3, 200], start=[0, 99]), np.uint16),
        (MultiBinary(4), np.uint8),
        (Box(0, 1, (2,), np.float64), np.float32),
    ],
)
def test_actions_are_kept_in_the_smallest_type(space, kind):
    assert exact._narrowest(of_actions(space)) == kind
