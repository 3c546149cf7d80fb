"""The loop: what it computes, compiles, keeps and logs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import Clock, Guess

import eqx_q
from eqx_q.errors import DivergedError, UsageError
from eqx_q.loops import running, source
from eqx_q.types import Count


def make_agent(env, key=0, **options):
    defaults = {
        "network": "mlp",
        "network_options": {"hidden_sizes": [16]},
        "rollout_length": 8,
        "num_minibatches": 4,
        "learning_rate": 1e-2,
        "epsilon_end": 0.1,
    }
    return eqx_q.PQN.create(
        env.observation_space, env.action_space, key=jax.random.key(key), **(defaults | options)
    )


def parameters(agent):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(agent, eqx.is_array))]


def assert_same(a, b):
    for x, y in zip(parameters(a), parameters(b), strict=True):
        np.testing.assert_array_equal(x, y)


def run(total_steps=64 * 12, key=1, **options):
    env = Guess(8)
    return eqx_q.train(
        make_agent(env), env, total_steps=total_steps, key=jax.random.key(key), **options
    )


def test_learns_to_guess():
    env = Guess(16)
    agent, history = eqx_q.train(make_agent(env), env, total_steps=20_000, key=jax.random.key(0))
    returns = eqx_q.evaluate(agent, env.replicate(32), num_episodes=64, key=jax.random.key(1))
    np.testing.assert_array_equal(returns, np.ones(64))
    assert history[0]["episode_return"] < 0.2 < history[-1]["episode_return"]


def test_somebodys_own_module_learns():
    """One that holds functions beside its arrays."""
    env = Guess(8)
    network = eqx.nn.MLP(3, 3, 8, 1, key=jax.random.key(0))
    agent = make_agent(env, network=network, network_options=None)
    trained, _ = eqx_q.train(agent, env, total_steps=640, key=jax.random.key(0))
    before, after = (a.network.module.layers[0].weight for a in (agent, trained))
    assert not np.array_equal(before, after)


def test_where_chunks_are_cut_changes_nothing():
    whole, _ = run(log_every=12)
    cut, _ = run(log_every=5)
    adaptive, _ = run()
    assert_same(whole, cut)
    assert_same(whole, adaptive)


def test_going_on_from_a_run_state_changes_nothing():
    whole, _ = run()
    states = []

    def keep(state, metrics):
        if metrics["env_steps"] == 64 * 5:
            states.append(jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, state))

    keep.every = 64 * 5
    run(callbacks=[keep])
    continued, _ = run(key=99, run_state=states[0])
    assert_same(whole, continued)


def test_the_callers_agent_stays_usable():
    env = Guess(8)
    agent = make_agent(env)
    before = [x.copy() for x in parameters(agent)]
    eqx_q.train(agent, env, total_steps=640, key=jax.random.key(0))
    for x, y in zip(before, parameters(agent), strict=True):
        np.testing.assert_array_equal(x, y)


def test_other_lengths_seeds_and_hyperparameters_compile_nothing():
    env = Guess(8)
    traces = []
    update = source._update

    def counted(*args):
        traces.append(None)
        return update(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_update", counted)
        for seed, total, options in (
            (0, 640, {}),
            (1, 640, {}),
            (0, 1280, {}),
            (0, 640, {"discount": 0.5}),
            (0, 640, {"lambda_": 0.1}),
            (0, 640, {"epsilon_start": 0.5, "epsilon_end": 0.0, "epsilon_decay": 0.7}),
            (0, 640, {"learning_rate": 1e-5, "learning_rate_end": 1e-6}),
        ):
            agent = make_agent(env, seed, **options)
            eqx_q.train(agent, env, total_steps=total, key=jax.random.key(seed))
    assert len(traces) <= 1


def test_a_weakly_typed_environment_is_compiled_once(monkeypatch):
    """`Guess` is one: its rewards are chosen from Python's numbers."""
    advance, traced = source.advance_from, []

    def counted(*arguments):
        traced.append(arguments)
        return advance(*arguments)

    monkeypatch.setattr(source, "advance_from", counted)
    env = Guess(10)  # no other test has as many lanes
    eqx_q.train(make_agent(env), env, total_steps=160, key=jax.random.key(0))
    assert len(traced) == 1


