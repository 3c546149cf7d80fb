"""JaxMARL as it is, under the contract. Every environment, against itself stepped by hand."""

import functools
import warnings

import jax
import jax.numpy as jnp
import jaxmarl
import numpy as np
import pytest
from jaxmarl.environments.overcooked import overcooked_layouts
from jaxmarl.environments.smax import map_name_to_scenario
from rollouts import CHUNK, lane_keys, play

import eqx_q.wrappers as wrappers

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
    "jaxnav": {"max_steps": 12, "lidar_num_beams": 4},
    "switch_riddle": {"num_agents": 4},
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
IDS = [name.removeprefix("jaxmarl/") for name in wrappers.env_ids("jaxmarl")]
# One of each kind. The rest of MPE has these steps, other rewards.
BY_HAND = [name for name in IDS if name[:3] != "MPE" or "sp" in name]

pytestmark = pytest.mark.filterwarnings(
    "ignore:OvercookedV2 is now released:DeprecationWarning",
    "ignore:scatter inputs have incompatible types:FutureWarning",
    "ignore:max_dist_to_goal",
)


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    """Sixteen environments are compiled here, to be run for a few steps."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
    if env.max_episode_steps is not None:
        assert timesteps.episode.length[timesteps.truncated].tolist() in (
            [],
            [env.max_episode_steps] * timesteps.truncated.sum(),
        )
