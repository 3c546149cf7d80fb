"""The offline loop: what it learns, resuming anywhere, what it refuses."""

import dataclasses
import inspect
import io
import json

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import Guess
from parts import Parted
from recordings import ACTIONS, STACK, VECTOR, describe, random_episodes, write

import eqx_q
from eqx_q.data import Blocks, Replay, Rows, Sampling
from eqx_q.data.sampling import _SHARE
from eqx_q.errors import DivergedError, UsageError
from eqx_q.loops.callbacks import Checkpoint, Evaluation, Interrupt, Progress
from eqx_q.loops.training import start
from eqx_q.saving.checkpoint import load, load_latest
from eqx_q.tracking import JsonlTracker

ROW = 12 + 4 + 4 + 3 + 8  # bytes of a row and of its indices


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    episodes = random_episodes(0, num=40)
    path = tmp_path_factory.mktemp("data") / "data"
    return write(path, [episodes[:15], episodes[15:30], episodes[30:]])


def make_agent(key=0, **options):
    defaults = {
        "network": "mlp",
        "network_options": {"hidden_sizes": [8]},
        "batch_size": 8,
        "learning_rate": 1e-3,
        "target_update_period": 5,
        "alpha": 0.1,
    }
    key = key if isinstance(key, jax.Array) else jax.random.key(key)
    return eqx_q.DQN.create(VECTOR, ACTIONS, key=key, **(defaults | options))


def make_population(num=4, alphas=None):
    keys = jax.random.split(jax.random.key(0), num)
    alphas = jnp.full(num, 0.1) if alphas is None else jnp.asarray(alphas)
    create = eqx.filter_vmap(lambda key, alpha: make_agent(key, alpha=alpha))
    return eqx_q.Population(create(keys, alphas))


def train(agent, dataset, num_updates=30, **options):
    options = {"key": jax.random.key(1)} | options
    return eqx_q.train_offline(agent, dataset, num_updates=num_updates, **options)


def assert_same(a, b):
    pairs = zip(*(jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (a, b)), strict=True)
    for x, y in pairs:
        np.testing.assert_array_equal(x, y)


def differ(a, b):
    return not bool(eqx.tree_equal(a, b))


def small_memory(dataset):
    return {"memory_gb": 0.5 * len(dataset) * ROW / 2**30, "updates_per_block": 7}


SAMPLINGS = {
    "uniform": lambda dataset: {},
    "prioritised": lambda dataset: {"priority_exponent": 0.6},
    "blocks": small_memory,
    "prioritised blocks": lambda dataset: small_memory(dataset) | {"priority_exponent": 0.6},
    "shards": lambda dataset: {"shards_per_block": 2, "updates_per_block": 6},
}


@pytest.fixture(params=SAMPLINGS)
def sampling(request, dataset):
    sampling = Sampling(**SAMPLINGS[request.param](dataset))
    several = request.param in ("blocks", "prioritised blocks", "shards")
    assert (Blocks(dataset, sampling).num_blocks > 1) is several
    return sampling


def test_a_run_taken_up_anywhere_ends_bit_for_bit_the_same(dataset, tmp_path, sampling):
    whole, _ = train(make_agent(), dataset, sampling=sampling)
    checkpoint = Checkpoint(tmp_path, every=1, keep=100)
    train(make_agent(), dataset, 21, sampling=sampling, callbacks=[checkpoint], log_every=4)
    latest, path = load_latest(tmp_path)
    assert path.name == "000000000021.ckpt" and int(latest.num_updates) == 21
    saved = sorted(tmp_path.iterdir())
    assert len(saved) >= 6
    for path in (saved[0], saved[-2], saved[-1]):  # within a block and between two
        agent, _ = train(make_agent(5), dataset, run_state=load(path), sampling=sampling)
        assert_same(agent, whole)


