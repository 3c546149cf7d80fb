"""Craftax under the contract, against itself stepped by hand."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import assert_equal, play

import eqx_q.wrappers as wrappers
from eqx_q.errors import UsageError
from eqx_q.wrappers.textures import load_constants

full_constants, constants = map(load_constants, ("craftax.craftax", "craftax.craftax_classic"))
Achievement, Action, BlockType = constants.Achievement, constants.Action, constants.BlockType
# Only now: these import the constants, too, but several workers at once.
from craftax.craftax_classic.envs.craftax_state import EnvParams, StaticEnvParams  # noqa: E402
from craftax.craftax_env import make_craftax_env_from_name  # noqa: E402
from craftax.environment_base.environment_bases import EnvironmentNoAutoReset  # noqa: E402

LANES, LIMIT, STEPS = 3, 6, 9
CLASSIC = "Craftax-Classic-Symbolic-v1"


@eqx.filter_jit
def run(env, state, actions, key):
    """States and timesteps `[T, N]` after each of the actions `[T, N]`."""

    def step(state, x):
        state, timestep = env.step(state, *x)
        return state, (state, timestep)

    return jax.lax.scan(step, state, (actions, jax.random.split(key, len(actions))))[1]


@functools.cache
def classic():
    return wrappers.make(f"craftax/{CLASSIC}", LANES, max_episode_steps=LIMIT)


@functools.cache
def started():
    return classic().reset(jax.random.key(0))


def changed(state, **fields):
    """The same state, with these fields of its worlds."""
    worlds = state.inner.world.replace(**fields)
    return eqx.tree_at(lambda state: state.inner.world, state, worlds)


def all_ended(env):
    """A state in which every lane is reset next: `env.reset` without compiling that too."""
    shapes, _ = jax.eval_shape(env.reset, jax.random.key(0))
    key = jax.random.key(0)
    state = jax.tree.map(
        lambda x: jnp.broadcast_to(key if x.dtype == key.dtype else x.dtype.type(0), x.shape),
        shapes,
    )
    return eqx.tree_at(lambda state: state.running.ended, state, jnp.ones(env.num_envs, bool))


def test_equals_craftax_stepped_by_hand_over_boundaries():
    """Lane 1 dies at once, and is therefore cut later than the others."""
    env, (state, start) = classic(), started()
    health = state.inner.world.player_health.at[1].set(0)
    state = changed(state, player_health=health)
    actions = jax.random.randint(jax.random.key(1), (STEPS, LANES), 0, 17)
    _, seen = run(env, state, actions, jax.random.key(2))

    raw = make_craftax_env_from_name(CLASSIC, auto_reset=False)
    reset, step = jax.jit(raw.reset_env), jax.jit(raw.step_env)
    for lane, key in enumerate(jax.random.split(jax.random.key(0), LANES)):
        obs, world = reset(key, raw.default_params)
        np.testing.assert_allclose(start.obs[lane], obs, atol=1e-6)
        if lane == 1:
            world = world.replace(player_health=0)
        ended = False
        for t, key in enumerate(jax.random.split(jax.random.key(2), STEPS)):
            key, now = jax.random.split(key, LANES)[lane], jax.tree.map(lambda x: x[t, lane], seen)  # noqa: B023
            if ended:
                obs, world = reset(key, raw.default_params)
                reward, done = 0.0, False
            else:
                obs, world, reward, done, _ = step(key, world, actions[t, lane], raw.default_params)
            cut = int(world.timestep) == LIMIT
            np.testing.assert_allclose(now.obs, obs, atol=1e-6)
            np.testing.assert_allclose(now.reward, reward, atol=1e-6)
            assert (now.first, now.terminated, now.truncated) == (ended, bool(done), cut)
            for one in Achievement:
                name = f"achievements/{one.name.lower()}"
                assert now.episode.metrics[name] == world.achievements[one.value]
            ended = done or cut
    np.testing.assert_array_equal(np.argwhere(seen.terminated), [[0, 1]])
    np.testing.assert_array_equal(np.argwhere(seen.truncated), [[5, 0], [5, 2], [7, 1]])


def test_achievements_and_score_by_hand():
    """Lane 0 plants a sapling, lane 1 drinks, lane 2 does nothing."""
    env, (state, _) = classic(), started()
    world = state.inner.world
    ground = jnp.array([BlockType.GRASS.value, BlockType.WATER.value, BlockType.STONE.value])
    state = changed(
        state,
        map=jnp.broadcast_to(ground[:, None, None], world.map.shape).astype(world.map.dtype),
        inventory=world.inventory.replace(sapling=jnp.array([1, 0, 0])),
        mob_map=jnp.zeros_like(world.mob_map),
        cows=world.cows.replace(mask=jnp.zeros_like(world.cows.mask)),
    )
    actions = jnp.zeros((STEPS, LANES), int)
    actions = actions.at[0].set(jnp.array([Action.PLACE_PLANT.value, Action.DO.value, 0]))
    _, seen = run(env, state, actions, jax.random.key(3))
    metrics = dict(seen.episode.metrics)
    percent = metrics.pop("percent_of_maximum")
    np.testing.assert_array_equal(seen.reward[0], [1, 1, 0])
    np.testing.assert_allclose(percent[0], [100 / 22, 100 / 22, 0], rtol=1e-6)
    np.testing.assert_allclose(percent, seen.episode.returns / 22 * 100, atol=1e-4)
    assert set(metrics) == {f"achievements/{one.name.lower()}" for one in Achievement}
    made = {"achievements/place_plant": [1, 0, 0], "achievements/collect_drink": [0, 1, 0]}
    for name, achieved in metrics.items():
        expected = np.tile(made.get(name, [0, 0, 0]), (STEPS, 1))
        expected[LIMIT:] = 0  # episodes later
        np.testing.assert_array_equal(achieved, expected, name)
    assert seen.episode.ended[LIMIT - 1].all()  # when they are counted


def test_the_score_is_out_of_what_all_achievements_pay():
    assert len(Achievement) == 22
    assert full_constants.ACHIEVEMENT_REWARD_MAP.sum() == 226


def test_the_full_game_by_its_own_state():
    """What it should have paid and shown, from the worlds that it went through."""
    env = wrappers.make("craftax/Craftax-Symbolic-v1", 2, max_episode_steps=3)
    assert (env.observation_space.shape, env.action_space.n) == ((8268,), 43)
    nothing = jnp.zeros((5, 2), int)
    states, seen = run(env, all_ended(env), nothing, jax.random.key(0))
    np.testing.assert_array_equal(seen.first[:, 0], [1, 0, 0, 0, 1])
    state = jax.tree.map(lambda x: x[0], states)
    # Something to do on the first of nine floors: a sapling to plant, and a table to build.
    world = state.inner.world
    inventory = world.inventory.replace(sapling=jnp.array([1, 0]), wood=jnp.array([9, 9]))
    grass = full_constants.BlockType.GRASS.value
    state = changed(state, inventory=inventory, map=jnp.full_like(world.map, grass))
    actions = [[full_constants.Action.PLACE_PLANT.value, full_constants.Action.PLACE_TABLE.value]]
    states, seen = run(env, state, jnp.array(actions * 5), jax.random.key(1))
    raw = make_craftax_env_from_name("Craftax-Symbolic-v1", auto_reset=False)
    worlds, look = states.inner.world, jax.jit(jax.vmap(jax.vmap(raw.get_obs)))
    np.testing.assert_allclose(seen.obs, look(worlds), atol=1e-6)
    np.testing.assert_array_equal(worlds.timestep, [[1, 1], [2, 2], [3, 3], [0, 0], [1, 1]])
    np.testing.assert_array_equal(seen.truncated[:, 0], [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(seen.first[:, 1], [0, 0, 0, 1, 0])
    assert not seen.terminated.any()
    before = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), state.inner.world, worlds)
    gained = np.diff(before.achievements.astype(int), axis=0)
    health = np.diff(before.player_health, axis=0)
    paid = np.array(gained @ full_constants.ACHIEVEMENT_REWARD_MAP + 0.1 * health)
    paid[3] = 0  # the reset
    np.testing.assert_allclose(seen.reward, paid, atol=1e-5)
    assert (gained[0].sum(-1) >= 1).all()
    for lane, name in enumerate(("place_plant", "place_table")):
        index = full_constants.Achievement[name.upper()].value
        shown = seen.episode.metrics[f"achievements/{name}"]
        np.testing.assert_array_equal(shown, worlds.achievements[..., index])
        assert shown[0, lane]
    np.testing.assert_allclose(
        seen.episode.metrics["percent_of_maximum"], seen.episode.returns / 2.26, atol=1e-4
    )
    assert not np.array_equal(worlds.map[3], before.map[0])  # a new world


def test_pixels_are_the_games_own_as_bytes():
    env = wrappers.make("craftax/Craftax-Classic-Pixels-v1", 2)
    space = env.observation_space
    assert space.shape == (63, 63, 3) and space.dtype == np.uint8
    assert (space.low.min(), space.high.max()) == (0, 255)
    state, timestep = env.reset(jax.random.key(0))
    raw = make_craftax_env_from_name("Craftax-Classic-Pixels-v1", auto_reset=False)
    pixels = jax.jit(jax.vmap(raw.get_obs))(state.inner.world)
    assert timestep.obs.dtype == jnp.uint8 and timestep.obs.max() > 200
    np.testing.assert_array_equal(timestep.obs, np.round(np.asarray(pixels) * 255))
    picture = env.render(state, 1)
    assert picture.shape == (144, 144, 3) and picture.dtype == np.uint8
    # The same scene, drawn finer: the same colours on the whole.
    np.testing.assert_allclose(picture.mean((0, 1)), timestep.obs[1].mean((0, 1)), atol=12)
    assert abs(picture.mean((0, 1)) - np.asarray(timestep.obs[0]).mean((0, 1))).max() > 1


class World(eqx.Module):
    timestep: jax.Array
    number: jax.Array
    achievements: jax.Array


class Probe(EnvironmentNoAutoReset):
    """Somebody's own, on Craftax's interface and cheap: dies at random."""

    static_env_params = StaticEnvParams()
    default_params = EnvParams()
    num_actions = 2

    def reset_env(self, rng, params):
        world = World(jnp.array(0), jax.random.uniform(rng), jnp.zeros(22, bool))
        return world.number[None], world

    def step_env(self, key, state, action, params):
        world = dataclasses.replace(state, timestep=state.timestep + 1)
        done = jax.random.uniform(key) < 0.1
        return world.number[None], world, 1.0, done | (world.timestep >= params.max_timesteps), {}


def probe(num_envs=64, **options):
    return wrappers.make(Probe(), num_envs, **options)


def test_optimistic_resets_are_plain_resets():
    """Episode by episode the same, so that no statistics can tell; see test_autoreset too."""
    plain = play(probe(max_episode_steps=12, optimistic_resets=1), 0, 5)[1]
    for ratio in (16, 128):
        assert_equal(play(probe(max_episode_steps=12, optimistic_resets=ratio), 0, 5)[1], plain)
    ended = plain.ended.sum(1)
    assert ended.max() > 4 and ended.min() == 0 and plain.truncated.any()
    assert len(np.unique(plain.obs[plain.first])) == plain.first.sum() > 500
    # The lengths have the distribution they must have: geometric, and cut.
    lengths = plain.episode.length[plain.ended]
    expected = [0.1 * 0.9**n for n in range(11)] + [0.9**11]
    seen = np.bincount(lengths, minlength=13)[1:] / len(lengths)
    np.testing.assert_allclose(seen, expected, atol=4 * np.sqrt(0.25 / len(lengths)))


def test_what_the_limit_does_is_an_option():
    cut = play(probe(max_episode_steps=12), 0, 2)[1]
    dead = play(probe(max_episode_steps=12, time_limit="terminate"), 0, 2)[1]
    at_limit = cut.truncated
    assert at_limit.any() and cut.terminated.any() and not dead.truncated.any()
    np.testing.assert_array_equal(at_limit & (cut.episode.length != 12), False)
    np.testing.assert_array_equal(dead.terminated, cut.terminated | at_limit)
    np.testing.assert_array_equal(dead.obs, cut.obs)
    own = wrappers.make((Probe(), EnvParams(max_timesteps=12)), 64)
    assert_equal(play(own, 0, 2)[1], cut)


def test_options_reach_the_game():
    env = wrappers.make(f"craftax/{CLASSIC}", 2, day_length=99, max_cows=5, map_size=[32, 32])
    assert env.game.params.day_length == 99
    assert env.game.env.static_env_params.max_cows == 5
    assert env.game.env.static_env_params.map_size == (32, 32)
    assert env.max_episode_steps == 10_000 and env.game.lanes_per_reset == 128
    other = env.replicate(1, max_episode_steps=50, optimistic_resets=1)
    assert other.max_episode_steps == 50 and other.game.lanes_per_reset is None
    assert other.game.params.day_length == 99
    pair = probe().replicate(1), wrappers.make((Probe(), EnvParams(max_timesteps=7)), 1)
    assert [one.max_episode_steps for one in pair] == [10_000, 7]


@pytest.mark.parametrize("name", ["Craftax-Symbolic-v1", CLASSIC])
def test_every_default_may_be_given_as_an_option(name):
    env = make_craftax_env_from_name(name, auto_reset=False)
    params, static = env.default_params, env.static_env_params
    options = {
        f.name: getattr(fs, f.name) for fs in (params, static) for f in dataclasses.fields(fs)
    }
    limit = options.pop("max_timesteps")
    lanes = wrappers.make(f"craftax/{name}", 1, max_episode_steps=limit, **options)
    assert lanes.game.env.static_env_params == static


def test_equal_calls_share_what_is_compiled():
    assert wrappers.make(f"craftax/{CLASSIC}", 1, max_episode_steps=LIMIT).game is classic().game
    assert wrappers.make(f"craftax/{CLASSIC}", 1).game is not classic().game


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Craftax-Clasic-Symbolic-v1", {}, "the nearest are Craftax-Classic-Symbolic-v1"),
        (CLASSIC, {"max_timesteps": 5}, "unknown option 'max_timesteps'"),
        (CLASSIC, {"optimistic_reset": 5}, "the nearest are optimistic_resets"),
        (CLASSIC, {"optimistic_resets": 0}, "optimistic_resets=0: give a whole number, 1 or"),
        (CLASSIC, {"max_episode_steps": 2.5}, "max_episode_steps=2.5: give a whole number"),
        (CLASSIC, {"time_limit": "terminated"}, "the nearest are terminate"),
        (CLASSIC, {"map_size": "x"}, "map_size='x': give a value like (64, 64)"),
        (CLASSIC, {"map_size": [32]}, "map_size=[32]: give a value like"),
        (CLASSIC, {"map_size": [32, 1.5]}, "give a value like (64, 64)"),
        (CLASSIC, {"day_length": "x"}, "day_length='x': give a value like 300"),
        (CLASSIC, {"god_mode": 3}, "unknown option 'god_mode'"),
        (CLASSIC, {"always_diamond": 3}, "always_diamond=3: give a value like True"),
    ],
)
def test_bad_input_is_told_how_to_be_mended(name, options, message):
    with pytest.raises(UsageError) as error:
        wrappers.make(f"craftax/{name}", 2, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
