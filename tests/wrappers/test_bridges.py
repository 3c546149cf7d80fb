"""Bridges to other libraries, against the wrapped environments and by those libraries' checks."""

import warnings

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import Clock, Relay, TwoStep
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from kinds import ACTIONS, Kinds, KindsTeam
from mpe2 import simple_spread_v3

import eqx_q.wrappers as wrappers
from eqx_q.errors import MissingExtraError, UsageError
from eqx_q.spaces import of_actions
from eqx_q.wrappers import to_gymnasium, to_pettingzoo
from eqx_q.wrappers.conversion import as_taken

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of its own environments
    from pettingzoo.test import parallel_api_test, parallel_seed_test


def cartpole(num_envs):
    return wrappers.make("gymnax/CartPole-v1", num_envs, max_steps_in_episode=12)


class Own:
    """An environment stepped by its own functions, with the keys that a bridge says it takes."""

    def __init__(self, env, seed):
        self._reset, self._step = jax.jit(env.reset), jax.jit(env.step)
        self.key = jax.random.key(seed)

    def reset(self):
        self.key, own = jax.random.split(self.key)
        self.state, timestep = self._reset(own)
        return timestep

    def step(self, action):
        self.key, own = jax.random.split(self.key)
        self.state, timestep = self._step(self.state, jnp.asarray(action), own)
        return timestep


def test_one_lane_equals_the_environment_itself():
    env = to_gymnasium(cartpole(1))
    assert isinstance(env, gymnasium.Env)
    own = Own(cartpole(1), 7)
    ends = []
    for episode in range(3):
        obs, info = env.reset(seed=7 if episode == 0 else None)
        timestep = own.reset()
        np.testing.assert_array_equal(obs, timestep.obs[0])
        assert info == {} and obs.flags.writeable
        over, action = False, 1
        while not over:
            action = 1 if episode == 1 else 1 - action  # one falls, the others balance
            obs, reward, terminated, truncated, info = env.step(action)
            timestep = own.step([action])
            np.testing.assert_array_equal(obs, timestep.obs[0])
            assert reward == timestep.reward[0] == 1.0 and type(reward) is float
            assert (terminated, truncated) == (timestep.terminated[0], timestep.truncated[0])
            over = terminated or truncated
        ends.append(truncated)
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(0)
    assert ends == [True, False, True]


def test_lanes_equal_the_environment_itself():
    env = to_gymnasium(cartpole(3))
    assert isinstance(env, gymnasium.vector.VectorEnv) and env.num_envs == 3
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.observation_space.shape == (3, 4) and env.action_space.shape == (3,)
    own = Own(cartpole(3), 7)
    obs, info = env.reset(seed=7)
    np.testing.assert_array_equal(obs, own.reset().obs)
    resets = 0
    for _ in range(30):
        action = env.action_space.sample()
        obs, reward, terminated, truncated, info = env.step(action)
        timestep = own.step(action)
        np.testing.assert_array_equal(obs, timestep.obs)
        np.testing.assert_array_equal(reward, timestep.reward)
        np.testing.assert_array_equal(terminated, timestep.terminated)
        np.testing.assert_array_equal(truncated, timestep.truncated)
        assert info == {}
        resets += timestep.first.sum()
    assert resets > 3


def test_lanes_must_be_reset_first_and_draw_only_when_asked():
    env = to_gymnasium(cartpole(2))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(2, int))
    env.reset(seed=0)
    assert env.render() is None


def test_gymnasiums_own_statistics_count_episodes_right():
    env = RecordEpisodeStatistics(to_gymnasium(Clock(3, shortest=2)))
    env.reset(seed=0)
    seen = [[], [], []]
    for _ in range(12):
        *_, info = env.step(np.zeros(3, int))
        for lane in np.flatnonzero(info.get("_episode", [])):
            seen[lane].append((info["episode"]["r"][lane], info["episode"]["l"][lane]))
    # An episode of lane i takes i + 2 steps, and the reset one more.
    assert seen == [[(2, 2)] * 4, [(3, 3)] * 3, [(4, 4)] * 2]


