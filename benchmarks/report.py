"""Draws curves and writes tables from the JSON in benchmarks/results.

  python benchmarks/report.py                      # docs/results.md, and the README's overview
  python benchmarks/report.py --into report.md     # into another file

Tables give the interquartile mean over seeds with 95 % intervals from a stratified bootstrap
(Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice", arXiv 2108.13264:
rliable's method), each seed's return, and the peers' values from references.json. Atari scores are
also human-normalised, with the no-op scores of `eqx_q.run.statistics`.
"""

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from record import RESULTS, ROOT

from eqx_q.run.statistics import human_normalised, interval, iqm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_BEGIN, _END = "<!-- results:begin -->", "<!-- results:end -->"
# What the README shows: an environment of a suite of learning runs, and the case that timed it.
_OVERVIEW = (
    ("PQN", "CartPole", "classic", "gymnax/CartPole-v1", "cartpole"),
    ("PQN", "MinAtar Breakout", "minatar", "gymnax/Breakout-MinAtar", "minatar"),
    ("PQN", "MinAtar Asterix", "minatar", "gymnax/Asterix-MinAtar", None),
    ("PQN", "MinAtar SpaceInvaders", "minatar", "gymnax/SpaceInvaders-MinAtar", None),
    ("PQN", "Atari Pong", "atari-pong", "envpool/Pong-v5", "atari"),
    ("PQN", "MiniGrid DoorKey 5x5", "minigrid", "envpool/MiniGrid-DoorKey-5x5-v0", None),
    (
        "PQN-RNN",
        "MemoryChain",
        "memory",
        "gymnax/MemoryChain-bsuite agent=pqn_rnn",
        "rnn_memory_chain",
    ),
    (
        "PQN-VDN",
        "SMAX 2s3z",
        "qmix",
        "jaxmarl/HeuristicEnemySMAX agent=pqn_vdn tuned=smax_small agent.mixer=vdn",
        "vdn_smax",
    ),
)
_PARTS = ("environment", "acting", "learning")
_PROTOCOLS = {
    "life_loss": "a lost life ends an episode, no sticky actions",
    "sticky": "whole games, sticky actions 0.25",
}


def estimate(scores: np.ndarray, digits: int = 1) -> str:
    """Interquartile mean and interval of `[seeds, tasks]` as text."""
    if not scores.size:
        return "–"
    if len(scores) == 1:
        return f"{iqm(scores):,.{digits}f}"
    low, high = interval(scores)
    return f"**{iqm(scores):,.{digits}f}** [{low:,.{digits}f}, {high:,.{digits}f}]"


