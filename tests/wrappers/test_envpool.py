"""EnvPool under the contract, against the same pool stepped without XLA."""

import dataclasses

import envpool
import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import play, roll

import eqx_q
import eqx_q.wrappers as wrappers
from eqx_q.errors import UsageError
from eqx_q.loops.training import Lanes, advance, start
from eqx_q.wrappers.host import HostEnv

LIVES = {
    "episodic_life": True,
    "reward_clip": True,
    "max_episode_steps": 150,
    "noop_max": 5,
    "num_threads": 1,
}


def pool(name, num_envs, seed, **options):
    return envpool.make(name, env_type="gymnasium", num_envs=num_envs, seed=seed, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SpaceInvaders-v5", LIVES),
        ("Breakout-v5", LIVES | {"repeat_action_probability": 0.25, "stack_num": 2}),
        ("Pong-v5", {"max_episode_steps": 50, "img_height": 42, "img_width": 42}),
    ],
)
def test_equals_the_pool_stepped_by_hand(name, options):
    """With lost lives, clipped rewards and a time limit; `episode` is that of the game."""
    env = wrappers.make(f"envpool/{name}", 3, seed=11, **options)
    actions, timesteps = play(env, 0, 10)
    raw = pool(name, 3, 11, **options)
    obs, info = raw.reset()
    np.testing.assert_array_equal(timesteps.obs[0], obs)
    ended, game_ended = np.zeros(3, bool), np.zeros(3, bool)
    returns, length = np.zeros(3), np.zeros(3, int)
    lost_lives = games = 0
    for t, action in enumerate(actions, start=1):
        obs, reward, terminated, truncated, info = raw.step(action)
        np.testing.assert_array_equal(timesteps.obs[t], obs)
        np.testing.assert_array_equal(timesteps.first[t], ended)
        np.testing.assert_array_equal(timesteps.reward[t], np.where(ended, 0, reward))
        np.testing.assert_array_equal(timesteps.terminated[t], terminated)
        np.testing.assert_array_equal(timesteps.truncated[t], truncated)
        returns, length = np.where(game_ended, 0, returns), np.where(game_ended, 0, length)
        returns, length = returns + np.where(ended, 0, info["reward"]), length + ~ended
        game_ended = ~ended & (info["terminated"].astype(bool) | truncated)
        ended = terminated | truncated
        np.testing.assert_array_equal(timesteps.episode.ended[t], game_ended)
        np.testing.assert_array_equal(timesteps.episode.returns[t], returns)
        np.testing.assert_array_equal(timesteps.episode.length[t], length)
        np.testing.assert_array_equal(length, info["elapsed_step"])
        lost_lives += (ended & ~game_ended).sum()
        games += game_ended.sum()
    assert games >= 2
    if "episodic_life" in options:
        assert lost_lives >= 2
        assert timesteps.reward.max() == 1
    if name == "SpaceInvaders-v5":
        assert timesteps.episode.returns.max() > 20  # not clipped
    env.close()


OTHERS = {
    "CartPole-v1": {"max_episode_steps": 12},
    "FrozenLake-v1": {"max_episode_steps": 9},
    "Blackjack-v1": {},
    "Pendulum-v1": {"max_episode_steps": 9},
    "Snake-v1": {},
    "Connector-v2": {},
    "MiniGrid-DoorKey-5x5-v0": {"max_episode_steps": 9, "leave_out": ["mission"]},
    "BabyAI-GoToObj-v0": {"leave_out": ["mission"]},
    "Hopper-v4": {"max_episode_steps": 30},
    "CheetahRun-v1": {"max_episode_steps": 9},
}