@pytest.mark.filterwarnings("ignore:.*Box observation space")
def test_it_passes_gymnasiums_check():
    def entry(render_mode=None):
        return to_gymnasium(cartpole(1), render_mode=render_mode)

    gymnasium.register("OfOurs-v0", entry)
    try:
        check_env(gymnasium.make("OfOurs-v0", render_mode="rgb_array").unwrapped)
    finally:
        del gymnasium.registry["OfOurs-v0"]


def test_seeds_start_anew_and_without_one_it_goes_on():
    env, other, third = [to_gymnasium(cartpole(1)) for _ in range(3)]
    starts = [env.reset(seed=seed)[0] for seed in (5, None, 5, None, 6)]
    np.testing.assert_array_equal(starts[:2], starts[2:4])
    assert not np.array_equal(starts[0], starts[1]) and not np.array_equal(starts[0], starts[4])
    assert not np.array_equal(other.reset()[0], third.reset()[0])  # never seeded


def test_an_environment_of_pythons_keeps_its_seed_and_says_so():
    raw = gymnasium.make("Taxi-v4")
    env = to_gymnasium(wrappers.make("gymnasium/Taxi-v4", 1, seed=3))
    with pytest.warns(UserWarning, match="seeded when it was made"):
        obs, info = env.reset(seed=9)
    place, said = raw.reset(seed=3)
    for action in [*range(6), 2, 0, 4]:
        assert obs == place
        np.testing.assert_array_equal(info["action_mask"], said["action_mask"])
        assert info["action_mask"].dtype == np.int8
        env.action_space.sample(info["action_mask"])
        obs, reward, *flags, info = env.step(action)
        place, paid, *raw_flags, said = raw.step(action)
        assert (reward, flags) == (paid, raw_flags)
    env.close()
    with pytest.raises(UsageError, match="closed"):
        env.reset()


def test_masks_of_lanes_have_gymnasiums_marks():
    env = to_gymnasium(wrappers.make("gymnasium/Taxi-v4", 2, seed=3))
    _, info = env.reset()
    expected = [gymnasium.make("Taxi-v4").reset(seed=seed)[1]["action_mask"] for seed in (3, 4)]
    np.testing.assert_array_equal(info["action_mask"], expected)
    assert info["_action_mask"].tolist() == [True, True]
    env.action_space.sample(tuple(info["action_mask"]))
    env.close()


@pytest.mark.filterwarnings("ignore:.*should be a.*:UserWarning", "ignore:.*seeded when")
@pytest.mark.parametrize("actions", ACTIONS)
def test_kinds_of_every_sort_go_there_and_back(actions):
    ours = wrappers.make(lambda: Kinds(actions), 1, seed=3, leave_out=["word"])
    env, raw = to_gymnasium(ours), Kinds(actions)
    assert env.action_space == of_actions(raw.action_space)
    (obs, info), (expected, said) = env.reset(), raw.reset(seed=3)
    over = False
    while not over:
        assert env.observation_space.contains(obs)
        del expected["word"]
        jax.tree.map(np.testing.assert_allclose, obs, expected)
        assert ("action_mask" in info) == ("action_mask" in said)
        action = env.action_space.sample(info.get("action_mask"))
        obs, reward, over, _, info = env.step(action)
        expected, paid, end, _, said = raw.step(as_taken(raw.action_space, np.asarray(action))[()])
        assert over == end and reward == np.float32(paid)
    env.close()


@pytest.mark.filterwarnings("ignore:.*seeded when")
@pytest.mark.parametrize("actions", ["multi_discrete", "box"])
def test_lanes_and_teams_of_every_kind(actions):
    lanes = to_gymnasium(wrappers.make(lambda: Kinds(actions), 2, leave_out=["word"]))
    obs, info = lanes.reset()
    for _ in range(6):
        assert lanes.observation_space.contains(jax.tree.map(np.asarray, obs))
        obs, *_, info = lanes.step(lanes.action_space.sample())
    if actions == "multi_discrete":
        assert [len(part) for part in info["action_mask"][1]] == [2, 3]
    lanes.close()
    team = wrappers.make(lambda: KindsTeam(actions), 1, leave_out=["word"])
    parallel_api_test(to_pettingzoo(team), num_cycles=30)
    team.close()


