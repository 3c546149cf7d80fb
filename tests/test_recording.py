"""Recordings against a plain loop over the same environment, lane by lane."""

import envpool
import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import Clock, Guess, Relay
from varied import VARIED, Whim

import eqx_q
from eqx_q.agents import decide
from eqx_q.data import Rows, Writer
from eqx_q.data.dataset import EXTRAS
from eqx_q.errors import UsageError
from eqx_q.loops import recording
from eqx_q.loops.recording import describe, record
from eqx_q.nets import AbstractQNetwork, NetworkOutput
from eqx_q.spaces import of_observations
from eqx_q.wrappers import Recording


def make_agent(env, seed=0, **options):
    options = {"network": "mlp", **options}
    key = jax.random.key(seed)
    return eqx_q.PQN.create(env.observation_space, env.action_space, key=key, **options)


def recorded(path, agent, env, num_steps, **options):
    """A data set of one shard, and what `record` says of it."""
    with Writer(path, describe(env, "suite/Name"), narrow=True) as writer:
        options = {"key": jax.random.key(1), "shard": "only", **options}
        said = record(agent, env, writer, num_steps=num_steps, **options)
        return writer.finish(), said


class Loop:
    """Episodes of plain lists. What is seen where `num_steps` are made ends those that run."""

    def __init__(self, num_lanes, num_steps):
        self.whole, self.cut = [], []
        self._running = [self._new() for _ in range(num_lanes)]
        self._left, self._time = num_steps, 0
        self._stopped = [False] * num_lanes

    def _new(self):
        return {"obs": [], "action": [], "reward": [], "terminated": False}

    def see(self, obs, action, reward, terminated, truncated, happened, **more):
        """A step of all lanes: what was seen, done and paid. Returns whether it is over.

        `more` is what an environment may say besides, by name.
        """
        self._time += 1
        seen = {"obs": obs} | {name: x for name, x in more.items() if name != "agent_reward"}
        done = {"action": action, "reward": reward} | {x: more[x] for x in more.keys() - seen}
        for lane, episode in enumerate(self._running):
            if self._stopped[lane]:
                continue

            def with_columns(columns, episode=episode, lane=lane):
                of_lane = jax.tree.map(lambda x: x[lane], columns)
                return episode | {x: [*episode.get(x, []), y] for x, y in of_lane.items()}

            if not happened[lane]:  # a final observation: the step was a reset
                self.whole.append(with_columns(seen))
                self._running[lane] = self._new()
            elif not self._left:
                self._stopped[lane] = True
                if episode["obs"]:
                    self.cut.append(with_columns(seen))
            else:
                self._left -= 1
                episode = with_columns(seen | done)
                episode.setdefault("began", (self._time, lane))
                episode["terminated"] = bool(terminated[lane])
                self._running[lane] = episode
        return all(self._stopped)

    @property
    def episodes(self):
        return sorted([*self.whole, *self.cut], key=lambda episode: episode["began"])


def check_equal(dataset, loop, seen=lambda obs: obs):
    episodes = list(dataset.episodes())
    assert len(episodes) == len(loop.episodes)
    for ours, theirs in zip(episodes, loop.episodes, strict=True):
        del theirs["began"]
        theirs |= {
            name: jax.tree.map(lambda *x: np.stack(x), *steps)
            for name, steps in theirs.items()
            if name != "terminated"
        }
        theirs["obs"] = seen(theirs["obs"])
        expected = Rows.of_episode(**theirs)
        assert jax.tree.structure(ours) == jax.tree.structure(expected)
        jax.tree.map(assert_same, ours, expected)


