"""Sequences drawn from recordings against the environment's own steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import STACK, describe as describe_random, observation, random_episodes, write
from varied import VARIED, Whim

from eqx_q.agents import decide
from eqx_q.data import Blocks, Replay, Sampling, Writer
from eqx_q.loops.recording import describe, record
from eqx_q.types import Rollout

STEPS = 25
sequences = jax.jit(Replay.sequences, static_argnums=2)


def lifetime(agent, env, num_steps):
    """All timesteps of one lane until so many transitions are made, and the actions between them.

    The first axis is time; those that a recording holds, whose last episode is cut.
    """
    reset_key, key = jax.random.split(jax.random.key(1))
    state, now = env.reset(reset_key)
    memory, timesteps, actions = agent.initial_memory(1), [now], []
    step, act = eqx.filter_jit(env.step), eqx.filter_jit(decide)
    while num_steps or not now.ended[0]:
        if not num_steps:  # here it is cut
            timesteps[-1] = eqx.tree_at(lambda t: t.truncated, now, ~now.terminated)
            break
        key, act_key, env_key = jax.random.split(key, 3)
        decision = act(agent, now, memory, epsilon=jnp.float32(0), key=act_key)
        memory = decision.memory
        state, now = step(state, decision.action, env_key)
        timesteps.append(now)
        actions.append(decision.action)
        num_steps -= int(not now.first[0])
    timesteps = jax.tree.map(lambda *x: np.stack(x)[:, 0], *timesteps)
    return timesteps, np.stack(actions)[:, 0]


@pytest.mark.parametrize("name", VARIED)
def test_sequences_are_what_the_environment_said(tmp_path, name):
    env = VARIED[name]
    agent = Whim.of(env)
    with Writer(tmp_path / "data", describe(env, "made/Up"), narrow=True) as writer:
        record(agent, env, writer, num_steps=STEPS, key=jax.random.key(1), shard="only")
        dataset = writer.finish()
    timesteps, actions = lifetime(agent, env, STEPS)
    replay, length = Blocks(dataset, Sampling()).load(0), 6
    places = jnp.arange(STEPS)
    ours: Rollout = sequences(replay, places, length)
    assert ours.memory is None and ours.values is None

    assert len(timesteps.reward) == len(dataset)  # a row for each
    begins = np.flatnonzero(~timesteps.ended)
    assert len(begins) == STEPS and np.sum(timesteps.first) > 5
    for lane, begin in enumerate(begins.tolist()):
        num = min(length + 1, len(dataset) - begin)
        of_lane = jax.tree.map(lambda x, lane=lane: np.asarray(x[:, lane]), ours)
        real = of_lane.real
        expected = jax.tree.map(lambda x, begin=begin, num=num: x[begin : begin + num], timesteps)
        for field in vars(expected).keys() - {"episode"}:
            seen = jax.tree.map(lambda x, num=num: x[:num], getattr(of_lane.timesteps, field))
            jax.tree.map(assert_same, seen, getattr(expected, field))
        np.testing.assert_array_equal(of_lane.timesteps.episode.ended[:num], expected.ended)
        np.testing.assert_array_equal(real[: num - 1], ~expected.first[1:])
        taken = actions[begin : begin + num - 1][real[: num - 1]]
        np.testing.assert_array_equal(of_lane.actions[real], taken)
        # After the last row nothing happens any more.
        assert not np.any(real[num - 1 :]) and np.all(of_lane.timesteps.first[num:])
        assert not np.any(of_lane.timesteps.ended[num:] | (of_lane.timesteps.reward[num:] != 0))
        space = env.action_space
        others = of_lane.actions[~real].reshape(-1, *(space.shape or ())).astype(space.dtype)
        assert all(space.contains(x) for x in others)


def assert_same(ours, expected):
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("clip", [False, True])
def test_of_stacked_frames_and_clipped_rewards(tmp_path, clip):
    episodes = random_episodes(0, num=6, stack=4)
    dataset = write(tmp_path / "data", [episodes], describe_random(STACK, 4))
    replay = Blocks(dataset, Sampling(reward_clip=clip)).load(0)
    length = 5
    ours = sequences(replay, jnp.arange(int(replay.num_drawable)), length)
    timeline = []
    for episode in episodes:
        for t in range(len(episode.action)):
            reward = episode.reward[t - 1] if t else np.float32(0)
            timeline.append(
                (observation(episode, t, 4, "zeros"), np.clip(reward, -1, 1) if clip else reward)
            )
    begins = np.flatnonzero(dataset.rows.acted)
    for lane, begin in enumerate(begins.tolist()):
        obs, reward = (np.stack(x) for x in zip(*timeline[begin : begin + length + 1], strict=True))
        np.testing.assert_array_equal(ours.timesteps.obs[: len(obs), lane], obs)
        np.testing.assert_array_equal(ours.timesteps.reward[: len(obs), lane], reward)


def test_blocks_end_where_their_rows_do(tmp_path):
    """Rows that only fill a block up are never in a sequence."""
    episodes = random_episodes(0, num=20)
    dataset = write(tmp_path / "data", [episodes])
    blocks = Blocks(dataset, Sampling(), num_blocks=3)
    seen = 0
    for index in range(3):
        replay = blocks.load(index)
        rows, length = int(replay.num_rows), 12
        seen += rows
        places = jnp.arange(int(replay.num_drawable))
        ours = sequences(replay, places, length)
        begins = np.asarray(replay.drawable)[: len(places)]
        t = begins + np.arange(length + 1)[:, None]
        assert rows < len(replay.action) and np.any(t >= rows)
        assert np.all(ours.timesteps.first[t >= rows])
        assert np.all(np.any(np.asarray(ours.timesteps.obs) != 0, axis=-1))
        last = begins == rows - 2
        np.testing.assert_array_equal(ours.real[:, last].sum(0), [1])
    assert seen == len(dataset)


def test_transitions_say_what_is_legal(tmp_path):
    env = VARIED["dict"]
    with Writer(tmp_path / "data", describe(env, "made/Up")) as writer:
        record(Whim.of(env), env, writer, num_steps=20, key=jax.random.key(1), shard="only")
        dataset = writer.finish()
    rows = dataset.rows
    ours = Blocks(dataset, Sampling()).load(0).transitions(jnp.arange(20), 2)
    begins = np.flatnonzero(rows.acted)
    np.testing.assert_array_equal(ours.action_mask, rows.action_mask[begins])
    np.testing.assert_array_equal(ours.next_action_mask, rows.action_mask[begins + ours.length])
    for obs, at in ((ours.obs, begins), (ours.next_obs, begins + ours.length)):
        expected = jax.tree.map(lambda x, at=at: x[at], rows.obs)
        jax.tree.map(np.testing.assert_array_equal, obs, expected)
    np.testing.assert_array_equal(ours.action, rows.action[begins])


def test_memory_is_counted_for_all_that_is_there(tmp_path):
    env = VARIED["team"]
    with Writer(tmp_path / "data", describe(env, "made/Up")) as writer:
        record(Whim.of(env), env, writer, num_steps=20, key=jax.random.key(1), shard="only")
        dataset = writer.finish()
    of_each = (2 * 4 + 8 + 6) + 4 + 3 + 1 + 4  # observation, action, mask, whether there, reward
    assert Blocks(dataset, Sampling())._row_bytes == 2 * of_each + 4 * 4 + 4 + 3 + 8