def test_memory_that_is_free_at_a_resume_changes_nothing(dataset, tmp_path, monkeypatch):
    def train_with_free(share, num_updates=30, **kwargs):
        free = share * len(dataset) * ROW / _SHARE
        monkeypatch.setattr("eqx_q.data.sampling._free_memory", lambda: free)
        kwargs = {"sampling": Sampling(updates_per_block=7)} | kwargs
        return train(make_agent(), dataset, num_updates, **kwargs)[0]

    whole = train_with_free(0.5)
    train_with_free(0.5, 10, callbacks=[Checkpoint(tmp_path, every=1)])
    taken_up, _ = load_latest(tmp_path)
    assert int(taken_up.num_blocks) > 1
    assert_same(train_with_free(2.0, run_state=taken_up), whole)
    # Nothing is left out where another mix is asked for, nor taken where it does not fit.
    some = Sampling(shards_per_block=1, updates_per_block=5)
    in_memory, _ = load_latest(tmp_path)
    for num_blocks in (1, 1000):
        known = dataclasses.replace(in_memory, num_blocks=jnp.asarray(num_blocks))
        assert eqx_q.loops.offline.blocks_of(known, dataset, some).num_blocks == 3
    with pytest.raises(UsageError, match=r"in 1000 blocks, but .* give memory_gb"):
        eqx_q.loops.offline.blocks_of(known, dataset, Sampling())
    # Who says how much memory may be taken, decides.
    said = Sampling(updates_per_block=7, memory_gb=2 * len(dataset) * ROW / 2**30)
    assert differ(train_with_free(0.5, run_state=load_latest(tmp_path)[0], sampling=said), whole)


def test_devices_that_share_a_memory_share_what_is_free(dataset, monkeypatch):
    free = 1.5 * len(dataset) * ROW / _SHARE
    monkeypatch.setattr("eqx_q.data.sampling._free_memory_of_host", lambda: free)

    class Core:
        def memory_stats(self):
            return None

    for cores, fits in ((1, True), (2, False)):
        monkeypatch.setattr(jax, "local_devices", lambda cores=cores: [Core()] * cores)
        assert (Blocks(dataset, Sampling()).num_blocks == 1) is fits


def test_where_chunks_are_cut_changes_nothing(dataset, sampling):
    whole, history = train(make_agent(), dataset, sampling=sampling, log_every=30)
    for log_every in (1, 7, None):
        cut, _ = train(make_agent(), dataset, sampling=sampling, log_every=log_every)
        assert_same(cut, whole)
    assert history[-1]["num_updates"] == history[-1]["total_updates"] == 30


def test_it_is_its_pure_core(dataset):
    agent, _ = train(make_agent(), dataset, 13)
    state = eqx_q.start_offline(make_agent(), dataset, key=jax.random.key(1))
    replay = Blocks(dataset, Sampling()).load(0)
    state, metrics = eqx.filter_jit(eqx_q.advance_offline)(state, replay, 13)
    assert_same(state.agent, agent)
    assert int(state.num_updates) == int(agent.num_updates) == 13
    assert np.isfinite(metrics["loss"])
    # By hand, update by update.
    state = eqx_q.start_offline(make_agent(), dataset, key=jax.random.key(1))
    ours, key, losses = state.agent, state.key, []
    for _ in range(13):
        key, draw_key, update_key = jax.random.split(key, 3)
        batch = replay.transitions(replay.draw(draw_key, (8,)), 1)
        ours, new = ours.update(batch, key=update_key)
        losses.append(new["loss"])
    np.testing.assert_allclose(np.mean(losses), metrics["loss"], rtol=1e-4)
    obs = dataset.rows.obs[:9]
    np.testing.assert_allclose(ours.act(obs).value, agent.act(obs).value, rtol=1e-3, atol=1e-4)


def test_the_callers_agent_stays_as_it_was(dataset):
    agent = make_agent()
    before = jax.tree.map(lambda x: np.array(x) if eqx.is_array(x) else x, agent)
    trained, _ = train(agent, dataset)
    assert_same(agent, before)
    assert differ(trained.network, agent.network)
    state = eqx_q.start_offline(agent, dataset, key=jax.random.key(1))
    train(agent, dataset, run_state=state)
    assert int(state.num_updates) == 0


def test_a_path_is_a_data_set(dataset):
    assert_same(train(make_agent(), dataset.path)[0], train(make_agent(), dataset)[0])


def test_another_key_is_another_run(dataset, sampling):
    a, _ = train(make_agent(), dataset, sampling=sampling)
    b, _ = train(make_agent(), dataset, sampling=sampling, key=jax.random.key(2))
    assert differ(a.network, b.network)