def _column(seeds: list[dict[str, Any]], name: str) -> np.ndarray:
    """`[seeds, 1]`: the value of the seeds that have it."""
    values = [seed[name] for seed in seeds if seed.get(name) is not None]
    return np.array(values, float).reshape(-1, 1)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table without empty columns."""
    filled = [any(column) for column in zip(*rows, strict=True)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(itertools.compress(line, filled))} |" for line in lines)


def _origin(result: dict[str, Any]) -> str:
    machine = result["machine"]
    runs = [seed for part in result.get("environments", {}).values() for seed in part["seeds"]]
    for game in result.get("games", {}).values():
        runs += [run for data in game.get("data", {}).values() for run in data["learners"].values()]
    commits = sorted({run.get("commit") or result["commit"] for run in runs}) or [result["commit"]]
    return (
        f"`{result['command']}`, commit {', '.join(commits)}, {result['date']}, {machine['cores']} "
        f"cores of {machine['cpu']}, jax {result['versions'].get('jax')}."
    )


def _references(references: dict[str, Any], name: str) -> str:
    def value(reference, kind):
        return f"{reference[kind]:g}" if kind in reference else "–"

    return "; ".join(
        f"{reference['who']}: {value(reference, 'training')} / {value(reference, 'greedy')}"
        for reference in references["returns"].get(name, [])
    )


def overview_table(read: dict[str, Any], references: dict[str, Any]) -> str:
    """A row for each task of the README: how well it is learnt, and how fast."""
    rows = []
    for agent, task, suite, name, case in _OVERVIEW:
        seeds = read[f"learning_{suite}"]["environments"][name]["seeds"]
        greedy = _column(seeds, "greedy_return")
        peers = [
            f"{reference['greedy']:g} ({reference['who'].split(',')[0]})"
            for reference in references["returns"].get(name, [])
            if "greedy" in reference
        ]
        timed = case and read[f"speed_{case}"]
        speed = f"{timed['contestants']['eqx_q']['steps_per_second']:,.0f}" if timed else ""
        ratio = f"**{timed['ratio']['median']:.1f}×**" if timed else ""
        steps = _steps(min(seed["env_steps"] for seed in seeds), 0)
        best = estimate(greedy, 1 if np.abs(greedy).max() >= 10 else 2)
        rows.append([agent, task, steps, best, str(len(seeds)), "; ".join(peers), speed, ratio])
    head = ["agent", "task", "steps", "greedy return", "seeds", "others", "steps/s"]
    return _table([*head, "against purejaxql"], rows)


def draw_overview(read: dict[str, Any], references: dict[str, Any], path: Path) -> None:
    """The README's picture: speeds against the scripts of others, and returns on MinAtar."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.7), layout="constrained")
    bars = [
        (name.removeprefix("speed_").replace("_", " "), result["ratio"]["median"])
        for name, result in read.items()
        if name.startswith("speed_") and result.get("ratio")
    ]
    bars = sorted(bars, key=lambda bar: bar[1])
    drawn = axes[0].barh([name for name, _ in bars], [ratio for _, ratio in bars], color="tab:blue")
    axes[0].bar_label(drawn, fmt="%.1f×", fontsize=7, padding=2)
    axes[0].axvline(1, color="black", linewidth=0.8)
    axes[0].margins(x=0.15)
    axes[0].set_title("times as fast, two CPU cores", fontsize=9)
    for axis, game in zip(axes[1:], ("Breakout", "Asterix", "SpaceInvaders"), strict=True):
        name = f"gymnax/{game}-MinAtar"
        seeds = read["learning_minatar"]["environments"][name]["seeds"]
        for kind, color in (("training", "tab:blue"), ("greedy", "tab:orange")):
            curves = [np.array(seed[f"{kind}_curve"]).T for seed in seeds]
            steps = max(curves, key=lambda curve: curve.shape[1])[0]
            values = np.array([np.interp(steps, *curve) for curve in curves])
            axis.fill_between(
                steps / 1e6, values.min(0), values.max(0), color=color, alpha=0.25, linewidth=0
            )
            axis.plot(steps / 1e6, values.mean(0), color=color, label=kind)
        for reference in references["returns"].get(name, []):
            if "greedy" in reference and "purejaxql" in reference["who"]:
                axis.axhline(
                    reference["greedy"], color="black", linestyle="--", linewidth=0.8,
                    label="purejaxql, greedy",
                )  # fmt: skip
        axis.set_title(f"MinAtar {game}, {len(seeds)} seeds", fontsize=9)
        axis.set_xlabel("million steps", fontsize=8)
    axes[1].set_ylabel("return", fontsize=8)
    axes[1].legend(fontsize=7)
    for axis in axes:
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def learning_table(result: dict[str, Any], references: dict[str, Any]) -> str:
    rows, first = [], {}
    for name, environment in result["environments"].items():
        seeds = environment["seeds"]
        if not seeds:
            continue
        baseline = first.setdefault(name.split()[0], seeds)
        steps = min(seed["env_steps"] for seed in seeds)
        greedy = _column(seeds, "greedy_return")
        score = environment.get("score")
        scores = _column([seed[score] for seed in seeds], "greedy") if score else np.zeros((0, 1))
        trained, compared = (_column(x, "training_return") for x in (seeds, baseline))
        at_random = environment.get("random_return")
        digits = 1 if np.abs(np.concatenate([trained, greedy])).max(initial=0) >= 10 else 2
        rows.append(
            [
                name,
                _steps(steps, environment.get("total_steps", steps)),
                "" if at_random is None else f"{at_random:,.{digits}f}",
                estimate(trained, digits),
                estimate(greedy, digits),
                ", ".join(f"{value:.{digits}f}" for value in greedy[:, 0]),
                f"{score}: {estimate(scores, digits=2)}" if score else "",
                _on_the_way(environment, digits),
                "" if baseline is seeds else _paired(trained, compared, digits),
                _references(references, name),
            ]
        )
    head = ["environment", "steps", "at random", "training", "greedy", "greedy, each seed"]
    head += [
        "greedy, besides",
        "greedy, on the way",
        "training, against the environment's first row, seed by seed",
    ]
    return _table([*head, "peers, training / greedy"], rows)


