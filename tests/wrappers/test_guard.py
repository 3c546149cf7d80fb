"""Environments that fail: raise, hang, return NaN or another shape."""

import os
import threading
import time
from typing import ClassVar

import gymnasium
import jax
import numpy as np
import pytest
from pettingzoo import ParallelEnv

import eqx_q
from eqx_q import wrappers
from eqx_q.data import Dataset, Writer
from eqx_q.errors import LaneError, UsageError
from eqx_q.loops.callbacks import Evaluation
from eqx_q.loops.evaluation import play_episodes
from eqx_q.loops.recording import describe, record
from eqx_q.wrappers.host import closing


class Fragile(gymnasium.Env):
    """Counts its steps, pays 1 a step, ends after six; in the second lane its third step breaks.

    After a restart it starts from 10 times as many, and does not break any more.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, how="raises", lanes=1, always=False):
        self.how, self.always = how, always
        self.made = _made.setdefault(how, [])
        self.made.append(self)
        self.breaks = len(self.made) == 2 or always
        self.age = 0 if len(self.made) <= 2 else 10

    def _obs(self):
        return np.array([self.age, self.count], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._obs(), {}

    def step(self, action):
        self.count += 1
        if self.breaks and self.count == 3:
            if self.how == "raises":
                raise RuntimeError("the motor is hot")
            if self.how == "hangs":
                time.sleep(20)
            if self.how == "nan":
                return np.full(2, np.nan, np.float32), 1.0, False, False, {}
            if self.how == "reward":
                return self._obs(), np.inf, False, False, {}
            if self.how == "shape":
                return self._obs()[:1], 1.0, False, False, {}
        return self._obs(), 1.0, self.count == 6, False, {}


_made: dict[str, list] = {}
MESSAGES = {
    "raises": r"RuntimeError: the motor is hot \(test_guard.py:\d+\)",
    "hangs": "no answer within 0.5 s",
    "nan": "an observation is not finite",
    "reward": "the reward is inf",
    "shape": r"an observation has shape \(1,\), but its space has shape \(2,\)",
}


@pytest.fixture(autouse=True)
def _anew():
    _made.clear()


def options(how):
    return {"timeout": 0.5} if how == "hangs" else {}


def play(env, steps):
    """Observations, rewards, first and ended of every timestep."""
    step = jax.jit(env.step)
    state, timestep = env.reset(jax.random.key(0))
    actions = np.zeros((env.num_envs, *([env.num_agents] if env.num_agents else [])), np.int32)
    timesteps = [timestep]
    for _ in range(steps):
        state, timestep = step(state, actions, jax.random.key(0))
        timesteps.append(timestep)
    return jax.tree.map(lambda *x: np.stack(x), *timesteps)


def make_agent(env, **options):
    defaults = {
        "rollout_length": 8,
        "num_minibatches": 1,
        "network_options": {"hidden_sizes": (8,)},
    }
    spaces = env.observation_space, env.action_space
    return eqx_q.PQN.create(*spaces, key=jax.random.key(1), **(defaults | options))


@pytest.mark.parametrize("how", MESSAGES)
def test_by_default_the_lane_and_what_it_did_are_told(how):
    env = wrappers.make(lambda: Fragile(how), 2, **options(how))
    message = f"the environment of lane 1 failed: {MESSAGES[how]}; set on_error=restart"
    with pytest.raises(LaneError, match=message), closing(env):
        play(env, 3)


@pytest.mark.parametrize("how", MESSAGES)
def test_a_restarted_lane_starts_an_episode_and_the_others_go_on(how, caplog):
    env = wrappers.make(lambda: Fragile(how), 2, on_error="restart", **options(how))
    with closing(env):
        seen = play(env, 8)
    np.testing.assert_array_equal(seen.obs[:, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0, 1])
    np.testing.assert_array_equal(seen.obs[:, 1, 1], [0, 1, 2, 0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(seen.obs[:, 1, 0], [0, 0, 0] + [10] * 6)
    np.testing.assert_array_equal(np.flatnonzero(seen.first[:, 0]), [0, 7])
    np.testing.assert_array_equal(np.flatnonzero(seen.first[:, 1]), [0, 3])
    np.testing.assert_array_equal(seen.reward[:, 1], [0, 1, 1, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(seen.episode.returns[:, 1], [0, 1, 2, 0, 1, 2, 3, 4, 5])
    assert not seen.ended[:, 1].any()
    (line,) = [x.getMessage() for x in caplog.records if "restarted" in x.getMessage()]
    assert line.startswith("restarted the environment of lane 1: ")


def test_a_process_that_raises_or_hangs_is_restarted_and_one_that_dies_is_told():
    restarting = wrappers.make(InProcess, 2, vectorization="async", on_error="restart", timeout=2.0)
    with closing(restarting) as env:
        seen = play(env, 4)
    np.testing.assert_array_equal(seen.obs[:, :, 0], [[0, 0], [1, 1], [0, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(seen.first[:, 0], [True, False, True, False, True])
    dying = wrappers.make(InProcess, 2, vectorization="async", how="dies")
    with (
        pytest.raises(LaneError, match=r"the process of lane (0|1|0, 1) died"),
        closing(dying) as env,
    ):
        play(env, 4)


class InProcess(gymnasium.Env):
    """Breaks in every second step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, how="raises"):
        self.how = how

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        if self.count == 2:
            if self.how == "dies":
                os._exit(1)
            raise RuntimeError("no")
        return np.full(1, self.count, np.float32), 1.0, False, False, {}


