"""JaxMARL under the contract. Every environment, against itself stepped by hand."""

import functools
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxmarl
import numpy as np
import pytest
from jaxmarl.environments import MultiAgentEnv, SimpleSpreadMPE, spaces
from jaxmarl.environments.overcooked import overcooked_layouts
from jaxmarl.environments.overcooked.common import OBJECT_TO_INDEX
from jaxmarl.environments.smax import map_name_to_scenario
from rollouts import CHUNK, lane_keys, play, roll

import eqx_q.wrappers as wrappers
from eqx_q.errors import UsageError
from eqx_q.wrappers.observe import Observe

LANES = 2
FRAIL = jnp.full(6, 20.0)  # units that die soon, so that battles end within few steps
PUREJAXQL = {"see_enemy_actions": True, "walls_cause_death": True, "attack_mode": "closest"}
# What is added to a name: for `make` of ours, and for that of JaxMARL.
SHORT = {
    "HeuristicEnemySMAX": {"max_steps": 13, "unit_type_health": FRAIL, **PUREJAXQL},
    "SMAX": {"max_steps": 9, "num_allies": 2, "num_enemies": 3},
    "overcooked": {"max_steps": 12},
    "overcooked_v2": {"max_steps": 12},
    "coin_game": {"num_inner_steps": 4, "num_outer_steps": 3},
    "jaxnav": {"max_steps": 12, "lidar_num_beams": 4, "goal_radius": 4.0},
}
OURS = {
    "HeuristicEnemySMAX": {"map": "2s3z"},
    "overcooked": {"layout": "coord_ring"},
}
THEIRS = {
    "HeuristicEnemySMAX": {"scenario": map_name_to_scenario("2s3z")},
    "overcooked": {"layout": overcooked_layouts["coord_ring"]},
    "jaxnav": {"act_type": "Discrete"},
    "MPE_simple_world_comm_v3": {"action_type": "Discrete"},
}
DIFFERENT_AGENTS = {  # their observations, or their actions
    "SMAX",
    "MPE_simple_adversary_v3",
    "MPE_simple_crypto_v3",
    "MPE_simple_push_v3",
    "MPE_simple_speaker_listener_v4",
    "MPE_simple_tag_v3",
    "MPE_simple_world_comm_v3",
}
DIFFERENT_ACTIONS = {"MPE_simple_speaker_listener_v4", "MPE_simple_world_comm_v3"}
IDS = [name.removeprefix("jaxmarl/") for name in wrappers.env_ids("jaxmarl")]
# One of each kind. The rest of MPE has these steps, other rewards.
BY_HAND = [name for name in IDS if name[:3] != "MPE" or "sp" in name]

pytestmark = pytest.mark.filterwarnings(
    "ignore:OvercookedV2 is now released:DeprecationWarning",
    "ignore:scatter inputs have incompatible types:FutureWarning",
    "ignore:max_dist_to_goal",
)


def make(name, num_envs=LANES, **options):
    if name.startswith("MPE"):
        options = {"max_steps": 10} | options
    if name in DIFFERENT_AGENTS:
        options = {"pad": True} | options
    options = SHORT.get(name, {}) | OURS.get(name, {}) | options
    return wrappers.make(f"jaxmarl/{name}", num_envs, **options)


def make_raw(name):
    options = {"max_steps": 10} if name.startswith("MPE") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jaxmarl.make(name, **(options | SHORT.get(name, {}) | THEIRS.get(name, {})))


def ended_by_task(name, raw, action, before, after, reward, info) -> bool:
    """Whether the game itself is over, said in another way than the wrapper says it."""
    if "SMAX" in name:
        alive = np.asarray(getattr(after, "state", after).unit_alive)
        return not (alive[: raw.num_allies].sum() and alive[raw.num_allies :].sum())
    if name == "switch_riddle":
        return reward[0] != 0  # for good or bad, where somebody told
    if name == "jaxnav":
        return not np.asarray(info["TimeO"]).any()
    return name == "hanabi"  # has no limit; all others end by theirs


def legal_actions(name, raw, state) -> dict:
    if "SMAX" in name:
        return raw.get_avail_actions(state)
    if name == "hanabi":
        return raw.get_legal_moves(state)
    return {agent: np.ones(raw.action_space(agent).n) for agent in raw.agents}


