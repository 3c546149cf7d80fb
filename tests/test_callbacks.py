"""The callbacks that ship with the library, one by one."""

import io
import signal
import time

import gymnasium
import jax
import numpy as np
import pytest

import eqx_q
from eqx_q.errors import UsageError
from eqx_q.loops import callbacks
from eqx_q.loops.callbacks import (
    Checkpoint,
    Evaluation,
    Interrupt,
    Progress,
    TimeBudget,
    Video,
    restore,
)
from eqx_q.loops.evaluation import Episodes
from eqx_q.saving.checkpoint import load, newest_checkpoint

pytestmark = pytest.mark.quick


def make_agent(env, key=0, memory="none", burn_in=0):
    return eqx_q.PQN.create(
        env.observation_space,
        env.action_space,
        key=jax.random.key(key),
        network_options={"hidden_sizes": [8], "memory": memory, "memory_size": 8},
        rollout_length=4,
        burn_in=burn_in,
        num_epochs=1,
        num_minibatches=1,
    )


@pytest.fixture(scope="module")
def env():
    return eqx_q.make("gymnax/CartPole-v1", num_envs=2)


def train(env, total_steps, crew, agent=None, **options):
    agent = make_agent(env) if agent is None else agent
    options = {"key": jax.random.key(1), "log_every": 1} | options
    return eqx_q.train(agent, env, total_steps=total_steps, callbacks=crew, **options)


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_evaluation_adds_its_returns_and_changes_nothing(env):
    seen = []
    evaluation = Evaluation(env.replicate(3), every=16, num_episodes=3, seed=5)
    agent, _ = train(env, 48, [evaluation, lambda _, metrics: seen.append(dict(metrics))])
    assert [row["env_steps"] for row in seen if "eval/return" in row] == [16, 32, 48]
    assert_same(agent, train(env, 48, [])[0])
    key = jax.random.fold_in(jax.random.key(5), 48 // 8)
    expected = eqx_q.evaluate(agent, env.replicate(3), num_episodes=3, key=key)
    assert evaluation.last is not None
    np.testing.assert_array_equal(evaluation.last.returns, expected)
    assert seen[-1]["eval/length"] == pytest.approx(expected.mean())  # CartPole pays 1 a step
    assert seen[-1]["eval/return"] == pytest.approx(expected.mean())
    assert seen[-1]["eval/return_std"] == pytest.approx(expected.std())


def test_a_budget_lets_side_work_take_its_share_and_no_more(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    budget = TimeBudget(0.1)
    spent, first = 0.0, 20.0
    with caplog.at_level("INFO", "eqx_q"):
        for _ in range(1000):
            now += 1.0
            if budget.affords("evaluation"):
                cost = 3.0 if spent else first
                now += cost
                budget.charge("evaluation", cost)
                spent += cost
            # There is always room for the final round, but for what the first one took too much.
            assert spent + (3.0 if spent > first else first) <= max(0.1 * now, 2 * first)
    assert spent > 0.08 * now
    assert not TimeBudget(0.1).affords("recording", guess=1.0)
    assert len(caplog.records) == 1 and "eval.time_fraction" in caplog.text


def test_evaluations_over_budget_are_skipped_but_the_last(env, monkeypatch):
    calls = []
    played = Episodes(np.ones(3, np.float32), np.ones(3, np.int32), {})
    fake = lambda agent, env, **_: calls.append(int(agent.env_steps)) or played  # noqa: E731
    monkeypatch.setattr(callbacks, "play_episodes", fake)
    monkeypatch.setattr(callbacks, "compile_evaluation", lambda agent, env, **_: None)
    budget = TimeBudget(0.0)
    train(env, 80, [Evaluation(env, every=16, num_episodes=3, budget=budget)])
    assert calls == [16, 80]  # one that tells the cost, the last


def test_checkpoints_come_after_steps_or_seconds_and_at_the_end(env, tmp_path):
    saved = []
    checkpoint = Checkpoint(tmp_path / "steps", every=24, keep=9)
    checkpoint_save = checkpoint.save
    checkpoint.save = lambda state, steps: saved.append(steps) or checkpoint_save(state, steps)
    train(env, 64, [checkpoint])
    assert saved == [24, 48, 64]
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names == [f"{steps:012d}.ckpt" for steps in saved]
    assert newest_checkpoint(tmp_path / "steps") == tmp_path / "steps" / names[-1]

    train(env, 32, [Checkpoint(tmp_path / "seconds", every=10**9, seconds=0.0, keep=2)])
    names = sorted(path.name for path in (tmp_path / "seconds").iterdir())
    assert names == ["000000000024.ckpt", "000000000032.ckpt"]


def test_a_full_disk_costs_checkpoints_but_not_the_run(env, tmp_path, monkeypatch, caplog):
    full = False

    def fsync(_):
        if full:
            raise OSError(28, "No space left on device")

    def fill(_, metrics):
        nonlocal full
        full = metrics["env_steps"] in (16, 24)

    monkeypatch.setattr("os.fsync", fsync)
    checkpoint = Checkpoint(tmp_path, every=16)
    train(env, 40, [fill, checkpoint])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000000000032.ckpt", "000000000040.ckpt"]
    assert caplog.text.count("No space left") == 1
    with pytest.raises(UsageError, match="No space left"):
        train(env, 24, [fill, Checkpoint(tmp_path, every=16)])


@pytest.mark.parametrize("options", [{}, {"memory": "gru", "burn_in": 2}])
def test_a_restored_run_goes_on_bit_for_bit(env, tmp_path, options):
    fresh = make_agent(env, **options)
    whole, _ = train(env, 96, [], fresh)
    train(env, 96, [Checkpoint(tmp_path, every=40, keep=9)], fresh)
    (tmp_path / "000000000096.ckpt").write_bytes(b"broken")
    (tmp_path / "000000000080.ckpt").unlink()
    run_state = restore(tmp_path, env)
    assert int(run_state.num_updates) == 40 // 8
    agent, _ = train(env, 96, [], fresh, run_state=run_state, key=jax.random.key(99), log_every=3)
    assert_same(agent, whole)


def test_a_run_of_python_environments_is_restored_without_their_state(tmp_path, caplog):
    env = eqx_q.make(lambda: gymnasium.make("CartPole-v1"), num_envs=2)
    checkpoint = Checkpoint(tmp_path, every=16, with_env=False)
    agent, _ = train(env, 32, [checkpoint])
    assert load(newest_checkpoint(tmp_path)).timestep is None
    with caplog.at_level("INFO", "eqx_q"):
        run_state = restore(tmp_path, env)
    assert "they start new episodes" in caplog.text
    assert_same(run_state.agent, agent)
    assert run_state.timestep.first.all()
    longer, _ = train(env, 64, [], run_state=run_state)
    assert int(longer.env_steps) == 64
    env.close()


def test_a_signal_ends_the_run_at_the_next_boundary(env, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    checkpoint = Checkpoint(tmp_path, every=10**9)

    def send(run_state, metrics):
        if metrics["env_steps"] == 24:
            signal.raise_signal(signal.SIGTERM)

    with Interrupt() as interrupt:
        agent, _ = train(env, 800, [send, interrupt, checkpoint])
    assert interrupt.received
    assert signal.getsignal(signal.SIGTERM) is before
    assert int(agent.env_steps) == 24
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "000000000024.ckpt"
    assert_same(load(newest).agent, agent)


def test_progress_is_lines_without_a_terminal_and_a_bar_with_one(env):
    metrics = {
        "env_steps": 500,
        "total_steps": 2000,
        "steps_per_second": 100.0,
        "episode_return": np.array([10.0, np.nan, 20.0]),
        "eval/return": np.array([7.0, 8.0, 9.0]),
        "done": False,
    }
    state = eqx_q.start(make_agent(env), env, key=jax.random.key(0))
    stream = io.StringIO()
    progress = Progress(stream)
    progress(state, metrics)
    assert stream.getvalue() == (
        "500/2,000 steps (25%)  100 steps/s  return 15  eval 8  0:00:45 left\n"
    )
    progress(state, metrics)  # less than ten seconds later
    assert stream.getvalue().count("\n") == 1
    progress(state, metrics | {"env_steps": 2000, "done": True})
    assert stream.getvalue().endswith("return 15  eval 8  0:00:00 left\n")

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    progress = Progress(terminal)
    progress(state, metrics)
    progress(state, metrics | {"env_steps": 1000})
    progress.close()
    assert "1.00k/2.00k" in terminal.getvalue() and "return 15  eval 8" in terminal.getvalue()


def test_progress_of_an_offline_run_counts_updates_and_shows_its_loss(env):
    agent = eqx_q.DQN.create(env.observation_space, env.action_space, key=jax.random.key(0))
    state = eqx_q.OfflineState(agent, jax.random.key(0), agent.num_updates.astype(np.int32))
    metrics = {
        "num_updates": 500,
        "total_updates": 2000,
        "updates_per_second": 100.0,  # of each member
        "loss": np.array([0.1, 0.3]),
        "done": False,
    }
    stream, terminal = io.StringIO(), io.StringIO()
    Progress(stream)(state, metrics)
    assert stream.getvalue() == "500/2,000 updates (25%)  100 updates/s  loss 0.2  0:00:15 left\n"
    terminal.isatty = lambda: True
    for loss, unit in ((metrics["loss"], "update of each seed"), (0.2, "update")):
        progress = Progress(terminal)
        progress(state, metrics | {"loss": loss})
        progress(state, metrics | {"loss": loss, "num_updates": 1000, "eval/return": 7.0})
        progress.close()
        shown = terminal.getvalue().split("\r")[-1]
        assert "1.00k/2.00k" in shown and "loss 0.2  eval 7" in shown
        assert f"{unit}/s" in shown or f"?{unit}" in shown


def test_a_renderer_that_fails_costs_only_the_pictures(env, tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise OSError("no display")

    monkeypatch.setattr(callbacks, "record_episode", broken)
    video = Video(env.replicate(1), tmp_path, every=16)
    agent, _ = train(env, 64, [video])
    assert int(agent.env_steps) == 64
    assert caplog.text.count("the run continues without pictures") == 1


def test_a_second_signal_ends_the_process_at_once(monkeypatch, capsys):
    left = []
    monkeypatch.setattr("os._exit", left.append)
    with Interrupt():
        signal.raise_signal(signal.SIGINT)
        assert not left and "once more to quit at once" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert left == [130]


def test_a_notice_is_no_first_signal_and_comes_too_late_after_one(monkeypatch):
    left = []
    monkeypatch.setattr("os._exit", left.append)
    with Interrupt() as interrupt:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        assert interrupt.received and interrupt.noticed and not left
        signal.raise_signal(signal.SIGTERM)
    assert left == [143]
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGUSR1)
        assert interrupt.received and not interrupt.noticed
