"""Hidden entries of the observation, against the same environment seen whole."""

import numpy as np
import pytest
from rollouts import assert_equal, play

import eqx_q.wrappers as wrappers
from eqx_q.errors import UsageError
from eqx_q.run import make_env


@pytest.mark.parametrize(
    ("source", "entries"),
    [("gymnax/CartPole-v1", [2, 0]), ("gymnax/Breakout-MinAtar", [3]), ("gymnasium/Taxi-v4", [7])],
)
def test_only_what_is_asked_for_is_seen_and_nothing_else_changes(source, entries):
    whole, part = wrappers.make(source, 3), wrappers.make(source, 3, observe=entries)
    (actions, expected), (same_actions, seen) = play(whole, 0, 2), play(part, 0, 2)
    np.testing.assert_array_equal(seen.obs, expected.obs[..., entries])
    np.testing.assert_array_equal(same_actions, actions)
    assert expected.ended.any() or source == "gymnasium/Taxi-v4"
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
    assert (other.num_envs, other.max_episode_steps, other.entries) == (5, 7, (0, 2))
    assert env.replicate(5, observe=[1]).observation_space.shape == (1,)


def test_it_is_an_option_of_a_configuration():
    env = {"suite": "gymnax", "name": "CartPole-v1", "observe": [0, 2]}
    assert make_env({"env": env, "seed": 0}, 2).observation_space.shape == (2,)


@pytest.mark.parametrize("observe", [[], [4], [-1], [0.5], 2, "ab"])
def test_entries_that_are_not_there(observe):
    message = r"^observe is .*shape \(4,\), so give a list of whole numbers from 0 to 3$"
    with pytest.raises(UsageError, match=message):
        wrappers.make("gymnax/CartPole-v1", 2, observe=observe)