@functools.cache
def played(name):
    """Once for all tests: an environment, the raw one, and what happened in each."""
    env, raw = make(name), make_raw(name)
    actions, timesteps = play(env, 3, 2)
    keys = lane_keys(3, 2, LANES)
    reset, step = jax.jit(raw.reset), jax.jit(raw.step_env)
    log = []
    for lane in range(LANES):
        ended = True
        for t in range(2 * CHUNK + 1):
            if ended:
                obs, state = reset(keys[t, lane])
                reward, terminated, truncated = np.zeros(raw_agents(raw)), False, False
            else:
                action = dict(zip(raw.agents, actions[t - 1, lane], strict=True))
                before = state
                obs, state, rewards, done, info = step(keys[t, lane], before, action)
                reward = np.array([rewards[agent] for agent in raw.agents], np.float32)
                by_task = ended_by_task(name, raw, action, before, state, reward, info)
                terminated = bool(done["__all__"]) and by_task
                truncated = bool(done["__all__"]) and not by_task
            log.append((t, lane, ended, obs, state, reward, terminated, truncated))
            ended = terminated or truncated
    return env, raw, timesteps, log


def raw_agents(raw):
    return len(raw.agents)


def padded(x, shape):
    full = np.zeros(shape, np.float32)
    full[tuple(slice(0, size) for size in np.shape(x))] = x
    return full


@pytest.mark.parametrize("name", BY_HAND)
def test_equals_jaxmarl_stepped_by_hand(name):
    env, raw, timesteps, log = played(name)
    for t, lane, first, obs, state, reward, terminated, truncated in log:
        seen = jax.tree.map(lambda x: x[t, lane], timesteps)  # noqa: B023
        assert (seen.first, seen.terminated, seen.truncated) == (first, terminated, truncated)
        # Compiled alone and in lanes, arithmetic may be reordered.
        for i, agent in enumerate(raw.agents):
            expected = padded(obs[agent], env.observation_space.shape)
            np.testing.assert_allclose(seen.obs[i], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen.agent_reward, reward, rtol=1e-4, atol=1e-4)
        shared = name in ("HeuristicEnemySMAX", "hanabi", "switch_riddle", "overcooked")
        team = reward[0] if shared or name == "overcooked_v2" else reward.sum()
        np.testing.assert_allclose(seen.reward, team, rtol=1e-4, atol=1e-4)
        legal = legal_actions(name, raw, state)
        masks = [padded(legal[agent], env.action_space.n) for agent in raw.agents]
        if seen.action_mask is None:
            assert np.all(masks)
        else:
            np.testing.assert_array_equal(seen.action_mask, masks)
    assert timesteps.ended.any()
    if name in ("switch_riddle", "jaxnav"):  # for SMAX, see below
        assert timesteps.terminated.any() and timesteps.truncated.any()
    if env.max_episode_steps is not None:
        assert timesteps.episode.length[timesteps.truncated].tolist() in (
            [],
            [env.max_episode_steps] * timesteps.truncated.sum(),
        )


@pytest.mark.parametrize("name", ["HeuristicEnemySMAX", "SMAX"])
def test_the_global_state_is_that_of_jaxmarl_step_by_step(name):
    env, raw, timesteps, log = played(name)
    for t, lane, _, obs, *_ in log:
        np.testing.assert_allclose(
            timesteps.global_state[t, lane], obs["world_state"], rtol=1e-4, atol=1e-4
        )
    assert timesteps.global_state.shape[2:] == (env.state_size,) == (raw.state_size,)
    assert Observe(env, [0]).state_size == env.state_size
    assert (timesteps.global_state[1:] != timesteps.global_state[:-1]).any(-1).all()


def test_action_masks_change_with_the_state():
    """Else one taken from the state before would pass for the right one."""
    _, _, timesteps, _ = played("HeuristicEnemySMAX")
    assert (timesteps.action_mask[1:] != timesteps.action_mask[:-1]).any()
    assert not timesteps.agent_mask.all()


def test_the_dead_can_only_stop():
    _, raw, timesteps, _ = played("HeuristicEnemySMAX")
    only_stop = np.arange(10) == raw.num_movement_actions - 1
    dead = ~timesteps.agent_mask
    np.testing.assert_array_equal(
        timesteps.action_mask[dead], np.broadcast_to(only_stop, (dead.sum(), 10))
    )
    assert (timesteps.action_mask[~dead].sum(-1) >= raw.num_movement_actions).all()