def test_metrics_of_a_suite(monkeypatch):
    emit = Clock._emit

    def and_metrics(self, count, first):
        state, timestep = emit(self, count, first)
        return state, eqx.tree_at(lambda t: t.episode.metrics, timestep, {"count": count})

    monkeypatch.setattr(Clock, "_emit", and_metrics)
    one, lanes, team = to_gymnasium(Clock(1)), to_gymnasium(Clock(2)), to_pettingzoo(Clock(1))
    assert one.reset()[1] == {"metrics": {"count": 0}}
    assert one.step(0)[-1] == {"metrics": {"count": 1}}
    lanes.reset()
    lanes.step([0, 0])
    info = lanes.step([0, 0])[-1]  # the first lane has begun anew
    assert info["metrics"]["count"].tolist() == [0, 2] and info["_metrics"].all()
    team.reset()
    assert team.step({"agent_0": 0})[-1] == {"agent_0": {"metrics": {"count": 1}}}


@pytest.mark.parametrize("bridge", [to_gymnasium, to_pettingzoo])
def test_it_compiles_once(monkeypatch, bridge):
    emit, traced = Clock._emit, []
    monkeypatch.setattr(Clock, "_emit", lambda *args: (traced.append(1), emit(*args))[1])
    env = bridge(Clock(1, shortest=2))
    action = 0 if bridge is to_gymnasium else {"agent_0": 0}
    for seed in (0, None, 1):
        env.reset(seed=seed)
        env.step(action)
        env.step(action)
    assert len(traced) == 2  # reset and step


def test_a_team_tells_its_state_where_it_has_one():
    env, own = to_pettingzoo(TwoStep(1)), Own(TwoStep(1), 3)
    assert env.state_space.shape == (3,)
    back = wrappers.make(lambda: to_pettingzoo(TwoStep(1)), 1, seed=3)
    assert back.state_size == 3
    for actions in ([[0, 0], [1, 1]], [[1, 0], [0, 1]]):
        env.reset(seed=3)
        timesteps, returned = [own.reset()], [back.host.reset()]
        np.testing.assert_array_equal(env.state(), timesteps[-1].global_state[0])
        for action in actions:
            env.step(dict(zip(env.agents, action, strict=True)))
            timesteps.append(own.step([action]))
            returned.append(back.host.step(np.array([action])))
            np.testing.assert_array_equal(env.state(), timesteps[-1].global_state[0])
            assert env.state_space.contains(env.state())
        for timestep, report in zip(timesteps, returned, strict=True):
            np.testing.assert_array_equal(report["global_state"], timestep.global_state)
    without = to_pettingzoo(Relay(1))
    without.reset()
    assert not hasattr(without, "state_space")
    # What PettingZoo's own environments without a state do.
    with pytest.raises(NotImplementedError, match="state"):
        without.state()


@pytest.mark.parametrize("limit", [False, True])
def test_a_team_and_its_deaths(limit):
    env = to_pettingzoo(Relay(1, limit))
    assert env.possible_agents == ["agent_0", "agent_1"] and env.agents == []
    for seed in (3, None):
        obs, infos = env.reset(seed=seed)
        if seed is not None:
            draw = int(Own(Relay(1), 3).reset().obs[0, 0, 2])
            assert obs["agent_0"].tolist() == [0, 0, draw]
        assert obs["agent_1"][:2].tolist() == [0, 1]
        assert [infos[x]["action_mask"].tolist() for x in env.agents] == [[1, 0, 0], [1, 0, 0]]

        obs, reward, terminated, truncated, infos = env.step({"agent_0": 0, "agent_1": 0})
        assert env.agents == env.possible_agents
        assert reward == {"agent_0": 0, "agent_1": 0}
        assert infos["agent_1"]["action_mask"].tolist() == [1, 1, 0]

        # The first dies in this step, in which it is paid and sees for the last time.
        obs, reward, terminated, truncated, infos = env.step({"agent_0": 1, "agent_1": 1})
        assert obs["agent_0"][:2].tolist() == [2, 0]
        assert reward == {"agent_0": 1, "agent_1": 1}
        assert terminated == {"agent_0": True, "agent_1": False}
        assert truncated == {"agent_0": False, "agent_1": False}
        assert env.agents == ["agent_1"]

        # What it does now is legal, though nobody says what.
        obs, reward, terminated, truncated, infos = env.step({"agent_1": 0})
        assert list(obs) == list(infos) == ["agent_1"] and reward == {"agent_1": 0}
        assert terminated == truncated == {"agent_1": False}

        _, reward, terminated, truncated, _ = env.step({"agent_1": 1})
        assert reward == {"agent_1": 1} and env.agents == []
        assert terminated == {"agent_1": not limit} and truncated == {"agent_1": limit}
        assert env.step({}) == ({}, {}, {}, {}, {})


