"""Evaluation counts whole episodes, the same number from every lane."""

import equinox as eqx
import jax
import numpy as np
import pytest
from environments import Clock, Guess

import eqx_q
from eqx_q.errors import UsageError
from eqx_q.loops.evaluation import _play, compile_evaluation, play_episodes

pytestmark = pytest.mark.quick


def make_agent(env):
    return eqx_q.PQN.create(
        env.observation_space, env.action_space, key=jax.random.key(0), network="mlp"
    )


def test_every_lane_counts_equally():
    env = Clock(4)  # lane i ends after i + 1 steps, with that return
    returns = eqx_q.evaluate(make_agent(env), env, num_episodes=10, key=jax.random.key(0))
    np.testing.assert_array_equal(returns, np.repeat([1, 2, 3, 4], 3))


def test_long_episodes_are_cut_and_it_says_so():
    env = Clock(4)
    with pytest.warns(UserWarning, match="2 of 8 episodes were cut at 2 steps"):
        returns = eqx_q.evaluate(
            make_agent(env), env, num_episodes=8, key=jax.random.key(0), max_episode_steps=2
        )
    # Lane 2 plays 3 steps: 2, then the one left; lane 3 plays 4: 2, then the two left.
    np.testing.assert_array_equal(returns, [1, 1, 2, 2, 2, 1, 2, 2])


def test_lengths_and_metrics_are_those_of_the_episodes():
    env = Clock(4)
    options = {"num_episodes": 8, "key": jax.random.key(0)}
    whole = play_episodes(make_agent(env), env, **options)
    np.testing.assert_array_equal(whole.lengths, np.repeat([1, 2, 3, 4], 2))
    np.testing.assert_array_equal(whole.metrics["half"], np.repeat([0.5, 1.0, 1.5, 2.0], 2))
    with pytest.warns(UserWarning, match="were cut"):
        cut = play_episodes(make_agent(env), env, max_episode_steps=2, **options)
    np.testing.assert_array_equal(cut.lengths, cut.returns)
    np.testing.assert_array_equal(cut.metrics["half"][4:], [1.0, 1.5, 1.0, 2.0])


class Lives(Clock):
    """Every second step costs a life, which ends the learner's episode and not the game's."""

    def _emit(self, count, first):
        state, timestep = super()._emit(count, first)
        lost = (count % 2 == 0) & (count > 0)
        return state, eqx.tree_at(
            lambda t: (t.terminated, t.first),
            timestep,
            (timestep.terminated | lost, first | (count % 2 == 1)),
        )


def test_a_lost_life_ends_no_episode():
    env = Lives(6)
    options = {"num_episodes": 6, "key": jax.random.key(0)}
    whole = play_episodes(make_agent(env), env, **options)
    np.testing.assert_array_equal(whole.returns, [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(whole.lengths, whole.returns)
    with pytest.warns(UserWarning, match="2 of 6 episodes were cut at 4"):
        cut = play_episodes(make_agent(env), env, max_episode_steps=4, **options)
    np.testing.assert_array_equal(cut.returns, [1, 2, 3, 4, 4, 4])


def test_epsilon_one_acts_at_random():
    env = Guess(64)
    agent = make_agent(env)
    returns = eqx_q.evaluate(agent, env, num_episodes=2000, key=jax.random.key(0), epsilon=1.0)
    np.testing.assert_allclose(returns.mean(), -1 / 3, atol=0.1)


def test_compiling_apart_plays_nothing_and_serves():
    env = Clock(3)
    agent = make_agent(env)
    options = {"num_episodes": 6, "epsilon": 0.5, "max_episode_steps": 9}
    before = _play._cached._cache_size()
    compile_evaluation(agent, env, **options)
    assert _play._cached._cache_size() == before + 1
    returns = eqx_q.evaluate(agent, env, key=jax.random.key(0), **options)
    assert _play._cached._cache_size() == before + 1
    np.testing.assert_array_equal(returns, [1, 1, 2, 2, 3, 3])


def test_bad_input():
    env = Clock(4)
    with pytest.raises(UsageError, match="at least one episode"):
        eqx_q.evaluate(make_agent(env), env, num_episodes=0, key=jax.random.key(0))
