"""Hidden entries of the observation, against the fully observed environment."""

import functools

import gymnax
import numpy as np
import pytest
from gymnax.environments import environment
from kinds import Kinds
from rollouts import assert_equal, play

import eqx_q.wrappers as wrappers
from eqx_q.errors import UsageError
from eqx_q.run import make_env


@pytest.mark.parametrize(
    ("source", "entries"),
    [
        ("gymnax/CartPole-v1", [2, 0]),
        ("gymnax/Breakout-MinAtar", [3]),
        ("gymnasium/CartPole-v1", [1]),
    ],
)
def test_only_what_is_asked_for_is_seen_and_nothing_else_changes(source, entries):
    whole, part = wrappers.make(source, 3), wrappers.make(source, 3, observe=entries)
    (actions, expected), (same_actions, seen) = play(whole, 0, 2), play(part, 0, 2)
    np.testing.assert_array_equal(seen.obs, expected.obs[..., entries])
    np.testing.assert_array_equal(same_actions, actions)
    assert expected.ended.any()
    for timestep in (seen, expected):
        object.__setattr__(timestep, "obs", None)
    assert_equal(seen, expected)
    space, parts = whole.observation_space, part.observation_space
    np.testing.assert_array_equal(parts.low, space.low[..., entries])
    np.testing.assert_array_equal(parts.high, space.high[..., entries])
    assert parts.dtype == space.dtype and part.action_space == whole.action_space
    assert part.on_host == whole.on_host and part.max_episode_steps == whole.max_episode_steps
    whole.close()
    part.close()


def test_a_replica_hides_the_same_unless_told_otherwise():
    env = wrappers.make("gymnax/CartPole-v1", 2, observe=[0, 2])
    other = env.replicate(5, max_steps_in_episode=7)
    assert (other.num_envs, other.max_episode_steps, other.observation_space.shape) == (5, 7, (2,))
    assert env.replicate(5, observe=[1]).observation_space.shape == (1,)


class Twice(environment.Environment):
    """A gymnax environment of somebody's own, that shows more than one array."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)

    def _show(self, obs):
        return {"once": obs, "again": (2 * obs,)}

    def reset_env(self, key, params):
        obs, state = self.env.reset_env(key, params)
        return self._show(obs), state

    def step_env(self, key, state, action, params):
        obs, *rest = self.env.step_env(key, state, action, params)
        return self._show(obs), *rest

    def is_truncated(self, state, params):
        return self.env.is_truncated(state, params)

    def action_space(self, params):
        return self.env.action_space(params)

    def observation_space(self, params):
        return None


def test_parts_of_several_arrays():
    make = functools.partial(wrappers.make, Kinds, 2)
    whole = make(leave_out=["word"])
    part = make(leave_out=["word", "nest"], observe={"image": [0]})
    small = make(leave_out=["word", "last"], observe={"nest.1.x": [1]})
    (_, expected), (_, seen), (_, less) = (play(env, 0, 1) for env in (whole, part, small))
    assert sorted(seen.obs) == ["image", "last"] and sorted(less.obs) == ["image", "nest"]
    np.testing.assert_array_equal(seen.obs["last"], expected.obs["last"])
    np.testing.assert_array_equal(less.obs["nest"][1]["x"], expected.obs["nest"][1]["x"][..., [1]])
    assert small.observation_space["nest"][1]["x"].shape == (1,)
    assert small.recording.preprocessing == {
        "leave_out": ["word", "last"],
        "observe": {"nest.1.x": [1]},
    }
    assert small.replicate(1).observation_space == small.observation_space
    for env in (whole, part, small):
        env.close()


def test_what_is_left_out_of_an_environment_in_jax():
    pair = gymnax.make("CartPole-v1")
    whole = wrappers.make((Twice(pair[0]), pair[1]), 2)
    part = wrappers.make((Twice(pair[0]), pair[1]), 2, leave_out=["again"])
    (_, expected), (_, seen) = play(whole, 0, 1), play(part, 0, 1)
    assert sorted(whole.observation_space) == ["again", "once"] and sorted(seen.obs) == ["once"]
    np.testing.assert_array_equal(seen.obs["once"], expected.obs["once"])
    np.testing.assert_allclose(expected.obs["again"][0], 2 * expected.obs["once"], rtol=1e-6)


def test_it_is_an_option_of_a_configuration():
    env = {"suite": "gymnax", "name": "CartPole-v1", "observe": [0, 2]}
    assert make_env({"env": env, "seed": 0}, 2).observation_space.shape == (2,)


@pytest.mark.parametrize("observe", [[], [4], [-1], [0.5], 2, "ab"])
def test_entries_that_are_not_there(observe):
    message = r"^observe=.*shape \(4,\), so give a list of whole numbers from 0 to 3$"
    with pytest.raises(UsageError, match=message):
        wrappers.make("gymnax/CartPole-v1", 2, observe=observe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "('word') is not supported: leave it out by its name (leave_out=['word'])"),
        ({"leave_out": "word"}, "give a list of paths"),
        ({"leave_out": ["wrod"]}, "entry of observations 'wrod': the nearest are word"),
        ({"leave_out": ["word"], "observe": [0]}, "give lists by path, such as {'image': [0]}"),
        ({"leave_out": ["word"], "observe": {"imag": [0]}}, "the nearest are image"),
        ({"leave_out": ["word"], "observe": {"last": [0]}}, "observe=[0]: the observation"),
    ],
)
def test_parts_that_are_not_there(options, message):
    with pytest.raises(UsageError) as error:
        wrappers.make(Kinds, 2, **options)
    assert message in str(error.value) and "\n" not in str(error.value)