def test_a_lane_that_breaks_too_often_ends_the_run():
    env = wrappers.make(
        lambda: Fragile("raises", always=True), 1, on_error="restart", max_restarts=3
    )
    with pytest.raises(LaneError, match="restarted 3 times in 1000 steps"), closing(env):
        play(env, 20)
    assert len(_made["raises"]) == 4


class Pair(ParallelEnv):
    """Two agents, who count; in its first lane the second one sees no number in the third step."""

    metadata: ClassVar = {"name": "pair"}
    possible_agents = ("a", "b")

    def __init__(self):
        self.breaks = not _made.setdefault("pair", [])
        _made["pair"].append(self)

    def observation_space(self, agent):
        return gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def action_space(self, agent):
        return gymnasium.spaces.Discrete(2)

    def _told(self, value):
        return dict.fromkeys(self.agents, value)

    def reset(self, seed=None, options=None):
        self.agents, self.count = list(self.possible_agents), 0
        return self._told(np.zeros(1, np.float32)), self._told({})

    def step(self, actions):
        self.count += 1
        obs = self._told(np.full(1, self.count, np.float32))
        if self.breaks and self.count == 3:
            obs["b"] = np.full(1, np.nan, np.float32)
        no = self._told(False)
        return obs, self._told(1.0), no, no, self._told({})


class Stuck(gymnasium.Env):
    """Its third step never ends, and holds the lock that closing it needs."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self):
        self.lock, self.count = threading.Lock(), 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        with self.lock:
            time.sleep(20 if self.count == 3 else 0)
        return np.full(1, self.count, np.float32), 1.0, False, False, {}

    def close(self):
        with self.lock:
            pass


def test_nobody_waits_for_a_lane_that_hangs():
    begin = time.monotonic()
    stopping = wrappers.make(Stuck, 1, timeout=0.2)
    with pytest.raises(LaneError, match=r"no answer within 0.2 s"), closing(stopping):
        play(stopping, 3)
    with closing(wrappers.make(Stuck, 1, on_error="restart", timeout=0.2)) as env:
        assert play(env, 4).obs[:, 0, 0].tolist() == [0, 1, 2, 0, 1]
    assert time.monotonic() - begin < 10


def test_closed_lanes_leave_no_threads():
    before = threading.active_count()
    for _ in range(3):
        env = wrappers.make(InProcess, 2, vectorization="sync", timeout=5.0)
        play(env, 1)
        env.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


class BreaksInReset(InProcess):
    """Its second reset breaks."""

    def __init__(self):
        super().__init__()
        self.resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        if self.resets == 3:  # the first one is asked for when it is made
            raise RuntimeError("no third one")
        return super().reset()

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, True, False, {}


def test_a_reset_that_breaks_is_told(caplog):
    with closing(wrappers.make(BreaksInReset, 1, on_error="restart")) as env:
        seen = play(env, 2)
    assert seen.first[:, 0].tolist() == [True, False, True]
    (line,) = [x.getMessage() for x in caplog.records if "restarted" in x.getMessage()]
    assert "RuntimeError: no third one" in line


class HalfBlind(InProcess):
    """What nobody sees is not finite."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.array([1, np.nan], np.float32), {}


