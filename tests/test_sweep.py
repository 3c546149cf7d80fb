"""Sweeps: skipped, continued, started by launchers, and summarized."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import jax
import numpy as np
import pytest
import submitit
from hydra.errors import MissingConfigException
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from omegaconf import OmegaConf
from PIL import Image

from eqx_q.run import summarize_sweep
from eqx_q.run.statistics import human_normalised, interval, iqm
from eqx_q.saving.checkpoint import checkpoints, load

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "tracker=jsonl",
    "tuned=none",
    "num_envs=4",
    "agent.rollout_length=8",
    "agent.num_minibatches=4",
    "agent.num_epochs=1",
    "agent.network_options.hidden_sizes=[8]",
    "eval.every=0",
    "video.every=0",
    "total_steps=640",
    "log_every=4",
    "checkpoint.every=128",
    "hydra.sweep.dir=sweep",
]


def test_joblib_runs_them_side_by_side_and_the_same_command_goes_on(script, tmp_path):
    command = ["-m", *SMALL, "agent.discount=5,0.9,0.5"]
    side_by_side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *command, *side_by_side],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert "error: run 0: discount=5" in run.stderr and "Traceback" not in run.stderr
    assert run.stderr.endswith(
        "error: some runs of the sweep failed: see the messages above (for submitit jobs, those in "
        ".submitit/ of the sweep's directory)\n"
    ), run.stderr
    runs = [tmp_path / "sweep" / str(i) for i in (1, 2)]
    whole = [load(run / "agent.eqx") for run in runs]
    assert [agent.discount for agent in whole] == [np.float32(0.9), 0.5]

    # One was killed before its first checkpoint, the other after it.
    for run in runs:
        (run / "summary.json").unlink()
        (run / "agent.eqx").unlink()
    shutil.rmtree(runs[0] / "checkpoints")
    checkpoints(runs[1] / "checkpoints")[0].unlink()
    begun = int(checkpoints(runs[1] / "checkpoints")[0].stem)
    assert 0 < begun < 640
    status, out, err = script("train", *command)
    assert status == 1 and err.count("error: ") == 2 and "error: run 0: discount=5" in err
    assert "already done: " not in out
    for run, before in zip(runs, whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, load(run / "agent.eqx"), before)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["env_steps"] for line in lines]
        assert steps == sorted(set(steps)) and steps[-1] == 640
    # What was cut was not trained again from its start.
    summary = json.loads((runs[1] / "summary.json").read_text())
    trained = summary["steps_per_second"] * summary["train_seconds"]
    assert trained == pytest.approx(640 - begun)

    # Now both are done, one of them as the message to somebody who stops it says.
    (runs[1] / "agent.eqx").unlink()
    status, _, err = script("train", f"resume={runs[1]}")
    assert status == 0, err
    stored = OmegaConf.load(runs[0] / "config.yaml")
    del stored["deterministic"], stored["eval"]["min_steps"]  # it was begun in an earlier version
    OmegaConf.save(stored, runs[0] / "config.yaml")
    times = [(run / "agent.eqx").stat().st_mtime_ns for run in runs]
    _, out, _ = script("train", *command)
    assert all(f"already done: {run}\n" in out for run in runs)
    assert [(run / "agent.eqx").stat().st_mtime_ns for run in runs] == times

    other = ["hydra.sweep.subdir=1", "agent.discount=0.9", "agent.lambda_=0.5"]
    status, _, err = script("train", *command[:-1], *other)
    assert status == 1
    assert f"'{runs[0]}' holds a run with agent.lambda_=0.65, not 0.5: choose" in err


def test_without_a_launcher_the_extra_is_named(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    app = importlib.import_module("_app")
    for name, package in {"joblib": "joblib", "submitit_slurm": "submitit"}.items():
        error = MissingConfigException("", f"hydra/launcher/{name}", ["basic"])
        told = app._explain(error)
        assert f"'hydra-{package}-launcher'" in told and "eqx_q[sweep]" in told
    error = MissingConfigException("", "hydra/launcher/jobli", ["basic", "joblib"])
    assert app._explain(error) == "unknown hydra/launcher 'jobli': the nearest are joblib"


def test_where_there_is_no_slurm_it_says_so(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, err = script("train", "-m", *SMALL, "hydra/launcher=slurm")
    assert status == 1 and err.count("\n") == 1, err
    assert err.startswith("error: ") and '"srun"' in err


def test_submitit_runs_here_what_slurm_would_get(script, tmp_path, monkeypatch):
    launchers = {}
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name in ("slurm", "slurm_local"):
            choice = [f"hydra/launcher={name}", "hydra.launcher.mem_gb=7"]
            config = hydra.compose("config", choice, return_hydra_config=True).hydra.launcher
            OmegaConf.set_struct(config, False)
            for key in ("_target_", "submitit_folder", "name"):
                config.pop(key)
            launchers[name] = OmegaConf.to_container(config)
    shared = set(OmegaConf.structured(BaseQueueConf)) - {"submitit_folder", "name"}
    assert {key: launchers["slurm"][key] for key in shared} == launchers["slurm_local"]

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for program in ("srun", "sbatch"):
        (tmp_path / program).touch(0o755)
    timeouts = launchers["slurm"].pop("max_num_timeout")
    executor = submitit.AutoExecutor(tmp_path, cluster="slurm", slurm_max_num_timeout=timeouts)
    executor.update_parameters(
        **{k if k in shared else f"slurm_{k}": v for k, v in launchers["slurm"].items()}
    )
    text = executor._executor._make_submission_file_text("python", "1")
    for line in ("time=1440", "cpus-per-task=8", "gpus-per-node=1", "mem=7GB", "nodes=1"):
        assert f"#SBATCH --{line}\n" in text
    assert executor._executor.max_num_timeout == 100

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    status, _, err = script("train", "-m", *SMALL, "hydra/launcher=slurm_local", "seed=3")
    assert status == 0, err
    summary = json.loads((tmp_path / "sweep" / "0" / "summary.json").read_text())
    assert summary["status"] == "done" and summary["seed"] == 3


def made_up(directory, name, seed, returns, suite="envpool", status="done", **agent):
    directory.mkdir(parents=True)
    (directory / "agent.eqx").touch()
    summary = {"status": status, "eval_return_per_seed": returns}
    (directory / "summary.json").write_text(json.dumps(summary))
    rows = [{"env_steps": t, "eval/return": [r and t * r for r in returns]} for t in (1, 2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)
    config = {"env": {"suite": suite, "name": name}, "seed": seed, "agent": agent}
    return config, directory


def test_a_summary_of_games_seeds_and_settings(tmp_path):
    rng = np.random.default_rng(0)
    values = {
        ("Pong-v5", 0.5): rng.uniform(-21, 21, 5),
        ("Breakout-v5", 0.5): rng.uniform(0, 400, 5),
        ("Boxing-v5", 0.5): rng.uniform(0, 900, 5),
        ("Pong-v5", 0.9): rng.uniform(-21, 21, 5),
        ("Breakout-v5", 0.9): rng.uniform(0, 400, 5),
    }
    runs = [
        made_up(tmp_path / f"{name}{lambda_}{seed}", name, seed, list(part), lambda_=lambda_)
        for (name, lambda_), returns in values.items()
        for seed, part in ((3, returns[:2]), (5, returns[2:]))  # two seeds in a run, and three
    ]
    runs.append(made_up(tmp_path / "own", "Mine-v0", 0, [1.0], suite="gymnasium", lambda_=0.5))
    runs.append(made_up(tmp_path / "cut", "Pong-v5", 9, [0.0], status="stopped", lambda_=0.5))
    runs.append(made_up(tmp_path / "blind", "Pong-v5", 8, [None], lambda_=0.5))
    for i, (config, _) in enumerate(runs):
        config["num_seeds"] = i  # is no setting
    told = summarize_sweep(runs, tmp_path / "out")

    rows = {(row["env"], row["setting"]): row for row in told["environments"]}
    assert len(rows) == 6
    for (name, lambda_), returns in values.items():
        row = rows["envpool/" + name, f"agent.lambda_={lambda_}"]
        assert (row["seeds"], row["members"]) == ([3, 3, 5, 5, 5], [0, 1, 0, 1, 2])
        assert row["returns"] == returns.tolist()
        assert row["mean"] == pytest.approx(returns.mean())
        assert row["iqm"] == pytest.approx(np.sort(returns)[1:4].mean())
        assert row["interval"] == interval(returns[:, None])
    assert rows["gymnasium/Mine-v0", "agent.lambda_=0.5"]["normalised"] is None
    pong = (values["Pong-v5", 0.5] + 20.7) / (14.6 + 20.7)
    breakout = (values["Breakout-v5", 0.5] - 1.7) / (30.5 - 1.7)
    boxing = (values["Boxing-v5", 0.5] - 0.1) / (12.1 - 0.1)
    row = rows["envpool/Pong-v5", "agent.lambda_=0.5"]
    assert row["normalised"] == pytest.approx(pong.mean())
    overall, _ = told["overall"]
    assert overall["setting"] == "agent.lambda_=0.5" and overall["games"] == 3
    games = np.stack([boxing, breakout, pong], axis=1)
    assert overall["median"] == pytest.approx(np.median(games.mean(0)))
    assert overall["mean"] == pytest.approx(games.mean())
    assert overall["iqm"] == pytest.approx(iqm(games))
    assert overall["interval"] == pytest.approx(interval(games))
    assert told["left_out"] == [str(tmp_path / "cut"), str(tmp_path / "blind")]

    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"] == 13
    with (tmp_path / "out" / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 26
    found = {(r["environment"], r["seed"], r["member"]) for r in lines}
    assert found >= {("envpool/Pong-v5", "5", "2")}
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert f"over 3 games at agent.lambda_=0.5: median **{overall['median']:.3f}**" in text
    assert "`eval_return` of 11 finished runs." in text
    assert f"without eval_return: {tmp_path / 'cut'}, {tmp_path / 'blind'}." in text
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_a_sweep_over_minatar_has_a_place_of_its_own(script, tmp_path):
    quick = [word for word in SMALL if not word.startswith("hydra.")]
    games = "env.name=Asterix-MinAtar,Breakout-MinAtar"
    status, _, err = script("train", "experiment=minatar", games, *quick)
    assert status == 0, err
    for game in ("Asterix", "Breakout"):
        run = tmp_path / "runs" / "pqn_minatar" / f"{game}-MinAtar_0"
        assert json.loads((run / "summary.json").read_text())["env_steps"] == 640


def test_human_normalised_scores_of_57_games():
    np.testing.assert_allclose(human_normalised("Pong", np.array([-20.7, 14.6])), [0, 1])
    assert human_normalised("Adventure", np.zeros(1)) is None
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("config", ["experiment=atari57"], return_hydra_config=True)
    assert config.hydra.sweep.dir == "runs/pqn_atari57"
    games = [game.strip() for game in config.hydra.sweeper.params["env.name"].split(",")]
    assert len(set(games)) == 57 and config.env.suite == "envpool"
    for game in games:
        assert human_normalised(game.removesuffix("-v5"), np.zeros(1)) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no sweep to summarize: give sweep=DIR"),
        (["sweep=nowhere"], "there are no runs below 'nowhere'"),
        (["sweep=."], "none of the 1 runs is finished and has eval_return"),
        (["sweep=.", "metric=return"], "unknown metric 'return': the nearest are"),
    ],
)
def test_bad_input_of_a_summary(script, tmp_path, arguments, message):
    config, run = made_up(tmp_path / "run", "Pong-v5", 0, [1.0], status="stopped")
    OmegaConf.save(config, run / "config.yaml")
    status, _, err = script("summarize", *arguments)
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