@pytest.mark.parametrize("exponent", [0.0, 0.6])
def test_members_of_a_population_draw_their_own(dataset, exponent):
    create = eqx.filter_vmap(lambda alpha: make_agent(0, alpha=alpha))
    twins = eqx_q.Population(create(jnp.zeros(3)))
    sampling = Sampling(priority_exponent=exponent)
    agent, history = train(twins, dataset, sampling=sampling)
    assert history[-1]["loss"].shape == (3,)
    assert len(np.unique(history[-1]["loss"])) == 3
    np.testing.assert_array_equal(agent.learnt, [30, 30, 30])
    assert differ(agent.member(0).network, agent.member(1).network)


@pytest.mark.parametrize("alphas", [None, [0.0, 0.1, 1.0, 4.0]])
def test_a_population_is_taken_up_too(dataset, tmp_path, alphas):
    sampling = Sampling(priority_exponent=0.6, **small_memory(dataset))
    whole, history = train(make_population(4, alphas), dataset, sampling=sampling)
    for name in ("loss", "td_error", "grad_norm", "conservative_gap"):
        assert history[-1][name].shape == (4,)
    checkpoint = Checkpoint(tmp_path, every=1)
    train(make_population(4, alphas), dataset, 17, sampling=sampling, callbacks=[checkpoint])
    state, _ = load_latest(tmp_path)
    again, _ = train(make_population(4, alphas), dataset, run_state=state, sampling=sampling)
    assert_same(again, whole)


