"""Gymnasium environments, against themselves stepped by hand."""

import os
import re
import signal

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Text, Tuple
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import TransformObservation
from kinds import ACTIONS, Kinds, multi_mask
from rollouts import CHUNK, assert_equal, cart_column, play, roll

import eqx_q.wrappers as wrappers
from eqx_q.errors import UsageError
from eqx_q.wrappers.conversion import as_taken


class Toy(gymnasium.Env):
    """Observes pairs; ends after three steps by task and limit at once; fails on demand."""

    observation_space = Dict({"place": Discrete(3), "speed": Box(-9, 9, (2,), np.float64)})
    action_space = Discrete(3, start=5)

    def __init__(self, fail_at: int = -1):
        self.fail_at, self.calls = fail_at, 0

    def _observe(self):
        return {"place": self.time % 3, "speed": np.array([self.time, self.last])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = self.last = 0
        return self._observe(), {"action_mask": np.array([1, 0, 1], np.int8)}

    def step(self, action):
        assert action in (5, 6, 7)
        self.time, self.last, self.calls = self.time + 1, int(action), self.calls + 1
        if self.calls == self.fail_at:
            raise ValueError("the wheel came off")
        mask = np.array([0, 1, self.time == 2], np.int8)
        both = self.time == 3
        return self._observe(), 0.5, both, both, {} if both else {"action_mask": mask}


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "Taxi-v4", "FrozenLake-v1"])
def test_equals_the_environment_stepped_by_hand(name):
    limit, seed = 15, 3
    env = wrappers.make(
        f"gymnasium/{name}", 2, seed=seed, vectorization="sync", max_episode_steps=limit
    )
    actions, timesteps = play(env, 0, 2)
    env.close()
    for lane in range(2):
        raw = gymnasium.make(name, max_episode_steps=limit)
        dtype = np.float32 if isinstance(raw.observation_space, Box) else np.int32
        ended, lane_seed = True, seed + lane
        for t in range(2 * CHUNK + 1):
            if ended:
                obs, info = raw.reset(seed=lane_seed)
                reward, terminated, truncated, lane_seed, first = 0, False, False, None, True
            else:
                obs, reward, terminated, truncated, info = raw.step(int(actions[t - 1, lane]))
                first = False
            np.testing.assert_array_equal(timesteps.obs[t, lane], np.asarray(obs, dtype))
            assert timesteps.reward[t, lane] == np.float32(reward)
            assert timesteps.first[t, lane] == first
            assert timesteps.terminated[t, lane] == terminated
            assert timesteps.truncated[t, lane] == (truncated and not terminated)
            if "action_mask" in info:
                np.testing.assert_array_equal(timesteps.action_mask[t, lane], info["action_mask"])
            ended = terminated or truncated
    assert (timesteps.action_mask is not None) == (name == "Taxi-v4")
    assert timesteps.ended.sum() >= 2


def test_the_vectorised_entry_point_is_used_and_equals_itself_stepped_by_hand():
    env = wrappers.make("gymnasium/CartPole-v1", 3, seed=5)
    raw = gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point")
    assert type(env.host.vector) is type(raw.unwrapped)
    actions, timesteps = play(env, 0, 3)
    obs, _ = raw.reset(seed=5)
    np.testing.assert_array_equal(timesteps.obs[0], obs)
    for t, action in enumerate(actions, start=1):
        obs, reward, terminated, truncated, _ = raw.step(action)
        np.testing.assert_array_equal(timesteps.obs[t], obs)
        np.testing.assert_array_equal(timesteps.reward[t], reward)
        np.testing.assert_array_equal(timesteps.terminated[t], terminated)
        np.testing.assert_array_equal(timesteps.truncated[t], truncated)
    env.close()


def test_a_vectorised_entry_point_that_runs_on_jax_is_not_called_back_from_jax():
    env = wrappers.make("gymnasium/phys2d/CartPole-v1", 2)
    assert isinstance(env.host.vector, SyncVectorEnv)
    _, timesteps = play(env, 0, 3)
    assert timesteps.ended.sum() >= 2 and (timesteps.reward[timesteps.first] == 0).all()
    env.close()


