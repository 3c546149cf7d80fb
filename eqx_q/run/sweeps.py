"""Summarises the runs of a sweep."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..clock import clock
from ..errors import MissingExtraError, UnknownNameError, UsageError
from ..saving.files import write_whole
from ..tracking import read_metrics
from .settings import Config, env_name, flat
from .statistics import human_normalised, interval, iqm
from .summary import finished, write_json

METRICS = {  # names in `summary.json`, and the corresponding ones in `metrics.jsonl`
    "eval_return": "eval/return",
    "best_eval_return": "eval/return",
    "train_return": "episode_return",
}


class Result(NamedTuple):
    """The result of one seed.

    `member`: its index among the members that the run trained with `seed`. `setting`: the options,
    other than seeds, in which runs of this environment differ. `normalised`: the Atari return on a
    scale where 0 is a random player and 1 a human. `curve`: steps and returns.
    """

    env: str
    setting: str
    seed: int
    member: int
    value: float
    normalised: float | None
    curve: list[tuple[int, float]]
    directory: Path


def summarize_sweep(
    runs: Sequence[tuple[Config, Path]], out: Path, *, metric: str = "eval_return"
) -> dict[str, Any]:
    """Compares the runs of a sweep; those without results are left out, and listed.

    Writes `sweep.json`, `sweep.csv` (a row per seed), `sweep.md` and `sweep.png` to `out`.

    **Arguments:** `runs`: configurations with their directories. `metric`: `eval_return` (greedy,
    at the end), `best_eval_return`, or `train_return` (with exploration, in the last tenth).

    **Returns:** the contents of `sweep.json`.
    **Raises:** `UsageError` if no run is finished, or none has the metric; `MissingExtraError`
    without Matplotlib.
    """
    if metric not in METRICS:
        raise UnknownNameError("metric", metric, METRICS)
    results = [result for run in _named(runs) for result in _results(*run, metric)]
    if not results:
        raise UsageError(
            f"none of the {len(runs)} runs is finished and has {metric}: continue the sweep, or "
            f"choose another metric ({', '.join(METRICS)})"
        )
    counted = {result.directory for result in results}
    told = {
        "metric": metric,
        "runs": len(runs),
        "left_out": [str(directory) for _, directory in runs if directory not in counted],
        "overall": [_overall(*group) for group in _groups(results, ("setting",))],
        "environments": [_of_one(*group) for group in _groups(results, ("setting", "env"))],
    }
    write_json(out / "sweep.json", told)
    write_whole(out / "sweep.csv", [_csv(results).encode()])
    write_whole(out / "sweep.md", [as_markdown(told).encode()])
    write_whole(out / "sweep.png", [_curves(results, METRICS[metric])])
    return told


def as_markdown(told: Mapping[str, Any]) -> str:
    """Formats the result of `summarize_sweep` as tables."""
    lines = [
        "| environment | setting | seeds | mean | IQM, 95 % interval | human-normalised | each |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in told["environments"]:
        cells = (
            row["env"],
            row["setting"] or "–",
            len(row["seeds"]),
            f"{row['mean']:,.4g}",
            _estimate(row["iqm"], row["interval"]),
            _number(row["normalised"]),
            ", ".join(f"{value:,.4g}" for value in row["returns"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for row in told["overall"]:
        if row["games"]:
            lines += [
                "",
                f"Human-normalised over {row['games']} games"
                f"{' at ' + row['setting'] if row['setting'] else ''}: median "
                f"**{row['median']:.3f}**, mean {row['mean']:.3f}, IQM "
                f"{_estimate(row['iqm'], row['interval'])}.",
            ]
    metric, left_out = told["metric"], told["left_out"]
    lines += ["", f"`{metric}` of {told['runs'] - len(left_out)} finished runs."]
    if left_out:
        lines += [f"Not finished, or without {metric}: {', '.join(left_out)}."]
    return "\n".join(lines) + "\n"


def _named(runs: Sequence[tuple[Config, Path]]) -> Iterator[tuple[Config, Path, str]]:
    """Each run with the options, other than seeds, that distinguish it in its environment."""
    every = [flat(config) for config, _ in runs]
    of_env = defaultdict(list)
    for (config, _), values in zip(runs, every, strict=True):
        of_env[env_name(config)].append(values)
    differing = {
        name
        for alike in of_env.values()
        for name in {name for values in alike for name in values}
        if any(values.get(name) != alike[0].get(name) for values in alike)
    }
    for (config, directory), values in zip(runs, every, strict=True):
        names = sorted(differing & values.keys() - {"seed", "num_seeds"})
        yield config, directory, " ".join(f"{name}={values[name]}" for name in names)


def _results(config: Config, directory: Path, setting: str, metric: str) -> Iterator[Result]:
    """The results of all seeds of a run, if it is finished."""
    summary = finished(directory) or {}
    values = summary.get(f"{metric}_per_seed")
    if values is None:
        return
    suite, name = config["env"]["suite"], config["env"]["name"]
    game = name.partition("-v")[0] if suite == "envpool" else ""
    done = summary.get("env_steps") or summary.get("num_updates", 0)
    rows = read_metrics(directory / "metrics.jsonl", done)
    curves = _curves_of(rows, METRICS[metric], len(values))
    for member, value in enumerate(values):
        if value is not None:
            normalised = human_normalised(game, np.array(value))
            yield Result(
                env_name(config),
                setting,
                config["seed"],
                member,
                value,
                None if normalised is None else float(normalised),
                curves[member],
                directory,
            )


def _curves_of(
    rows: Iterable[dict[str, Any]], name: str, members: int
) -> list[list[tuple[int, float]]]:
    curves = [[] for _ in range(members)]
    for row in rows:
        if row.get(name) is not None:
            for curve, value in zip(curves, np.atleast_1d(row[name]), strict=True):
                if value is not None:
                    curve.append((clock(row).done, float(value)))
    return curves


def _groups(
    results: Iterable[Result], names: tuple[str, ...]
) -> list[tuple[tuple[str, ...], list[Result]]]:
    """Groups results by the values of some fields, in the order of these."""
    groups = defaultdict(list)
    for result in results:
        groups[tuple(getattr(result, name) for name in names)].append(result)
    return sorted(groups.items())


def _of_one(names: tuple[str, ...], results: list[Result]) -> dict[str, Any]:
    """Statistics of one environment at one setting."""
    setting, env = names
    results = sorted(results, key=lambda result: (result.seed, result.member))
    values = np.array([result.value for result in results])
    normalised = [result.normalised for result in results if result.normalised is not None]
    return {
        "env": env,
        "setting": setting,
        "seeds": [result.seed for result in results],
        "members": [result.member for result in results],
        "returns": values.tolist(),
        "mean": float(values.mean()),
        "iqm": iqm(values),
        "interval": interval(values[:, None]) if len(values) > 1 else None,
        "normalised": float(np.mean(normalised)) if normalised else None,
    }


def _overall(names: tuple[str, ...], results: list[Result]) -> dict[str, Any]:
    """Human-normalised statistics over all games at one setting.

    The interval is computed if all games have the same number of seeds.
    """
    known = [result for result in results if result.normalised is not None]
    games = [
        np.array([result.normalised for result in group], float)
        for _, group in _groups(known, ("env",))
    ]
    means = [float(np.mean(game)) for game in games]
    told: dict[str, Any] = {"setting": names[0], "games": len(games)}
    if games:
        seeds = {len(game) for game in games}
        told["median"], told["mean"] = float(np.median(means)), float(np.mean(means))
        told["iqm"] = iqm(np.concatenate(games))
        told["interval"] = interval(np.array(games).T) if seeds != {1} and len(seeds) == 1 else None
    return told


def _estimate(middle: float, around: Sequence[float] | None) -> str:
    if around is None:
        return f"{middle:,.4g}"
    return f"{middle:,.4g} [{around[0]:,.4g}, {around[1]:,.4g}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _csv(results: Iterable[Result]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    head = ["environment", "setting", "seed", "member", "return", "human_normalised", "directory"]
    writer.writerow(head)
    for r in sorted(results, key=lambda r: (r.setting, r.env, r.seed, r.member)):
        writer.writerow([r.env, r.setting, r.seed, r.member, r.value, r.normalised, r.directory])
    return text.getvalue()


def _curves(results: Sequence[Result], name: str) -> bytes:
    """A PNG with a plot for each environment: seeds as thin lines, their mean as a thick one."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise MissingExtraError("matplotlib", "sweep") from None
    settings = sorted({result.setting for result in results})
    environments = _groups(results, ("env",))
    columns = min(len(environments), 8)
    rows = -(-len(environments) // columns)
    figure = Figure(figsize=(2.8 * columns, 2.3 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, ((env,), group) in zip(axes, environments, strict=False):
        for (setting,), alike in _groups(group, ("setting",)):
            color = f"C{settings.index(setting)}"
            curves = [np.array(result.curve) for result in alike if result.curve]
            for curve in curves:
                axis.plot(curve[:, 0], curve[:, 1], color=color, linewidth=0.6, alpha=0.5)
            if curves:
                steps = max(curves, key=len)[:, 0]
                mean = np.mean([np.interp(steps, *curve.T) for curve in curves], axis=0)
                axis.plot(steps, mean, color=color, linewidth=1.8)
        axis.set_title(env.partition("/")[2], fontsize=8)
        axis.tick_params(labelsize=6)
        axis.xaxis.get_offset_text().set_fontsize(6)
    for axis in axes[len(environments) :]:
        axis.set_axis_off()
    figure.supylabel(name, fontsize=8)
    if len(settings) > 1:
        lines = [Line2D([], [], color=f"C{i}", label=one) for i, one in enumerate(settings)]
        figure.legend(handles=lines, loc="outside lower center", fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    return picture.getvalue()