def test_priorities_follow_what_was_learnt(dataset):
    """After a run they are those of the last errors, and 1 where nothing was drawn."""
    states = []
    train(
        make_agent(learning_rate=0.0), dataset, 40, sampling=Sampling(priority_exponent=0.7),
        callbacks=[lambda state, _: states.append(state)],
    )  # fmt: skip
    priorities = states[-1].priorities
    replay = Blocks(dataset, Sampling()).load(0)
    num = int(replay.num_drawable)
    batch = replay.transitions(jnp.arange(num), 1)
    errors = make_agent().update(batch, key=jax.random.key(0))[1]["priority"]
    expected = (np.asarray(errors) + 1e-6) ** 0.7
    values = np.asarray(priorities.values)[:num]
    drawn = values != 1
    assert 10 < drawn.sum() < num
    np.testing.assert_allclose(values[drawn], expected[drawn], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("members", [None, 2])
def test_the_next_block_begins_with_the_largest_priority(dataset, members):
    """Schaul et al. 2016, Algorithm 1, line 6."""
    states = []
    sampling = Sampling(priority_exponent=0.7, shards_per_block=1, updates_per_block=400)
    agent = make_agent(reward_scale=30.0) if members is None else make_population(members)
    train(
        agent, dataset, 402, sampling=sampling, log_every=1,
        callbacks=[lambda state, _: states.append(state.priorities)],
    )  # fmt: skip
    before, after = (np.asarray(states[k].values) for k in (399, 401))
    assert np.all(before.max(-1) != 1)
    for old, new in zip(np.atleast_2d(before), np.atleast_2d(after), strict=True):
        untouched = new[new == old.max()]
        assert len(untouched) > len(new[new > 0]) / 3


def test_a_run_goes_on_with_the_priorities_that_it_is_told_to(dataset):
    states = []
    prioritised = Sampling(priority_exponent=0.6)
    keep = lambda state, _: states.append(state)  # noqa: E731
    train(make_agent(), dataset, 10, sampling=prioritised, callbacks=[keep])
    state = states[-1]
    train(make_agent(), dataset, 20, run_state=state, callbacks=[keep])  # uniform from here on
    assert states[-1].priorities is None
    train(make_agent(), dataset, 30, run_state=states[-1], sampling=prioritised, callbacks=[keep])
    assert states[-1].priorities is not None
    other = Sampling(priority_exponent=0.6, fraction=0.5)
    with pytest.raises(UsageError, match=r"data differ.*same sampling"):
        train(make_agent(), dataset, 20, run_state=state, sampling=other)


def test_callbacks_count_in_updates(dataset):
    calls = []

    class Every:
        every = 6

        def __call__(self, run_state, metrics):
            calls.append((metrics["num_updates"], int(run_state.num_updates), metrics["done"]))

    _, history = train(make_agent(), dataset, 20, callbacks=[Every()], log_every=4)
    assert calls == [(6, 6, False), (12, 12, False), (18, 18, False), (20, 20, True)]
    assert [row["num_updates"] for row in history] == [4, 6, 10, 12, 16, 18, 20]
    assert history[0]["total_updates"] == 20 and history[0]["updates_per_second"] > 0


def test_a_callback_may_change_and_stop_the_run(dataset):
    def replace(run_state, metrics):
        agent = eqx.tree_at(lambda a: a.learning_rate, run_state.agent, jnp.float32(0.0))
        if metrics["num_updates"] == 10:
            raise eqx_q.StopTraining
        return eqx.tree_at(lambda s: s.agent, run_state, agent)

    agent, history = train(make_agent(), dataset, 1000, callbacks=[replace], log_every=5)
    frozen, _ = train(make_agent(), dataset, 5)
    assert_same(agent.network, frozen.network)
    assert history[-1]["num_updates"] == 10 and history[-1]["done"]


def test_a_run_that_diverges_says_so(dataset):
    with pytest.raises(DivergedError, match=r"not finite after .* updates: lower learning_rate"):
        train(
            make_agent(learning_rate=1e30, value={"name": "scalar", "td_loss": "squared"}),
            dataset,
            200,
        )


def test_somebodys_own_module_learns(dataset):
    network = eqx.nn.MLP(3, 4, 8, 1, key=jax.random.key(0))  # holds functions, beside arrays
    agent, _ = train(make_agent(network=network, network_options=None), dataset)
    assert differ(agent.network.module.layers[0].weight, network.layers[0].weight)


def test_quantiles_and_frame_stacks_and_steps(tmp_path):
    episodes = random_episodes(0, num=10, stack=4)
    dataset = write(tmp_path / "data", [episodes], describe(STACK, 4))
    agent = eqx_q.CQL.create(
        STACK,
        ACTIONS,
        key=jax.random.key(0),
        network="mlp",
        network_options={"hidden_sizes": [8]},
        value={"name": "quantile", "num_quantiles": 5},
        n_step=3,
        batch_size=4,
    )
    _, history = train(agent, dataset, sampling=Sampling(reward_clip=True))
    assert np.isfinite(history[-1]["loss"])


@pytest.mark.parametrize("num_members", [None, 2])
def test_sequences_where_an_agent_learns_from_those(dataset, monkeypatch, num_members):
    """Each a lane of a rollout, from memory as at an episode's start."""

    def sequences(replay, place, length):
        obs = jnp.broadcast_to(place.astype(jnp.float32)[:, None], (length + 1, len(place), 1))
        no = jnp.zeros(obs.shape[:2], bool)
        steps = eqx_q.TimeStep(obs, obs[..., 0], no, no, no, eqx_q.Episode(no, obs[..., 0], no + 0))
        return eqx_q.Rollout(steps, jnp.zeros((length, len(place)), jnp.int32))

    monkeypatch.setattr(Replay, "sequences", sequences, raising=False)

    def create(key):
        blur = {"sigma": 1.0}
        return Parted.create(VECTOR, ACTIONS, key=key, blur=blur, sequence_length=3)

    agent = create(jax.random.key(0))
    if num_members:
        keys = jax.random.split(jax.random.key(0), num_members)
        agent = eqx_q.Population(eqx.filter_vmap(create)(keys))
    told, states = [], []

    def keep(state, metrics):
        told.append(metrics)
        states.append(state)

    sampling = Sampling(priority_exponent=1.0, priority_correction=0.0)
    train(agent, dataset, 2, sampling=sampling, callbacks=[keep], log_every=1)
    (first, last), members = told, () if num_members is None else (num_members,)
    assert "priority" not in first and first["seen"].shape == (*members, 4, 4)
    assert not np.array_equal(first["seen"], last["seen"])
    for name, row in (("first", first), ("last", last)):
        np.testing.assert_allclose(row["loss"], row["seen"].mean((-1, -2)), err_msg=name)
    # What was drawn has the priority that it told, its own place.
    places = last["seen"][..., 0, :].reshape(-1, 4).astype(int)
    values = np.asarray(states[-1].priorities.values).reshape(len(places), -1)
    for place, own in zip(places, values, strict=True):
        np.testing.assert_allclose(own[place], place + 1e-6, rtol=1e-5)


# What is known exactly.

NUM_STATES, GAMMA = 5, 0.8
STATES = gymnasium.spaces.Box(0, 1, (NUM_STATES,), np.float32)
MOVES = gymnasium.spaces.Discrete(2)


def walk(state, action):
    """A chain: left, right; behind its right end is 1, and the end. Behind its left a wall."""
    if action == 1 and state == NUM_STATES - 1:
        return state, 1.0, True
    return max(0, state + 2 * action - 1), 0.0, False


def best_values():
    q = np.zeros((NUM_STATES, 2))
    for _ in range(200):
        for state, action in np.ndindex(q.shape):
            then, reward, ended = walk(state, action)
            q[state, action] = reward + (0 if ended else GAMMA * q[then].max())
    return q


def chain(path, right=0.5, num=60, limit=6):
    """Episodes of a policy that goes right with this probability, cut after a few steps."""
    rng, episodes = np.random.default_rng(0), []
    for i in range(num):
        state, ended = i % NUM_STATES, False
        states, actions, rewards = [state], [], []
        while not ended and len(actions) < limit:
            action = int(rng.random() < right)
            state, reward, ended = walk(state, action)
            states.append(state)
            actions.append(action)
            rewards.append(reward)
        obs = np.eye(NUM_STATES, dtype=np.float32)[states]
        episodes.append(
            Rows.of_episode(obs, np.array(actions), np.array(rewards), terminated=ended)
        )
    description = describe(STATES)._replace(action_space=MOVES)
    return write(path, [episodes], description)


def tabular(create=eqx_q.DQN.create, **options):
    network = eqx.nn.Linear(NUM_STATES, 2, use_bias=False, key=jax.random.key(0))
    defaults = {
        "network": network,
        "learning_rate": 0.01,
        "target_update_period": 20,
        "discount": GAMMA,
        "optimizer": {"name": "adam", "eps": 1e-8},
    }
    return create(STATES, MOVES, key=jax.random.key(0), **(defaults | options))


def values_of(agent):
    return np.asarray(agent.network.module.weight).T


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, {}),
        ({"value": {"name": "scalar", "td_loss": "squared"}, "double": True}, {}),
        ({}, {"priority_exponent": 0.5}),
        ({}, {"memory_gb": 150 * (5 * 4 + 19) / 2**30, "updates_per_block": 100}),
    ],
)
def test_dqn_finds_the_exact_values(tmp_path, options, sampling):
    """Though most episodes are cut: a truncation that were an end would give less."""
    dataset = chain(tmp_path / "data")
    assert dataset.rows.truncated.sum() > 20
    assert (Blocks(dataset, Sampling(**sampling)).num_blocks > 1) is ("memory_gb" in sampling)
    agent, _ = train(tabular(**options), dataset, 2500, sampling=Sampling(**sampling))
    np.testing.assert_allclose(values_of(agent), best_values(), atol=0.01)


