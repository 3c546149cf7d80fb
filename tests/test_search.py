"""Search: what varies, who proposes, what is learnt and reported, and surviving a kill."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import gymnasium
import hydra
import jax
import numpy as np
import optuna
import pytest
import yaml
from omegaconf import OmegaConf

import eqx_q
from eqx_q.agents.hyperparameters import names
from eqx_q.data import Description, Rows, Writer
from eqx_q.errors import CorruptFileError, DivergedError, LaneError, UsageError
from eqx_q.loops import source
from eqx_q.loops.offline import OfflineState
from eqx_q.run import make_agent, make_env, search as searches, study as studies
from eqx_q.run.space import check_space, read_space
from eqx_q.run.study import SharedStudy
from eqx_q.sharding import ManyDevices, OneDevice

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "tracker=jsonl",
    "num_envs=4",
    "agent.rollout_length=16",
    "agent.num_minibatches=4",
    "agent.num_epochs=1",
    "agent.network_options.hidden_sizes=[16]",
    "eval.num_envs=4",
    "hydra.run.dir=search",
]


def composed(*overrides):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("tune", list(overrides)), resolve=True)


def space_of(search, **config):
    return read_space({**composed(), **config, "search": search})


SPACES = gymnasium.spaces.Box(-1, 1, (4,)), gymnasium.spaces.Discrete(2)
LEARNING_RATE = {"low": 1e-5, "high": 1e-2, "log": True}
MIXED = {
    "num_envs": [8, 16],
    "agent": {
        "learning_rate": LEARNING_RATE,
        "lambda_": {"low": 0, "high": 1},
        "num_epochs": {"low": 1, "high": 4},
        "network_options": {"hidden_sizes": [[16], [8, 8]]},
        "discount": None,
    },
}


# ---- spaces


def test_the_agent_itself_says_what_varies_inside_a_population():
    space = space_of(MIXED)
    assert space.traced == {"agent.learning_rate", "agent.lambda_"}
    kinds = {name: type(x).__name__ for name, x in space.distributions.items()}
    assert kinds == {
        "num_envs": "CategoricalDistribution",
        "agent.learning_rate": "FloatDistribution",
        "agent.lambda_": "FloatDistribution",  # a number of the agent, though the ends are whole
        "agent.num_epochs": "IntDistribution",
        "agent.network_options.hidden_sizes": "CategoricalDistribution",
    }
    params = {"num_envs": 8, "agent.learning_rate": 1e-3, "agent.lambda_": 0.5}
    params |= {"agent.num_epochs": 3, "agent.network_options.hidden_sizes": "[8, 8]"}
    assert space.leaves(params) == {"learning_rate": 1e-3, "lambda_": 0.5}
    assert set(space.static(params)) == set(params) - {"agent.learning_rate", "agent.lambda_"}
    config = space.apply(composed(), params)
    assert (config["num_envs"], config["agent"]["num_epochs"]) == (8, 3)
    assert config["agent"]["network_options"]["hidden_sizes"] == [8, 8]
    assert config["agent"]["network_options"]["norm"] == "layer_norm"
    cql = composed("agent=cql", "env=minatar")
    assert "agent.alpha" in read_space(cql).traced


def test_a_part_and_an_option_of_one_of_those_are_searched_together():
    """As with a base that has the option, of which trials may then be without it."""
    search = {"agent": {"value": {"name": ["hl_gauss", "scalar"], "sigma": [0.5, 1.0]}}}
    config = {**composed("agent.value.name=hl_gauss"), "search": search}
    space, env = read_space(config), make_env(config, 1)
    assert space.traced == {"agent.value.sigma"}
    check_space(config, space, env)
    for name in search["agent"]["value"]["name"]:
        params = {"agent.value.name": name, "agent.value.sigma": 0.5}
        trial = space.apply({**config, "num_seeds": 1}, space.static(params))
        agent = eqx.filter_eval_shape(make_agent, trial, env, [space.leaves(params)])
        assert ("value.sigma" in names(agent.members)) == (name == "hl_gauss")
    assert space_of(search).traced == set()  # the option of a part that is not the base's


BAD_SPACES = [
    ({"agent": {"lerning_rate": [1]}}, "unknown hyperparameter of the space 'agent.lerning_rate'"),
    ({"agent": {"lerning_rate": [1]}}, "agent.learning_rate"),
    ({"seed": [1, 2]}, "unknown hyperparameter of the space 'seed'"),
    ({"agent": {"lambda_": 0.5}}, "search.agent.lambda_=0.5: give a list of choices, or low and"),
    ({"agent": {"lambda_": []}}, "give at least one choice"),
    ({"agent": {"lambda_": ["much"]}}, "give numbers"),
    ({"agent": {"learning_rate": {"low": 1.0, "high": 0.1}}}, "search.agent.learning_rate: "),
    ({"agent": {"num_epochs": {"low": 1, "high": 2, "hihg": 3}}}, "with log or step"),
    ({"agent": {"lambda_": {"low": 0.5, "high": 1.5}}}, "lambda_=1.5 is out of range"),
    ({"agent": {"network": ["mlp", "mpl"]}}, "unknown network 'mpl'"),
    ({"agent": {"value": {"sigma": [0.5, 1]}}}, "agent.value.sigma needs agent.value=hl_gauss"),
    ({}, "the search space is empty"),
]


@pytest.mark.parametrize(("search", "message"), BAD_SPACES)
def test_a_bad_space_is_refused(search, message):
    config = {**composed(), "search": search}
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        check_space(config, read_space(config), make_env(config, 1))


@pytest.mark.parametrize("space", sorted(path.stem for path in (ROOT / "conf/search").iterdir()))
def test_every_shipped_space_is_one_of_its_agent(space):
    agents = {path.stem for path in (ROOT / "conf/agent").iterdir()}
    agent = space if space in agents else "pqn_vdn" if "teams" in space else "pqn"
    env = "mpe" if agent == "pqn_vdn" else "minatar"
    config = composed(f"agent={agent}", f"env={env}", f"search={space}")
    check_space(config, read_space(config), make_env(config, 1))


# ---- studies


def open_study(directory, space=None, sampler="random", **options):
    return SharedStudy(
        directory, space or space_of(MIXED), sampler=sampler, maximize=True, **options
    )


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_batch_shares_what_is_static(tmp_path, sampler):
    study = open_study(tmp_path, sampler=sampler)
    static, rates = [], []
    for batch in range(6):
        trials = study.ask(100, 5)
        assert [t.number for t in trials] == list(range(5 * batch, 5 * batch + 5))
        shared = [study._space.static(t.params) for t in trials]
        assert all(params == shared[0] for params in shared)
        static.append(str(shared[0]))
        rates += [t.params["agent.learning_rate"] for t in trials]
        for trial in trials:
            study.tell(trial, trial.params["agent.lambda_"])
    assert len(set(static)) > 1 and len(set(rates)) == 30
    study.close()


def test_who_finishes_while_another_asks_is_counted_once(tmp_path, monkeypatch):
    one, other = open_study(tmp_path), open_study(tmp_path)
    (trial,) = other.ask(2, 1)
    is_alive = one._is_alive

    def finishes(name):
        if name == other._name:
            other.tell(trial, 1.0)
            other.close()
        return is_alive(name)

    monkeypatch.setattr(one, "_is_alive", finishes)
    assert len(one.ask(2, 9)) == 1
    assert [t.state.name for t in one.study.get_trials()] == ["COMPLETE", "RUNNING"]
    one.close()


def test_batches_are_of_equal_size_and_end_with_the_search(tmp_path):
    study = open_study(tmp_path)
    sizes = []
    while trials := study.ask(10, 4):
        sizes.append(len(trials))
        study.tell(trials[0], None)
        for trial in trials[1:]:
            study.tell(trial, 1.0)
    assert sizes == [4, 3, 3]
    assert len(study.finished) == 10 and len(study.complete) == 7
    study.close()


def test_a_search_that_goes_on_proposes_something_else(tmp_path):
    first, later = open_study(tmp_path / "a"), open_study(tmp_path / "b")
    proposed = [t.params for t in first.ask(8, 4)]
    assert [t.params for t in later.ask(8, 4)] == proposed  # the seed decides
    first.close()
    again = open_study(tmp_path / "a")
    assert all(t.params not in proposed for t in again.ask(8, 4))
    for study in (later, again):
        study.close()


def test_processes_share_a_search_and_give_up_what_the_dead_left(tmp_path):
    one, other = open_study(tmp_path), open_study(tmp_path)
    ours, theirs = one.ask(6, 4), other.ask(6, 4)
    assert [t.number for t in ours] == [0, 1, 2] and [t.number for t in theirs] == [3, 4, 5]
    assert one.ask(6, 4) == []  # all are taken
    for trial in theirs[:2]:
        other.tell(trial, 1.0)
    other._alive.release()  # as the kernel does when a process dies
    (again,) = one.ask(6, 4)
    assert again.number == 6
    states = [t.state.name for t in one.study.get_trials()]
    assert states == ["RUNNING"] * 3 + ["COMPLETE"] * 2 + ["FAIL", "RUNNING"]
    one.close()
    (tmp_path / "workers" / "killed").touch()  # before it had trials
    open_study(tmp_path).close()
    assert list((tmp_path / "workers").iterdir()) == []


def test_a_grid_is_every_combination_once(tmp_path):
    space = space_of({"agent": {"lambda_": [0.1, 0.2, 0.3], "num_epochs": {"low": 1, "high": 2}}})
    study = open_study(tmp_path, space, sampler="grid")
    seen = []
    for trial in study.ask(99, 2):
        study.give_up(trial)  # and they are proposed again
    assert study.study.get_trials(states=[optuna.trial.TrialState.WAITING]) == []
    while trials := study.ask(99, 2):
        assert len({t.params["agent.num_epochs"] for t in trials}) == 1
        seen += [tuple(t.params[name] for name in sorted(space.distributions)) for t in trials]
        for trial in trials:
            study.tell(trial, 0.0)
    assert sorted(seen) == [(x, n) for x in (0.1, 0.2, 0.3) for n in (1, 2)]
    study.close()
    space = space_of({"agent": {"lambda_": [0.1, 0.2, 0.3, 0.4], "num_epochs": [1, 2]}})
    study, sizes = open_study(tmp_path / "even", space, sampler="grid"), []
    while trials := study.ask(99, 3):  # in groups of four
        sizes.append(len(trials))
        for trial in trials:  # one comes to the end
            study.tell(trial, None if study.complete else 0.0)
    assert sizes == [2, 2, 2, 2]
    searches._draw(tmp_path, study)
    assert (tmp_path / "history.png").exists() and not (tmp_path / "importances.png").exists()
    study.close()
    with pytest.raises(UsageError, match=r"give search.agent.learning_rate as a list"):
        open_study(tmp_path, sampler="grid")


def test_a_storage_that_is_locked_damaged_or_half_written(tmp_path, monkeypatch):
    study = open_study(tmp_path)
    study.tell(study.ask(4, 1)[0], 3.0)
    study.close()
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 6, "wor')  # killed while it wrote
    study = open_study(tmp_path)
    assert study.best.value == 3.0
    study.tell(study.ask(4, 1)[0], 4.0)
    study.close()
    study = open_study(tmp_path)
    assert study.best.value == 4.0
    study.close()

    monkeypatch.setattr(studies, "_PATIENCE", 0.05)
    lock = studies._Lock(tmp_path / "study.journal.lock")
    with lock, pytest.raises(UsageError, match=r"another process holds '.*study.journal.lock'"):
        open_study(tmp_path)
    for damage in (b"not JSON\n", b'{"op_code": 99}\n', b"[]\n"):
        journal.write_bytes(damage + whole)
        with pytest.raises(CorruptFileError, match=r"study.journal' is damaged"):
            open_study(tmp_path)
    assert not list((tmp_path / "workers").iterdir())
    lines = whole.splitlines(keepends=True)
    for number, line in enumerate(lines):  # of each, one bit in the middle is another
        at = len(line) // 2
        flipped = line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]
        journal.write_bytes(b"".join([*lines[:number], flipped, *lines[number + 1 :]]))
        with pytest.raises(
            CorruptFileError, match=rf"study.journal' is damaged .*line {number + 1}: "
        ):
            open_study(tmp_path)


# ---- searches


def rows_of(directory):
    with open(directory / "trials.csv") as file:
        return list(csv.DictReader(file))


TINY = [*SMALL, "total_steps=640", "trials=4", "population=2", "num_seeds=2"]
QUICK = [*SMALL, "eval.every=0", "metric=loss"]


@pytest.fixture
def quick(monkeypatch):
    """Training that learns nothing: the loss is 1 - lambda. Tells who learnt, and how long."""
    trained = []

    def train(agent, env, *, total_steps, key, callbacks, log_every, devices):
        assert agent.num_members % devices == 0
        steps = agent.learns_from.units(env.num_envs // agent.num_members)
        done = -(-total_steps // steps) * steps
        trained.append((np.asarray(agent.members.lambda_), done))
        metrics = {"env_steps": done, "total_steps": done, "loss": 1 - trained[-1][0]}
        metrics |= {"done": True, "compile_seconds": 0.0, "train_seconds": 0.0}
        state = OfflineState(agent, key, jax.numpy.int32(0))  # which is not looked into
        for callback in callbacks:
            callback(state, metrics)
        learnt = agent.members.env_steps.plus(done)
        members = eqx.tree_at(lambda members: members.env_steps, agent.members, learnt)
        return eqx_q.Population(members), [metrics]

    monkeypatch.setattr(searches, "train", train)
    monkeypatch.setattr(searches, "_draw", lambda *_: None)
    return trained


@pytest.mark.parametrize(("asked", "found"), [(None, 80), (20, 80), (0, 0)])
def test_members_are_evaluated_at_rungs_only(asked, found):
    """Each training of a search ends at one, and evaluates there."""
    config = {"agent": {"schedule_steps": None}, "eval": {"every": asked}}
    told = searches._for_rungs(config, 80)
    assert (told["eval"]["every"], told["agent"]["schedule_steps"]) == (found, 80)


def test_a_population_learns_what_was_proposed_in_one_program(
    script, tmp_path, monkeypatch, replace_backend, received
):
    replace_backend()
    traces = []
    update = source._update
    monkeypatch.setattr(source, "_update", lambda *args: traces.append(None) or update(*args))
    options = ["+tracker.aim.experiment=e", f"tracker.repo={tmp_path}"]
    status, out, err = script("tune", *TINY, *options)
    assert status == 0, err
    assert len(traces) == 1
    members = len(list(tmp_path.glob("received *")))
    tracked = [row for i in range(members) for row in received(tmp_path, i)]
    names = sorted(row[1]["name"] for row in tracked if row[0] == "open")
    assert names == [f"trial {i}" for i in range(4)]  # a tracker has a run for each trial
    trials = [row[1]["trial"] for row in tracked if row[0] == "params" and "trial" in row[1]]
    assert sorted(trials) == [0, 1, 2, 3]
    search = tmp_path / "search"
    assert {"best.yaml", "trials.csv", "summary.json", "history.png", "importances.png"} <= {
        path.name for path in search.iterdir()
    }
    rows = rows_of(search)
    assert [row["state"] for row in rows] == ["complete"] * 4
    config = composed(*TINY[:-3], "num_seeds=1")
    options = {k: v for k, v in config["agent"].items() if v is not None and k != "_target_"}
    options["network_options"] = {"hidden_sizes": [16], "norm": "layer_norm"}
    varied = ("learning_rate", "lambda_", "discount", "epsilon_end", "epsilon_decay")
    env = eqx_q.make("gymnax/CartPole-v1", num_envs=16)

    def create(key, values):
        spaces = env.observation_space, env.action_space
        return eqx_q.PQN.create(*spaces, key=key, **(options | values))

    for first in (0, 2):
        values = {
            name: np.repeat(
                [np.float32(row[f"agent.{name}"]) for row in rows[first : first + 2]], 2
            )
            for name in varied
        }
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)[np.array([0, 1, 0, 1])]
        agent = eqx_q.Population(eqx.filter_vmap(create)(keys, values))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), first), 0)
        agent, _ = eqx_q.train(agent, env, total_steps=640, key=key)
        key = jax.random.fold_in(jax.random.key(1), 10)
        returns = eqx_q.evaluate(agent, env, num_episodes=4, key=key).mean(1).reshape(2, 2)
        for row, per_seed in zip(rows[first : first + 2], returns, strict=True):
            np.testing.assert_allclose(
                [float(x) for x in row["per_seed"].split()], per_seed, rtol=1e-5
            )
            assert float(row["value"]) == pytest.approx(per_seed.mean())

    summary = json.loads((search / "summary.json").read_text())
    best = max(rows, key=lambda row: float(row["value"]))
    assert summary["best"]["trial"] == int(best["trial"]) and summary["trials"] == 4
    tuned = yaml.safe_load((search / "best.yaml").read_text())
    assert tuned["agent"]["learning_rate"] == float(best["agent.learning_rate"])
    assert (tuned["total_steps"], tuned["num_envs"]) == (640, 4)

    # It is a tuned file: what it makes is the best trial's agent.
    assert (search / "best.yaml").read_text().startswith("# @package _global_")
    installed = OmegaConf.merge(composed("tuned=none"), tuned)
    agent = make_agent(OmegaConf.to_container(installed), env)
    np.testing.assert_allclose(agent.lambda_, float(best["agent.lambda_"]), rtol=1e-6)
    assert agent.num_minibatches == 4 and agent.reward_scale == np.float32(0.1)

    # Nothing is left to do, but to install it.
    shipped = tmp_path / "conf/tuned/pqn_cartpole.yaml"
    shipped.parent.mkdir(parents=True)
    shipped.write_text("# of a user's own")
    monkeypatch.setattr("_app.CONF", tmp_path / "conf")
    status, out, err = script("tune", "resume=search", "install=true")
    assert status == 0, err
    assert "installed: conf/tuned/pqn_cartpole.yaml" in out
    # A search may be shorter than the runs that the file is for.
    assert yaml.safe_load(shipped.read_text()) == tuned | {"total_steps": 500_000}
    assert "of 4 trials" in shipped.read_text()
    assert rows_of(search) == rows and len(traces) == 1
    for change in ("agent.discount=0.5", "total_steps=9", "search.agent.lambda_=[0.5]"):
        status, _, err = script("tune", "resume=search", change)
        assert status == 1 and f"leave out {change.split('=')[0]}\n" in err
    status, _, err = script("tune", *TINY)
    assert status == 1 and "already holds a run: continue it with resume=" in err


def test_a_population_shrinks_from_rung_to_rung(script, tmp_path, quick):
    options = ["total_steps=1600", "trials=4", "population=4", "num_seeds=2"]
    options += ["halving.rungs=1", "halving.eta=2", "direction=minimize"]
    status, _, err = script("tune", *QUICK, *options)
    assert status == 0, err
    rows = rows_of(tmp_path / "search")
    rates = np.array([float(row["agent.lambda_"]) for row in rows], np.float32)
    best = np.sort(np.argsort(rates)[2:])  # the smallest loss
    (all_, before), (kept, after) = quick
    np.testing.assert_array_equal(all_, np.repeat(rates, 2))  # two seeds each
    np.testing.assert_array_equal(kept, np.repeat(rates[best], 2))
    assert (before, before + after) == (832, 1600)  # whole updates, of 64 steps
    for number, row in enumerate(rows):
        ended = ("complete", "1600") if number in best else ("pruned", "832")
        assert (row["state"], row["steps"]) == ended
        assert float(row["value"]) == pytest.approx(1 - rates[number], rel=1e-5)
    summary = json.loads((tmp_path / "search/summary.json").read_text())
    assert (summary["pruned"], summary["best"]["trial"]) == (2, np.argmax(rates))


def test_rungs_are_whole_updates_and_members_share_devices(script, tmp_path, monkeypatch, quick):
    there, taken = jax.devices(), []

    def place_on(devices):
        taken.append(devices)
        mesh = jax.sharding.Mesh(np.array(there * devices), ("devices",))
        return OneDevice() if devices == 1 else ManyDevices(mesh)

    monkeypatch.setattr(searches, "place_on", place_on)
    options = ["total_steps=640", "trials=8", "population=8", "halving.rungs=5", "halving.eta=2"]
    status, out, err = script("tune", *QUICK, *options, "devices=4")
    assert status == 0 and "failed" not in out, err
    # 20, 40, 80, 160, 320 and 640 steps, of which an update makes 64
    assert [done for _, done in quick] == [64, 64, 64, 128, 320]
    assert [len(members) for members, _ in quick] == [8, 4, 2, 1, 1]
    assert [devices for devices in taken if devices != 4] == [2, 1]  # fewer, for fewer members


def test_a_batch_that_fails_on_its_way_fails_with_those_that_are_left(
    script, tmp_path, monkeypatch, quick
):
    learn = searches.train

    def diverge(agent, *arguments, **options):
        if len(quick) == 1:
            quick.append(None)
            raise DivergedError("the loss is not finite")
        return learn(agent, *arguments, **options)

    monkeypatch.setattr(searches, "train", diverge)
    options = ["total_steps=640", "trials=8", "population=4", "halving.rungs=1"]
    status, out, err = script("tune", *QUICK, *options)
    assert status == 0, err
    assert "failed: the loss is not finite" in out
    states = [row["state"] for row in rows_of(tmp_path / "search")]
    assert states[:4] == ["pruned"] * 4 and states[4:].count("complete") == 1


def test_static_values_that_cannot_work_cost_their_batch_alone(
    script, tmp_path, monkeypatch, quick
):
    learn = searches.train

    def trace(agent, env, **options):
        state = eqx_q.start(agent, env, key=options["key"])
        eqx.filter_eval_shape(eqx_q.advance, state, env, 1)
        return learn(agent, env, **options)

    monkeypatch.setattr(searches, "train", trace)
    options = ["total_steps=64", "trials=2", "population=1", "sampler=grid"]
    options += ["~search.agent", "+search.agent.num_minibatches=[7,4]"]
    status, out, err = script("tune", *QUICK, *options)
    assert status == 0, err
    assert "trials [0] failed: num_minibatches=7 does not divide the 64 transitions" in out
    first, second = rows_of(tmp_path / "search")
    assert (first["state"], first["value"], second["state"]) == ("pruned", "", "complete")
    options[-1] = "+search.agent.num_minibatches=[7]"
    status, _, err = script("tune", *QUICK, *options, "hydra.run.dir=other")
    assert status == 1 and "every trial failed, the last one with: num_minibatches=7" in err


def test_an_environment_that_breaks_is_no_fault_of_a_trial(script, monkeypatch):
    def broken(*_, **__):
        raise LaneError("lane 0 broke")

    monkeypatch.setattr(searches, "train", broken)
    options = ["total_steps=64", "trials=2", "population=1", "hydra.run.dir=search"]
    status, out, err = script("tune", *QUICK, *options)
    assert status == 1 and "error: lane 0 broke" in err and "failed" not in out


def test_an_override_replaces_what_a_space_says(script, tmp_path, quick):
    options = ["total_steps=64", "trials=4", "search.agent.lambda_=[0.5,0.75]"]
    options += ["search.agent.epsilon_end={low: 0.1, high: 0.2}", "search.agent.max_grad_norm=[3]"]
    status, _, err = script("tune", *QUICK, *options, "search.agent.learning_rate=null")
    assert status == 0, err
    rows = rows_of(tmp_path / "search")
    assert {row["agent.max_grad_norm"] for row in rows} == {"3"}  # which the space did not have
    stored = yaml.safe_load((tmp_path / "search" / "config.yaml").read_text())["search"]["agent"]
    assert stored["epsilon_end"] == {"low": 0.1, "high": 0.2}
    assert {row["agent.lambda_"] for row in rows} == {"0.5", "0.75"}
    assert "agent.learning_rate" not in rows[0] and "agent.discount" in rows[0]


def test_a_sweep_of_searches_goes_on_with_its_own(script, tmp_path, quick):
    quick_sweep = [word for word in QUICK if not word.startswith("hydra.")]
    command = ["-m", *quick_sweep, "total_steps=64", "trials=2", "hydra.sweep.dir=sweep"]
    assert script("tune", *command)[0] == 0
    rows = rows_of(tmp_path / "sweep" / "0")
    status, _, err = script("tune", *command)
    assert status == 0 and rows_of(tmp_path / "sweep" / "0") == rows, err
    status, _, err = script("tune", *command, "num_seeds=2")
    assert status == 1 and "holds a run with num_seeds=1, not 2" in err
    # As training would, it refuses what would be another search, in a directory of the sweep's.
    for name in ("tune", "train"):
        status, _, err = script(name, "-m", "resume=sweep/0", "hydra.sweep.dir=other")
        assert status == 1 and "resume continues one run, in its own directory" in err
    assert not (tmp_path / "other" / "0" / "study.journal").exists()


def test_results_are_written_though_who_found_them_died_before(script, tmp_path, quick):
    options = ["total_steps=64", "trials=2", "search=purejaxql"]
    assert script("tune", *QUICK, *options)[0] == 0
    found = {}
    for name in ("best.yaml", "trials.csv", "summary.json"):
        found[name] = (tmp_path / "search" / name).read_text()
        (tmp_path / "search" / name).unlink()
    status, _, err = script("tune", "resume=search")
    assert status == 0 and len(quick) == 1, err
    for name in ("best.yaml", "trials.csv"):
        assert (tmp_path / "search" / name).read_text() == found[name]
    best = [json.loads(text)["best"] for text in (found.pop("summary.json"),)]
    assert best == [json.loads((tmp_path / "search/summary.json").read_text())["best"]]


def test_what_varies_in_sampling_is_what_is_sampled(script, tmp_path, monkeypatch):
    with Writer(tmp_path / "data", Description("gymnax/CartPole-v1", *SPACES)) as writer:
        obs = np.zeros((4, 4), np.float32)
        writer.append(Rows.of_episode(obs, np.zeros(3, int), np.ones(3), terminated=True))
        writer.commit("all")
        writer.finish()
    exponents = []

    def train(agent, dataset, *, num_updates, key, callbacks, log_every, sampling, devices):
        exponents.append(sampling.priority_exponent)
        metrics = {"num_updates": num_updates, "loss": np.zeros(agent.num_members)}
        times = {"compile_seconds": 0.0, "train_seconds": 0.0}
        return agent, [metrics | times]

    monkeypatch.setattr(searches, "train_offline", train)
    options = ["agent=dqn", "data=data", "num_updates=3", "tracker=jsonl", "eval.every=0"]
    options += ["~search.agent", "+search.sampling.priority_exponent=[0.25,0.5]", "metric=loss"]
    options += ["sampler=grid", "population=1", "trials=2", "hydra.run.dir=search"]
    status, _, err = script("tune", *options)
    assert status == 0, err
    assert exponents == [0.25, 0.5]


BAD_INPUT = {
    "metric=eval/retrun": "unknown metric 'eval/retrun': the nearest are eval/return",
    "metric=los eval.every=0": "metric 'los': the nearest are loss",
    "search=pqm": "unknown search 'pqm': the nearest are pqn",
    "search.agent.lamda_=[0.5]": "unknown hyperparameter of the space 'agent.lamda_'",
    "sampler=tep": "sampler=tep: choose one of tpe, random, grid",
    "direction=up": "direction=up: choose maximize or minimize",
    "eval.every=0": "needs evaluations, but eval.every=0",
    "trials=0": "trials=0: give a whole number of at least 1",
    "halving.rungs=9": "halving.rungs=9 are too many for total_steps=640",
    "pbt.every=64": "leave out pbt",
    "agent=cql": "this agent learns from recorded data",
    "resume=nowhere": "error: 'nowhere' is not a run directory",
    "resume=damaged": "study.journal' is damaged",
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input_gets_one_line(script, tmp_path, quick, arguments):
    (tmp_path / "damaged").mkdir()
    stored = {**composed(*TINY[:-1]), "chosen": {"agent": "pqn", "env": "cartpole"}}
    (tmp_path / "damaged/config.yaml").write_text(yaml.safe_dump(stored))
    (tmp_path / "damaged/study.journal").write_text("damaged\n")
    given = [] if "resume" in arguments else ["tracker=jsonl", "total_steps=640", "num_envs=4"]
    status, _, err = script("tune", *given, *arguments.split())
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert BAD_INPUT[arguments] in err


def test_trials_share_one_pool_of_emulators(script, tmp_path, monkeypatch):
    import envpool

    pools = []
    make = envpool.make
    monkeypatch.setattr(
        envpool,
        "make",
        lambda *args, **options: pools.append(options["num_envs"]) or make(*args, **options),
    )
    options = ["env=atari", "agent.network=mlp", "agent.network_options.hidden_sizes=[4]"]
    options += ["num_envs=2", "agent.rollout_length=2", "agent.num_minibatches=1"]
    options += ["agent.num_epochs=1", "eval.every=0", "metric=q_value", "tracker=jsonl"]
    options += ["total_steps=8", "trials=8", "population=4", "hydra.run.dir=search"]
    status, _, err = script("tune", *options)
    assert status == 0, err
    assert [row["state"] for row in rows_of(tmp_path / "search")] == ["complete"] * 8
    assert pools.count(8) == 1  # 4 trials, 2 lanes each, and both batches


def test_a_killed_search_goes_on_without_repeating_a_trial(script, tmp_path, quick):
    command = [sys.executable, str(ROOT / "scripts" / "tune.py"), *QUICK, "total_steps=640"]
    command += ["trials=200", "population=2", "cpu_devices=2"]  # of which a resume has one
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    table = tmp_path / "search" / "trials.csv"
    while not table.exists() or len(table.read_text().splitlines()) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert "members share 2 devices" in "".join(process.communicate())
    study = open_study(tmp_path / "search", read_space(composed()))
    before = {t.number: (t.params, t.value) for t in study.finished}
    study.close()
    total = len(before) + 3
    status, _, err = script("tune", "resume=search", f"trials={total}")
    assert status == 0, err
    study = open_study(tmp_path / "search", read_space(composed()))
    after = {t.number: (t.params, t.value) for t in study.finished}
    assert len(after) == total
    assert before.items() <= after.items()
    assert len({json.dumps(params) for params, _ in after.values()}) == total
    states = {t.state for t in study.study.get_trials()}
    assert optuna.trial.TrialState.RUNNING not in states
    study.close()
