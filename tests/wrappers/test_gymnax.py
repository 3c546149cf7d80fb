"""gymnax under the contract. Every environment, against itself stepped by hand."""

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.environment import Environment
from rollouts import CHUNK, cart_column, lane_keys, play

import eqx_q.wrappers as wrappers
from eqx_q.errors import UsageError

IDS = [name.removeprefix("gymnax/") for name in wrappers.env_ids("gymnax")]
# Those whose declared spaces are not true of what they observe, and the true shape.
UNTRUE = {
    "Catch-bsuite": (10, 5),
    "FourRooms-misc": (4,),
    "MemoryChain-bsuite": (3,),
    "MetaMaze-misc": (15,),
}
# Short, so that episodes end by the limit too.
LIMIT = {"max_steps_in_episode": 12}


def test_ids_are_all_but_the_download():
    assert set(gymnax.registered_envs) - set(IDS) == {"MNISTBandit-bsuite"}


def test_a_download_that_fails_is_told():
    with pytest.raises(UsageError, match="'MNISTBandit-bsuite' needs data that is not available"):
        wrappers.make("gymnax/MNISTBandit-bsuite", 2)


def test_actions_of_a_box_keep_their_bounds():
    env = wrappers.make("gymnax/Pendulum-v1", 2)
    assert env.action_space == gymnasium.spaces.Box(-2, 2, (1,), np.float32)