@pytest.mark.filterwarnings("ignore:.*precision lowered")  # EnvPool's own
@pytest.mark.parametrize("name", OTHERS)
def test_others_equal_the_pool_stepped_by_hand(name):
    options = OTHERS[name] | {"num_threads": 1}
    env = wrappers.make(f"envpool/{name}", 2, seed=5, **options)
    actions, timesteps = play(env, 1, 3)
    left_out = options.pop("leave_out", [])
    raw = pool(name, 2, 5, **options)
    kind, shape, *_ = raw.spec._action_spec[-1]
    assert isinstance(env, HostEnv) == (kind == "float64" or kind is np.float64)
    obs, info = raw.reset()
    reward, ended = np.zeros(2), np.zeros(2, bool)
    terminated, truncated, over = ended, ended, ended
    for t in range(len(actions) + 1):
        if t:
            action = actions[t - 1].astype(kind).reshape(2, *shape[1:])
            obs, reward, terminated, truncated, info = raw.step(action)
        told = dict(obs) if isinstance(obs, dict) else {"": obs}
        mask = told.pop("action_mask", None)
        if mask is not None:
            legal = mask | ~mask.any(-1, keepdims=True)
            np.testing.assert_array_equal(timesteps.action_mask[t], legal.reshape(2, -1))
        for path in left_out:
            del told[path]
        seen = jax.tree.map(lambda x: x[t], timesteps.obs)  # noqa: B023
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype).reshape(x.shape)),
            seen if isinstance(seen, dict) else {"": seen},
            told,
        )
        np.testing.assert_array_equal(timesteps.first[t], over | (t == 0))
        np.testing.assert_array_equal(timesteps.reward[t], np.where(over, 0, reward))
        np.testing.assert_array_equal(timesteps.terminated[t], terminated)
        np.testing.assert_array_equal(timesteps.truncated[t], truncated)
        np.testing.assert_array_equal(timesteps.episode.length[t], info["elapsed_step"])
        over = terminated | truncated
    assert timesteps.ended.any()
    if "max_episode_steps" in options:
        assert env.max_episode_steps == options["max_episode_steps"]
        assert timesteps.truncated.any() or name == "FrozenLake-v1"
    env.close()


def test_spaces_of_others():
    limits = {"CheetahRun-v1": 1000, "Connector-v2": 50, "Blackjack-v1": None}
    made = {name: wrappers.make(f"envpool/{name}", 1) for name in limits}
    assert {name: env.max_episode_steps for name, env in made.items()} == limits
    whole = made["Connector-v2"].action_space
    assert whole == gymnasium.spaces.MultiDiscrete([5] * 10)
    run = made["CheetahRun-v1"]
    unbounded = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
    assert run.observation_space["position"] == unbounded
    assert run.action_space == gymnasium.spaces.Box(-1, 1, (6,), np.float32)
    replica = run.replicate(3, leave_out=["velocity"], max_episode_steps=7)
    assert list(replica.observation_space) == ["position"] and replica.max_episode_steps == 7
    assert replica.recording.preprocessing == {"leave_out": ["velocity"]}
    for env in (*made.values(), replica):
        env.close()


def test_what_is_not_drawn_gives_no_picture():
    for name in ("FrozenLake-v1", "MiniGrid-Empty-5x5-v0"):
        env = wrappers.make(f"envpool/{name}", 2)
        state, _ = env.reset(jax.random.key(0))
        picture = env.render(state, 1)
        assert picture is None or picture.shape == (160, 160, 3)
        assert (picture is None) == (name == "FrozenLake-v1")
        env.close()


def test_a_step_after_a_lost_life_changes_nothing_in_the_game():
    env = wrappers.make("envpool/Breakout-v5", 2, seed=3, **LIVES)
    _, timesteps = play(env, 0, 3)
    t, lane = np.argwhere(timesteps.terminated & ~timesteps.episode.ended)[0]
    assert timesteps.first[t + 1, lane] and timesteps.reward[t + 1, lane] == 0
    assert timesteps.episode.length[t + 1, lane] == timesteps.episode.length[t, lane]
    # The frame stack goes on: frames seen before are still in it.
    np.testing.assert_array_equal(timesteps.obs[t + 1, lane, :3], timesteps.obs[t, lane, 1:])
    env.close()


