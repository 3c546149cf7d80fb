"""The benchmark of search: what it times and compares, and its continuation."""

import json
import sys
from pathlib import Path

import pytest
import report
import search

PROVENANCE = {
    "command": "python benchmarks/search.py",
    "commit": "abc",
    "date": "today",
    "machine": {"cores": 2, "cpu": "a processor"},
    "versions": {"jax": "1"},
}
TRIALS = "trial,state,value,num_envs,agent.lambda_\n0,complete,5.0,8,0.5\n1,pruned,,16,0.25\n"
TASK = ["search", "env=cartpole", "halving.rungs=1", "~search.agent", "total_steps=640"]


@pytest.fixture
def scripts(monkeypatch):
    """What was run, by the directory; each "takes" two seconds and leaves its results."""
    ran = []

    def timed(words, note, told):
        ran.append(words)
        (where,) = (word for word in words if word.startswith(("hydra.run.dir=", "resume=")))
        directory = Path(where.partition("=")[2])
        directory.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(told))
        if "tune" in words[0]:
            (directory / "study.journal").touch()
            (directory / "trials.csv").write_text(TRIALS)
        stopped = len(ran) == 1 and "stop" in words
        summary = {"status": "stopped" if stopped else "done", "env_steps": 640}
        summary |= {"best": {"trial": 0, "value": 5.0}, "eval_return_per_seed": [1.0, 2.0]}
        (directory / "summary.json").write_text(json.dumps(summary))
        rows = [[None, None, None], [1.0, None, 4.0], [3.0, 2.0, 7.0]]
        rows = [{"env_steps": 10 * i, "episode_return": row} for i, row in enumerate(rows)]
        (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return 2.0

    monkeypatch.setattr(search, "_timed", timed)
    return ran


def benchmark(tmp_path, monkeypatch, *words):
    command = ["search.py", *words, "--runs", str(tmp_path / "runs"), "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out.json")])
    search.main()
    return json.loads((tmp_path / "out.json").read_text())


def test_the_same_trials_are_timed_alone(scripts, tmp_path, monkeypatch):
    result = benchmark(tmp_path, monkeypatch, *TASK)
    tune, first, second, found, shipped = scripts
    assert tune[:5] == ["scripts/tune.py", *TASK[1:]] and "trials=64" in tune
    for words, varied in ((first, ["8", "0.5"]), (second, ["16", "0.25"]), (found, ["8", "0.5"])):
        assert words[:3] == ["scripts/train.py", "env=cartpole", "total_steps=640"]
        assert {"num_envs=" + varied[0], "agent.lambda_=" + varied[1]} <= set(words)
        assert not {"halving.rungs=1", "~search.agent"} & set(words)
    for words in (found, shipped):
        assert {"seed=1000", "num_seeds=2"} <= set(words)
    assert not any("lambda_" in word for word in shipped)
    assert (result["search_seconds"], result["sequential_seconds"]) == (2.0, 4.0)
    assert result["speedup"] == 2.0 and result["trials"] == 2

    # A single one stands for the others; and nothing that is done is done again.
    result = benchmark(tmp_path, monkeypatch, *TASK, "--sequential", "1")
    assert result["sequential_seconds"] == 4.0 and len(scripts) == 5


def test_what_was_stopped_goes_on_and_its_seconds_add_up(scripts, tmp_path):
    directory = tmp_path / "search"
    with pytest.raises(SystemExit, match="stopped: run the same command to continue"):
        search.run("tune", directory, "stop")
    assert search.run("tune", directory, "stop")[0] == 4.0
    assert scripts[1][1:] == [f"resume={directory}", "tracker=jsonl"]
    assert search.run("tune", directory, "stop")[0] == 4.0 and len(scripts) == 2
    assert search.run("tune", directory, "other")[0] == 2.0  # another task begins anew
    assert f"hydra.run.dir={directory}" in scripts[2]


def test_populations_are_compared_at_equal_steps(scripts, tmp_path, monkeypatch):
    result = benchmark(tmp_path, monkeypatch, "pbt", "env=minatar", "total_steps=2_000_000")
    ours, theirs = (set(words) for words in scripts)
    assert {word.partition("=")[0] for word in ours ^ theirs} == {"pbt.every", "hydra.run.dir"}
    assert "log_every=24" in ours and f"pbt.every={24 * 32 * 128}" in ours  # 20 rounds
    assert result["pbt"]["env_steps"] == result["random"]["env_steps"]
    curve = {"steps": [10, 20], "best": [4.0, 7.0], "median": [2.5, 3.0]}
    assert curve.items() <= result["pbt"].items()


def test_a_script_is_timed_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "ROOT", tmp_path)
    (tmp_path / "well.py").write_text("import time; time.sleep(0.2)")
    (tmp_path / "ill.py").write_text("raise SystemExit(3)")
    note = tmp_path / "runs" / "note.json"
    assert 0.2 < search._timed(["well.py"], note, {"seconds": 0.0}) < 20
    with pytest.raises(SystemExit, match=r"ill.py failed"):
        search._timed(["ill.py"], note, {"seconds": 0.0})


def test_tables_and_the_picture(tmp_path):
    found = {"env": "X", "trials": 64, "total_steps": 500_000, "best": {"value": 41.25}}
    found |= {"greedy_return_found": [40.0, 42.0], "greedy_return_shipped": [30.0, 30.0]}
    found |= {"search_seconds": 600.0, "sequential_seconds": 1200.0, "speedup": 2.0}
    found |= {"sequential_trials_measured": 8}
    curve = {"steps": [1, 2], "best": [1.0, 9.0], "median": [0.5, 4.0], "env_steps": 2_000_000}
    of_pbt = {"env": "X", "population": 3}
    of_pbt["pbt"] = {**curve, "greedy_return_per_member": [1.0, 8.0, 3.0]}
    of_pbt["random"] = {**curve, "greedy_return_per_member": [1.0, 2.0, 0.0]}
    (tmp_path / "search_x.json").write_text(json.dumps(PROVENANCE | found))
    (tmp_path / "pbt_x.json").write_text(json.dumps(PROVENANCE | of_pbt))
    text = report.report(tmp_path, tmp_path / "README.md")
    assert "| X | 64 × 0.5 M steps | 41.2 | **41.0** [40.0, 42.0] | **30.0**" in text
    assert "| **+11.0** [+10.0, +12.0] | 10 min | 20 min (from 8) | **2.0×** |" in text
    assert "| X | population-based | 3 × 2 M | 8.0 | 3.0 | 9.0 | 4.0 |" in text
    assert "| X | random search | 3 × 2 M | 2.0 | 1.0 | 9.0 | 4.0 |" in text
    assert (
        "![pbt_x](results/pbt_x.png)" in text
        and (tmp_path / "results/pbt_x.png").stat().st_size > 1000
    )
