"""Timesteps built in a user's own loop keep the boundary rule."""

import jax
import numpy as np

from eqx_q.types import Count, Rollout, TimeStep


def collect(num_steps: int = 200, num_lanes: int = 5, seed: int = 0):
    """Random rewards and endings, with junk wherever a lane only resets."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(num_steps + 1, num_lanes, 3)).astype(np.float32)
    reward = rng.normal(size=(num_steps, num_lanes))  # float64, as Gymnasium gives it
    terminated, truncated = rng.random(size=(2, num_steps, num_lanes)) < 0.15
    timesteps = [TimeStep.initial(obs[0])]
    for t in range(num_steps):
        timesteps.append(timesteps[-1].then(obs[t + 1], reward[t], terminated[t], truncated[t]))
    actions = list(rng.integers(2, size=(num_steps, num_lanes)))
    return (obs, reward, terminated, truncated), Rollout.stack(timesteps, actions)


def test_equals_a_loop_over_one_lane_after_the_other():
    (obs, reward, terminated, truncated), rollout = collect()
    steps = rollout.timesteps
    for lane in range(obs.shape[1]):
        ended, total, length = False, 0.0, 0
        for t in range(len(reward)):
            now = jax.tree.map(lambda x, t=t, lane=lane: x[t + 1, lane], steps)
            assert now.first == ended
            if ended:
                ended, total, length = False, 0.0, 0
                assert (now.reward, now.terminated, now.truncated) == (0, False, False)
            else:
                ended = terminated[t, lane] or truncated[t, lane]
                total, length = total + reward[t, lane], length + 1
                np.testing.assert_allclose(now.reward, reward[t, lane], rtol=1e-6)
                assert now.terminated == terminated[t, lane]
                assert now.truncated == (truncated[t, lane] and not terminated[t, lane])
            assert now.episode.ended == ended
            assert now.episode.length == length
            np.testing.assert_allclose(now.episode.returns, total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(steps.obs, obs)
    np.testing.assert_array_equal(rollout.real, ~steps.first[1:])
    assert steps.first[0].all()
    assert steps.reward.dtype == np.float32


def test_types_do_not_change_along_the_way():
    """So that `jit` compiles once for the first timestep and for those after it."""
    no = np.zeros(2, bool)
    first = TimeStep.initial(np.zeros((2, 3), np.float32))
    later = first.then(first.obs, np.ones(2), no, no).then(first.obs, np.ones(2), ~no, no)
    dtypes = [jax.tree.map(lambda x: x.dtype, timestep) for timestep in (first, later)]
    assert dtypes[0] == dtypes[1]


def test_counts_compare_as_numbers():
    count = Count.of(2**32 - 1).plus(3)
    assert count == 2**32 + 2 and count != 2 and count != 2**32 + 3
    assert count == Count.of(2**32 - 2).plus(4) and count != Count.of(2)
    assert count != -1 and count != 0.5 and count != "many"
    several = Count.of(np.array([5, 6], np.uint32))
    assert (several == np.array([5, 7])).tolist() == [True, False]
    assert jax.jit(lambda count: count == 5)(Count.of(5))