def test_a_game_that_ends_in_the_step_of_its_limit_is_over():
    """EnvPool says truncated of it, and not terminated."""
    options = {"seed": 3, "num_threads": 1}
    fire_and_stay = 1

    def steps(limit):
        env = wrappers.make("envpool/Breakout-v5", 1, max_episode_steps=limit, **options)
        state, _ = env.reset(jax.random.key(0))
        step = jax.jit(lambda s: env.step(s, jnp.array([fire_and_stay]), jax.random.key(0)))
        for _ in range(limit):
            state, timestep = step(state)
            if timestep.ended[0]:
                break
        env.close()
        return int(timestep.episode.length[0]), bool(timestep.terminated[0])

    length, terminated = steps(1000)
    assert terminated and length < 1000
    assert steps(length) == (length, True)
    assert steps(length - 1) == (length - 1, False)


def test_pools_that_look_alike_are_not_taken_for_each_other():
    """In one function compiled for the one, the other must be stepped, by identity."""
    one, two = (wrappers.make("envpool/Pong-v5", 2, seed=s, num_threads=1) for s in (1, 2))
    assert one != two and one.pool != two.pool
    states = [env.reset(jax.random.key(0))[0] for env in (one, two)]
    for i in range(3):
        lengths = []
        for j, env in enumerate((one, two)):
            states[j], (_, timesteps) = roll(env, states[j], jax.random.key(i))
            lengths.append(timesteps.episode.length[-1, 0])
        assert lengths == [20 * (i + 1)] * 2
    for env in (one, two):
        env.close()


def test_reset_is_refused_inside_jit():
    env = wrappers.make("envpool/Pong-v5", 1)
    with pytest.raises(UsageError, match="outside jit"):
        jax.jit(env.reset)(jax.random.key(0))
    env.close()


def test_a_closed_pool_is_refused_even_by_what_is_compiled():
    env = wrappers.make("envpool/Pong-v5", 1)
    state, _ = env.reset(jax.random.key(0))
    state, _ = roll(env, state, jax.random.key(0))
    env.close()
    env.close()
    for use in (
        lambda: roll(env, state, jax.random.key(0)),
        lambda: env.reset(jax.random.key(0)),
        lambda: env.render(state),
    ):
        with pytest.raises(UsageError, match="closed: make 'envpool/Pong-v5' again"):
            use()


def test_the_screen_is_drawn():
    env = wrappers.make("envpool/Pong-v5", 2)
    state, _ = env.reset(jax.random.key(0))
    picture = env.render(state, 1)
    assert picture.shape == (210, 160, 3) and picture.dtype == np.uint8
    env.close()


def test_options_of_the_emulator_reach_it():
    options = {"stack_num": 3, "gray_scale": False, "full_action_space": True, "frame_skip": 2}
    env = wrappers.make("envpool/Pong-v5", 1, max_episode_steps=99, **options)
    assert env.observation_space.shape == (9, 84, 84)
    assert env.action_space.n == 18 and env.max_episode_steps == 99
    assert env.pool.envpool.config["frame_skip"] == 2
    replica = env.replicate(2, seed=4, stack_num=1)
    assert replica.observation_space.shape == (3, 84, 84) and replica.action_space.n == 18
    assert replica.pool.envpool.config["seed"] == 4
    for one in (env, replica):
        one.close()


