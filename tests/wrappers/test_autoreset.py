"""The boundary rule, on an environment small enough to list the expected steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q.wrappers import autoreset
from eqx_q.wrappers.autoreset import Lasting, Report, Running

pytestmark = pytest.mark.quick


def reset_lane(key):
    # Weak types, as suites written with Python numbers have them, and a reward that nobody earned.
    state = jax.random.randint(key, (), 0, 100) * 0
    return state * 1, Report(
        jnp.float32(100.0), jnp.float32(7.0), jnp.array(True), jnp.array(True), {"seen": state}
    )


def step_lane(state, action, key):
    """Ends by the task in the third step; action 1 meets the limit there at once, or after one."""
    state = state + 1
    report = Report(
        jnp.asarray(state, jnp.float32),
        jnp.asarray(action + 1, jnp.float32),
        state == 3,
        action == 1,
        {"seen": state},
    )
    return state, report


def run(actions):
    """`actions`: `[T, N]`."""
    num_envs = actions.shape[1]
    state, start = autoreset.reset(reset_lane, jax.random.key(0), num_envs)

    def step(state, action):
        return autoreset.step(reset_lane, step_lane, state, action, jax.random.key(1))

    _, rest = jax.lax.scan(step, state, jnp.asarray(actions))
    return jax.tree.map(lambda a, b: np.concatenate([a[None], b]), start, rest)


def test_an_episode_and_the_next():
    seen = run(np.array([[0, 0], [0, 1], [0, 5], [9, 0], [0, 0], [0, 0]]))
    # Lane 0 ends by the task at t = 3, lane 1 by the limit at t = 2; the action after is ignored.
    np.testing.assert_array_equal(seen.first[:, 0], [1, 0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(seen.first[:, 1], [1, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(seen.terminated[:, 0], [0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(seen.terminated[:, 1], [0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(seen.truncated[:, 1], [0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(seen.obs[:, 0], [100, 1, 2, 3, 100, 1, 2])
    np.testing.assert_array_equal(seen.obs[:, 1], [100, 1, 2, 100, 1, 2, 3])
    np.testing.assert_array_equal(seen.reward[:, 0], [0, 1, 1, 1, 0, 1, 1])
    np.testing.assert_array_equal(seen.reward[:, 1], [0, 1, 2, 0, 1, 1, 1])
    np.testing.assert_array_equal(seen.episode.returns[:, 1], [0, 1, 3, 0, 1, 2, 3])
    np.testing.assert_array_equal(seen.episode.length[:, 0], [0, 1, 2, 3, 0, 1, 2])
    np.testing.assert_array_equal(seen.episode.ended, seen.ended)
    np.testing.assert_array_equal(seen.episode.metrics["seen"], seen.obs % 100)


def test_termination_wins_over_truncation():
    seen = run(np.array([[0], [0], [1]]))
    assert seen.terminated[3, 0] and not seen.truncated[3, 0]


def test_first_is_the_wrappers_whatever_the_suite_reports():
    """A suite that pays, and claims an end, where the boundary rule has a reset."""
    yes = jnp.ones(2, bool)
    paid = jnp.array([[1.0, 2.0], [3.0, 1.0]])
    report = Report(jnp.zeros((2, 1)), paid.sum(-1), yes, yes, agent_reward=paid)
    before = Running(jnp.array([True, False]), jnp.array([10.0, 20.0]), jnp.array([5, 6]))
    after, timestep = before.follow(report)
    np.testing.assert_array_equal(timestep.reward, [0, 4])
    np.testing.assert_array_equal(timestep.agent_reward, [[0, 0], [3, 1]])
    np.testing.assert_array_equal(timestep.first, [True, False])
    np.testing.assert_array_equal(timestep.terminated, [False, True])
    np.testing.assert_array_equal(timestep.truncated, [False, False])
    np.testing.assert_array_equal(timestep.episode.returns, [0, 24])
    np.testing.assert_array_equal(timestep.episode.length, [0, 7])
    np.testing.assert_array_equal(after.ended, [False, True])


def test_lanes_reset_apart():
    def reset_lane(key):
        return jnp.array(0), Report(
            jax.random.uniform(key), jnp.float32(0), jnp.array(False), jnp.array(False)
        )

    _, timestep = autoreset.reset(reset_lane, jax.random.key(0), 50)
    assert len(np.unique(timestep.obs)) == 50


class Dice:
    """Lives for as long as its keys want, or is cut by action 1. Counts the worlds it makes."""

    def __init__(self):
        self.made = 0

    def count(self, world):
        self.made += 1

    def reset(self, key):
        world = jax.random.uniform(key)
        jax.debug.callback(self.count, world)  # called for each of many lanes
        return (world, key, Lasting(jnp.int32(0))), Report(
            world, jnp.float32(0), jnp.array(False), jnp.array(False)
        )

    def step(self, state, action, key):
        lives = (jax.random.uniform(key) > 0.3) | (action == 2)
        world, world_key, steps = state
        state = (world, world_key, Lasting(steps.value + 1))
        return state, Report(world, jnp.float32(1), ~lives, action == 1)

    def roll(self, num_envs, resets_at_once):
        """40 steps; in the tenth of them every lane is cut."""
        state, start = autoreset.reset(self.reset, jax.random.key(0), num_envs)
        jax.effects_barrier()
        self.made = 0

        def step(state, x):
            action, key = x
            return autoreset.step(
                self.reset,
                self.step,
                state,
                jnp.full(num_envs, action),
                key,
                resets_at_once=resets_at_once,
            )

        actions = jnp.zeros(40, int).at[6:10].set(jnp.array([2, 2, 2, 1]))
        state, rest = jax.lax.scan(step, state, (actions, jax.random.split(jax.random.key(1), 40)))
        jax.effects_barrier()
        state = jax.tree.map(lambda x: jax.random.key_data(x) if x.dtype == key_type else x, state)
        return state, jax.tree.map(lambda a, b: np.concatenate([a[None], b]), start, rest)


key_type = jax.random.key(0).dtype


@pytest.mark.parametrize("resets_at_once", [1, 3, 4, 7])
def test_resets_in_batches_are_those_of_every_lane(resets_at_once):
    """Whether they divide the lanes or not, and where every lane has ended."""
    num_envs, every, batched = 7, Dice(), Dice()
    expected = every.roll(num_envs, None)
    got = batched.roll(num_envs, resets_at_once)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    np.testing.assert_array_equal(got[0].inner[2].value, 40)  # it outlasts every episode
    first = expected[1].first[1:]
    assert first.all(1).any() and not first.any(1).all()
    # Nobody shares a world with a neighbour, nor keeps that of an episode before.
    assert len(np.unique(got[1].obs[got[1].first])) == got[1].first.sum() > 50
    assert every.made == 40 * num_envs
    batches = -(-first.sum(1) // resets_at_once)
    assert batched.made == resets_at_once * batches.sum()