def assert_same(ours, theirs):
    """Equal, but for the last bits of what two programs computed in different order."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def play_in_a_loop(agent, env, num_steps, epsilon):
    """What `record` is to write, from one step after the other."""
    loop = Loop(env.num_envs, num_steps)
    reset_key, key = jax.random.split(jax.random.key(1))
    state, now = env.reset(reset_key)
    memory = agent.initial_memory(env.num_envs)
    step, act = eqx.filter_jit(env.step), eqx.filter_jit(decide)
    while True:
        key, act_key, env_key = jax.random.split(key, 3)
        decision = act(agent, now, memory, epsilon=epsilon, key=act_key)
        memory = decision.memory
        state, then = step(state, decision.action, env_key)
        columns = (now.obs, decision.action, then.reward, then.terminated, then.truncated)
        more = {name: getattr(now, name) for name in EXTRAS} | {"agent_reward": then.agent_reward}
        more = {name: x for name, x in more.items() if x is not None}
        columns, more = jax.tree.map(np.asarray, (columns, more))
        if loop.see(*columns, ~np.asarray(then.first), **more):
            return loop
        now = then


@pytest.mark.parametrize(("num_steps", "epsilon"), [(1, 0.6), (6, 0.6), (300, 1.0)])
def test_rows_equal_a_loop_over_gymnax(tmp_path, num_steps, epsilon):
    """In the long run at random: the last bit of a value may decide what is greedy."""
    env = eqx_q.make("gymnax/CartPole-v1", num_envs=4, max_steps_in_episode=12)
    agent, epsilon = make_agent(env), jnp.float32(epsilon)
    dataset, said = recorded(tmp_path / "data", agent, env, num_steps, epsilon=epsilon)
    loop = play_in_a_loop(agent, env, num_steps, epsilon)
    check_equal(dataset, loop)
    assert dataset.num_transitions == num_steps
    assert (said.transitions, said.episodes, said.cut) == (
        num_steps, len(loop.whole), len(loop.cut)
    )  # fmt: skip
    if num_steps >= 300:
        ended = np.array([episode["terminated"] for episode in loop.whole])
        assert ended.any() and not ended.all()  # both by the task and by the limit
        returns = [sum(episode["reward"]) for episode in loop.whole]
        assert said.return_mean == pytest.approx(np.mean(returns))
        assert dataset.rows.obs.dtype == np.float32
    assert dataset.shards[0].source == said._asdict()


@pytest.mark.parametrize("name", ["dict", "team"])
def test_rows_equal_a_loop_whatever_the_spaces(tmp_path, name, monkeypatch):
    monkeypatch.setattr(recording, "_CHUNK_STEPS", 20)
    env = VARIED[name].replicate(3)
    agent = Whim.of(env)
    dataset, said = recorded(tmp_path / "data", agent, env, 100)
    loop = play_in_a_loop(agent, env, 100, jnp.float32(0))
    check_equal(dataset, loop)
    assert (said.transitions, said.episodes, said.cut) == (100, len(loop.whole), len(loop.cut))
    assert said.cut and dataset.rows.truncated.sum() > said.cut and dataset.rows.terminated.any()
    description = dataset.description
    assert description.action_space == env.action_space and description.num_agents == env.num_agents


def test_a_team_with_memory_does_what_is_legal(tmp_path):
    env = Relay(3)
    agent = make_agent(env, num_agents=2, network_options={"memory": "gru", "hidden_sizes": [8]})
    dataset, _ = recorded(tmp_path / "data", agent, env, 50, epsilon=0.5)
    check_equal(dataset, play_in_a_loop(agent, env, 50, jnp.float32(0.5)))
    assert dataset.rows.reward.min() >= 0  # nobody did what is not legal


class Alternate(AbstractQNetwork):
    """Counts the steps of an episode, and does 0 and 1 in turn from its start on."""

    scale: jax.Array

    def initial_statistics(self):
        return None

    def initial_memory(self, num_lanes):
        return jnp.zeros(num_lanes)

    def __call__(self, inputs, statistics, memory):
        first = inputs.first
        if first is None:
            first = jnp.zeros(inputs.num_steps_and_rows, bool)

        def count(before, first):
            now = jnp.where(first, 0.0, before)
            return now + 1, now

        memory, counts = jax.lax.scan(count, memory, first)
        values = self.scale * jax.nn.one_hot(counts.astype(int) % 2, 2)
        return NetworkOutput(values[..., None], memory)


def test_memory_is_carried_and_reset(tmp_path):
    env = eqx_q.make("gymnax/CartPole-v1", num_envs=4, max_steps_in_episode=12)
    agent = make_agent(env, network=Alternate(jnp.ones(())))
    dataset, _ = recorded(tmp_path / "data", agent, env, 200)
    check_equal(dataset, play_in_a_loop(agent, env, 200, jnp.float32(0)))
    for episode in dataset.episodes():
        np.testing.assert_array_equal(episode.action[:-1], np.arange(len(episode.action) - 1) % 2)


def rebuilt(frames, stack):
    """Stacks of an episode's frames, the first one repeated before it."""
    padded = np.concatenate([np.repeat(frames[:1], stack - 1, 0), frames])
    return np.stack([padded[t : t + stack] for t in range(len(frames))])