def _on_the_way(environment: dict[str, Any], digits: int) -> str:
    """Greedy returns of each seed at the steps at which peers publish theirs, if within the run."""
    at = environment.get("also_at") or 0
    if not 0 < at < environment["total_steps"]:
        return ""
    curves = [np.array(seed["greedy_curve"]) for seed in environment["seeds"]]
    nearest = [curve[np.argmin(np.abs(curve[:, 0] - at)), 1] for curve in curves]
    return f"at {at / 1e6:g} M: {', '.join(f'{value:,.{digits}f}' for value in nearest)}"


def variants_table(result: dict[str, Any]) -> str | None:
    """What options give over several environments: scores relative to an environment's first row.

    `None` unless several environments were trained with the same options, with several seeds each
    and positive scores.
    """
    variants: dict[str, list[np.ndarray]] = {}
    for _, rows in itertools.groupby(
        ((*name.split(" "), x["seeds"]) for name, x in result["environments"].items()),
        key=lambda row: row[0],
    ):
        rows = list(rows)
        shared = set.intersection(*(set(options) for _, *options, _ in rows))
        scores = [_column(seeds, "training_return")[:, 0] for *_, seeds in rows]
        for (_, *options, _), of_row in zip(rows, scores, strict=True):
            name = " ".join(option for option in options if option not in shared)
            variants.setdefault(name, []).append(of_row / scores[0].mean())
        if len(rows) == 1 or min(map(len, scores)) == 1 or scores[0].mean() <= 0:
            return None
    numbers = {len(scores) for scores in variants.values()}
    if len(numbers) > 1 or numbers <= {0, 1}:
        return None
    table = []
    for name, scores in variants.items():
        fewest = min(map(len, scores))
        together = np.stack([of_one[:fewest] for of_one in scores], axis=1)
        each = ", ".join(f"{of_one.mean():.2f}" for of_one in scores)
        table.append([name or "as it is", estimate(together, 2), each])
    return _table(["options", "training, relative to the first row", "each environment"], table)


def _steps(done: int, planned: int) -> str:
    """Steps in millions, with the total if the run is not finished."""
    rest = f" of {planned / 1e6:.3g}" if done < planned else ""
    return f"{done / 1e6:.3g}{rest} M"


def atari_table(result: dict[str, Any]) -> str | None:
    """Both protocols with human-normalised scores, and the IQM over several games."""
    rows = []
    for protocol, meaning in _PROTOCOLS.items():
        normalised = []
        for name, environment in result["environments"].items():
            seeds = [seed.get("protocols", {}) for seed in environment["seeds"]]
            returns = _column(seeds, protocol)
            if returns.size:
                game = name.removeprefix("envpool/").removesuffix("-v5")
                normalised.append(human_normalised(game, returns))
                rows.append([game, meaning, estimate(returns), estimate(normalised[-1], digits=2)])
        if len(normalised) > 1:
            fewest = min(map(len, normalised))
            scores = np.concatenate([scores[:fewest] for scores in normalised], axis=1)
            rows.append([f"{len(normalised)} games", meaning, "", estimate(scores, digits=2)])
    return _table(["game", "protocol", "return", "human-normalised"], rows) if rows else None


