"""Comparisons of offline learning report what their runs logged."""

import json

import numpy as np
import offline
import pytest
import report

from eqx_q.data import Description, Rows, Writer


def _learner(final, best):
    return {"final": final, "best": best}


def test_the_table_tells_the_end_the_best_and_by_how_much_cql_leads():
    learners = {
        "bc": _learner([1.0, 2.0, 3.0], [3.0, 3.0, 3.0]),
        "dqn": _learner([0.0, 0.0, 0.0], [5.0, 6.0, 7.0]),
        "cql": _learner([8.0, 8.0, 8.0], [9.0, 9.0, 9.0]),
    }
    data = {"transitions": 50_000, "return_mean": 4.25}
    games = {"Chess": {"teacher": 10.0, "data": {"narrow": {"data": data, "learners": learners}}}}
    (row,) = report.offline_table({"games": games}).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["Chess", "narrow", "50 k", "10.0", "4.2"]
    assert cells[5].startswith("**2.0** [1.") and cells[5].endswith("(3.0)")
    assert cells[6].endswith("(6.0)") and cells[7].endswith("(9.0)")
    assert cells[8] == "**+8.0** [+8.0, +8.0]"


def test_speeds_are_told_with_their_ratio_pair_by_pair():
    ours = {"updates_per_second": 80.0, "batches_per_second": 3000.0}
    theirs = {"updates_per_second": 8.0, "batches_per_second": 30.0}
    costs = {"compile_seconds": 1.0, "peak_memory_mb": 100.0}
    result = {
        "case": "offline_cql",
        "contestants": {"eqx_q": ours | costs, "slimcql": theirs | costs},
        "ratio": {"updates_per_second": [9.0, 10.0, 12.0], "batches_per_second": [100.0]},
    }
    first, second = report.offline_speed_table([result]).splitlines()[2:]
    assert "| 80.0 **10.0×** (9.0–12.0) | 3,000.0 **100.0×** (100.0–100.0) |" in first
    assert "| slimcql | 8.0 | 30.0 |" in second


def test_what_a_data_set_is_of_counts_whole_episodes_alone(tmp_path, monkeypatch):
    """Wherever those that were cut stand."""
    source = {"runs": ["/a"], "steps": 7, "epsilons": [0.1]}
    with Writer(tmp_path / "data", Description("x/y", *_spaces(), source=source)) as writer:
        for name, episodes in {"a": ([100], [1, 2], [4]), "b": ([9],), "c": ([100],)}.items():
            for rewards in episodes:
                obs = np.zeros((len(rewards) + 1, 2), np.float32)
                steps = obs, np.zeros(len(rewards), int), np.array(rewards)
                writer.append(Rows.of_episode(*steps, terminated=rewards[0] != 100))
            returns = [sum(rewards) for rewards in episodes if rewards[0] != 100]
            mean = float(np.mean(returns)) if returns else None
            writer.commit(name, source={"episodes": len(returns), "return_mean": mean})
        writer.finish()
    monkeypatch.setattr(offline, "script", None)  # nothing is recorded anew
    told = offline.record(tmp_path / "data", ["run=/a", "steps=7", "epsilon=0.1"])
    assert told == {"transitions": 6, "episodes": 5, "return_mean": 16 / 3}
    for other in ("run=/b", "steps=8", "epsilon=[0.1,1.0]"):
        with pytest.raises(SystemExit, match="move it away"):
            offline.record(tmp_path / "data", [other])


def _spaces():
    import gymnasium

    return gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(2)


def test_results_are_read_per_seed(tmp_path):
    summary = {"num_updates": 20, "updates_per_second": 5.0, "commit": "abc"}
    summary |= {"eval_return_per_seed": [1.0, 2.0], "best_eval_return_per_seed": [3.0, 2.0]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"num_updates": 10, "loss": [0.1, 0.2], "eval/return": [3.0, 1.0]},
        {"num_updates": 15, "loss": [0.1, 0.2]},
        {"num_updates": 20, "loss": [0.1, 0.2], "eval/return": [1.0, 2.0]},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = offline.results_of(tmp_path)
    assert told["final"] == [1.0, 2.0] and told["best"] == [3.0, 2.0]
    assert told["curve"] == [[10, 3.0, 1.0], [20, 1.0, 2.0]]


@pytest.mark.parametrize("learner", offline.LEARNERS)
def test_every_learner_is_configured(learner):
    from record import compose

    for name, batch_size in {"minatar": 128, "pong": 32}.items():
        suite = offline.SUITES[name]
        for env in suite.games.values():
            config = compose([f"agent={learner}", *env, "data=x", *suite.learners])
            assert config["num_updates"] < 50_000 and config["agent"]["batch_size"] == batch_size