def test_schedule_is_stretched_to_the_run_unless_it_is_set():
    env = Guess(8)
    agent, _ = eqx_q.train(make_agent(env), env, total_steps=640, key=jax.random.key(0))
    assert float(agent.schedule_steps) == 640
    agent = make_agent(env, schedule_steps=5_000.0)
    agent, _ = eqx_q.train(agent, env, total_steps=640, key=jax.random.key(0))
    assert float(agent.schedule_steps) == 5_000


def test_metrics_count_what_happened():
    """Lanes end after 1 and 2 steps, plus one reset step each: 2 and 3 steps a cycle."""
    env = Clock(2)
    agent = make_agent(env, rollout_length=12)
    _, history = eqx_q.train(agent, env, total_steps=24, key=jax.random.key(0))
    (row,) = history
    assert row["env_steps"] == 24
    assert row["episodes"] == 6 + 4
    assert row["transitions"] == 6 * 1 + 4 * 2
    assert row["episode_return"] == pytest.approx((6 * 1 + 4 * 2) / 10)
    assert row["episode_length"] == pytest.approx((6 * 1 + 4 * 2) / 10)
    assert "q_values" not in row  # distributions go to callbacks alone
    assert row["done"]


def test_population_counts_per_member():
    env = Clock(4)
    keys = jax.random.split(jax.random.key(0), 2)
    probe = Clock(2)
    agent = eqx_q.Population(
        eqx.filter_vmap(lambda key: eqx_q.PQN.create(
            probe.observation_space, probe.action_space, key=key, network="mlp",
            rollout_length=60, num_minibatches=4))(keys)
    )  # fmt: skip
    agent, (row,) = eqx_q.train(agent, env, total_steps=120, key=jax.random.key(0))
    assert row["env_steps"] == 120
    np.testing.assert_array_equal(row["episodes"], [30 + 20, 15 + 12])
    returns = eqx_q.evaluate(agent, env, num_episodes=6, key=jax.random.key(0))
    np.testing.assert_array_equal(returns, [[1] * 3 + [2] * 3, [3] * 3 + [4] * 3])


class Recorder:
    def __init__(self, every=None, overlap=False, stop_at=None):
        self.every, self.overlap, self.stop_at = every, overlap, stop_at
        self.steps, self.rows = [], []

    def __call__(self, run_state, metrics):
        assert int(run_state.num_updates) * 64 == metrics["env_steps"]
        self.steps.append(metrics["env_steps"])
        self.rows.append(metrics)
        if self.stop_at is not None and metrics["env_steps"] >= self.stop_at:
            raise eqx_q.StopTraining


@pytest.mark.parametrize("overlap", [False, True])
def test_callbacks_are_called_at_their_multiples_and_at_the_end(overlap):
    often, seldom = Recorder(64 * 3, overlap), Recorder(64 * 4, overlap)
    run(64 * 14, callbacks=[often, seldom], log_every=100)
    assert often.steps == [64 * i for i in (3, 6, 9, 12, 14)]
    assert seldom.steps == [64 * i for i in (4, 8, 12, 14)]
    assert [row["done"] for row in seldom.rows] == [False, False, False, True]


def test_stopping_ends_the_run_and_tells_everybody():
    observer = Recorder(every=10**9, overlap=True)
    stopper = Recorder(stop_at=64 * 4)
    _, history = run(64 * 14, callbacks=[stopper, observer], log_every=2)
    assert observer.steps == [64 * 4]
    assert observer.rows[0]["done"]
    assert history[-1]["env_steps"] == 64 * 4