def speed_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for name, run in result["contestants"].items():
            speed = f"{run['steps_per_second']:,.0f}"
            costs = [f"{run['compile_seconds']:.1f} s", f"{run['peak_memory_mb']:,.0f} MB"]
            rest = _ratio_and_split(result) if name == "eqx_q" else ["", "", ""]
            name = f"eqx_q, {result['earlier_commit'][:7]}" if name == "earlier" else name
            rows.append([result["case"], name, speed, *costs, *rest])
    head = ["case", "", "steps/s", "compiling", "peak memory", "ratio", "of matmul ceiling"]
    return _table([*head, " / ".join(_PARTS)], rows)


def _ratio_and_split(result: dict[str, Any]) -> list[str]:
    ratio, split = result["ratio"], result.get("split")
    if ratio:
        low, high = min(ratio["pairs"]), max(ratio["pairs"])
        ratio = f"**{ratio['median']:.1f}×** ({low:.1f}–{high:.1f})"
    ceiling = split and f"{split['matmul_ceiling_fraction']:.0%}"
    parts = split and " / ".join(f"{split[f'{part}_fraction']:.0%}" for part in _PARTS)
    return [ratio or "", ceiling or "", parts or ""]


def launches_table(result: dict[str, Any]) -> str:
    """A row for each program: what an update and its steps launch, ours and the peer's."""
    rows = []
    for case, counted in result["cases"].items():
        ours, theirs = counted["eqx_q"], counted.get("purejaxql", {})
        numbers = []
        for name in ("update", "env_step", "gradient_step"):
            both = [f"{counts[name]:,}" for counts in (ours, theirs) if name in counts]
            numbers.append(" / ".join(both))
        ratio = f"{ours['update'] / theirs['update']:.2f}" if theirs else ""
        memory = [f"{counts['temporary_mb']:,.0f}" for counts in (ours, theirs) if counts]
        rows.append([case, *numbers, ratio, " / ".join(memory)])
    head = ["program", "launches per update", "per env step", "per gradient step", "ratio"]
    return _table([*head, "temporary MB"], rows)


def offline_speed_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for name, run in result["contestants"].items():
            cells = []
            for figure in ("updates_per_second", "batches_per_second"):
                pairs = result["ratio"][figure] if result.get("ratio") else []
                ratio = f" **{np.median(pairs):.1f}×** ({min(pairs):.1f}–{max(pairs):.1f})"
                cells.append(f"{run[figure]:,.1f}{ratio if pairs and name == 'eqx_q' else ''}")
            costs = f"{run['compile_seconds']:.1f} s", f"{run['peak_memory_mb']:,.0f} MB"
            rows.append([result["case"], name, *cells, *costs])
    head = ["case", "", "updates/s", "batches/s, drawn alone", "compiling", "peak memory"]
    return _table(head, rows)


def conversion_table(result: dict[str, Any]) -> str:
    rows = []
    for game, formats in result["games"].items():
        for name, runs in formats.items():
            each = runs["frames_per_second_each"]
            speed = f"**{runs['frames_per_second']:,.0f}** ({min(each):,.0f}–{max(each):,.0f})"
            rows.append([game, name, f"{runs['bytes_per_frame']:.0f} B", speed])
    return _table(["game", "format", "a frame takes there", "frames/s on one core"], rows)