@pytest.fixture
def interruptible():
    """The usual answer to Ctrl-C; a shell that runs tests in the background switches it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_processes_equal_one_after_the_other(interruptible):
    sync = wrappers.make("gymnasium/Acrobot-v1", 2, seed=1, vectorization="sync")
    apart = wrappers.make("gymnasium/Acrobot-v1", 2, seed=1, vectorization="async")
    assert_equal(play(sync, 0, 1)[1], play(apart, 0, 1)[1])
    assert apart.max_episode_steps == 500
    # Ctrl-C reaches every process; it is for the parent alone.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for process in apart.host.vector.processes:
        os.kill(process.pid, signal.SIGINT)
    assert_equal(play(sync, 1, 1)[1], play(apart, 1, 1)[1])
    sync.close()
    apart.close()


def test_spaces_masks_and_flags_of_ones_own():
    env = wrappers.make(Toy, 2)
    assert env.observation_space == Dict({"place": Discrete(3), "speed": Box(-9, 9, (2,))})
    assert env.action_space == Discrete(3, start=5)
    actions, timesteps = play(env, 0, 1)
    for lane in range(2):
        time = 0
        for t in range(CHUNK + 1):
            time = 0 if timesteps.first[t, lane] else time + 1
            last = 0 if time == 0 else actions[t - 1, lane]
            assert timesteps.obs["place"][t, lane] == time % 3
            np.testing.assert_array_equal(timesteps.obs["speed"][t, lane], [time, last])
            mask = [[1, 0, 1], [0, 1, 0], [0, 1, 1], [1, 1, 1]][time]  # the last gave none
            np.testing.assert_array_equal(timesteps.action_mask[t, lane], mask)
            assert timesteps.terminated[t, lane] == (time == 3)
    assert not timesteps.truncated.any()
    env.close()


@pytest.mark.parametrize("actions", ACTIONS)
def test_kinds_of_every_sort_equal_the_environment_stepped_by_hand(actions):
    apart = actions == "multi_discrete"
    env = wrappers.make(
        lambda: Kinds(actions),
        2,
        seed=3,
        vectorization="async" if apart else "sync",
        leave_out=["word"],
    )
    took, timesteps = play(env, 0, 1)
    assert (took.dtype.kind == "f") == (actions == "box")
    for lane in range(2):
        raw, ended, seed = Kinds(actions), True, 3 + lane
        for t in range(CHUNK + 1):
            reward = 0.0
            if ended:
                (obs, _), ended, seed = raw.reset(seed=seed), False, None
            else:
                action = np.asarray(took[t - 1, lane], raw.action_space.dtype)
                obs, reward, ended, *_ = raw.step(as_taken(raw.action_space, action)[()])
            del obs["word"]
            jax.tree.map(
                lambda seen, x: np.testing.assert_array_equal(seen, np.asarray(x, seen.dtype)),
                jax.tree.map(lambda x: x[t, lane], timesteps.obs),  # noqa: B023
                obs,
            )
            assert timesteps.reward[t, lane] == np.float32(reward)
            assert timesteps.terminated[t, lane] == ended
            if apart:
                mask = multi_mask(raw.time)  # of a factor that nothing is legal of, all is
                expected = np.concatenate([x if x.any() else x + 1 for x in mask])
                np.testing.assert_array_equal(timesteps.action_mask[t, lane], expected)
    assert timesteps.obs["image"].dtype == np.uint8 and timesteps.terminated.sum() >= 4
    env.close()


class Chooser(gymnasium.Env):
    """Observes what is legal."""

    def __init__(self, others):
        self.action_space = Discrete(3)
        self.observation_space = Dict({**others, "action_mask": MultiBinary(3)})

    def _observe(self):
        obs = {name: space.low for name, space in self.observation_space.items() if name[0] == "o"}
        return {**obs, "action_mask": np.array([0, 1, 1], np.int8)}

    def reset(self, *, seed=None, options=None):
        return self._observe(), {}

    def step(self, action):
        return self._observe(), 0.0, False, False, {}


def test_a_mask_in_the_observation_is_not_seen():
    box = Box(1, 2, (2,))
    for others, seen in (
        ({"observation": box}, box),
        ({"observation": box, "other": box}, Dict({"observation": box, "other": box})),
    ):
        env = wrappers.make(lambda: Chooser(others), 2)  # noqa: B023
        assert env.observation_space == seen
        _, timestep = env.reset(jax.random.key(0))
        np.testing.assert_array_equal(timestep.action_mask, [[0, 1, 1]] * 2)
        assert all((x == 1).all() for x in jax.tree.leaves(timestep.obs))
        env.close()
    env = wrappers.make(lambda: Chooser({"observation": box}), 2, leave_out=["action_mask"])
    assert env.reset(jax.random.key(0))[1].action_mask is None
    assert list(env.observation_space) == ["observation"]
    assert env.recording.preprocessing == {"leave_out": ["action_mask"]}
    assert env.replicate(1).observation_space == env.observation_space
    env.close()


class Parts(gymnasium.Env):
    """Observes what it is made with, some of it nothing to learn from."""

    action_space = Discrete(2)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


BOX, WORD = Box(0, 1, (2,)), Text(3)


@pytest.mark.parametrize(
    ("space", "path", "seen"),
    [
        (Tuple([Dict({"word": WORD, "x": BOX}), BOX]), "0.word", Tuple([Dict({"x": BOX}), BOX])),
        (Dict({"a.b": WORD, "x": BOX}), "a.b", Dict({"x": BOX})),
        (
            Dict({"a.b": Dict({"c": WORD, "d": BOX}), "a": Dict({"b": BOX})}),
            "a.b.c",
            Dict({"a.b": Dict({"d": BOX}), "a": Dict({"b": BOX})}),
        ),
    ],
)
def test_what_cannot_be_learnt_from_is_left_out_by_the_name_that_is_told(space, path, seen):
    advice = f"leave it out by its name (leave_out=['{path}'])"
    with pytest.raises(UsageError, match=re.escape(advice)):
        wrappers.make(lambda: Parts(space), 2)
    env = wrappers.make(lambda: Parts(space), 2, leave_out=[path])
    assert env.observation_space == seen
    _, timestep = env.reset(jax.random.key(0))
    assert seen.contains(jax.tree.map(lambda x: np.asarray(x[1]), timestep.obs))
    env.close()


def test_an_entry_of_a_tuple_is_not_left_out():
    space = Tuple([WORD, BOX])
    for options in ({}, {"leave_out": ["0"]}):
        with pytest.raises(UsageError, match=r"'0'.*: wrap the env.*\.TransformObservation"):
            wrappers.make(lambda: Parts(space), 2, **options)
    with pytest.raises(UsageError, match="unknown entry of observations '2': known are 0, 1"):
        wrappers.make(lambda: Parts(space), 2, leave_out=["2"])
    env = wrappers.make(lambda: TransformObservation(Parts(space), lambda obs: obs[1], BOX), 2)
    assert env.observation_space == BOX
    env.close()


class Late(gymnasium.Env):
    """Says only after `reset` what is legal."""

    def __init__(self, actions):
        self.action_space, self.observation_space = actions, Box(0, 1, (2,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {"action_mask": np.array([0, 1, 1])}


def test_a_mask_that_comes_too_late_is_told():
    env = wrappers.make(lambda: Late(Discrete(3)), 2)
    env.host.reset()
    with pytest.raises(UsageError, match="include it in the info of every reset, too"):
        env.host.step(np.zeros(2, int))
    env.close()
    unmasked = wrappers.make(lambda: Late(Box(0, 1, (3,))), 2)  # which no mask is for
    assert "action_mask" not in unmasked.host.step(np.zeros((2, 3), np.float32))
    unmasked.close()


def test_the_seed_is_for_the_first_reset_and_later_ones_go_on():
    env = wrappers.make("gymnasium/CartPole-v1", 2, seed=4)
    again = env.replicate(2, seed=4)
    starts = [one.reset(jax.random.key(0))[1].obs for one in (env, env, again, again)]
    assert not np.array_equal(starts[0], starts[1])
    np.testing.assert_array_equal(starts[0], starts[2])
    np.testing.assert_array_equal(starts[1], starts[3])
    for one in (env, again):
        one.close()


@pytest.mark.filterwarnings("ignore")
def test_an_error_in_the_environment_is_shown(caplog):
    env = wrappers.make(Toy, 1, fail_at=7)
    state, _ = env.reset(jax.random.key(0))
    with pytest.raises(Exception, match="the wheel came off"):
        jax.block_until_ready(roll(env, state, jax.random.key(0)))
    env.close()
    # And nothing else is harmed.
    again = wrappers.make(Toy, 1)
    _, timesteps = play(again, 0, 1)
    assert timesteps.episode.ended.sum() == 5
    again.close()


def test_it_does_not_lock_up_while_jax_is_busy_elsewhere():
    env = wrappers.make("gymnasium/CartPole-v1", 4)
    state, _ = env.reset(jax.random.key(0))
    heavy = jax.jit(lambda x: jnp.sum(x @ x))
    matrix = jnp.ones((300, 300))
    for i in range(10):
        state, (_, timesteps) = roll(env, state, jax.random.key(i))  # returns before it is done
        for j in range(3):
            assert float(heavy(matrix * (i + j))) >= 0
        jax.block_until_ready(timesteps)
    env.close()


def test_closed_is_said_so():
    env = wrappers.make("gymnasium/CartPole-v1", 1)
    state, _ = env.reset(jax.random.key(0))
    env.close()
    env.close()
    with pytest.raises(UsageError, match="closed"):
        env.reset(jax.random.key(0))
    with pytest.raises(UsageError, match="closed"):
        env.step(state, jnp.zeros(1, int), jax.random.key(0))
    assert env.render(state) is None


def test_pictures_of_each_lane():
    for vectorization in ("auto", "sync"):
        env = wrappers.make("gymnasium/CartPole-v1", 2, vectorization=vectorization)
        state, _ = env.reset(jax.random.key(0))
        for i in range(8):
            state, _ = env.step(state, jnp.array([0, 1]), jax.random.key(i))
        left, right = env.render(state, 0), env.render(state, 1)
        assert left.dtype == np.uint8 and left.shape == (400, 600, 3)
        assert cart_column(left) + 10 < cart_column(right)
        env.close()
