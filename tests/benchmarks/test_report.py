import csv
import json

import numpy as np
import pytest
import report

pytestmark = pytest.mark.quick


def test_iqm_is_the_mean_of_the_middle_half():
    scores = np.array([[100.0, 1, 2], [3, 4, -50], [5, 6, 7], [8, 0, 9]])
    assert report.iqm(scores) == np.mean(np.sort(scores.ravel())[3:9])


def test_intervals_are_those_of_a_bootstrap_by_hand():
    scores = np.random.default_rng(1).normal(size=(7, 1))
    rng = np.random.default_rng(2)
    means = []
    for _ in range(20_000):
        draw = np.sort([scores[rng.integers(7), 0] for _ in range(7)])
        means.append(draw[1:6].mean())  # a quarter of seven, rounded down, on either side
    np.testing.assert_allclose(
        report.interval(scores), np.percentile(means, [2.5, 97.5]), atol=0.05
    )


def test_the_bootstrap_is_stratified_by_task():
    # Seeds agree within every task: resampling within tasks changes nothing.
    scores = np.tile([0.0, 10.0, 20.0, 1000.0], (5, 1))
    np.testing.assert_allclose(report.interval(scores), [report.iqm(scores)] * 2)


def test_human_normalised_scores():
    returns = np.array([-20.7, 14.6, 20.0])
    np.testing.assert_allclose(report.human_normalised("Pong", returns), [0, 1, 40.7 / 35.3])
    with (report.ROOT / "eqx_q" / "run" / "atari_scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["game"] for row in rows}) == 57
    assert all(float(row["random"]) < float(row["human"]) for row in rows)


def _learning(name, seeds):
    provenance = {
        "command": "python benchmarks/learning.py s",
        "commit": "abc",
        "date": "today",
        "machine": {"cores": 2, "cpu": "a processor"},
        "versions": {"jax": "1"},
    }
    return {**provenance, "suite": "s", "environments": {name: {"seeds": seeds}}}


def _seed(value, **more):
    return {
        "env_steps": 2_000_000,
        "training_return": value,
        "greedy_return": value + 1,
        "training_curve": [[0, 0], [2e6, value]],
        "greedy_curve": [],
        **more,
    }


def test_what_counts_beside_the_return_has_a_column_where_there_is_any():
    result = _learning("jaxmarl/X", [_seed(1.0, won={"greedy": won}) for won in (0.8, 0.9, 1.0)])
    references = {"returns": {}}
    assert "besides" not in report.learning_table(result, references)
    result["environments"]["jaxmarl/X"]["score"] = "won"
    text = report.learning_table(result, references)
    assert "| greedy, besides |" in text and "| won: **0.90** [0.80, 1.00] |" in text


def test_runs_of_one_environment_are_compared_seed_by_seed():
    result = _learning("maze", [_seed(value) for value in (1.0, 50.0, 200.0)])
    result["environments"]["maze with more"] = {
        "seeds": [_seed(value) for value in (4.0, 53.0, 203.0)]
    }
    head, _, first, second = report.learning_table(result, {"returns": {}}).splitlines()
    column = head.split("|").index(" training, against the environment's first row, seed by seed ")
    assert first.split("|")[column].strip() == ""
    assert second.split("|")[column].strip() == "**+3.0** [+3.0, +3.0]"


def test_options_are_compared_over_environments():
    result = _learning("a/X", [_seed(value) for value in (1.0, 2.0, 3.0)])
    of = result["environments"]
    of["a/X head=dueling"] = {"seeds": [_seed(value) for value in (4.0, 4.0, 4.0)]}
    assert report.variants_table(result) is None  # one environment
    of["a/Y agent=team"] = {"seeds": [_seed(value) for value in (10.0, 10.0)]}
    of["a/Y agent=team head=dueling"] = {"seeds": [_seed(value) for value in (30.0, 30.0)]}
    _, _, first, second = report.variants_table(result).splitlines()
    assert first.endswith("| 1.00, 1.00 |") and first.startswith("| as it is | **")
    assert second == "| head=dueling | **2.50** [2.50, 2.50] | 2.00, 3.00 |"
    of["a/Y agent=team"]["seeds"] = [_seed(value) for value in (-10.0, -10.0)]
    assert report.variants_table(result) is None  # no scale


def test_the_report_replaces_itself_between_the_markers(tmp_path):
    seeds = [_seed(v, protocols={"sticky": v}) for v in (10.0, 11.0, 12.0)]
    result = _learning("envpool/Pong-v5", seeds)
    (tmp_path / "learning_s.json").write_text(json.dumps(result))
    text = report.report(tmp_path, tmp_path / "README.md")
    assert "| envpool/Pong-v5 | 2 M | **11.0** [10.0, 12.0] | **12.0** [11.0, 13.0] |" in text
    assert "11.0, 12.0, 13.0 | CleanRL: 20.49 / – |" in text
    normalised = (11 + 20.7) / 35.3
    assert (
        f"| Pong | whole games, sticky actions 0.25 | **11.0** [10.0, 12.0] | **{normalised:.2f}**"
        in text
    )
    assert "![learning_s](results/learning_s.png)" in text
    assert (tmp_path / "results" / "learning_s.png").stat().st_size > 1000

    page = tmp_path / "README.md"
    page.write_text(f"before\n{report._BEGIN}\nold\n{report._END}\nafter\n")
    for _ in range(2):
        report.insert(page, text)
        expected = f"before\n{report._BEGIN}\n{text}\n{report._END}\nafter\n"
        assert page.read_text() == expected


def test_one_seed_has_no_interval():
    table = report.learning_table(_learning("x/y", [_seed(3.0)]), {"returns": {}})
    assert "| x/y | 2 M | 3.00 | 4.00 | 4.00 |\n" in f"{table}\n"


def test_random_play_stands_beside_and_small_returns_have_two_digits():
    for seed, expected in (
        (3.0, "0.25 | 3.00 | 4.00 | 4.00 |"),
        (10.0, "0.2 | 10.0 | 11.0 | 11.0 |"),
    ):
        result = _learning("x/y", [_seed(seed)])
        result["environments"]["x/y"]["random_return"] = 0.25
        table = report.learning_table(result, {"returns": {}})
        assert f"| x/y | 2 M | {expected}\n" in f"{table}\n"


def test_results_are_told_with_the_commits_that_the_runs_were_of():
    result = _learning("x/y", [_seed(1.0, commit="old"), _seed(2.0)])
    assert "commit abc, old, today" in report._origin(result)


def test_memory_is_told_with_where_it_came_from(tmp_path):
    def run(steps, *through):
        return {"total_steps": steps, "peak_mb": max(through), "through_the_run_mb": list(through)}

    result = _learning("none", []) | {"short": run(10, 5.0), "long": run(1000, 7.0, 8.0, 6.0)}
    (tmp_path / "memory.json").write_text(json.dumps(result))
    text = report.report(tmp_path, tmp_path / "README.md")
    assert "At most 5 MB over 10 steps, and 8 MB over 1,000 steps;" in text
    assert "8 MB half way and 6 MB at its end. `python benchmarks/learning.py s`" in text


def test_the_overview_has_a_row_for_each_task_of_the_readme(tmp_path):
    read, references = report.read_all(report.RESULTS)
    table = report.overview_table(read, references)
    assert table in (report.ROOT / "README.md").read_text()
    speed = read["speed_minatar"]
    ours = f"{speed['contestants']['eqx_q']['steps_per_second']:,.0f}"
    row = next(line for line in table.splitlines() if "Breakout" in line)
    assert ours in row and f"**{speed['ratio']['median']:.1f}×**" in row
    report.draw_overview(read, references, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").stat().st_size > 10_000


def test_launches_of_a_program_with_and_without_a_peer():
    ours = {"update": 3000, "env_step": 10, "gradient_step": 30, "temporary_mb": 12.3}
    theirs = {"update": 6000, "env_step": 20, "gradient_step": 60, "temporary_mb": 24}
    alone = {"update": 80, "gradient_step": 79, "temporary_mb": 1500}
    table = report.launches_table(
        {"cases": {"a": {"eqx_q": ours, "purejaxql": theirs}, "b": {"eqx_q": alone}}}
    )
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert rows == [
        ["a", "3,000 / 6,000", "10 / 20", "30 / 60", "0.50", "12 / 24"],
        ["b", "80", "", "79", "", "1,500"],
    ]
