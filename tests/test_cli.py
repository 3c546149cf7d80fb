"""The scripts: their files, their continuation, and their messages for bad input."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest
import yaml

import eqx_q
from eqx_q.loops import callbacks
from eqx_q.run import make_agent, make_env, provenance
from eqx_q.run.making import emulator_seed
from eqx_q.saving.checkpoint import checkpoints, load, save, save_checkpoint
from eqx_q.wrappers import custom
from eqx_q.wrappers.host import closing
from eqx_q.wrappers.registry import SUITES

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "tracker=jsonl",
    "num_envs=4",
    "agent.rollout_length=16",
    "agent.num_minibatches=4",
    "agent.num_epochs=1",
    "agent.network_options.hidden_sizes=[16]",
]
QUIET = ["eval.every=0", "video.every=0"]


def test_a_run_leaves_its_directory_and_can_be_evaluated(
    script, tmp_path, replace_backend, received
):
    replace_backend()
    options = ["total_steps=2e3", "num_seeds=2", "eval.num_envs=4", "video.max_steps=20"]
    options += ["+tracker.aim.experiment=e", f"tracker.repo={tmp_path}"]
    status, out, _ = script("train", *SMALL, *options, "hydra.run.dir=run")
    assert status == 0
    (_, opened), *calls, _ = received(tmp_path)
    assert opened["description"].startswith("pqn in gymnax/CartPole-v1: tracker=jsonl num_envs=4")
    assert opened["tags"] == ["pqn", "gymnax/CartPole-v1"] and opened["experiment"] == "e"
    params = {
        name: x for kind, nested, *_ in calls if kind == "params" for name, x in nested.items()
    }
    assert params["agent"]["rollout_length"] == 16 and params["total_steps"] == 2048
    assert params["env_steps"] == 2048 and params["done"] and params["compile_seconds"] > 0
    names = {name for kind, x, *_ in calls if kind == "metrics" for name in x}
    assert names >= {"train/return", "eval/return", "loss/td_error", "time/steps_per_second"}
    assert any(kind == "gif" for kind, *_ in calls)
    assert "tuned values: conf/tuned/pqn_cartpole.yaml" in out
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "summary.json", "agent.eqx", "checkpoints"
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["env_steps"]) == ("done", 2048)
    assert len(summary["eval_return_per_seed"]) == 2
    assert summary["eval_return_mean"] == pytest.approx(np.mean(summary["eval_return_per_seed"]))
    assert summary["steps_per_second"] == pytest.approx(2 * 2048 / summary["train_seconds"])
    for key in ("transitions", "compile_seconds", "wall_seconds", "device", "versions"):
        assert summary[key]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "env_steps" in row]
    assert rows[-1]["env_steps"] == 2048
    np.testing.assert_allclose(rows[-1]["eval/return"], summary["eval_return_per_seed"])

    status, out, _ = script("evaluate", "run=run", "episodes=6", "seed=3", "video=true")
    assert status == 0
    result = json.loads((run / "evaluation_as_trained.json").read_text())
    best = int(np.argmax(result["return_per_seed"]))
    assert f"wrote run/media/evaluation_as_trained.gif (member {best})" in out
    assert (run / "media" / "evaluation_as_trained.gif").read_bytes().startswith(b"GIF89a")
    agent = load(run / "agent.eqx")
    env = eqx_q.make("gymnax/CartPole-v1", num_envs=12)
    expected = eqx_q.evaluate(agent, env, num_episodes=6, key=jax.random.key(3))
    np.testing.assert_array_equal(result["returns"], expected)
    assert f"{expected.mean():.2f}" in out

    # Killed between the last checkpoint and the results: they are made up for.
    (run / "agent.eqx").unlink()
    (run / "summary.json").write_text("")
    assert script("train", "resume=run")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, load(run / "agent.eqx"), agent)
    again = json.loads((run / "summary.json").read_text())
    assert again["train_seconds"] is None
    for key in ("status", "env_steps", "transitions", "eval_return_per_seed"):
        assert again[key] == summary[key]
    np.testing.assert_allclose(again["train_return_per_seed"], summary["train_return_per_seed"])
    status, _, err = script("train", "resume=run")
    assert status == 1 and "give a larger total_steps to continue" in err


def test_total_steps_stretch_the_schedules(script, tmp_path):
    script("train", *SMALL, *QUIET, "total_steps=1000", "hydra.run.dir=a")
    assert load(tmp_path / "a" / "agent.eqx").schedule_steps == 1000
    script(
        "train", *SMALL, *QUIET, "total_steps=1000", "agent.schedule_steps=77", "hydra.run.dir=b"
    )
    assert load(tmp_path / "b" / "agent.eqx").schedule_steps == 77


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_resume_changes_hyperparameters_that_are_leaves(script, tmp_path, num_seeds):
    options = [*SMALL, *QUIET, "total_steps=1000", f"num_seeds={num_seeds}", "hydra.run.dir=run"]
    assert script("train", *options)[0] == 0
    change = ["total_steps=2000", "agent.learning_rate=1e-5", "agent.schedule_steps=99"]
    status, _, err = script("train", "resume=run", *change)
    assert status == 0, err
    status, _, err = script("train", "resume=run", "total_steps=2500", "agent.discount=5")
    assert status == 1 and "discount=5" in err
    # What was refused leaves nothing behind; what was changed stays so.
    assert script("train", "resume=run", "total_steps=2500")[0] == 0
    agent = load(tmp_path / "run" / "agent.eqx")
    agent = agent if num_seeds == 1 else agent.member(1)
    assert int(agent.env_steps) == 2560
    assert agent.learning_rate == np.float32(1e-5) and agent.schedule_steps == 99
    assert agent.discount == np.float32(0.99)
    status, _, err = script("train", "resume=run", "total_steps=3000", "agent.num_epochs=2")
    assert status == 1
    assert "leave out 'agent.num_epochs=2' (the agent's options that may change are" in err
    status, _, err = script("train", "resume=run", "total_steps=3000", "agent.adam_epsilon=1e-5")
    assert status == 1
    assert "leave out 'agent.optimizer.eps=1e-5' (the agent's" in err


def test_killed_after_a_checkpoint_a_run_tells_the_same(script, tmp_path, monkeypatch):
    command = [*SMALL, *QUIET, "total_steps=704", "checkpoint.every=64", "log_every=1"]
    assert script("train", *command, "hydra.run.dir=whole")[0] == 0

    def save_and_die(directory, run_state, step, keep):
        path = save_checkpoint(directory, run_state, step, keep)
        if step == 640:  # in the last tenth
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "save_checkpoint", save_and_die)
        assert script("train", *command, "hydra.run.dir=killed")[0] == 1
    assert script("train", "resume=killed")[0] == 0
    told = []
    for name in ("whole", "killed"):
        rows = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        returns = [(row["env_steps"], row["episode_return"]) for row in rows]
        told.append((returns, summary["train_return_per_seed"]))
    assert told[0] == told[1] and told[0][1] != [None]


@pytest.mark.parametrize("where", [[], ["hydra.run.dir=run"]])
def test_the_same_command_goes_on(script, tmp_path, where):
    command = [*SMALL, *QUIET, "total_steps=640", "checkpoint.every=128", "resume=auto", *where]
    status, _, err = script("train", *command)
    assert status == 0, err
    (run,) = tmp_path.glob("run" if where else "runs/*/*")
    whole, time = load(run / "agent.eqx"), (run / "agent.eqx").stat().st_mtime_ns
    assert f"already done: {run}\n" in script("train", *command)[1]
    assert (run / "agent.eqx").stat().st_mtime_ns == time
    # Killed, and started once more in the same way.
    (run / "summary.json").unlink()
    checkpoints(run / "checkpoints")[0].unlink()
    begun = int(checkpoints(run / "checkpoints")[0].stem)
    assert 0 < begun < 640
    status, _, err = script("train", *command)
    assert status == 0, err
    jax.tree.map(np.testing.assert_array_equal, load(run / "agent.eqx"), whole)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps_per_second"] * summary["train_seconds"] == pytest.approx(640 - begun)
    # As it is named; then it is another run.
    assert script("train", f"resume={run}", "total_steps=700")[0] == 0
    status, _, err = script("train", *command)
    assert status == 1 and "holds a run with total_steps=700, not 640" in err
    status, _, err = script("train", *command, "agent.discount=0.5")
    assert status == bool(where) and len([*tmp_path.glob("runs/*/*")]) == (0 if where else 2)


def test_a_sweep_goes_on_where_one_of_its_runs_fails(script, tmp_path):
    options = [*SMALL, *QUIET, "total_steps=128", "hydra.sweep.dir=sweep"]
    status, _, err = script("train", "-m", *options, "agent.discount=5,0.5")
    assert status == 1
    assert "error: run 0: discount=5" in err
    assert "error: some runs of the sweep failed: see the messages above" in err
    assert load(tmp_path / "sweep" / "1" / "agent.eqx").discount == 0.5


def test_a_sweep_ends_where_one_of_its_runs_is_stopped(script, monkeypatch):
    summary = {"status": "stopped", "env_steps": 1, "steps_per_second": 1.0}
    summary |= {"eval_return_per_seed": None, "eval_return_mean": None, "preempted": False}
    runs = []
    train_run = lambda *arguments, **options: runs.append(arguments) or summary  # noqa: E731
    monkeypatch.setattr("eqx_q.run.train_run", train_run)
    status, _, err = script("train", "-m", *SMALL, *QUIET, "seed=0,1", "hydra.sweep.dir=sweep")
    assert status == 1 and "error: the sweep was stopped: continue it with the same command" in err
    assert "hydra.sweep.dir=sweep\n" in err
    assert len(runs) == 1


def test_interrupted_killed_and_damaged_a_run_still_ends_the_same(script, tmp_path):
    options = [*SMALL, *QUIET, "total_steps=80_000", "checkpoint.every=1000", "checkpoint.keep=3"]
    assert script("train", *options, "hydra.run.dir=whole")[0] == 0

    def start(*arguments):
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    checkpoints = tmp_path / "run" / "checkpoints"

    def wait_for_progress(process, since):
        while len(names := [path.name for path in checkpoints.glob("*.ckpt")]) < 3 or (
            max(names) <= since
        ):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))

    # Short chunks here, one long chunk above: where a run is cut changes nothing.
    process = start(*options, "log_every=8", "hydra.run.dir=run")
    wait_for_progress(process, "")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "python scripts/train.py resume=" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"

    newest = max(checkpoints.glob("*.ckpt"))
    process = start("resume=run")
    wait_for_progress(process, newest.name)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()

    damaged = max(checkpoints.glob("*.ckpt"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    status, out, err = script("train", "resume=run")
    assert status == 0, err
    assert f"{damaged}" in out + err and "trying the previous checkpoint" in out + err
    resumed, whole = load(tmp_path / "run" / "agent.eqx"), load(tmp_path / "whole" / "agent.eqx")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    status, _, err = script("train", "resume=run")
    assert status == 1 and "give a larger total_steps to continue" in err


BAD_INPUT = {
    "agent=pqm": "unknown agent 'pqm': the nearest are pqn",
    "env=cartpol": "unknown env 'cartpol': the nearest are cartpole",
    "tuned=cleanrl_atar": "unknown tuned 'cleanrl_atar': the nearest are cleanrl_atari",
    "agnet=pqn": "unknown option 'agnet': the nearest are agent, ",
    "agent.lambda=1": "unknown option 'agent.lambda': the nearest are agent.lambda_",
    "env=minatar env.name=Breakot-MinAtar": "unknown gymnax environment 'Breakot-MinAtar'",
    "env=atari env.name=Pnog-v5": "Pong-v5",
    "num_envs=-3": "num_envs=-3: give a whole number of at least 1",
    "agent.num_minibatches=7": "num_minibatches=7 does not divide the 64 transitions",
    "agent.network=mpl": "unknown network 'mpl': the nearest are mlp",
    "agent.network_options.norm=layer": "unknown norm 'layer': the nearest are layer_norm",
    "total_steps=soon": "total_steps=soon: give a number",
    "total_steps=1.5": "total_steps=1.5: give a whole number",
    "num_seeds=0": "num_seeds=0: give a whole number of at least 1",
    "total_steps=inf": "total_steps=inf: give a whole number",
    "checkpoint.every=0": "checkpoint.every=0: give a whole number of at least 1",
    "eval.every=50 eval.epsilon=7": "eval.epsilon=7.0: give a number from 0 to 1",
    "agent.schedule_steps=soon": "agent.schedule_steps=soon: give a number",
    "checkpoint.keep=0": "checkpoint.keep=0: give a whole number of at least 1",
    "log_every=1.5": "log_every=1.5: give a whole number",
    "eval.every=50 eval.num_envs=0": "eval.num_envs=0: give a whole number of at least 1",
    "eval.every=50 eval.num_episodes=few": "eval.num_episodes=few: give a whole number",
    "eval.every=50 eval.max_episode_steps=-1": "eval.max_episode_steps=-1: give a whole number",
    "num_envs=1000000000000": "1,000,000,000,000 lanes are too many: lower num_envs",
    "resume=damaged": "config.yaml' is damaged: ",
    "devices=2": "JAX sees 1 (cpu): use at most that, or divide the CPU with cpu_devices=2",
    "cpu_devices=0": "cpu_devices=0: give a whole number of at least 1",
    "agent.lane_groups=3": "lane_groups=3 does not divide the 4 lanes of a rollout",
    "hydra/launcher=slurm": "hydra/launcher=slurm starts the runs of a sweep: add -m",
    "hydra.run.dri=there": "unknown option 'hydra.run.dri': the nearest are hydra.run.dir",
    "distributed.num_processes=2": "need a coordinator: add distributed.coordinator=HOST:PORT",
    "distributed.coordinator=here": "the processes do not find each other",
    "hydra.run.dir=file/run": "cannot write to the run directory",
    "hydra.run.dir=used": "already holds a run: delete it, or choose another directory",
    "hydra.run.dir=above/begun": "already holds a run: continue it with resume=",
    "resume=above": "it has no config.yaml; the newest run below it is 'above/begun'",
    "resume=nowhere": "error: 'nowhere' is not a run directory: it has no config.yaml",
    "agent.learning_rate=fast": "agent.learning_rate=fast: give a number, such as 0.0001",
    "agent.network_options.hidden_sizes=64": "give a list, such as [256, 256]",
    "agent.network_options.hidden_sizes=[0]": "cannot have hidden_sizes=(0,), ",
    "agent.bins=[3,1]": "bins=[3, 1]: give a whole number of at least 2, or a list of them",
    "agent.value.sigma=0.5": "agent.value.sigma needs agent.value=hl_gauss, but scalar is chosen",
    "agent.optimizer=sgd agent.optimizer.b1=0.9": "but sgd is chosen: leave it out, or choose",
    "data=5": "/5' is not a data set",
    "deterministic=maybe": "deterministic=maybe: give true or false, such as False",
    "+agent.lamda=1": "unknown hyperparameter 'lamda': the nearest are lambda_",
    "agent": "missing EQUAL",
    "agent=null": "Config group override must be a string or a list",
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input_gets_one_line(script, tmp_path, arguments):
    (tmp_path / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text("{}\n")
    begun = tmp_path / "above" / "begun"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "checkpoints" / "1.ckpt").touch()
    (begun / "metrics.jsonl").write_text("{}\n")
    (begun / "config.yaml").touch()
    status, _, err = script("train", *SMALL, *QUIET, "total_steps=100", *arguments.split())
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert BAD_INPUT[arguments] in err
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "runs").exists()  # a run that was refused leaves nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no run to evaluate: give run=DIR"),
        (["run=nowhere"], "'nowhere' is not a run directory"),
        (["run=nowhere", "protocol=stick"], "unknown protocol 'stick': the nearest are sticky"),
        (["run=nowhere", "episodes=few"], "episodes=few: give a number"),
    ],
)
def test_bad_input_of_an_evaluation(script, arguments, message):
    status, _, err = script("evaluate", *arguments)
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err


def test_without_hydra_the_extra_is_named(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra", None)
    monkeypatch.delitem(sys.modules, "_app", raising=False)
    for path in (ROOT / "scripts").glob("[!_]*.py"):
        with pytest.raises(SystemExit, match=r"run `pip install 'eqx_q\[train\]'`"):
            runpy.run_path(str(path), run_name="__main__")


def test_lanes_of_emulators_never_share_a_seed():
    options = {"suite": "gymnasium", "name": "CartPole-v1", "vectorization": "sync"}
    starts = []
    for seed in range(3):
        env = make_env({"seed": seed, "env": options}, 4)
        starts.extend(np.asarray(env.reset(jax.random.key(0))[1].obs))
        env.close()
    assert len(np.unique(starts, axis=0)) == 12
    roles = ("training", "evaluation", "video", "afterwards")
    seeds = np.sort([emulator_seed(seed, role) for seed in range(10) for role in roles])
    assert seeds.min() >= 0 and seeds.max() < 2**31 - 2**24
    assert np.diff(seeds).min() > 1024


def test_a_missing_extra_is_named(script, monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "envpool" else find_spec(name)
    )
    status, _, err = script("train", *SMALL, "env=atari")
    assert status == 1
    assert "run `pip install 'eqx_q[atari]'`" in err


class Spoiled(gymnasium.Env):
    """From some step of the process on rewards are so large that their squares are infinite."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    steps_left = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        Spoiled.steps_left -= 1
        reward = 1.0 if Spoiled.steps_left > 0 else 1e30
        return np.zeros(2, np.float32), reward, Spoiled.steps_left % 7 == 0, False, {}