def test_who_is_only_cut_by_the_limit_is_not_gone():
    """Or else a truncation would be learnt as a termination of every agent."""
    _, raw, timesteps, log = played("jaxnav")
    gone = np.zeros(raw_agents(raw), bool)
    for t, lane, first, _, state, *_ in log:
        gone = (gone & (not first)) | state.goal_reached | state.move_term
        np.testing.assert_array_equal(timesteps.agent_mask[t, lane], ~gone)
    alive = timesteps.agent_mask
    assert alive[timesteps.truncated].any(-1).all() and not alive[timesteps.truncated].all()
    assert not alive[timesteps.terminated].any()


def test_who_has_evaporated_is_gone():
    """Only its first step after arrival says that it has arrived. Rules alone, nothing compiled."""
    game = wrappers.make("jaxmarl/jaxnav", 2, evaporating=True).game
    _, state = jax.eval_shape(game.env.reset, jax.random.key(0))
    goal, crash, before = np.eye(4, dtype=bool)[:3]
    state = state.replace(goal_reached=goal, move_term=crash, term=before, done=np.ones(4, bool))
    np.testing.assert_array_equal(game.rules.agent_mask(game.env, state), [0, 0, 0, 1])


def test_padding_is_of_zeros_and_illegal_actions():
    _, _, timesteps, _ = played("MPE_simple_speaker_listener_v4")
    # The speaker sees 3 numbers and says 3 things, the listener sees 11 and has 5 moves.
    assert timesteps.obs.shape[2:] == (2, 11)
    assert (timesteps.obs[:, :, 0, 3:] == 0).all() and (timesteps.obs[:, :, 0, :3] != 0).any()
    expected = [[True, True, True, False, False], [True] * 5]
    np.testing.assert_array_equal(
        timesteps.action_mask, np.broadcast_to(expected, timesteps.action_mask.shape)
    )


def after_battle(health, step):
    """The timestep after one in which lane `i` starts with `health[i]` of allies and enemies."""
    env, _, _, _ = played("HeuristicEnemySMAX")
    state, _ = env.reset(jax.random.key(0))
    units = state.inner.game.state
    new = jnp.repeat(jnp.array(health, jnp.float32), env.num_agents, axis=1)
    units = units.replace(unit_health=new, step=jnp.full(LANES, step, units.step.dtype))
    state = eqx.tree_at(lambda s: s.inner.game.state, state, units)
    _, (_, timesteps) = roll(env, state, jax.random.key(1))
    return jax.tree.map(lambda x: np.asarray(x[0]), timesteps)


def test_a_battle_is_won_by_who_is_left():
    won_and_lost = after_battle([(20, 0), (0, 20)], step=3)
    assert won_and_lost.terminated.all() and not won_and_lost.truncated.any()
    np.testing.assert_array_equal(won_and_lost.episode.metrics["won"], [True, False])
    np.testing.assert_array_equal(won_and_lost.reward >= 1, [True, False])  # JaxMARL's measure
    np.testing.assert_array_equal(won_and_lost.agent_mask, [[True] * 5, [False] * 5])
    draw_and_none = after_battle([(0, 0), (20, 20)], step=3)
    np.testing.assert_array_equal(draw_and_none.terminated, [True, False])
    assert not draw_and_none.episode.metrics["won"].any()


def test_a_battle_that_ends_at_the_limit_is_ended_by_the_task():
    # JaxMARL compares the clock before it sets it forward: this is the 14th step.
    timestep = after_battle([(20, 20), (20, 0)], step=13)
    np.testing.assert_array_equal(timestep.truncated, [True, False])
    np.testing.assert_array_equal(timestep.terminated, [False, True])
    assert not after_battle([(20, 20), (20, 20)], step=12).ended.any()