def offline_table(result: dict[str, Any]) -> str:
    """Final returns of each learner, and CQL's lead over DQN with an interval."""
    rows = []
    for game, of_game in result["games"].items():
        for kind, of_data in of_game["data"].items():
            data, learners = of_data["data"], of_data["learners"]
            finals = {name: np.array(x["final"]).reshape(-1, 1) for name, x in learners.items()}
            best = {name: np.array(x["best"]).reshape(-1, 1) for name, x in learners.items()}
            lead = _lead(finals["cql"], finals["dqn"]) if {"cql", "dqn"} <= set(finals) else ""
            rows.append(
                [
                    game,
                    kind,
                    f"{data['transitions'] / 1e3:,.0f} k",
                    f"{of_game['teacher']:.1f}",
                    f"{data['return_mean']:.1f}",
                    *(
                        f"{estimate(finals[x])} ({iqm(best[x]):.1f})" if x in finals else ""
                        for x in ("bc", "dqn", "cql")
                    ),
                    lead,
                ]
            )
    names = [f"{name.upper()}, at the end (best)" for name in ("bc", "dqn", "cql")]
    head = ["game", "data", "transitions", "teacher", "return in the data", *names]
    return _table([*head, "CQL − DQN"], rows)


def search_table(results: list[dict[str, Any]]) -> str:
    """Results of searches with unseen seeds, and their durations."""
    rows = []
    for result in results:
        found, shipped = (
            np.array(result[f"greedy_return_{which}"], float).reshape(-1, 1)
            for which in ("found", "shipped")
        )
        took = [f"{result[f'{how}_seconds'] / 60:,.0f} min" for how in ("search", "sequential")]
        if result["sequential_trials_measured"] < result["trials"]:
            took[1] += f" (from {result['sequential_trials_measured']})"
        rows.append(
            [
                result["env"],
                f"{result['trials']} × {result['total_steps'] / 1e6:.3g} M steps",
                f"{result['best']['value']:,.1f}",
                *(estimate(returns) for returns in (found, shipped)),
                _lead(found, shipped),
                *took,
                f"**{result['speedup']:.1f}×**",
            ]
        )
    head = ["environment", "trials", "the best in the search", "with other seeds", "as shipped"]
    return _table([*head, "difference", "search", "one after another", "speedup"], rows)


def pbt_table(results: list[dict[str, Any]]) -> str:
    """The best and the median member of populations, with and without population-based training."""
    rows = []
    for result in results:
        for name, how in (("pbt", "population-based"), ("random", "random search")):
            greedy = np.array(result[name]["greedy_return_per_member"], float)
            members = f"{result['population']} × {result[name]['env_steps'] / 1e6:.3g} M"
            values = [greedy.max(), np.median(greedy)]
            values += [result[name][member][-1] for member in ("best", "median")]
            rows.append([result["env"], how, members, *(f"{value:,.1f}" for value in values)])
    head = ["environment", "", "members × steps", "best, greedy", "median, greedy"]
    return _table([*head, "best, training", "median, training"], rows)


def _lead(ours: np.ndarray, theirs: np.ndarray, resamples: int = 10_000) -> str:
    """The difference of two means over seeds, with a 95 % bootstrap interval if several."""
    if len(ours) == len(theirs) == 1:
        return f"{ours.mean() - theirs.mean():+.1f}"
    rng = np.random.default_rng(0)
    means = [x[rng.integers(len(x), size=(resamples, len(x))), 0].mean(1) for x in (ours, theirs)]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return f"**{ours.mean() - theirs.mean():+.1f}** [{low:+.1f}, {high:+.1f}]"


def _paired(ours: np.ndarray, theirs: np.ndarray, digits: int, resamples: int = 10_000) -> str:
    """The mean difference between runs of the same seeds, with a 95 % bootstrap interval."""
    if len(ours) != len(theirs):
        return "–"
    differences = (ours - theirs)[:, 0]
    if len(differences) == 1:
        return f"{differences[0]:+.{digits}f}"
    drawn = np.random.default_rng(0).integers(len(ours), size=(resamples, len(ours)))
    low, high = np.percentile(differences[drawn].mean(1), [2.5, 97.5])
    return f"**{differences.mean():+.{digits}f}** [{low:+.{digits}f}, {high:+.{digits}f}]"