def test_a_callback_may_keep_the_run_state_and_sees_distributions():
    kept = []
    run(64 * 6, callbacks=[lambda state, metrics: kept.append((state, metrics))], log_every=2)
    for i, (state, metrics) in enumerate(kept):
        assert int(state.num_updates) == 2 * (i + 1)  # not deleted by the chunks after it
        assert metrics["q_values"].shape == (8,)


def test_a_longer_run_stretches_the_schedule_of_a_shorter_one():
    states = []
    run(64 * 6, callbacks=[lambda state, metrics: states.append(state)])
    agent, _ = run(64 * 12, run_state=states[-1])
    assert float(agent.schedule_steps) == 64 * 12
    agent, _ = eqx_q.train(agent, Guess(8), total_steps=64 * 12, key=jax.random.key(0))
    assert float(agent.schedule_steps) == 64 * 24


def test_a_callback_may_replace_the_run_state():
    def halve(state, metrics):
        return eqx.tree_at(lambda s: s.agent.learning_rate, state, state.agent.learning_rate / 2)

    halve.every = 64 * 4
    agent, _ = run(64 * 8, callbacks=[halve])
    np.testing.assert_allclose(agent.learning_rate, 1e-2 / 4)


def test_a_loss_that_is_not_finite_ends_the_run():
    env = Guess(8)
    seen = Recorder()
    with pytest.raises(DivergedError, match="lower learning_rate"):
        eqx_q.train(
            make_agent(env, reward_scale=float("inf")),
            env,
            total_steps=640,
            key=jax.random.key(0),
            callbacks=[seen],
        )
    assert seen.steps == []


def test_a_gradient_that_is_not_finite_is_seen_before_the_loss_is():
    row = {"env_steps": 64, "loss": 1.0}
    with pytest.raises(DivergedError):
        running._check_finite(row | {"grad_norm": float("nan")})
    running._check_finite(row | {"grad_norm": np.array([np.nan, 1.0])})  # one member still learns


def test_history_is_bounded():
    history = running.History()
    for i in range(100_000):
        history.append({"env_steps": i})
    steps = [row["env_steps"] for row in history.rows]
    assert len(steps) <= 1000
    assert len(set(np.diff(steps[:-1]))) == 1
    assert steps[-1] == 99_999


def test_advance_can_be_vmapped():
    env = Guess(8)
    states = [
        eqx_q.start(make_agent(env, i, schedule_steps=640.0), env, key=jax.random.key(i))
        for i in range(2)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x) if eqx.is_array(x[0]) else x[0], *states)
    together, metrics = eqx.filter_jit(eqx.filter_vmap(lambda state: eqx_q.advance(state, env, 3)))(
        stacked
    )
    for i, state in enumerate(states):
        alone, own = eqx.filter_jit(eqx_q.advance)(state, env, 3)
        np.testing.assert_allclose(metrics["loss"][i], own["loss"], rtol=1e-4)
        np.testing.assert_array_equal(
            jax.random.key_data(together.key[i]), jax.random.key_data(alone.key)
        )


def test_bad_input():
    env = Guess(8)
    agent = make_agent(env)
    with pytest.raises(UsageError, match="observation_space"):
        eqx_q.train(agent, Clock(8), total_steps=64, key=jax.random.key(0))
    for steps in (0, -1, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="total_steps must be positive"):
            eqx_q.train(agent, env, total_steps=steps, key=jax.random.key(0))
    with pytest.raises(UsageError, match=r"are .* updates, but 2\*\*31 are too many"):
        eqx_q.train(agent, env, total_steps=2**50, key=jax.random.key(0))
    with pytest.raises(UsageError, match="log_every must be"):
        eqx_q.train(agent, env, total_steps=64, key=jax.random.key(0), log_every=0)
    with pytest.raises(UsageError, match="num_minibatches"):
        eqx_q.train(make_agent(env, num_minibatches=7), env, total_steps=64, key=jax.random.key(0))


def test_a_long_run_holds_no_more_than_a_short_one():
    held = []

    def count(state, metrics):
        held.append(sum(x.nbytes for x in jax.live_arrays()))

    run(64 * 300, callbacks=[count], log_every=1)
    # The first two boundaries still fill the pipeline of snapshots.
    assert len(set(held[2:])) == 1