def test_a_time_limit_can_be_told_as_termination_and_a_reward_be_the_mean():
    _, _, truncates, _ = played("MPE_simple_spread_v3")
    env = make("MPE_simple_spread_v3", time_limit="terminate", team_reward="mean")
    _, timesteps = play(env, 3, 2)
    assert truncates.truncated.any()
    np.testing.assert_array_equal(timesteps.terminated, truncates.truncated)
    assert not timesteps.truncated.any()
    np.testing.assert_allclose(timesteps.agent_reward, truncates.agent_reward, rtol=1e-5)
    np.testing.assert_allclose(timesteps.reward, timesteps.agent_reward.mean(-1), rtol=1e-5)
    assert not np.allclose(timesteps.agent_reward.std(-1), 0)


UP, DOWN, RIGHT, LEFT, STAY, INTERACT = range(6)


@pytest.mark.parametrize("learner_lanes", [None, 1])
def test_the_shaped_reward_is_annealed_and_counts_in_no_return(learner_lanes):
    """An onion into the pot every 5 steps is 3 to who does it, a delivered soup 20 to both."""
    env = wrappers.make(
        "jaxmarl/overcooked",
        LANES,
        layout="cramped_room",
        max_steps=11,
        shaped_reward_horizon=30,
        shaped_reward_lanes=learner_lanes,
    )
    state, _ = env.reset(jax.random.key(0))
    dishes = state.inner.game.agent_inv.at[1, 1].set(OBJECT_TO_INDEX["dish"])
    state = eqx.tree_at(lambda s: s.inner.game.agent_inv, state, dishes)
    step = jax.jit(env.step)
    onion = [LEFT, INTERACT, RIGHT, UP, INTERACT]
    cook = [*onion, *onion, STAY, STAY, *onion]  # the second wait is the reset
    serve = [DOWN, DOWN, INTERACT] + 14 * [STAY]
    returns = np.zeros(LANES)
    for t, actions in enumerate(zip(cook, serve, strict=True)):
        state, seen = step(state, jnp.array([actions] * LANES), jax.random.key(t))
        weight = max(0, 1 - t * (learner_lanes or LANES) / 30)
        shaped = 3 * weight * (t in (4, 9, 16))
        game = np.array([0, 20 * (t == 2)])
        np.testing.assert_allclose(seen.agent_reward, [(g + shaped, g) for g in game], atol=1e-5)
        np.testing.assert_allclose(seen.reward, game + shaped, atol=1e-5)
        returns = (returns + game) * (t != 11)
        np.testing.assert_allclose(seen.episode.returns, returns)
        assert (seen.truncated == (t == 10)).all() and (seen.first == (t == 11)).all()
    assert (weight > 0) == (learner_lanes == 1)  # in the second episode: it goes on, down to 0


class Countdown(MultiAgentEnv):
    """Somebody's own: two agents, paid what they do, for three steps."""

    def __init__(self):
        super().__init__(num_agents=2)
        self.action_spaces = {agent: spaces.Discrete(3) for agent in self.agents}

    def _observe(self, left):
        return {agent: jnp.array([left, i]) for i, agent in enumerate(self.agents)}

    def reset(self, key):
        return self._observe(3), jnp.array(3)

    def step_env(self, key, state, actions):
        left = state - 1
        rewards = {agent: actions[agent] for agent in self.agents}
        done = dict.fromkeys([*self.agents, "__all__"], left == 0)
        return self._observe(left), left, rewards, done, {}


def test_ones_own_is_accepted_and_ended_as_it_says():
    env = wrappers.make(Countdown(), 2)
    assert env.max_episode_steps is None and env.num_agents == 2
    actions, timesteps = play(env, 0, 1)
    np.testing.assert_array_equal(timesteps.terminated[:, 0], np.arange(CHUNK + 1) % 4 == 3)
    assert not timesteps.truncated.any()
    real = ~timesteps.first[1:]
    np.testing.assert_array_equal(timesteps.reward[1:][real], actions.sum(-1)[real])
    shared = env.replicate(2, team_reward="shared")
    assert shared.game.env is env.game.env and shared.game.team_reward == "shared"


def test_a_kind_is_known_by_its_class():
    env = wrappers.make(SimpleSpreadMPE(max_steps=7), 1)
    assert env.max_episode_steps == 8


