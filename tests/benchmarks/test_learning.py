import json
import sys

import learning
import numpy as np
import pytest
from record import compose


def _run(directory, rows, **summary):
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        (directory / "summary.json").write_text(json.dumps(summary))


def test_final_return_is_of_the_episodes_of_the_last_twentieth():
    steps = np.arange(1.0, 101.0)
    curve = np.stack([steps, steps, np.ones(100)], axis=1)
    curve[-1, 2] = 3  # three episodes of return 100 weigh thrice
    assert learning.final_return(curve) == (96 + 97 + 98 + 99 + 3 * 100) / 7
    assert learning.final_return(np.zeros((0, 3))) is None


def test_a_thinned_curve_keeps_the_mean_over_episodes():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 400)
    curve = np.stack([np.arange(400.0), rng.normal(size=400), counts], axis=1)
    thin = np.array(learning.thin_out(curve))
    assert thin.shape == (100, 2)
    assert thin[-1, 0] == 399
    expected = np.average(curve[4:8, 1], weights=curve[4:8, 2])
    np.testing.assert_allclose(thin[1, 1], expected, atol=1e-4)
    assert learning.thin_out(curve[:3])[2] == [2.0, round(curve[2, 1], 4)]
    assert learning.thin_out(curve[:0]) == []


def test_random_play_is_measured_once_for_an_environment(tmp_path):
    path = tmp_path / "CartPole" / "random.json"
    config = compose(["env=cartpole"])
    assert 15 < learning.random_return(config, path) < 30  # a trained one's is 500
    path.write_text(json.dumps({"env": config["env"], "return": 1.5}))
    assert learning.random_return(config, path) == 1.5
    path.write_text(json.dumps({"env": {"name": "another"}, "return": 1.5}))
    assert 15 < learning.random_return(config, path) < 30


def test_collect_takes_every_member_and_its_evaluations(tmp_path):
    rows = [
        {"env_steps": 10, "episode_return": [None, 2.0], "episodes": [0, 1]},
        {"env_steps": 20, "episode_return": [3.0, 4.0], "episodes": [1, 1], "eval/return": [7, 8]},
    ]
    _run(tmp_path / "run", rows, status="done", seed=5, eval_return_per_seed=[9.0, 10.0])
    (tmp_path / "run" / "evaluation_sticky.json").write_text('{"return_per_seed": [1.5, 2.5]}')
    first, second = learning.collect(tmp_path / "run")
    assert first["seed"] == second["seed"] == 5
    assert (first["member"], second["member"]) == (0, 1)
    assert first["training_curve"] == [[20.0, 3.0]]  # no episode ended before
    assert second["training_curve"] == [[10.0, 2.0], [20.0, 4.0]]
    assert second["greedy_curve"] == [[20.0, 8.0]]
    assert (first["greedy_return"], second["greedy_return"]) == (9.0, 10.0)
    assert second["protocols"] == {"sticky": 2.5}


def test_collect_takes_what_counts_beside_the_return(tmp_path):
    row = {"env_steps": 10, "episode_return": 2.0, "episodes": 4, "eval/return": 3.0}
    rows = [row | {"episode_won": 0.25, "eval/won": 0.5}, row | {"env_steps": 20}]
    rows[1] |= {"episode_won": 0.75, "eval/won": 1.0}
    _run(tmp_path / "run", rows, status="done", seed=0, eval_return_per_seed=[3.0])
    (only,) = learning.collect(tmp_path / "run", "won")
    assert only["won"] == {
        "training": 0.75,
        "greedy": 1.0,
        "training_curve": [[10.0, 0.25], [20.0, 0.75]],
        "greedy_curve": [[10.0, 0.5], [20.0, 1.0]],
    }


def test_collect_takes_runs_that_are_not_finished(tmp_path):
    _run(tmp_path / "run", [{"env_steps": 10, "episode_return": 2.0, "episodes": 1}])
    (only,) = learning.collect(tmp_path / "run")
    assert only["training_return"] == 2.0
    assert only["greedy_return"] is None


def test_runs_start_go_on_and_are_skipped(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(learning, "script", lambda *arguments: calls.append(arguments))
    new, begun, done = tmp_path / "new", tmp_path / "begun", tmp_path / "done"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "checkpoints" / "1.eqx").touch()
    _run(done, [], status="done")
    for directory in (new, begun, done):
        learning.run(directory, ["env=cartpole"])
    assert calls[0][:2] == ("train", "env=cartpole") and f"hydra.run.dir={new}" in calls[0]
    assert calls[1:] == [("train", f"resume={begun}")]


def test_a_run_of_another_configuration_is_not_taken_for_this_one(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(learning, "script", lambda *arguments: calls.append(arguments))
    directory = tmp_path / "run"
    _run(directory, [], status="done")
    config = learning.compose(["env=minatar"])
    del config["agent"]["network_options"]["memory"]  # an option newer than the run
    (directory / "config.yaml").write_text(json.dumps(config))  # which YAML can read
    learning.run(directory, ["env=minatar"])
    for other in ("agent.lambda_=0.5", "agent.network_options.input_scale=1", "total_steps=8"):
        with pytest.raises(SystemExit, match="holds a run with"):
            learning.run(directory, ["env=minatar", other])
    assert calls == []


def test_names_tell_tasks_of_one_environment_apart():
    for suite in learning.SUITES.values():
        names = [learning.task_name(suite, task, learning.compose(task)) for task in suite.tasks]
        assert len(set(names)) == len(names)
    minatar, memory = learning.SUITES["minatar"], learning.SUITES["memory"]
    config = {"env": {"suite": "gymnax", "name": "X"}}
    assert learning.task_name(minatar, minatar.tasks[0], config) == "gymnax/X"
    hidden = "gymnax/X agent=pqn_rnn +env.observe=[0,2]"
    assert learning.task_name(memory, memory.tasks[4], config) == hidden


def test_results_of_environments_that_are_not_trained_stay(tmp_path, monkeypatch):
    out, runs = tmp_path / "out.json", tmp_path / "runs"
    arguments = ["classic", "--collect", "--runs", str(runs), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["learning.py", *arguments])
    monkeypatch.setattr(learning, "random_return", lambda config, path: 0.0)
    row = {"env_steps": 10, "episode_return": -80.0, "episodes": 4}
    _run(runs / "gymnax" / "Acrobot-v1" / "seed_0", [row], status="done")
    stays = {"seeds": [], "total_steps": 7}
    out.write_text(json.dumps({"environments": {"gymnax/CartPole-v1": stays, "gone": stays}}))
    learning.main()
    found = json.loads(out.read_text())["environments"]
    assert list(found) == ["gymnax/CartPole-v1", "gymnax/Acrobot-v1"]
    assert found["gymnax/CartPole-v1"] == stays
    assert found["gymnax/Acrobot-v1"]["seeds"][0]["training_return"] == -80.0