def with_memory(env, **options):
    network = {"hidden_sizes": [8], "memory": "gru", "memory_size": 8, "last_reward": True}
    return make_agent(env, network_options=network, num_minibatches=2, **options)


def test_a_burn_in_is_the_end_of_the_rollout_before():
    """With the memory at its start, so that whoever plays it again ends where the run stands."""
    env = Clock(4, shortest=3)
    agent = with_memory(env, burn_in=3, learning_rate=0.0)
    run_state = eqx_q.start(agent, env, key=jax.random.key(0))
    for _ in range(2):
        run_state, _ = eqx_q.advance(run_state, env, 1)
        before = run_state.burn_in
        assert before.actions.shape == (3, 4)
        memory = before.memory
        for t in range(3):
            steps = jax.tree.map(lambda x, t=t: x[t], before.timesteps)
            decision = agent.act(steps.obs, memory, first=steps.first, reward=steps.reward)
            memory = eqx.tree_at(
                lambda m: m.last_action, decision.memory, before.actions[t][:, None]
            )
        for ours, theirs in zip(
            jax.tree.leaves(memory), jax.tree.leaves(run_state.memory), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        # What comes next in the environment is where the run stands.
        ended = np.asarray(before.timesteps.ended[-1])
        np.testing.assert_array_equal(run_state.timestep.first, ended)


def test_steps_are_counted_past_two_to_the_32():
    env = Clock(4)
    begun = 2**32 - 2 * 32  # lane-steps: two updates before the words overflow
    agent = eqx_q.PQN.create(
        env.observation_space,
        env.action_space,
        key=jax.random.key(0),
        num_minibatches=2,
        rollout_length=8,
        epsilon_start=1.0,
        epsilon_end=0.0,
        epsilon_decay=1.0,
    )
    state = eqx_q.start(agent, env, key=jax.random.key(1))
    state = eqx.tree_at(
        lambda s: (s.num_updates, s.agent.env_steps, s.transitions),
        state,
        (jnp.int32(begun // 32), Count.of(begun), Count.of(begun)),
    )
    seen = []
    agent, history = eqx_q.train(
        agent,
        env,
        total_steps=2 * 2**32,
        key=jax.random.key(2),
        run_state=state,
        log_every=1,
        callbacks=[lambda state, metrics: seen.append(state) or _stop_after(metrics, begun + 160)],
    )
    steps = [begun + 32 * i for i in range(1, 6)]
    assert [row["env_steps"] for row in history] == steps
    assert [int(state.agent.env_steps) for state in seen] == steps
    assert begun + 160 > 2**32 < history[-1]["transitions"] <= steps[-1]
    np.testing.assert_allclose([row["epsilon"] for row in history], 0.5, atol=1e-6)


def _stop_after(metrics, steps):
    if metrics["env_steps"] >= steps:
        raise eqx_q.StopTraining


def test_the_first_burn_in_never_happened():
    env = Clock(4, shortest=3)
    agents = []
    for burn_in in (0, 3):
        agent = with_memory(env, burn_in=burn_in)
        run_state = eqx_q.start(agent, env, key=jax.random.key(0))
        run_state, metrics = eqx_q.advance(run_state, env, 1)
        agents.append(run_state.agent)
        assert metrics["episodes"] == 5  # of 3, 3, 4, 5 and 6 steps, and a reset each
        assert int(run_state.agent.env_steps) == int(run_state.transitions) + 5
    assert_close(*agents)


def assert_close(a, b):
    for x, y in zip(parameters(a), parameters(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_keys_of_the_old_kind_train_alike():
    env = Guess(8)
    keys = jax.random.key(1), jax.random.PRNGKey(1)
    new, old = (eqx_q.train(make_agent(env), env, total_steps=128, key=key)[0] for key in keys)
    assert_same(new, old)