@pytest.mark.parametrize(("stack", "sticky"), [(4, 0.0), (2, 0.25)])
def test_rows_equal_a_loop_over_an_emulator(tmp_path, stack, sticky):
    """Whole games for unclipped rewards, though it learns from lives and clipped ones."""
    limit = {"max_episode_steps": 250, "num_threads": 1, "stack_num": stack}
    limit |= {"repeat_action_probability": sticky}
    trained = eqx_q.make("envpool/Asterix-v5", 1, episodic_life=True, reward_clip=True, **limit)
    env = trained.replicate(3, seed=5, **trained.recording.options)
    agent = make_agent(env, network_options={"hidden_sizes": [8]})
    dataset, said = recorded(tmp_path / "data", agent, env, 1500, epsilon=1.0)

    pool = envpool.make("Asterix-v5", env_type="gymnasium", num_envs=3, seed=5, **limit)
    loop = Loop(3, 1500)
    _, key = jax.random.split(jax.random.key(1))
    obs, _ = pool.reset()
    ended, act = np.zeros(3, bool), eqx.filter_jit(agent.act)
    over = False
    while not over:
        key, act_key, _ = jax.random.split(key, 3)
        action = np.asarray(act(obs, epsilon=jnp.float32(1.0), key=act_key).action)
        then, reward, terminated, truncated, _ = pool.step(action)
        over = loop.see(obs, action, reward, terminated, truncated, ~ended)
        obs, ended = then, terminated | truncated
    for episode in loop.episodes:  # what an agent saw, from the frames that are stored
        stacks = np.stack(episode["obs"])
        np.testing.assert_array_equal(rebuilt(stacks[:, -1], stack), stacks)
    check_equal(dataset, loop, seen=lambda stacks: stacks[:, -1])
    assert dataset.rows.reward.max() > 1
    terminated = [episode["terminated"] for episode in loop.whole]
    assert any(terminated) and not all(terminated) and said.cut == 3
    assert dataset.description.stack == stack and dataset.description.stack_start == "repeat"
    assert dataset.description.preprocessing["repeat_action_probability"] == np.float32(sticky)
    for each in (trained, env):
        each.close()
    pool.close()


def test_a_second_recording_goes_on_with_the_emulators(tmp_path):
    env = eqx_q.make("envpool/Pong-v5", 2, num_threads=1)
    agent = make_agent(env, network_options={"hidden_sizes": [8]})
    with Writer(tmp_path / "data", describe(env, "envpool/Pong-v5")) as writer:
        for shard in "ab":
            key = jax.random.key(0)
            record(agent, env, writer, num_steps=50, key=key, shard=shard, epsilon=1.0)
        dataset = writer.finish()
    a, b = (dataset.rows.obs[shard.start :][: shard.rows] for shard in dataset.shards)
    assert a.shape == b.shape and np.any(a != b)
    env.close()


def test_chunks_leave_no_trace(tmp_path, monkeypatch):
    """Episodes longer than a chunk, several in one, and ends at its border."""
    env = Clock(5)  # lane i ends after i + 1 steps
    agent = make_agent(env)
    whole, _ = recorded(tmp_path / "whole", agent, env, 60)
    for steps in (1, 2, 3):
        monkeypatch.setattr(recording, "_CHUNK_STEPS", steps)
        monkeypatch.setattr(recording, "_CHUNK_BYTES", 200 * steps)  # that are written at a time
        chunks, _ = recorded(tmp_path / str(steps), agent, env, 60)
        jax.tree.map(np.testing.assert_array_equal, chunks.rows, whole.rows)
    lengths = [len(episode.action) - 1 for episode in whole.episodes()]
    # In the order in which they begin: all at once, then after 2, 3, 4 and 4 steps.
    assert lengths[:9] == [1, 2, 3, 4, 5, 1, 2, 1, 3]


def test_whole_numbers_are_stored_in_a_byte(tmp_path):
    env = eqx_q.make("gymnax/Breakout-MinAtar", num_envs=4)
    agent = make_agent(env, network="minatar_cnn")
    dataset, _ = recorded(tmp_path / "data", agent, env, 200, epsilon=1.0)
    assert dataset.rows.obs.dtype == np.uint8
    check_equal(dataset, play_in_a_loop(agent, env, 200, jnp.float32(1.0)))


class Late(Clock):
    """Observes whole numbers, and in the last lane halves towards the end."""

    def _emit(self, count, first):
        state, timestep = super()._emit(count, first)
        half = jnp.where((count == 29)[:, None], 0.5, 0.0)
        obs = jnp.stack([count, count], -1).astype(jnp.float32) + half
        return state, eqx.tree_at(lambda t: t.obs, timestep, obs)