@pytest.mark.parametrize("name", IDS)
def test_equals_gymnax_stepped_by_hand(name):
    env = wrappers.make(f"gymnax/{name}", 2, **LIMIT)
    actions, timesteps = play(env, 0, 1)
    raw, params = gymnax.make(name)
    limit = type(params.max_steps_in_episode)(12)  # one is a float, and must stay one
    params = params.replace(max_steps_in_episode=limit)
    step = jax.jit(raw.step_env)
    reset = jax.jit(raw.reset_env)
    keys = lane_keys(0, 1, 2)
    one_hot = env.observation_space.shape != np.shape(reset(keys[0, 0], params)[0])
    for lane in range(2):
        ended = True
        for t in range(CHUNK + 1):
            key, seen = keys[t, lane], jax.tree.map(lambda x: x[t, lane], timesteps)  # noqa: B023
            if ended:
                obs, state = reset(key, params)
                reward, terminated, truncated = 0, False, False
            else:
                obs, state, reward, terminated, _ = step(key, state, actions[t - 1, lane], params)
                truncated = bool(state.time >= params.max_steps_in_episode) and not terminated
            if one_hot:
                obs = np.eye(env.observation_space.shape[0])[int(obs)]
            # Compiled alone and in lanes, arithmetic may be reordered.
            np.testing.assert_allclose(seen.obs, obs, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(seen.reward, reward, rtol=1e-5, atol=1e-6)
            assert (seen.first, seen.terminated, seen.truncated) == (ended, terminated, truncated)
            assert env.observation_space.contains(seen.obs)
            ended = bool(terminated or truncated)
    assert timesteps.terminated.any() or timesteps.truncated.any()


def test_what_deep_seas_own_step_adds_is_seen_by_nobody():
    """The wrapper calls `step_env`. One environment alone has more than that in its `step`."""
    assert [name for name in IDS if type(gymnax.make(name)[0]).step is not Environment.step] == [
        "DeepSea-bsuite"
    ]
    raw, params = gymnax.make("DeepSea-bsuite", size=3)
    _, own = raw.reset_env(jax.random.key(0), params)
    plain = own
    for i in range(9):
        key, right = jax.random.key(i), int(plain.action_mapping[plain.row, plain.column])
        obs, plain, reward, terminated, _ = raw.step_env(
            jax.random.split(key)[0], plain, right, params
        )
        if terminated:
            _, plain = raw.reset_env(jax.random.split(key)[1], params)
        _, own, own_reward, own_terminated, _, info = raw.step(key, own, right, params)
        np.testing.assert_allclose(info["final_observation"], obs)
        assert reward == pytest.approx(float(own_reward), abs=1e-6)
        assert terminated == own_terminated
    assert own.denoised_return != plain.denoised_return  # the sum that it keeps over episodes


@pytest.mark.parametrize("name", list(UNTRUE))
def test_spaces_are_true_where_those_declared_are_not(name):
    env = wrappers.make(f"gymnax/{name}", 4)
    assert env.observation_space.shape == UNTRUE[name]
    raw, params = gymnax.make(name)
    declared = raw.observation_space(params)
    _, timesteps = play(env, 0, 1)
    kept = [
        declared.contains(obs)
        and declared.dtype == raw.reset_env(jax.random.key(0), params)[0].dtype
        for obs in timesteps.obs.reshape(-1, *UNTRUE[name])
    ]
    assert not all(kept)  # else gymnax has mended it, and the wrapper may believe it


def test_deep_sea_ends_by_the_task_alone_where_it_reports_both():
    raw, params = gymnax.make("DeepSea-bsuite", size=4)
    _, state = raw.reset_env(jax.random.key(0), params)
    for _ in range(4):
        _, state, _, terminated, _ = raw.step_env(jax.random.key(0), state, 0, params)
    assert terminated and raw.is_truncated(state, params)  # both
    _, timesteps = play(wrappers.make("gymnax/DeepSea-bsuite", 2, size=4), 0, 1)
    assert timesteps.terminated.sum() > 0 and timesteps.truncated.sum() == 0


def test_options_reach_constructor_and_parameters():
    env = wrappers.make("gymnax/DeepSea-bsuite", 2, size=5, unscaled_move_cost=0.5)
    assert env.observation_space.shape == (5, 5)
    assert env.game.params.unscaled_move_cost == 0.5
    rooms = wrappers.make("gymnax/FourRooms-misc", 2, goal_fixed=[1, 2], use_visual_obs=True)
    assert rooms.observation_space.shape == (13, 13, 2)
    assert env.replicate(1).observation_space.shape == (5, 5)
    replica = env.replicate(1, unscaled_move_cost=0.25)
    assert replica.game.params.unscaled_move_cost == 0.25
    assert replica.observation_space.shape == (5, 5)


def test_equal_calls_share_what_is_compiled_and_others_do_not():
    def game(**options):
        return wrappers.make("gymnax/CartPole-v1", 2, **options).game

    assert game() is game()
    assert game(max_steps_in_episode=9) is game(max_steps_in_episode=9)
    assert game() is not game(max_steps_in_episode=9)


def test_it_steps_under_vmap():
    """Not so emulators: this is what many seeds at once stand on."""
    env = wrappers.make("gymnax/CartPole-v1", 2)
    keys = jax.random.split(jax.random.key(0), 3)
    states, starts = jax.vmap(env.reset)(keys)
    _, timesteps = jax.vmap(env.step)(states, jnp.ones((3, 2), int), keys)
    for i in range(3):
        state, start = env.reset(keys[i])
        _, timestep = env.step(state, jnp.ones(2, int), keys[i])
        np.testing.assert_allclose(starts.obs[i], start.obs)
        np.testing.assert_allclose(timesteps.obs[i], timestep.obs, rtol=1e-6)


def test_breakout_is_drawn_cell_by_cell():
    env = wrappers.make("gymnax/Breakout-MinAtar", 2)
    state, timestep = env.reset(jax.random.key(0))
    state, timestep = env.step(state, jnp.array([0, 1]), jax.random.key(1))
    picture, grid = env.render(state, 1), np.asarray(timestep.obs[1])
    assert picture.shape == (240, 240, 3)
    cells = picture[12::24, 12::24]
    np.testing.assert_array_equal(cells.any(-1), grid.any(-1))
    bricks = cells[1:4].reshape(-1, 3)
    assert (bricks == bricks[0]).all() and (bricks[0] != cells[9, 3]).any()


@pytest.mark.parametrize("name", ["FourRooms-misc", "MetaMaze-misc", "FrozenLake-misc"])
def test_mazes_are_drawn_from_above(name):
    env = wrappers.make(f"gymnax/{name}", 1)
    state, _ = env.reset(jax.random.key(1))
    picture, inner = env.render(state), jax.tree.map(lambda x: np.asarray(x[0]), state.inner)
    game = env.game.env
    height, width = game.desc.shape if hasattr(game, "desc") else game.occupied_map.shape
    cell = 240 // max(height, width)
    cells = picture[cell // 2 :: cell, cell // 2 :: cell]
    assert cells.shape == (height, width, 3)
    if hasattr(game, "desc"):
        blocked, place = np.asarray(game.desc) == 2, divmod(int(inner.position), width)
        goal = (height - 1, width - 1)
    else:
        blocked, place, goal = np.asarray(game.occupied_map) == 1, inner.pos, inner.goal
    colours = {tuple(colour) for colour in cells.reshape(-1, 3)}
    assert len(colours) == 4
    wall, target, player = cells[blocked][0], cells[*goal], cells[*place]
    assert (cells[blocked] == wall).all() and (cells == wall).all(-1).sum() == blocked.sum()
    assert (cells == target).all(-1).sum() == 1 and (cells == player).all(-1).sum() == 1


def test_of_a_chain_there_is_nothing_to_see():
    env = wrappers.make("gymnax/MemoryChain-bsuite", 1)
    assert env.render(env.reset(jax.random.key(0))[0]) is None


def test_cartpole_is_drawn_where_it_stands():
    env = wrappers.make("gymnax/CartPole-v1", 1)
    state, _ = env.reset(jax.random.key(0))
    pictures = [env.render(state)]
    for i in range(8):
        state, _ = env.step(state, jnp.array([1]), jax.random.key(i))
    pictures.append(env.render(state))
    assert cart_column(pictures[1]) > cart_column(pictures[0]) + 5


def test_memory_chain_asks_at_its_end_for_what_it_showed_at_its_start():
    """At its full length: the context is seen twice, and the answer is due 99 steps later."""
    _, seen = play(wrappers.make("gymnax/MemoryChain-bsuite", 3, memory_length=100), 0, 11)
    for lane in range(3):
        for start in (0, 102):
            obs, reward = seen.obs[start:, lane], seen.reward[start:, lane]
            assert seen.first[start, lane] and set(obs[:, 2][:2]) <= {-1.0, 1.0}
            np.testing.assert_allclose(obs[1:102, 0], 1 - np.arange(101) / 100, atol=1e-6)
            np.testing.assert_array_equal(obs[2:102, 1:], 0)
            np.testing.assert_array_equal(reward[1:101], 0)
            assert (
                seen.terminated[start + 101, lane] and seen.episode.length[start + 101, lane] == 101
            )
    assert not seen.truncated.any()


def test_memory_chain_pays_for_the_right_answer():
    env = wrappers.make("gymnax/MemoryChain-bsuite", 4, memory_length=3)
    state, timestep = env.reset(jax.random.key(1))
    shown = timestep.obs[:, 2] > 0
    assert shown.any() and not shown.all()
    step = jax.jit(env.step)
    right = jnp.array([True, False, True, False])
    for t in range(4):
        action = jnp.where(right, shown, ~shown) if t == 3 else ~shown
        state, timestep = step(state, action.astype(int), jax.random.key(t))
    np.testing.assert_array_equal(timestep.reward, [1, -1, 1, -1])
    np.testing.assert_array_equal(timestep.episode.returns, [1, -1, 1, -1])
    assert timestep.terminated.all()
