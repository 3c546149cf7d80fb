import gymnasium
import gymnax
import jax
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, Graph

import eqx_q.wrappers as wrappers
from eqx_q.errors import MissingExtraError, UsageError
from eqx_q.wrappers import custom

pytestmark = pytest.mark.quick


class Unbounded(gymnasium.Env):
    """Does anything."""

    def __init__(self, space=None):
        self.observation_space = space or Box(-1, 1, (2,))
        self.action_space = Discrete(2) if space else Box(-np.inf, 1, (2,))

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


@pytest.mark.parametrize(
    ("source", "num_envs", "options", "message"),
    [
        ("gymnx/CartPole-v1", 2, {}, "unknown suite 'gymnx': the nearest are gymnax"),
        ("CartPole-v1", 2, {}, "write 'suite/name'"),
        ("gymnax/CartPol-v1", 2, {}, "the nearest are CartPole-v1"),
        ("gymnax/cartpole-v1", 2, {}, "the nearest are CartPole-v1"),
        ("gymnax/CartPole-v1", 2, {"max_step_in_episode": 3}, "max_steps_in_episode"),
        ("gymnax/Catch-bsuite", 2, {"colums": 3}, "the nearest are columns"),
        ("gymnax/CartPole-v1", 0, {}, "num_envs=0"),
        ("gymnax/CartPole-v1", -1, {}, "num_envs=-1"),
        ("envpool/Pong-v4", 2, {}, "the nearest are Pong-v5"),
        ("envpool/Pong-v5", 2, {"episodic_live": True}, "the nearest are episodic_life"),
        ("envpool/Pong-v5", 2, {"batch_size": 1}, "unknown option 'batch_size'"),
        ("envpool/Pong-v5", 2, {"stack_num": 0}, "stack_num=0"),
        ("envpool/Pong-v5", 2, {"repeat_action_probability": 1.5}, "between 0 and 1"),
        ("envpool/Pong-v5", 2, {"frame_skip": "four"}, "Pong-v5 cannot be made with"),
        ("envpool/Pong-v5", 2, {"noop_max": 0}, "noop_max=0: give 1 or more"),  # it crashes
        ("gymnasium/CartPol-v1", 2, {}, "Did you mean: `CartPole`"),
        ("gymnasium/CartPole-v1", 2, {"fast": True}, "unexpected keyword argument 'fast'"),
        ("gymnasium/CartPole-v1", 2, {"vectorization": "asink"}, "the nearest are async"),
        ("envpool/CartPol-v1", 2, {}, "the nearest are CartPole-v1"),
        ("envpool/Go9x9-v1", 2, {}, "'Go9x9-v1' has 2 players"),
        ("envpool/VizdoomCustom-v1", 2, {}, "EnvPool cannot make 'VizdoomCustom-v1'"),
        ("envpool/Hopper-v4", 2, {"frame_skip": 0}, "frame_skip=0"),
        ("envpool/Snake-v1", 2, {"max_episode_steps": 9}, "leave out max_episode_steps"),
        ("envpool/CliffWalking-v1", 2, {"max_episode_steps": 9}, "leave out max_episode_steps"),
        (object(), 2, {}, "cannot make an environment of"),
        (lambda: 3, 2, {}, "must return a gymnasium.Env"),
        (lambda: {}["key"], 2, {}, "cannot make an environment: KeyError: 'key'"),
        (Unbounded, 2, {}, "has no bounds: wrap the environment in gymnasium.wrappers.Resc"),
        (
            lambda: Unbounded(Graph(Box(-1, 1, (2,)), None)),
            2,
            {},
            "of kind Graph is not supported: wrap the",
        ),
    ],
)
def test_bad_input_is_told_how_to_be_mended(source, num_envs, options, message):
    with pytest.raises(UsageError) as error:
        wrappers.make(source, num_envs, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("suite", "package", "extra"),
    [
        ("gymnax", "gymnax", "jax-envs"),
        ("envpool", "envpool", "atari"),
        ("pettingzoo", "pettingzoo", "multi-agent"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, suite, package, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*pip install 'eqx_q\[{extra}\]'"):
        wrappers.make(f"{suite}/Anything", 1)


def test_ids_of_a_suite():
    pools = {"envpool/SpaceInvaders-v5", "envpool/HalfCheetah-v4", "envpool/FrozenLake-v1"}
    assert pools <= set(wrappers.env_ids("envpool"))
    assert "gymnasium/CartPole-v1" in wrappers.env_ids("gymnasium")
    with pytest.raises(UsageError, match="nearest are gymnax"):
        wrappers.env_ids("gymnx")


def test_ones_own_environments_are_taken():
    cartpole, params = gymnax.make("CartPole-v1")
    pair = wrappers.make((cartpole, params.replace(max_steps_in_episode=7)), 2)
    assert pair.max_episode_steps == 7 and not pair.on_host
    alone = wrappers.make(cartpole, 2, max_steps_in_episode=9)
    assert alone.max_episode_steps == 9
    assert alone.replicate(3, max_steps_in_episode=5).max_episode_steps == 5
    factory = wrappers.make(lambda: gymnasium.make("CartPole-v1", max_episode_steps=11), 2)
    assert factory.max_episode_steps == 11 and factory.on_host
    by_class = wrappers.make(gymnasium.envs.classic_control.CartPoleEnv, 2)
    assert by_class.max_episode_steps is None
    for env in (factory, by_class):
        env.close()


class Open(gymnasium.Env):
    """Cannot be used once it is closed."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    is_open = True

    def reset(self, *, seed=None, options=None):
        assert self.is_open
        return np.zeros(2, np.float32), {}

    def close(self):
        self.is_open = False


def test_what_a_function_hands_out_is_not_closed_on_the_way():
    """It may be one object, which is asked for again: a simulator that somebody has running."""
    running = Open()
    env = wrappers.make(lambda: running, 1)
    _, timestep = env.reset(jax.random.key(0))
    np.testing.assert_array_equal(timestep.obs, np.zeros((1, 2)))
    env.close()


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(custom, "_registered", {})
    return custom.register


def test_registered_environments_are_made_by_name(registered):
    cartpole, params = gymnax.make("CartPole-v1")
    registered("mine/Pair", (cartpole, params.replace(max_steps_in_episode=7)))
    registered(
        "mine/Python", lambda limit=11: gymnasium.make("CartPole-v1", max_episode_steps=limit)
    )
    registered(
        "mine/Lanes",
        lambda num_envs, limit=5: wrappers.make(cartpole, num_envs, max_steps_in_episode=limit),
    )
    limits = {"Pair": 7, "Python": 11, "Lanes": 5}
    for name, limit in limits.items():
        for full in (f"mine/{name}", f"custom/mine/{name}"):
            env = wrappers.make(full, 2)
            assert (env.num_envs, env.max_episode_steps) == (2, limit)
            env.close()
    for name in ("Python", "Lanes"):
        env = wrappers.make(f"mine/{name}", 2, limit=3, observe=[0, 2])
        assert env.max_episode_steps == 3 and env.observation_space.shape == (2,)
        env.close()
    assert wrappers.env_ids("mine") == ["mine/Lanes", "mine/Pair", "mine/Python"]
    assert "custom/mine/Pair" in wrappers.env_ids("custom")
    registered("mine/Pair", cartpole)  # again: as in a notebook
    assert wrappers.make("mine/Pair", 1).max_episode_steps == 500


def test_a_seed_goes_to_functions_that_take_one(registered):
    seeds = []

    def lanes(num_envs, seed):
        seeds.append(seed)
        return wrappers.make("gymnax/CartPole-v1", num_envs)

    registered("mine/Lanes", lanes)
    wrappers.make("mine/Lanes", 1, seed=5)
    assert seeds == [5]


@pytest.mark.parametrize(
    ("name", "factory", "made", "message"),
    [
        ("Maze", dict, None, "'Maze' has no namespace: register 'namespace/Name'"),
        ("gymnax/Maze", dict, None, "'gymnax' is a suite of eqx_q"),
        (
            "mine/Maze",
            dict,
            "mine/Mase",
            "unknown environment 'mine/Mase': the nearest are mine/Maze",
        ),
        ("mine/Maze", dict, "custom/Mase", "unknown environment of your own 'Mase'"),
        ("mine/Maze", 3, "mine/Maze", "cannot make an environment of 3"),
        ("mine/Maze", lambda num_envs: None, "mine/Maze", "2 lanes, but returned a NoneType"),
        (
            "mine/Maze",
            lambda num_envs: wrappers.make("gymnax/CartPole-v1", 3),
            "mine/Maze",
            "with 2 lanes, but returned 3 lanes",
        ),
    ],
)
def test_bad_registrations_are_told(registered, name, factory, made, message):
    def both():
        registered(name, factory)
        wrappers.make(made, 2)

    with pytest.raises(UsageError) as error:
        both()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_options_of_registered_functions_are_told(registered):
    registered("mine/Lanes", lambda num_envs, length=3: None)
    with pytest.raises(UsageError, match="unknown option 'lenth': the nearest are length"):
        wrappers.make("mine/Lanes", 2, lenth=4)


def test_packages_register_by_entry_points(registered, monkeypatch, tmp_path):
    package = tmp_path / "mazes-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: mazes\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[eqx_q.environments]\nours/Maze = mazes:make\nours/Gone = mazes:gone\n"
    )
    (tmp_path / "mazes.py").write_text(
        "import gymnasium\ndef make():\n    return gymnasium.make('CartPole-v1')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {"ours/Maze", "ours/Gone"} <= set(wrappers.env_ids("ours"))
    env = wrappers.make("ours/Maze", 1)
    assert env.max_episode_steps == 500
    env.close()
    with pytest.raises(UsageError, match="'ours/Gone' is registered as mazes:gone, which fails"):
        wrappers.make("ours/Gone", 1)