def collected(memory, num_seeds=None, **options):
    """The run state after some updates of an agent that learns nothing, and its last rollout."""
    env = wrappers.make("envpool/Breakout-v5", 4, seed=11, **LIVES, **options)
    spaces = env.observation_space, env.action_space
    network = {"network": "nature_cnn", "network_options": {"hidden_sizes": [8], "memory": memory}}
    given = {"learning_rate": 0.0, "epsilon_start": 0.0, "epsilon_end": 0.0}
    given |= {"burn_in": 2 if memory == "gru" else 0}
    given |= {"rollout_length": 6, "num_minibatches": 1, "num_epochs": 1}
    create = lambda key: eqx_q.PQN.create(*spaces, key=key, **network, **given)  # noqa: E731
    key = jax.random.key(0)
    if num_seeds is None:
        agent = create(key)
    else:
        agent = eqx_q.Population(eqx.filter_vmap(create)(jax.random.split(key, num_seeds)))
    state = start(agent, env, key=key)
    state, _ = eqx.filter_jit(advance)(state, env, 2)
    rollout, _ = eqx.filter_jit(Lanes(env).draw)(state, key)
    env.close()
    return state, rollout


# One member cannot be shared by two halves.
@pytest.mark.parametrize(("memory", "num_seeds"), [("gru", None), ("none", 2), ("none", 1)])
def test_two_buffers_equal_one(memory, num_seeds):
    """Lane by lane, for an agent that acts greedily; with memory it warms it up, too."""
    one, two = (collected(memory, num_seeds, double_buffered=choice) for choice in (False, True))
    for x, y in zip(one, two, strict=True):
        x, y = (eqx.filter(tree, eqx.is_array) for tree in (x, y))
        if hasattr(x, "env_state"):  # of which there are two
            halves = [x.env_state, y.env_state]
            x, y = (dataclasses.replace(tree, env_state=None) for tree in (x, y))
            episode = jax.tree.map(lambda *x: jnp.concatenate(x), *(h.episode for h in halves[1]))
            assert eqx.tree_equal(episode, halves[0].episode)
        same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)  # noqa: E731
        x, y = (jax.tree.map(_as_numbers, tree) for tree in (x, y))
        jax.tree.map(same, x, y)
    assert one[1].timesteps.obs.any()
    assert num_seeds == 1 or np.unique(one[1].actions).size > 1


def _as_numbers(x):
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_two_buffers_under_the_contract():
    one, two = (
        wrappers.make("envpool/Pong-v5", 4, seed=3, double_buffered=choice, num_threads=1)
        for choice in (False, True)
    )
    for x, y in zip(play(one, 0, 3), play(two, 0, 3), strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)
    assert [half.num_envs for half in two.parts] == [2, 2] and one.parts == (one,)
    assert two.replicate(3, seed=1).num_envs == 3
    again, other = two.replicate(4, seed=3), two.replicate(4, seed=3, double_buffered=False)
    for x, y in zip(play(again, 0, 1), play(other, 0, 1), strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)
    assert len(again.parts) == 2 and len(other.parts) == 1
    assert two.recording == one.recording
    picture = two.render(two.reset(jax.random.key(0))[0], lane=3)
    assert picture.shape == (210, 160, 3)
    two.close()
    with pytest.raises(UsageError, match="closed"):
        two.reset(jax.random.key(0))


def test_two_buffers_that_cannot_be():
    assert wrappers.make("envpool/Pong-v5", 3, double_buffered=True).parts[0].num_envs == 3
    with pytest.raises(UsageError, match="leave out double_buffered"):
        wrappers.make("envpool/Hopper-v4", 2, double_buffered=True)


def test_the_step_of_one_buffer_ends_after_the_other_was_sent():
    """Else acting in it might wait, which no result would show."""
    env = wrappers.make("envpool/Pong-v5", 2, double_buffered=True)
    (one, other), state = env.parts, env.reset(jax.random.key(0))[0]

    def step(after):
        sent = one.send(state[0], jnp.zeros(1, int), jax.random.key(0))
        token = dataclasses.replace(state[1], token=after)
        return one.recv(sent, token)[0].token

    jaxpr = jax.make_jaxpr(step)(other.pool.handle)
    (given,) = jaxpr.jaxpr.invars
    assert any(given in equation.invars for equation in jaxpr.jaxpr.eqns)
    env.close()