def test_who_dies_in_the_step_of_the_limit_is_not_truncated():
    env = to_pettingzoo(Relay(1, limit=True, dies=4))
    env.reset()
    for _ in range(4):
        _, _, terminated, truncated, _ = env.step({"agent_0": 0, "agent_1": 0})
    assert terminated == {"agent_0": True, "agent_1": False}
    assert truncated == {"agent_0": False, "agent_1": True}


def test_alone_it_is_a_team_of_one():
    env, own = to_pettingzoo(cartpole(1)), Own(cartpole(1), 4)
    obs, _ = env.reset(seed=4)
    np.testing.assert_array_equal(obs["agent_0"], own.reset().obs[0])
    while env.agents:
        obs, reward, terminated, truncated, _ = env.step({"agent_0": 1})
        timestep = own.step([1])
        np.testing.assert_array_equal(obs["agent_0"], timestep.obs[0])
        assert reward == {"agent_0": 1.0}
        assert terminated == {"agent_0": timestep.terminated[0]}
        assert truncated == {"agent_0": timestep.truncated[0]}


@pytest.mark.parametrize("make", [lambda: Relay(1), lambda: Relay(1, True), lambda: cartpole(1)])
def test_it_passes_pettingzoos_checks(make):
    parallel_api_test(to_pettingzoo(make()), num_cycles=30)
    shared = make()  # even two bridges from one environment have nothing in common
    parallel_seed_test(lambda: to_pettingzoo(shared), num_cycles=30)


def test_there_and_back_again():
    options = {"max_cycles": 5}
    ours = wrappers.make("pettingzoo/mpe2.simple_spread_v3", 1, seed=6, **options)
    env, raw = to_pettingzoo(ours), simple_spread_v3.parallel_env(**options)
    obs, _ = env.reset()
    expected, _ = raw.reset(seed=6)
    for _ in range(2):
        while raw.agents:
            for mine, other in zip(env.agents, raw.agents, strict=True):
                np.testing.assert_allclose(obs[mine], expected[other], rtol=0, atol=1e-37)
            obs, reward, _, truncated, _ = env.step(dict.fromkeys(env.agents, 2))
            expected, paid, _, cut_off, _ = raw.step(dict.fromkeys(raw.agents, 2))
            np.testing.assert_allclose([*reward.values()], [*paid.values()], rtol=1e-6)
            assert [*truncated.values()] == [*cut_off.values()]
        obs, _ = env.reset()
        expected, _ = raw.reset()
    env.close()


def test_pictures_are_drawn_where_they_are_asked_for():
    env = to_gymnasium(cartpole(2), render_mode="rgb_array")
    env.reset(seed=0)
    left, right = env.render()
    assert left.shape == right.shape and not np.array_equal(left, right)
    alone, plain = to_pettingzoo(cartpole(1), render_mode="rgb_array"), to_gymnasium(cartpole(1))
    for one in (alone, plain):
        one.reset(seed=0)
    assert alone.render().shape == left.shape and plain.render() is None


def test_what_cannot_be_is_told_how_to_be_mended(monkeypatch):
    with pytest.raises(
        UsageError, match=r"Gymnasium does not support teams: use eqx_q.*to_pettingzoo"
    ):
        to_gymnasium(Relay(1))
    with pytest.raises(UsageError, match="env has 2: make it with num_envs=1"):
        to_pettingzoo(Relay(2))
    with pytest.raises(UsageError, match="render_mode 'rgb_aray': the nearest are rgb_array"):
        to_gymnasium(Clock(1), render_mode="rgb_aray")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"'pettingzoo'.*pip install 'eqx_q\[multi-agent\]'"
    ):
        to_pettingzoo(Relay(1))