def test_what_is_found_to_be_no_whole_number_later_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_CHUNK_STEPS", 4)
    env = Late(30)
    dataset, _ = recorded(tmp_path / "data", make_agent(env), env, 1500)
    assert dataset.rows.obs.dtype == np.float32 and np.any(dataset.rows.obs == 29.5)
    check_equal(dataset, play_in_a_loop(make_agent(env), env, 1500, jnp.float32(0)))


class Film(Clock):
    """Stacks of three frames; `says` what stands before the first, `fault` is where it lies."""

    says: str = eqx.field(static=True, default="repeat")
    fault: str = eqx.field(static=True, default="none")

    @property
    def observation_space(self):
        return of_observations(gymnasium.spaces.Box(0, 255, (3, 2, 2), np.uint8))

    @property
    def recording(self):
        return Recording(stack=3, stack_start=self.says)

    def _emit(self, count, first):
        state, timestep = super()._emit(count, first)
        times = count[:, None] + jnp.arange(-2, 1)
        before = 0 if self.says == "zeros" else 10
        frames = jnp.where(times >= 0, times + 10, before)
        if self.fault == "start":
            frames = jnp.where(first[:, None] & (jnp.arange(3) == 0), 99, frames)
        if self.fault == "later":
            frames = jnp.where((count[:, None] == 2) & (jnp.arange(3) == 1), 99, frames)
        obs = jnp.broadcast_to(frames[..., None, None], (*frames.shape, 2, 2)).astype(jnp.uint8)
        return state, eqx.tree_at(lambda t: t.obs, timestep, obs)


@pytest.mark.parametrize("says", ["repeat", "zeros"])
def test_of_stacks_one_frame_is_stored(tmp_path, says):
    env = Film(4, says=says)
    dataset, _ = recorded(tmp_path / "data", make_agent(env), env, 30)
    for episode in dataset.episodes():
        assert episode.obs[:, 0, 0].tolist() == list(range(10, 10 + len(episode.action)))
    assert dataset.description.stack_start == says


@pytest.mark.parametrize("fault", ["start", "later"])
@pytest.mark.parametrize("says", ["repeat", "zeros"])
def test_stacks_that_frames_do_not_give_are_refused(tmp_path, says, fault):
    env = Film(4, says=says, fault=fault)
    with pytest.raises(UsageError, match="are not stacks of frames"):
        recorded(tmp_path / "data", make_agent(env), env, 30)


def test_what_does_not_fit_is_refused(tmp_path):
    env = Clock(2)
    agent, other = make_agent(env), make_agent(Guess(2))
    with pytest.raises(UsageError, match="record in the environment that it was"):
        recorded(tmp_path / "b", other, env, 5)
    team = Relay(2)
    alone = eqx_q.PQN.create(
        team.observation_space, team.action_space, key=jax.random.key(0), network="mlp"
    )
    with pytest.raises(UsageError, match="the agent's num_agents is None, the environment's 2"):
        recorded(tmp_path / "a", alone, team, 5)
    with pytest.raises(UsageError, match="at least one transition"):
        recorded(tmp_path / "c", agent, env, 0)
    members = eqx.filter_vmap(lambda key: make_agent_of(key, env))(
        jax.random.split(jax.random.key(0), 2)
    )
    with pytest.raises(UsageError, match="one by one"):
        recorded(tmp_path / "d", eqx_q.Population(members), env, 5)


def make_agent_of(key, env):
    return eqx_q.PQN.create(env.observation_space, env.action_space, key=key, network="mlp")


def test_an_exception_between_chunks_leaves_the_shard_uncommitted(tmp_path):
    env = Clock(4)
    agent, key = make_agent(env), jax.random.key(0)
    seen = []

    def stop(recorded):
        seen.append(recorded.transitions)
        raise KeyboardInterrupt

    with Writer(tmp_path / "data", describe(env, "suite/Clock")) as writer:
        record(agent, env, writer, num_steps=20, key=key, shard="a")
        with pytest.raises(KeyboardInterrupt):
            record(agent, env, writer, num_steps=20, key=key, shard="b", on_chunk=stop)
    assert len(seen) == 1
    with Writer(tmp_path / "data", describe(env, "suite/Clock")) as writer:
        assert writer.done == {"a"}
        record(agent, env, writer, num_steps=20, key=key, shard="b")
        dataset = writer.finish()
    dataset.verify()
    a, b = dataset.shards
    assert a.rows == b.rows == b.start and dataset.num_transitions == 40
