"""The contract of every suite. A new suite only adds its cases here."""

import functools
from typing import ClassVar

import equinox as eqx
import gymnasium
import jax
import numpy as np
import pytest
from kinds import Kinds
from pettingzoo import ParallelEnv
from rollouts import CHUNK, agents, assert_equal, play, roll, traces

import eqx_q.wrappers as wrappers
from eqx_q import spaces
from eqx_q.spaces import factors
from eqx_q.testing import check_env


class Walk(gymnasium.Env):
    """Somebody's own: a walk that ends at either end, or after 12 steps, or both at once."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float64)
    action_space = gymnasium.spaces.Discrete(2, start=1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = int(self.np_random.integers(-2, 3)), 0
        return np.array([self.place / 4]), {}

    def step(self, action):
        assert action in (1, 2)
        self.place, self.time = self.place + (1 if action == 2 else -1), self.time + 1
        at_end = abs(self.place) == 4
        return np.array([self.place / 4]), float(at_end), at_end, self.time == 12, {}


class Fading(ParallelEnv):
    """Somebody's own team of two: each acts for a while, and no longer than 12 steps."""

    metadata: ClassVar = {"name": "fading", "render_modes": []}
    possible_agents: ClassVar = ["left", "right"]
    action_space = staticmethod(functools.cache(lambda agent: gymnasium.spaces.Discrete(2)))
    observation_space = staticmethod(
        functools.cache(lambda agent: gymnasium.spaces.Box(0.0, 20.0, (2,), np.float64))
    )
    random = np.random.default_rng()

    def observe(self):
        return {agent: np.array([self.time, self.left[agent]]) for agent in self.agents}

    def reset(self, seed=None, options=None):
        self.random = self.random if seed is None else np.random.default_rng(seed)
        self.agents, self.time = list(self.possible_agents), 0
        self.left = {agent: int(self.random.integers(3, 20)) for agent in self.agents}
        return self.observe(), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.time += 1
        for agent, action in actions.items():
            self.left[agent] -= action
        over = {agent: self.left[agent] == 0 for agent in self.agents}
        late = dict.fromkeys(self.agents, self.time == 12)
        report = (self.observe(), over.copy(), over, late, {agent: {} for agent in self.agents})
        self.agents = [agent for agent in self.agents if not over[agent] and not late[agent]]
        return report


CASES = {
    "cartpole": ("gymnax/CartPole-v1", {"max_steps_in_episode": 20}),
    "breakout": ("gymnax/Breakout-MinAtar", {}),
    "four_rooms": ("gymnax/FourRooms-misc", {"max_steps_in_episode": 10}),
    "frozen_lake": ("gymnax/FrozenLake-misc", {}),
    "deep_sea": ("gymnax/DeepSea-bsuite", {"size": 5}),
    "atari": ("envpool/Breakout-v5", {"max_episode_steps": 30}),
    "gymnasium_vector": ("gymnasium/CartPole-v1", {}),
    "gymnasium_taxi": ("gymnasium/Taxi-v4", {"max_episode_steps": 15}),
    "craftax": ("craftax/Craftax-Classic-Symbolic-v1", {"max_episode_steps": 15}),
    "smax": ("jaxmarl/HeuristicEnemySMAX", {"num_allies": 2, "num_enemies": 3, "max_steps": 9}),
    "overcooked": ("jaxmarl/overcooked", {"max_steps": 12, "shaped_reward_horizon": 100}),
    "mpe_padded": ("jaxmarl/MPE_simple_speaker_listener_v4", {"max_steps": 12, "pad": True}),
    "observe": ("gymnax/CartPole-v1", {"observe": [0, 2], "max_steps_in_episode": 20}),
    "own": (Walk, {}),
    "own_kinds": (Kinds, {"leave_out": ["word"]}),
    "pendulum": ("gymnax/Pendulum-v1", {"max_steps_in_episode": 15}),
    "minigrid": (
        "envpool/MiniGrid-DoorKey-5x5-v0",
        {"max_episode_steps": 12, "leave_out": ["mission"], "num_threads": 1},
    ),
    "hopper": ("envpool/Hopper-v4", {"max_episode_steps": 14, "num_threads": 1}),
    "pettingzoo": ("pettingzoo/mpe2.simple_spread_v3", {"max_cycles": 15}),
    "own_team": (Fading, {}),
}
CHUNKS, LANES = 4, 3
STEPS = CHUNKS * CHUNK


def all_equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    return CASES[request.param]


def make(case, seed=0, num_envs=LANES):
    source, options = case
    return wrappers.make(source, num_envs, seed=seed, **options)


@pytest.fixture(scope="module")
def env(case):
    env = make(case)
    yield env
    env.close()


@pytest.fixture(scope="module")
def played(env):
    return play(env, 0, CHUNKS)


def test_it_keeps_the_contract(case):
    env = make(case)
    check_env(env, num_steps=40)
    env.close()