@pytest.mark.parametrize("name", IDS)
def test_every_id_fits_the_contract(name):
    env = make(name)
    state, start = jax.eval_shape(env.reset, jax.random.key(0))
    action = jnp.zeros((LANES, env.num_agents), jnp.int32)
    later, timestep = jax.eval_shape(env.step, state, action, jax.random.key(0))
    assert jax.tree.structure((state, start)) == jax.tree.structure((later, timestep))
    for a, b in zip(
        jax.tree.leaves((state, start)), jax.tree.leaves((later, timestep)), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert timestep.obs.shape == (LANES, env.num_agents, *env.observation_space.shape)
    assert (timestep.global_state is None) == ("SMAX" not in name) == (env.state_size is None)
    assert (timestep.action_mask is None) == (
        name not in ("HeuristicEnemySMAX", "SMAX", "hanabi", *DIFFERENT_ACTIONS)
    )


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("MPE_simple_spread_v3", (0, 0, 0)),
        ("MPE_simple_tag_v3", (0, 0, 0, 1)),  # the prey sees less
        ("MPE_simple_speaker_listener_v4", (0, 1)),
        ("SMAX", (0, 0, 1, 1, 1)),  # all see alike, and have as many actions as enemies
    ],
)
def test_agents_are_of_a_kind_where_they_see_and_act_alike(name, kinds):
    assert make(name).agent_kinds == kinds


def test_equal_calls_share_what_is_compiled_and_others_do_not():
    def game(**options):
        return wrappers.make("jaxmarl/MPE_simple_spread_v3", 2, **options).game

    assert game() is game()
    assert game(num_agents=2) is game(num_agents=2)
    assert game() is not game(team_reward="mean")
    env = wrappers.make("jaxmarl/MPE_simple_spread_v3", 2, num_agents=2)
    assert env.replicate(3).game is env.game
    assert env.replicate(3, damping=0.5).game.env.damping == 0.5
    assert env.replicate(3, damping=0.5).num_agents == 2


@pytest.mark.parametrize("name", ["2s3z", "5m_vs_6m", "smacv2_5_units"])
def test_maps_by_name(name):
    raw = map_name_to_scenario(name)
    env = wrappers.make("jaxmarl/HeuristicEnemySMAX", 1, map=name, **PUREJAXQL)
    assert env.num_agents == raw.num_allies and env.game.env.num_enemies == raw.num_enemies
    assert env.action_space.n == 5 + raw.num_enemies
    assert env.game.env.smacv2_unit_type_generation == raw.smacv2_unit_type_generation
    np.testing.assert_array_equal(env.game.env.scenario, raw.unit_types)