def memory_line(result: dict[str, Any]) -> str:
    """Resident memory of a run and of one ten times as long."""
    runs = [result[name] for name in ("short", "long")]
    peaks = [f"{run['peak_mb']:,.0f} MB over {run['total_steps']:,} steps" for run in runs]
    through = result["long"]["through_the_run_mb"]
    middle, end = through[len(through) // 2], through[-1]
    return (
        f"At most {', and '.join(peaks)}; in the longer run {middle:,.0f} MB half way and "
        f"{end:,.0f} MB at its end. {_origin(result)}"
    )


def draw(result: dict[str, Any], references: dict[str, Any], path: Path) -> None:
    """Plots training and greedy returns: seeds as thin lines, means thick, peers dashed."""
    environments = {name: e for name, e in result["environments"].items() if e["seeds"]}
    columns = min(5, len(environments))
    rows = -(-len(environments) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(environments) :]:
        axis.axis("off")
    for axis, (name, environment) in zip(axes.flat, environments.items(), strict=False):
        for kind, color in (("training", "tab:blue"), ("greedy", "tab:orange")):
            curves = [np.array(seed[f"{kind}_curve"]) for seed in environment["seeds"]]
            curves = [curve for curve in curves if len(curve)]
            axis.plot([], [], color=color, label=kind)
            for curve in curves:
                axis.plot(curve[:, 0], curve[:, 1], color=color, linewidth=0.6, alpha=0.5)
            if curves:
                steps = max(curves, key=len)[:, 0]
                mean = np.mean([np.interp(steps, *curve.T) for curve in curves], axis=0)
                axis.plot(steps, mean, color=color, linewidth=1.8)
            for reference in references["returns"].get(name, []):
                if kind in reference:
                    axis.axhline(reference[kind], color=color, linestyle="--", linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("environment steps", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_offset_text().set_fontsize(7)
    axes[0, 0].set_ylabel("return", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_offline(result: dict[str, Any], path: Path) -> None:
    """Plots greedy returns over updates: seeds as thin lines, means thick, the teacher dashed."""
    panels = [
        (f"{game}, {kind}", of_game["teacher"], of_data)
        for game, of_game in result["games"].items()
        for kind, of_data in of_game["data"].items()
    ]
    columns = min(6, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.7 * columns, 2.5 * rows), squeeze=False, layout="constrained"
    )
    for axis, (title, teacher, of_data) in zip(axes.flat, panels, strict=False):
        for (name, learner), color in zip(
            of_data["learners"].items(), ("tab:green", "tab:orange", "tab:blue"), strict=False
        ):
            curve = np.array(learner["curve"])
            axis.plot(curve[:, 0], curve[:, 1:], color=color, linewidth=0.6, alpha=0.5)
            axis.plot(curve[:, 0], curve[:, 1:].mean(1), color=color, label=name.upper())
        axis.axhline(teacher, color="black", linestyle="--", linewidth=0.8, label="teacher")
        axis.axhline(of_data["data"]["return_mean"], color="grey", linestyle=":", label="data")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("updates", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes[0, 0].set_ylabel("return", fontsize=8)
    axes[0, 0].legend(fontsize=6)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_pbt(result: dict[str, Any], path: Path) -> None:
    """Plots training returns of the best and the median member against random search."""
    figure, axes = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
    for name, color in (("pbt", "tab:blue"), ("random", "tab:orange")):
        for member, style in (("best", "-"), ("median", "--")):
            curve, label = result[name], f"{name}, {member}"
            axes.plot(curve["steps"], curve[member], style, color=color, label=label)
    axes.set_title(result["env"], fontsize=9)
    axes.set_xlabel("environment steps of each member", fontsize=8)
    axes.set_ylabel("return", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def read_all(results: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results by name, and what peers publish."""
    references = json.loads((ROOT / "benchmarks" / "references.json").read_text())
    paths = sorted(results.glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}, references


def report(results: Path, into: Path) -> str:
    """The whole report as markdown, and the pictures in a folder beside it."""
    read, references = read_all(results)
    pictures = into.parent / "results"
    pictures.mkdir(exist_ok=True)
    parts = []
    speeds = [result for name, result in read.items() if name.startswith("speed_")]
    if speeds:
        parts += ["## Speed", speed_table(speeds), *(f"- {_origin(result)}" for result in speeds)]
    speeds = [result for name, result in read.items() if name.startswith("offline_speed_")]
    if speeds:
        parts += ["## Speed, from data", offline_speed_table(speeds), *map(_origin, speeds)]
    if "convert" in read:
        result = read["convert"]
        of_what = (
            "Games played at random, from files in the original formats to a finished data set."
        )
        load = f"The machine's load was {result['machine']['load']:.1f}."
        of_what += f" {load}" if result["machine"]["load"] > 0.5 else ""
        parts += ["## Speed of conversion", conversion_table(result), of_what, _origin(result)]
    if "launches" in read:
        of_what = (
            "Kernels and library calls in XLA's program for an H200, ours / purejaxql's. Small "
            "agents on a GPU are bound by their number. Loops whose length is not known when "
            "compiling count once, and of conditionals all branches."
        )
        result = read["launches"]
        parts += ["## Launches on a GPU", of_what, launches_table(result), _origin(result)]
    if "memory" in read:
        parts += ["## Memory", memory_line(read["memory"])]
    for name, result in read.items():
        if not name.startswith("learning_") or not any(
            environment["seeds"] for environment in result["environments"].values()
        ):
            continue
        picture = pictures / f"{name}.png"
        draw(result, references, picture)
        parts += [f"## Learning: {result['suite']}", learning_table(result, references)]
        parts += [table] if (table := variants_table(result)) else []
        parts += [table] if (table := atari_table(result)) else []
        parts += [f"![{name}]({os.path.relpath(picture, into.parent)})", _origin(result)]
    for name, result in read.items():
        if name.startswith("offline_") and "games" in result:
            picture = pictures / f"{name}.png"
            draw_offline(result, picture)
            of_one = "One teacher and one data set each: intervals are over learners' seeds alone."
            parts += [f"## Learning from data: {result['suite']}", offline_table(result), of_one]
            parts += [f"![{name}]({os.path.relpath(picture, into.parent)})", _origin(result)]
    searches = [result for name, result in read.items() if name.startswith("search_")]
    if searches:
        parts += ["## Search", search_table(searches), *(f"- {_origin(x)}" for x in searches)]
    trained = {name: result for name, result in read.items() if name.startswith("pbt_")}
    if trained:
        parts += ["## Population-based training", pbt_table(list(trained.values()))]
    for name, result in trained.items():
        picture = pictures / f"{name}.png"
        draw_pbt(result, picture)
        parts += [f"![{name}]({os.path.relpath(picture, into.parent)})", _origin(result)]
    sources = "; ".join(f"{who}: {source}" for who, source in references["sources"].items())
    parts.append(f"Interquartile means with 95 % bootstrap intervals over seeds. Peers: {sources}.")
    return "\n\n".join(parts)


def insert(page: Path, text: str) -> None:
    """Inserts the report between the page's two markers, or replaces a page without markers."""
    before, after = f"{_BEGIN}\n", f"\n{_END}\n"
    if page.exists() and _BEGIN in (old := page.read_text()):
        before = old[: old.index(_BEGIN)] + before
        after = "\n" + old[old.index(_END) :]
    page.write_text(before + text + after)
    print(f"wrote {page}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON files")
    parser.add_argument("--into", type=Path, help="the file to write; default: docs and README")
    args = parser.parse_args()
    page = args.into or ROOT / "docs" / "results.md"
    insert(page, report(args.results, page))
    if args.into is None:
        read, references = read_all(args.results)
        draw_overview(read, references, ROOT / "docs" / "overview.png")
        insert(ROOT / "README.md", overview_table(read, references))


if __name__ == "__main__":
    main()