def test_shapes_and_types_are_those_of_the_spaces(env, played):
    actions, timesteps = played
    space, lanes, team = env.observation_space, (STEPS + 1, LANES), agents(env)
    assert isinstance(env, wrappers.Env)
    assert hash(space) == hash(spaces.of_observations(space))
    assert env.action_space == spaces.of_actions(env.action_space)
    assert env.num_envs == LANES
    found = jax.tree.map(lambda x: (x.shape, x.dtype), timesteps.obs)
    expected = spaces.shapes(space, *lanes, *team)
    assert found == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    rows = spaces.as_rows(space, timesteps.obs, -1)
    for i in range(0, len(jax.tree.leaves(rows)[0]), 7):
        assert space.contains(jax.tree.map(lambda x: x[i], rows))  # noqa: B023
    types = {"reward": np.float32, "terminated": bool, "truncated": bool, "first": bool}
    for name, dtype in types.items():
        value = getattr(timesteps, name)
        assert value.shape == lanes and value.dtype == dtype, name
    episode = timesteps.episode
    assert (episode.ended.dtype, episode.returns.dtype) == (bool, np.float32)
    assert episode.length.dtype == np.int32 and episode.length.shape == lanes
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        assert len(np.unique(actions)) == env.action_space.n
    if timesteps.action_mask is not None:
        assert timesteps.action_mask.shape == (*lanes, *team, sum(factors(env.action_space)))
        assert timesteps.action_mask.any(-1).all()
    if team:
        assert timesteps.agent_reward.shape == (*lanes, *team)
    if timesteps.agent_mask is not None:
        assert timesteps.agent_mask.shape == (*lanes, *team)
        assert timesteps.agent_mask[timesteps.first].all()


def test_the_limit_truncates(env, played):
    _, timesteps = played
    assert timesteps.ended.sum() >= 3  # else nothing is tested
    limit = env.max_episode_steps
    if limit is not None and limit < STEPS:
        assert timesteps.episode.length.max() == limit
        assert timesteps.ended[timesteps.episode.length == limit].all()
        assert timesteps.truncated.any() or timesteps.terminated.any()
    np.testing.assert_array_equal(
        timesteps.truncated & (timesteps.episode.length < (limit or 12)), False
    )


def test_the_same_seed_gives_the_same_and_another_does_not(case, played):
    source, _ = case
    again, other = make(case), make(case, seed=100)
    assert_equal(play(again, 0, CHUNKS)[1], played[1])
    # An emulator takes its seed from `make` and only its actions from the key.
    different = play(other, 1, CHUNKS)[1] if not other.on_host else play(other, 0, CHUNKS)[1]
    same = all_equal(different.obs, played[1].obs)
    assert not same or source == "gymnax/DeepSea-bsuite"
    again.close()
    other.close()


def test_a_second_reset_starts_anew(case):
    env = make(case)
    play(env, 0, 1)
    _, timesteps = play(env, 1, CHUNKS)
    length = np.where(timesteps.first, 0, np.arange(STEPS + 1)[:, None])
    before_first_end = np.cumsum(timesteps.ended, axis=0) - timesteps.ended == 0
    np.testing.assert_array_equal(
        timesteps.episode.length[before_first_end], length[before_first_end]
    )
    env.close()


def test_two_in_turn_are_as_two_apart(case):
    """Both through one compiled function, which must not take the one for the other."""
    envs = [make(case, seed=0), make(case, seed=7)]
    states = [env.reset(jax.random.key(i))[0] for i, env in enumerate(envs)]
    parts = [[], []]
    for turn in range(2):
        for i, env in enumerate(envs):
            states[i], (_, timesteps) = roll(env, states[i], jax.random.key(turn))
            parts[i].append(timesteps)
    for i, seed in enumerate((0, 7)):
        alone = make(case, seed=seed)
        state, _ = alone.reset(jax.random.key(i))
        for turn in range(2):
            state, (_, timesteps) = roll(alone, state, jax.random.key(turn))
            assert_equal(timesteps, parts[i][turn])
        alone.close()
        envs[i].close()


def test_it_compiles_once(case, played):
    env = make(case)
    state, _ = env.reset(jax.random.key(0))
    before = traces["roll"]
    for turn in range(3):
        state, _ = roll(env, state, jax.random.key(turn))
    state, _ = env.reset(jax.random.key(1))
    roll(env, state, jax.random.key(1))
    # One made alike shares what is compiled, unless it lives outside JAX: code is bound to that.
    assert traces["roll"] - before == env.on_host
    env.close()


def test_a_replica_is_of_the_same_kind(case, env, played):
    replica = env.replicate(2, seed=0)
    assert type(replica) is type(env) and replica.num_envs == 2
    assert replica.observation_space == env.observation_space
    assert replica.max_episode_steps == env.max_episode_steps
    run = roll if env.on_host else functools.partial(eqx.filter_eval_shape, roll)
    reset = replica.reset if env.on_host else functools.partial(jax.eval_shape, replica.reset)
    state, _ = reset(jax.random.key(0))
    _, (_, timesteps) = run(replica, state, jax.random.key(0))
    expected = spaces.shapes(env.observation_space, CHUNK, 2, *agents(env))
    assert jax.tree.map(np.shape, timesteps.obs) == jax.tree.map(np.shape, expected)
    replica.close()
    # The one it was made from goes on, undisturbed.
    again = make(case)
    state, _ = again.reset(jax.random.key(0))
    state, (_, one) = roll(again, state, jax.random.key(0))
    again.replicate(2).close()
    state, (_, two) = roll(again, state, jax.random.key(1))
    assert not all_equal(one.obs, two.obs)
    again.close()


def test_pictures(env):
    state, _ = env.reset(jax.random.key(0))
    state, _ = roll(env, state, jax.random.key(0))
    picture = env.render(state, 1)
    if picture is not None:
        height, width, colours = picture.shape
        assert min(height, width) >= 100 and colours == 3 and picture.dtype == np.uint8
        assert picture.min() < picture.max()