def test_cloning_finds_the_probabilities_of_the_data(tmp_path):
    dataset = chain(tmp_path / "data", right=0.8, num=300)
    agent, _ = train(tabular(eqx_q.BC.create), dataset, 2500)
    rows = dataset.rows
    for state in range(NUM_STATES):
        here = (rows.obs[:, state] == 1) & (rows.action >= 0)
        share = np.mean(rows.action[here])
        q = values_of(agent)[state]
        np.testing.assert_allclose(1 / (1 + np.exp(q[0] - q[1])), share, atol=0.06)


def test_cql_prefers_what_the_data_does(tmp_path):
    """The data mostly go left, which is wrong: DQN sees that, CQL stays with them."""
    dataset = chain(tmp_path / "data", right=0.25, num=200)
    dqn, _ = train(tabular(), dataset, 2500)
    assert np.all(values_of(dqn).argmax(-1) == 1)
    cql, history = train(tabular(eqx_q.CQL.create, alpha=20.0), dataset, 2500)
    assert np.all(values_of(cql).argmax(-1) == 0)
    assert history[-1]["conservative_gap"] < np.log(2)
    little, _ = train(tabular(eqx_q.CQL.create, alpha=0.001), dataset, 2500)
    np.testing.assert_allclose(values_of(little), best_values(), atol=0.03)


# What cannot work.


@pytest.mark.parametrize("num_updates", [0, -1, 2**31])
def test_a_number_of_updates_that_is_none(dataset, num_updates):
    with pytest.raises(UsageError, match="num_updates must be a whole number"):
        train(make_agent(), dataset, num_updates)