def test_what_is_hidden_may_be_anything():
    with closing(wrappers.make(HalfBlind, 1, observe=[0])) as env:
        assert play(env, 0).obs.tolist() == [[[1.0]]]
    with pytest.raises(LaneError, match="an observation is not finite"):
        wrappers.make(HalfBlind, 1)


def test_an_evaluation_counts_no_part_of_a_broken_episode():
    env = wrappers.make(lambda: Fragile("raises"), 2, on_error="restart")
    agent = make_agent(env)
    with closing(env), pytest.warns(UserWarning, match="were cut at 2 steps"):
        played = play_episodes(
            agent, env, num_episodes=6, key=jax.random.key(0), max_episode_steps=2
        )
    assert (played.lengths > 0).all()
    np.testing.assert_array_equal(played.returns, played.lengths)


class Mourning(Pair):
    """The second agent dies at once; what is said of it then is no number, and of a third one."""

    def step(self, actions):
        obs, reward, no, _, info = super().step(actions)
        if "b" not in actions:
            obs["b"], reward["b"] = np.full(1, np.nan, np.float32), None
            reward["referee"] = obs["referee"] = None
        terminated = no | {"b": "b" in actions}
        self.agents = ["a"]
        return obs, reward, terminated, no, info


def test_what_is_said_of_the_dead_does_not_count():
    _made["pair"] = [None]  # so that none breaks
    with closing(wrappers.make(Mourning, 1)) as env:
        seen = play(env, 3)
    assert seen.obs[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_team_is_restarted():
    with closing(wrappers.make(Pair, 2, on_error="restart")) as env:
        seen = play(env, 4)
    np.testing.assert_array_equal(seen.obs[:, :, 1, 0], [[0, 0], [1, 1], [2, 2], [0, 3], [1, 4]])
    np.testing.assert_array_equal(np.argwhere(seen.first), [[0, 0], [0, 1], [3, 0]])
    _made.clear()
    message = "the environment of lane 0 failed: an observation is not finite at 'b'"
    with pytest.raises(LaneError, match=message), closing(wrappers.make(Pair, 2)) as env:
        play(env, 3)


class Stateful(Pair):
    """In its second lane the state breaks in the third step."""

    def __init__(self):
        super().__init__()
        self.breaks, self.loses = False, len(_made["pair"]) == 2

    def state(self):
        if self.loses and self.count == 3:
            raise RuntimeError("nobody knows")
        return np.array([self.count], np.float32)


def test_a_team_whose_state_breaks_is_restarted():
    with closing(wrappers.make(Stateful, 2, on_error="restart")) as env:
        seen = play(env, 4)
    np.testing.assert_array_equal(np.argwhere(seen.first), [[0, 0], [0, 1], [3, 1]])
    np.testing.assert_array_equal(seen.global_state[:, 1, 0], [0, 1, 2, 0, 1])
    _made.clear()
    message = "the environment of lane 1 failed: RuntimeError: nobody knows"
    with pytest.raises(LaneError, match=message), closing(wrappers.make(Stateful, 2)) as env:
        play(env, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"on_error": "ignore"}, "unknown on_error 'ignore': .* restart, stop"),
        ({"timeout": 0}, "timeout=0: give a number of seconds above 0"),
        ({"max_restarts": 0}, "max_restarts=0: give a whole number, 1 or more"),
    ],
)
def test_bad_options_are_told(given, message):
    with pytest.raises(UsageError, match=message):
        wrappers.make(lambda: Fragile(), 1, **given)
    with pytest.raises(UsageError, match="not separate Python environments"):
        wrappers.make("gymnax/CartPole-v1", 1, on_error="restart")


