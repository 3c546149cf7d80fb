"""PettingZoo's teams, against themselves stepped by hand."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pettingzoo
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from kinds import ACTIONS, KindsTeam
from mpe2 import simple_speaker_listener_v4, simple_spread_v3
from pettingzoo import ParallelEnv
from pettingzoo.utils import parallel_to_aec
from rollouts import CHUNK, assert_equal, play

import eqx_q.wrappers as wrappers
from eqx_q.errors import MissingExtraError, UsageError
from eqx_q.wrappers import pettingzoo as suite
from eqx_q.wrappers.conversion import as_taken


class Fates(ParallelEnv):
    """Each agent's end is written: the step it comes in, and whether it is the task or the limit.

    An agent observes the time, its number, and what it did last; it is paid its number a step.
    """

    metadata: ClassVar = {"name": "fates", "is_parallelizable": True, "render_modes": []}
    render_mode = None

    def __init__(self, fates, masks=None, pay=1.0, shape=(3,)):
        self.fates, self.masks, self.pay, self.shape = fates, masks, pay, shape
        self.possible_agents = list(fates)

    def observation_space(self, agent):
        box = Box(1.0, 9.0, (3,), np.float64)
        if self.masks != "obs":
            return box
        return Dict({"observation": box, "action_mask": Box(0, 1, (3,), np.int8)})

    def action_space(self, agent):
        return Discrete(3, start=4)

    def number(self, agent):
        return 1 + self.possible_agents.index(agent)

    def mask(self, agent):
        return np.array([1, self.time % 2, self.number(agent) == 2], np.int8)

    def observe(self, agent):
        obs = np.resize([1 + self.time, self.number(agent), self.last[agent]], self.shape)
        return {"observation": obs, "action_mask": self.mask(agent)} if self.masks == "obs" else obs

    def tell(self, agents):
        says = self.masks == "info" or (self.masks == "late" and self.time > 0)
        return {x: {"action_mask": self.mask(x)} if says else {} for x in agents}

    def reset(self, seed=None, options=None):
        self.time, self.agents = 0, list(self.possible_agents)
        self.last = dict.fromkeys(self.agents, 1)
        return {x: self.observe(x) for x in self.agents}, self.tell(self.agents)

    def step(self, actions):
        assert set(actions) == set(self.agents) and set(actions.values()) <= {4, 5, 6}
        acting, self.time, self.last = self.agents, self.time + 1, actions
        over = {x: self.fates[x][1] for x in acting if self.fates[x][0] == self.time}
        self.agents = [x for x in acting if x not in over]
        return (
            {x: self.observe(x) for x in acting},
            {x: self.pay * self.number(x) for x in acting},
            {x: over.get(x) in ("task", "both") for x in acting},
            {x: over.get(x) in ("limit", "both") for x in acting},
            self.tell(acting),
        )


def by_hand(raw, players, actions, seed):
    """What the environment itself says over time, in the arrays of one lane."""
    fields = ("obs", "agent_reward", "agent_mask", "terminated", "truncated", "first")
    said = {name: [] for name in fields}
    over = True
    for t in range(len(actions) + 1):
        rewards, ended = {}, (False, False)
        if first := over:
            obs, _ = raw.reset(seed=seed)
            seed, alive = None, set(raw.agents)
        else:
            acting = {x: int(actions[t - 1, players.index(x)]) for x in raw.agents}
            obs, rewards, _, truncated, _ = raw.step(acting)
            alive = set(raw.agents)
            if not alive:
                alive = {x for x in acting if truncated[x]}
                ended = (not alive, bool(alive))
        over = any(ended)
        said["first"].append(first)
        said["terminated"].append(ended[0])
        said["truncated"].append(ended[1])
        shapes = {x: raw.observation_space(x).shape for x in players}
        whole = np.max([*shapes.values()], axis=0)
        seen = [np.asarray(obs.get(x, np.zeros(shapes[x]))) for x in players]
        said["obs"].append([np.pad(x, [(0, n) for n in whole - x.shape]) for x in seen])
        said["agent_reward"].append([rewards.get(x, 0) for x in players])
        said["agent_mask"].append([x in alive for x in players])
    return {name: np.asarray(one, np.float32) for name, one in said.items()}


def assert_says(timesteps, lane, said):
    for name, expected in said.items():
        seen = getattr(timesteps, name)[:, lane]
        # Equal, but that XLA may make 0 of numbers that are all but that.
        np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-37, err_msg=name)
    np.testing.assert_allclose(timesteps.reward[:, lane], said["agent_reward"].sum(-1), rtol=1e-6)


def legal_play(env, seed, steps):
    """As `play`, but by the masks."""
    generator = np.random.default_rng(seed)
    state, timestep = env.reset(jax.random.key(0))
    actions, timesteps = [], [timestep]
    for _ in range(steps):
        wishes = generator.random(timestep.action_mask.shape) * timestep.action_mask
        actions.append(wishes.argmax(-1) + env.action_space.start)
        state, timestep = env.step(state, jnp.asarray(actions[-1]), jax.random.key(0))
        timesteps.append(timestep)
    return np.stack(actions), jax.tree.map(lambda *x: np.stack(x), *timesteps)


def test_equals_the_environment_stepped_by_hand():
    env = wrappers.make("pettingzoo/mpe2.simple_spread_v3", 2, seed=3, max_cycles=7)
    assert env.num_agents == 3 and env.action_space.n == 5
    assert env.observation_space == Box(-np.inf, np.inf, (18,), np.float32)
    actions, timesteps = play(env, 0, 2)
    for lane in range(2):
        raw = simple_spread_v3.parallel_env(max_cycles=7)
        said = by_hand(raw, raw.possible_agents, actions[:, lane], 3 + lane)
        assert_says(timesteps, lane, said)
        assert said["truncated"].sum() == 2 * CHUNK // 8
    assert timesteps.action_mask is None
    env.close()


def test_equals_a_game_whose_agents_die_early():
    name = "butterfly/knights_archers_zombies_v11"
    options = {"spawn_delay": 2, "max_zombies": 30, "line_death": True, "max_cycles": 50}
    env = wrappers.make(f"pettingzoo/{name.replace('/', '.')}", 2, seed=8, **options)
    actions, timesteps = play(env, 0, 6)
    for lane in range(2):
        raw = pettingzoo.make("parallel", name, **options)
        assert_says(timesteps, lane, by_hand(raw, raw.possible_agents, actions[:, lane], 8 + lane))
    going_on = ~timesteps.agent_mask & ~timesteps.ended[..., None]
    assert going_on.any() and timesteps.truncated.any()
    env.close()


def test_agents_that_act_in_turn_are_converted_by_pettingzoo():
    def converted():
        return simple_spread_v3.env(max_cycles=7)

    def own():
        return parallel_to_aec(Fates({"a": (2, "task"), "b": (4, "limit")}))

    env = wrappers.make(converted, 2, seed=3)
    same = wrappers.make("pettingzoo/mpe2.simple_spread_v3", 2, seed=3, max_cycles=7)
    assert_equal(play(env, 0, 1)[1], play(same, 0, 1)[1])
    assert wrappers.make(own, 1).num_agents == 2
    env.close()
    same.close()


def test_agents_that_differ_are_padded():
    name = "pettingzoo/mpe2.simple_speaker_listener_v4"
    env = wrappers.make(name, 2, seed=5, pad=True, max_cycles=4)
    assert env.observation_space.shape == (11,) and env.action_space.n == 5
    actions, timesteps = legal_play(env, 0, 12)
    for lane in range(2):
        raw = simple_speaker_listener_v4.parallel_env(max_cycles=4)
        said = by_hand(raw, ["speaker_0", "listener_0"], actions[:, lane], 5 + lane)
        assert_says(timesteps, lane, said)
    assert (timesteps.obs[:, :, 0, 3:] == 0).all() and timesteps.obs[:, :, 1, 3:].any()
    assert actions[:, :, 0].max() == 2 and actions[:, :, 1].max() == 4
    legal = np.broadcast_to([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], timesteps.action_mask.shape)
    np.testing.assert_array_equal(timesteps.action_mask, legal)
    env.close()


class Ranges(ParallelEnv):
    """Two agents with other ranges of what they see and do; each is paid the sum of what it did."""

    metadata: ClassVar = {"name": "ranges", "render_modes": []}
    possible_agents: ClassVar = ["a", "b"]
    render_mode = None
    observation_spaces: ClassVar = {"a": Discrete(2, start=1), "b": Discrete(4)}
    action_spaces: ClassVar = {
        "a": Box(np.array([-1.0, 3.0]), np.array([1.0, 3.0]), dtype=np.float64),
        "b": Box(np.array([-10.0, 0.1]), np.array([0.0, 0.3]), dtype=np.float64),
    }

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        self.agents = ["a", "b"]
        return {"a": 2, "b": 3}, {"a": {}, "b": {}}

    def step(self, actions):
        assert all(self.action_spaces[x].contains(action) for x, action in actions.items())
        rewards = {x: action.sum() for x, action in actions.items()}
        no = dict.fromkeys("ab", False)
        return {"a": 1, "b": 0}, rewards, no, no, {"a": {}, "b": {}}


def test_agents_whose_ranges_differ():
    env = wrappers.make(Ranges, 1)
    assert env.observation_space == Discrete(4) and env.action_space == Box(0, 1, (2,))
    assert env.agent_kinds == (0, 1)
    state, timestep = env.reset(jax.random.key(0))
    np.testing.assert_array_equal(timestep.obs, [[2, 3]])
    for action, paid in (([0, 0], [2, -9.9]), ([1, 1], [4, 0.3]), ([0.5, 0.25], [3, -4.85])):
        both = jnp.array([[action, action]], jnp.float32)
        state, timestep = env.step(state, both, jax.random.key(0))
        np.testing.assert_allclose(timestep.agent_reward, [paid], rtol=1e-6)
    np.testing.assert_array_equal(timestep.obs, [[1, 0]])
    env.close()


@pytest.mark.filterwarnings("ignore")
def test_padding_is_no_action(caplog):
    env = wrappers.make("pettingzoo/mpe2.simple_speaker_listener_v4", 1, pad=True)
    state, _ = env.reset(jax.random.key(0))
    with pytest.raises(Exception, match="has 3 actions, action 3 is padding"):
        jax.block_until_ready(env.step(state, jnp.array([[3, 4]]), jax.random.key(0)))
    env.close()


@pytest.mark.parametrize(
    ("fates", "alive", "terminated"),
    [
        # One dies, the other meets the limit: there is somebody left to bootstrap.
        ({"a": (1, "task"), "b": (3, "limit")}, ["ab", "b", "b", "b"], False),
        ({"a": (3, "task"), "b": (3, "limit")}, ["ab", "ab", "ab", "b"], False),
        ({"a": (2, "limit"), "b": (3, "limit")}, ["ab", "ab", "b", "b"], False),
        ({"a": (2, "limit"), "b": (2, "limit")}, ["ab", "ab", "ab"], False),
        # Whoever was left has come to the end of the task.
        ({"a": (3, "task"), "b": (1, "limit")}, ["ab", "a", "a", ""], True),
        ({"a": (1, "task"), "b": (3, "task")}, ["ab", "b", "b", ""], True),
        ({"a": (2, "task"), "b": (2, "both")}, ["ab", "ab", ""], True),
    ],
)
def test_how_a_team_ends(fates, alive, terminated):
    env = wrappers.make(lambda: Fates(fates), 1)
    actions, timesteps = play(env, 0, 1)
    last = len(alive) - 1
    for t in range(CHUNK + 1):
        time = t % len(alive)
        mask = [agent in alive[time] for agent in "ab"]
        np.testing.assert_array_equal(timesteps.agent_mask[t, 0], mask)
        assert timesteps.first[t, 0] == (time == 0)
        assert timesteps.terminated[t, 0] == (time == last and terminated)
        assert timesteps.truncated[t, 0] == (time == last and not terminated)
        for m, agent in enumerate("ab"):
            there = time <= fates[agent][0]
            acted = there and time > 0
            did = actions[t - 1, 0, m] if acted else 1
            expected = [1 + time, m + 1, did] if there else [0, 0, 0]
            np.testing.assert_array_equal(timesteps.obs[t, 0, m], expected)
            assert timesteps.agent_reward[t, 0, m] == (m + 1 if acted else 0)
    # The dead see zeros, which the agents' own spaces do not hold.
    assert env.observation_space.low.max() == 0
    env.close()


@pytest.mark.parametrize("masks", ["info", "obs"])
def test_masks(masks):
    fates = {"a": (2, "task"), "b": (4, "limit")}
    env = wrappers.make(lambda: Fates(fates, masks), 2)
    _, timesteps = legal_play(env, 0, 10)
    for t in range(11):
        time = t % 5
        own = [[1, time % 2, 0], [1, time % 2, 1]]
        if time > 2:
            own[0] = [1, 1, 1]  # nobody asks the dead
        np.testing.assert_array_equal(timesteps.action_mask[t], [own, own])
        np.testing.assert_array_equal(timesteps.obs[t, :, 1, :2], [[1 + time, 2]] * 2)
    env.close()


def test_masks_that_come_too_late_are_told():
    env = wrappers.make(lambda: Fates({"a": (2, "task"), "b": (4, "limit")}, "late"), 1)
    env.host.reset()
    with pytest.raises(UsageError, match="include it in the info of every reset, too"):
        env.host.step(np.full((1, 2), 4))
    env.close()


@pytest.mark.parametrize(
    ("team_reward", "rewards"), [("sum", [0, 6, 5, 5]), ("mean", [0, 2, 5 / 3, 5 / 3])]
)
def test_team_rewards(team_reward, rewards):
    fates = {"a": (1, "task"), "b": (3, "task"), "c": (3, "task")}
    env = wrappers.make(lambda: Fates(fates), 1, team_reward=team_reward)
    _, timesteps = play(env, 0, 1)
    np.testing.assert_allclose(timesteps.reward[:8, 0], rewards * 2, rtol=1e-6)
    np.testing.assert_array_equal(timesteps.agent_reward[:4, 0].sum(-1), [0, 6, 5, 5])
    np.testing.assert_allclose(timesteps.episode.returns[3, 0], np.sum(rewards), rtol=1e-6)
    env.close()


@pytest.mark.filterwarnings("ignore")
def test_a_shared_reward_is_taken_once_and_must_be_shared(caplog):
    env = wrappers.make(
        "pettingzoo/mpe2.simple_spread_v3", 1, team_reward="shared", local_ratio=0.0
    )
    _, timesteps = play(env, 0, 1)
    np.testing.assert_allclose(timesteps.reward, timesteps.agent_reward[..., 1])
    assert (timesteps.reward[1:] < 0).all()
    env.close()
    unlike = wrappers.make(
        lambda: Fates({"a": (2, "task"), "b": (2, "task")}), 1, team_reward="shared"
    )
    state, _ = unlike.reset(jax.random.key(0))
    with pytest.raises(Exception, match=r"agents got rewards 1\.0, 2\.0: use sum or mean"):
        jax.block_until_ready(unlike.step(state, jnp.full((1, 2), 4), jax.random.key(0)))
    unlike.close()


def test_the_seed_is_for_the_first_reset_and_later_ones_go_on():
    env = wrappers.make("pettingzoo/mpe2.simple_spread_v3", 2, seed=4)
    again = env.replicate(2, seed=4)
    starts = [one.reset(jax.random.key(0))[1].obs for one in (env, env, again, again)]
    assert not np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0][0], starts[0][1])
    np.testing.assert_array_equal(starts[0], starts[2])
    np.testing.assert_array_equal(starts[1], starts[3])
    for one in (env, again):
        one.close()


def test_names():
    names = wrappers.env_ids("pettingzoo")
    assert {"pettingzoo/mpe2.simple_tag_v3", "pettingzoo/butterfly.pistonball_v6"} <= set(names)
    for name in ("classic.rps_v2", "pettingzoo.classic.rps_v2"):
        env = wrappers.make(f"pettingzoo/{name}", 1)
        assert env.num_agents == 2 and env.action_space.n == 3
        assert env.observation_space == Discrete(4)
        env.close()


def test_pictures_of_each_lane():
    env = wrappers.make("pettingzoo/mpe2.simple_spread_v3", 2)
    state, _ = env.reset(jax.random.key(0))
    left, right = env.render(state, 0), env.render(state, 1)
    assert left.shape == (700, 700, 3) and not np.array_equal(left, right)
    plain = env.replicate(1, render_mode=None)
    state, _ = plain.reset(jax.random.key(0))
    assert plain.render(state) is None
    env.close()
    assert env.render(state) is None
    with pytest.raises(UsageError, match="closed"):
        env.reset(jax.random.key(0))


class Mixed(Fates):
    """Its second agent observes something else."""

    def __init__(self, other):
        super().__init__({"a": (1, "task"), "b": (1, "task")})
        self.other = other

    def observation_space(self, agent):
        return super().observation_space(agent) if agent == "a" else self.other


@pytest.mark.parametrize("actions", ACTIONS)
def test_agents_that_are_alike_have_spaces_of_every_kind(actions):
    env = wrappers.make(lambda: KindsTeam(actions), 2, leave_out=["word"])
    assert env.agent_kinds == (0, 0) and env.state_size == 3
    took, timesteps = play(env, 0, 1)
    raw = KindsTeam(actions)
    for t in range(CHUNK + 1):
        time, rewards = t % 6, {}
        if time == 0:
            obs, infos = raw.reset()
        else:
            acts = {x: took[t - 1, 0, "ab".index(x), ...] for x in raw.agents}
            acts = {x: as_taken(raw.action_space(x), one)[()] for x, one in acts.items()}
            obs, rewards, _, _, infos = raw.step(acts)
        np.testing.assert_array_equal(timesteps.global_state[t, 0], np.float32(raw.state()))
        for m, agent in enumerate("ab"):
            seen = jax.tree.map(lambda x: x[t, 0, m], timesteps.obs)  # noqa: B023
            assert env.observation_space.contains(seen)
            assert timesteps.agent_reward[t, 0, m] == np.float32(rewards.get(agent, 0))
            if agent in obs:
                del obs[agent]["word"]
                jax.tree.map(
                    lambda x, y: np.testing.assert_array_equal(x, np.asarray(y, x.dtype)),
                    seen,
                    obs[agent],
                )
            else:
                assert seen["nest"][0] == 2 and not seen["image"].any()
            if actions == "multi_discrete" and agent in infos:
                legal = [x if x.any() else x + 1 for x in infos[agent]["action_mask"]]
                np.testing.assert_array_equal(timesteps.action_mask[t, 0, m], np.concatenate(legal))
    env.close()


def test_global_states_and_kinds():
    options = {"max_cycles": 4, "continuous_actions": True}
    env = wrappers.make("pettingzoo/mpe2.simple_spread_v3", 2, seed=3, **options)
    assert env.action_space == Box(0, 1, (5,)) and env.state_size == 54
    actions, timesteps = play(env, 0, 1)
    raw = simple_spread_v3.parallel_env(**options)
    raw.reset(seed=4)
    for t in range(5):
        if t:
            raw.step(dict(zip(raw.agents, actions[t - 1, 1], strict=True)))
        np.testing.assert_allclose(
            timesteps.global_state[t, 1], np.float32(raw.state()), rtol=0, atol=1e-37
        )
    without = env.replicate(1, global_state=False)
    assert without.state_size is None
    assert without.reset(jax.random.key(0))[1].global_state is None
    padded = wrappers.make("pettingzoo/mpe2.simple_adversary_v3", 1, pad=True)
    assert padded.agent_kinds == (0, 1, 1)
    for one in (env, without, padded):
        one.close()


def make_pair(**options):
    return Fates({"a": (1, "task"), "b": (1, "task")}, **options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("pettingzoo/mpe.simple_spread_v3", {}, "the nearest are mpe2.simple_spread_v3"),
        ("pettingzoo/mpe2.simple_spred_v3", {}, "the nearest are mpe2.simple_spread_v3"),
        ("pettingzoo/butterfly.pistonbal_v6", {}, "the nearest are butterfly.pistonball_v6"),
        ("pettingzoo/", {}, "unknown PettingZoo environment ''"),
        ("pettingzoo/.rps_v2", {}, "the nearest are classic.rps_v2"),
        ("pettingzoo/json", {}, "no function 'parallel_env' or 'env'"),
        ("pettingzoo/mpe2.simple_spread_v3", {"cycles": 3}, "unexpected keyword argument 'cycles'"),
        ("pettingzoo/mpe2.simple_spread_v3", {"team_reward": "men"}, "the nearest are mean"),
        ("pettingzoo/classic.rps_v2", {"global_state": True}, "has no state()"),
        (
            "pettingzoo/mpe2.simple_speaker_listener_v4",
            {"continuous_actions": True},
            "make them equal, or Boxes of one shape",
        ),
        (lambda: Mixed(Dict({"x": Discrete(2)})), {"pad": True}, "so that all observe alike"),
        (KindsTeam, {}, "('word') is not supported: leave it out by its name (leave_out=['word'])"),
        ("pettingzoo/mpe2.simple_speaker_listener_v4", {}, "have 3, 5 actions: set pad=true"),
        ("pettingzoo/mpe2.simple_adversary_v3", {}, "shapes (8,), (10,): set pad=true"),
        ("pettingzoo/classic.connect_four_v3", {}, "take turns"),
        (make_pair(), {}, "give a function that makes it"),
        (make_pair, {"colour": 3}, "unexpected keyword argument 'colour'"),
        (
            make_pair,
            {"shape": (4,)},
            "an observation has shape (4,) at 'a', but its space has shape (3,)",
        ),
    ],
)
def test_bad_input_is_told_how_to_be_mended(source, options, message):
    with pytest.raises(UsageError) as error:
        wrappers.make(source, 2, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name.partition(".")[0])

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingExtraError, match=r"'mpe2'.*pip install 'eqx_q\[multi-agent\]'"):
        suite.make("mpe2.simple_spread_v3", 1)


def test_a_function_gets_its_options_and_is_called_once_a_lane():
    made = []

    def own(end):
        made.append(Fates({"a": (end, "task")}))
        return made[-1]

    env = wrappers.make(own, 2, team_reward="mean", end=2)
    assert env.num_agents == 1 and len(made) == 2
    assert [lane.env for lane in env.host.lanes] == made
    assert env.replicate(1).host.lanes[0].env is made[2] and len(made) == 3
    env.close()


def test_a_function_may_be_the_first_to_import_pettingzoo():
    code = """
        import sys
        import eqx_q

        def own():
            from mpe2 import simple_spread_v3
            return simple_spread_v3.parallel_env()

        assert "pettingzoo" not in sys.modules
        print(eqx_q.make(own, 1).num_agents)
    """
    command = [sys.executable, "-c", inspect.cleandoc(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr


def test_what_the_configuration_advertises_can_be_made():
    path = Path(__file__).parents[2] / "conf" / "env" / "pettingzoo.yaml"
    (name,) = re.findall(r"env\.name=([\w.]*\w)", path.read_text())
    ((option, value),) = re.findall(r"\+env\.(\w+)=(\d+)", path.read_text())
    env = wrappers.make(f"pettingzoo/{name}", 1, **{option: int(value)})
    assert env.num_agents is not None
    assert env.host.lanes[0].env.unwrapped.max_zombies == int(value) != 10
    env.close()


def test_compiled_code_too_learns_that_it_is_closed():
    env = wrappers.make(make_pair, 1)
    state, _ = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    jax.block_until_ready(step(state, jnp.full((1, 2), 4), jax.random.key(0)))
    env.close()
    with pytest.raises(jax.errors.JaxRuntimeError, match="this environment is closed"):
        jax.block_until_ready(step(state, jnp.full((1, 2), 4), jax.random.key(0)))


def test_gymnasium_functions_stay_gymnasiums():
    assert pettingzoo.parallel_registry  # it is imported, and asked first
    env = wrappers.make(lambda: gymnasium.make("CartPole-v1"), 1)
    assert env.num_agents is None
    env.close()