def test_a_chunk_that_is_none(dataset):
    with pytest.raises(UsageError, match="log_every must be"):
        train(make_agent(), dataset, log_every=0)


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match="is not a data set"):
        train(make_agent(), tmp_path)


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (
            VECTOR,
            gymnasium.spaces.Discrete(6),
            "has actions Discrete.4., the agent .*test/Env-v0",
        ),
        (gymnasium.spaces.Box(-1, 1, (5,), np.float32), ACTIONS, r"has observations Box.*\(3,\)"),
        (gymnasium.spaces.Box(0, 9, (3,), np.uint8), ACTIONS, "has observations .* the agent"),
    ],
)
def test_data_of_something_else(dataset, observations, actions, message):
    agent = eqx_q.DQN.create(observations, actions, key=jax.random.key(0))
    with pytest.raises(UsageError, match=message):
        train(agent, dataset)
    state = eqx_q.OfflineState(agent, jax.random.key(0), jnp.zeros((), jnp.int32))
    with pytest.raises(UsageError, match=message):
        train(make_agent(), dataset, run_state=state)


def unchecked(function):
    """As people call it: types are checked in tests alone."""
    return inspect.unwrap(function)


def online_agent(key):
    return eqx_q.PQN.create(VECTOR, ACTIONS, key=key, network="mlp")


def test_an_online_agent_does_not_learn_offline(dataset):
    agent = online_agent(jax.random.key(0))
    population = eqx.filter_vmap(online_agent)(jax.random.split(jax.random.key(0), 2))
    for wrong in (agent, eqx_q.Population(population)):
        with pytest.raises(UsageError, match=r"learns from environments.*use eqx_q\.train"):
            unchecked(eqx_q.start_offline)(wrong, dataset, key=jax.random.key(0))


def test_an_offline_agent_does_not_learn_online():
    env = Guess(8)

    def create(key):
        return eqx_q.DQN.create(env.observation_space, env.action_space, key=key)

    population = eqx.filter_vmap(create)(jax.random.split(jax.random.key(0), 2))
    for wrong in (create(jax.random.key(0)), eqx_q.Population(population)):
        with pytest.raises(UsageError, match=r"learns from data.*use eqx_q\.train_offline"):
            unchecked(start)(wrong, env, key=jax.random.key(0))


def test_an_offline_agent_is_evaluated_as_any_other():
    env = Guess(8)
    agent = eqx_q.DQN.create(env.observation_space, env.action_space, key=jax.random.key(0))
    returns = eqx_q.evaluate(agent, env, num_episodes=16, key=jax.random.key(0))
    assert returns.shape == (16,) and np.all(np.isfinite(returns))


def test_callbacks_of_the_library_work_offline_too(tmp_path):
    """Evaluation in an environment, checkpoints without its state, progress, lines of metrics."""
    env = Guess(8)
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(20):
        obs = rng.uniform(size=(2, *env.observation_space.shape))
        rows = Rows.of_episode(
            obs.astype(np.float32), rng.integers(0, 3, 1), np.ones(1), terminated=True
        )
        episodes.append(rows)
    description = describe(env.observation_space)._replace(action_space=env.action_space)
    dataset = write(tmp_path / "data", [episodes], description)
    agent = eqx_q.DQN.create(
        env.observation_space,
        env.action_space,
        key=jax.random.key(0),
        network_options={"hidden_sizes": [8]},
    )
    stream, tracker = io.StringIO(), JsonlTracker(tmp_path / "metrics.jsonl")
    interrupt = Interrupt()
    agent, _ = train(
        agent,
        dataset,
        20,
        log_every=5,
        callbacks=[
            Evaluation(env.replicate(4), every=10, num_episodes=8, seed=3),
            Checkpoint(tmp_path / "checkpoints", every=10, keep=9, with_env=False),
            Progress(stream, seconds_between_lines=0.0),
            tracker,
            interrupt,
        ],
    )
    tracker.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_updates"] for row in rows] == [5, 10, 15, 20]
    assert ["eval/return" in row for row in rows] == [False, True, False, True]
    assert "env_steps" not in rows[0]
    key = jax.random.fold_in(jax.random.key(3), 20)
    returns = eqx_q.evaluate(agent, env.replicate(4), num_episodes=8, key=key)
    assert rows[-1]["eval/return"] == pytest.approx(float(returns.mean()))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["000000000010.ckpt", "000000000020.ckpt"]
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("5/20 updates (25%)") and lines[-1].startswith("20/20 updates")
    assert " updates/s  loss " in lines[0] and "eval" in lines[-1]