def test_a_broken_episode_is_masked_out_of_learning():
    """Targets are those of an episode that is truncated where the environment was last sound."""
    env = wrappers.make(lambda: Fragile("raises"), 2, on_error="restart")
    agent = make_agent(env, num_epochs=1, lambda_=0.9)
    with closing(env):
        timesteps = play(env, 8)
    actions = np.zeros((8, 2), np.int32)
    rollout = eqx_q.Rollout(timesteps, actions)
    cut = np.array(timesteps.truncated)
    cut[2, 1] = True  # where the second lane was last sound
    episode = eqx_q.TimeStep(**{**vars(timesteps), "truncated": cut})
    as_cut = eqx_q.Rollout(episode, actions)
    updated, metrics, *_ = agent.update(rollout, key=jax.random.key(2))
    expected, expected_metrics, *_ = agent.update(as_cut, key=jax.random.key(2))
    for one, other in zip(jax.tree.leaves(updated), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert metrics["loss"] == expected_metrics["loss"]
    whole = np.array(timesteps.first)
    whole[3, 1] = False  # as if nothing had broken: this must differ
    other = eqx_q.Rollout(eqx_q.TimeStep(**{**vars(timesteps), "first": whole}), actions)
    assert agent.update(other, key=jax.random.key(2))[1]["loss"] != metrics["loss"]


def test_training_counts_restarts_and_goes_on():
    with closing(wrappers.make(lambda: Fragile("raises"), 2, on_error="restart")) as env:
        agent = make_agent(env)
        _, history = eqx_q.train(agent, env, total_steps=64, key=jax.random.key(2), log_every=1)
    assert [row["restarts"] for row in history] == [1, 0, 0, 0]
    assert history[-1]["transitions"] < 64


class Keep:
    """Notes what it is asked to rescue."""

    def __init__(self):
        self.kept = []

    def __call__(self, run_state, metrics):
        pass

    def rescue(self, run_state, metrics):
        self.kept.append((int(run_state.num_updates), metrics["env_steps"]))


def test_the_last_good_state_is_kept_where_a_lane_breaks():
    env, keep = wrappers.make(lambda: Late(), 1), Keep()
    agent, how = make_agent(env, rollout_length=4), {"key": jax.random.key(2), "log_every": 1}
    with pytest.raises(LaneError, match="lane 0 failed: ValueError: too late"), closing(env):
        eqx_q.train(agent, env, total_steps=100, callbacks=[keep], **how)
    assert keep.kept == [(4, 16)]


def test_the_last_state_is_kept_where_the_last_evaluation_breaks():
    class Evaluate:
        overlap = True

        def __call__(self, run_state, metrics):
            if metrics["done"]:
                raise jax.errors.JaxRuntimeError("of its environment")

    env, keep = wrappers.make(Calm, 1), Keep()
    how = {"key": jax.random.key(2), "callbacks": [Evaluate(), keep]}
    with pytest.raises(jax.errors.JaxRuntimeError), closing(env):
        eqx_q.train(make_agent(env), env, total_steps=32, **how)
    assert keep.kept == [(4, 32)]


def test_it_is_told_whether_an_evaluation_broke():
    env, other = wrappers.make(Calm, 1), wrappers.make(lambda: Late(), 1)
    evaluation = Evaluation(other, every=32, num_episodes=1)
    how = {"key": jax.random.key(2), "callbacks": [evaluation]}
    message = "^in an evaluation, the environment of lane 0 failed: ValueError: too late"
    with pytest.raises(LaneError, match=message), closing(other), closing(env):
        eqx_q.train(make_agent(env), env, total_steps=32, **how)


class Calm(InProcess):
    """Never breaks."""

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Late(gymnasium.Env):
    """Breaks in its 18th step."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self):
        self.count = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        if self.count == 18:
            raise ValueError("too late")
        return np.zeros(1, np.float32), 1.0, False, False, {}


def test_a_recorded_episode_that_breaks_is_truncated_where_it_was_last_sound(tmp_path):
    with closing(wrappers.make(lambda: Fragile("raises"), 2, on_error="restart")) as env:
        agent = make_agent(env)
        with Writer(tmp_path / "data", describe(env, "gymnasium/Fragile")) as writer:
            recorded = record(
                agent, env, writer, num_steps=14, key=jax.random.key(0), shard="a", epsilon=1.0
            )
            writer.finish()
    assert (recorded.transitions, recorded.episodes, recorded.cut) == (14, 1, 2)
    lengths = [(len(x.first), x.truncated.sum()) for x in Dataset(tmp_path / "data").episodes()]
    assert lengths == [(7, 0), (3, 1), (6, 1), (2, 1)]  # with the final observation
    np.testing.assert_array_equal(
        [x.obs[:, 1].tolist() for x in Dataset(tmp_path / "data").episodes()][1], [0, 1, 2]
    )