WRONG = {
    "Overcooked": ({}, "unknown JaxMARL environment 'Overcooked': the nearest are overcooked,"),
    "MPE_simple_facmac_v1": ({}, "has Box actions"),
    "MPE_simple_tag_v3": ({}, "observations of shapes ((14,), (16,)): give pad=true"),
    "MPE_simple_speaker_listener_v4": ({}, "give pad=true"),
    "SMAX": ({"map": "5m_vs_6m"}, "numbers of actions (10, 11): give pad=true"),
    "HeuristicEnemySMAX": ({"map": "2s4z"}, "unknown map '2s4z': the nearest are 2s3z"),
    "overcooked": (
        {"layout": "cramp_room"},
        "unknown layout 'cramp_room': the nearest are cramped",
    ),
    "overcooked_v2": ({"layout": "two_room"}, "the nearest are two_rooms"),
    "storm": ({}, "one array for each of its agents"),
    "ant_4x2": ({}, "pass that environment instead of the name"),
    "hanabi": ({"num_agents": 7}, "JaxMARL cannot make hanabi with these options: Number of"),
    "switch_riddle": (
        {"team_reward": "means"},
        "unknown team_reward 'means': the nearest are mean",
    ),
    "coin_game": (
        {"num_inner_step": 3},
        "unknown option 'num_inner_step': the nearest are num_inner",
    ),
    "MPE_simple_spread_v3": ({"shaped_reward_horizon": 9}, "has no shaped reward"),
    "MPE_simple_reference_v3": ({"time_limit": "stop"}, "unknown time_limit 'stop'"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_cannot_be_says_what_can(name):
    options, message = WRONG[name]
    refused(name, options, message)


def refused(name, options, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        wrappers.make(f"jaxmarl/{name}", 2, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("HeuristicEnemySMAX", {"map": 8}, "unknown map '8': the nearest are 8m"),
        ("HeuristicEnemySMAX", {"attack_mode": "randm"}, "'randm': the nearest are random"),
        ("overcooked", {"layout": 8}, "JaxMARL cannot make overcooked with these options: "),
        ("overcooked", {"shaped_reward_horizon": "x"}, "='x': give 0 or more env steps"),
        ("overcooked", {"shaped_reward_horizon": float("nan")}, "=nan: give 0 or more"),
        ("overcooked", {"shaped_reward_lanes": -1}, "=-1: give a whole number, 1 or more"),
        ("overcooked", {"shaped_reward_lanes": 1.5}, "=1.5: give a whole number, 1 or more"),
        ("MPE_simple_spread_v3", {"action_type": "Foo"}, "Action type: Foo is not supported"),
        ("MPE_simple_spread_v3", {"max_steps": "x"}, "max_steps='x': give a whole number"),
        ("MPE_simple_spread_v3", {"damping": "x"}, "cannot make MPE_simple_spread_v3 with these"),
    ],
)
def test_options_that_jaxmarl_does_not_check(name, options, message):
    refused(name, options, message)


@pytest.mark.parametrize("name", ["MPE_simple_spread_v3", "SMAX", "coin_game", "jaxnav"])
def test_what_agents_are_paid_differently_is_not_shared(name):
    """While of a kind that is not known, anything is believed; see above."""
    refused(name, {"team_reward": "shared", "pad": True}, "set team_reward to sum or mean")


def test_pictures_show_what_is_there():
    env = make("HeuristicEnemySMAX")
    state, _ = env.reset(jax.random.key(0))
    units = jax.tree.map(lambda x: x[1], state.inner.game.state)
    picture = env.render(state, 1)
    assert picture.shape == (240, 240, 3)  # of a map of 32 × 32
    x, y = np.asarray(units.unit_positions).T * 240 / 32
    colours = picture[(240 - y).astype(int), x.astype(int)]
    assert (colours[:5] == colours[0]).all() and (colours[5:] == colours[5]).all()
    assert (colours[0] != colours[5]).any() and colours.any(-1).all()
    dead = units.unit_alive.at[0].set(False)
    lane = eqx.tree_at(lambda s: s.inner.game.state.unit_alive, state, dead[None].repeat(2, 0))
    assert env.render(lane, 1)[240 - int(y[0]) - 1, int(x[0])].sum() == 0

    env = make("MPE_simple_spread_v3")
    state, _ = env.reset(jax.random.key(0))
    picture, places = env.render(state, 0), (np.asarray(state.inner.game.p_pos[0]) + 2) * 60
    for (x, y), colour in zip(places, env.game.env.colour, strict=True):
        assert any((picture[240 - int(y) - 1, int(x)] == c).all() for c in (colour, (64, 64, 64)))

    env = make("overcooked")
    state, _ = env.reset(jax.random.key(0))
    picture = env.render(state, 0)
    assert picture.shape == (5 * 32, 5 * 32, 3)
    tiles = picture.reshape(5, 32, 5, 32, 3).std(axis=(1, 3)).sum(-1)
    for x, y in np.asarray(state.inner.game.agent_pos[0]):
        assert tiles[y, x] > tiles[2, 2]  # the middle of this kitchen is a bare counter

    env = make("overcooked_v2")
    state, _ = env.reset(jax.random.key(0))
    picture, grid = env.render(state, 0), state.inner.game.grid[0]
    tiles = picture.reshape(grid.shape[0], 32, grid.shape[1], 32, 3).std(axis=(1, 3)).sum(-1)
    floor = tiles[np.asarray(grid[..., 0]) == 0]
    agents = jax.tree.map(np.asarray, state.inner.game.agents.pos)
    assert sorted(floor)[-2:] == sorted(tiles[agents.y[0], agents.x[0]])

    env = make("coin_game")
    state, _ = env.reset(jax.random.key(0))
    cells = env.render(state, 0)[40::80, 40::80]
    game = jax.tree.map(lambda x: np.asarray(x[0]), state.inner.game)
    players = {tuple(cells[*place]) for place in (game.red_pos, game.blue_pos)}
    assert (0, 0, 0) not in players
    assert len({tuple(cell) for cell in cells.reshape(-1, 3)}) > len(players)

    env = make("switch_riddle")
    assert env.render(env.reset(jax.random.key(0))[0]) is None