def test_a_diverged_run_names_its_last_good_checkpoint(script, tmp_path, monkeypatch):
    gymnasium.register("Spoiled-v0", entry_point=Spoiled)
    options = [*SMALL, *QUIET, "env=gymnasium", "env.name=Spoiled-v0", "env.vectorization=sync"]
    options += ["total_steps=2048", "log_every=1", "checkpoint.every=256", "hydra.run.dir=run"]

    def failure(*arguments):
        status, _, err = script("train", *arguments)
        assert status == 1
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "the loss is not finite" in line
        return line

    try:
        monkeypatch.setattr(Spoiled, "steps_left", 600)
        line = failure(*options)
        newest = max((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
        assert newest.stem == f"{512:012d}"
        assert f"the last good checkpoint is {newest}" in line
        leaves = jax.tree.leaves(load(newest).agent.network)
        assert all(np.isfinite(leaf).all() for leaf in leaves if hasattr(leaf, "dtype"))
        # Also where a resumed run fails before it could write one of its own; and it has no agent.
        assert f"the last good checkpoint is {newest}" in failure("resume=run")
        status, _, err = script("evaluate", "run=run")
        assert status == 1 and "finish it with `python scripts/train.py resume=run`" in err
    finally:
        del gymnasium.registry["Spoiled-v0"]


def test_what_an_environment_in_python_says_is_one_line(script, tmp_path):
    options = ["agent=pqn_vdn", "env=pettingzoo", "tuned=none", "total_steps=512", "log_every=1"]
    options += ["env.team_reward=shared", "+env.observe=[0, 2]", "hydra.run.dir=run"]

    def check(status, out, err):
        assert status == 1
        assert err.startswith("error: team_reward=shared, but agents got rewards ")
        assert err.count("\n") == 1 and "Traceback" not in out

    check(*script("train", *SMALL, *QUIET, *options))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    with closing(make_env(config, 1)) as env:
        save(tmp_path / "run" / "agent.eqx", make_agent(config, env))
    check(*script("evaluate", "run=run", "episodes=2"))


def test_an_environment_of_ones_own_is_trained_in_by_name(script, tmp_path, monkeypatch):
    (tmp_path / "my_games.py").write_text(
        "import gymnasium, eqx_q\n"
        "def cart(limit=9): return gymnasium.make('CartPole-v1', max_episode_steps=limit)\n"
        "eqx_q.register('mine/Cart', cart)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(custom, "_registered", {})
    options = ["env=custom", "env.name=mine/Cart", "+env.limit=7", "total_steps=128"]
    status, _, err = script("train", *SMALL, *QUIET, *options)
    assert status == 1 and "unknown environment of your own 'mine/Cart': known are none" in err
    options += ["env.import=my_games", "hydra.run.dir=run"]
    assert script("train", *SMALL, *QUIET, *options)[0] == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["episode_length"] == 7
    del sys.modules["my_games"]
    custom._registered.clear()
    status, _, err = script("evaluate", "run=run", "episodes=2")
    assert status == 1 and "(in scripts: +imports=[my_games])" in err
    assert script("evaluate", "run=run", "episodes=2", "+imports=[my_games]")[0] == 0
    del sys.modules["my_games"]


def test_the_versions_of_all_suites_are_told():
    assert {suite.package for suite in SUITES.values()} <= set(provenance()["versions"])


def test_help_names_every_choice(script):
    status, out, _ = script("train", "--help")
    assert status == 0
    for group in ("agent", "env", "tuned", "tracker", "protocol", "experiment"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert path.stem in out
