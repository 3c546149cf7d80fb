"""Model cards: scores, usage, configuration and versions of an agent."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..agents import Agent
from ..saving.files import write_whole
from ..wrappers.registry import SUITES
from .making import learnt
from .parts import chosen_options
from .settings import Config, env_name, given, in_use, without_paths
from .summary import read_json


def write_card(
    out: Path,
    config: Config,
    directory: Path,
    agent: Agent,
    member: int | None,
    *,
    opening: str,
    usage: str,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model card of a run's agent, `README.md`, to the directory `out`.

    **Arguments:** `directory`: the run. `member`: which of several seeds the agent is, or `None`.
    `opening`, `usage`: the first paragraph, and the section on usage. `facts`: further rows of the
    table of facts.
    """
    summary = read_summary(directory)
    ((unit, amount),) = learnt(agent).items()
    stopped = ", then training was stopped" if summary.get("status") == "stopped" else ""
    seed = summary.get("member") if member is None else member  # a published agent's is recorded
    of_all = f", member {seed} of {config['num_seeds']}" if seed is not None else ""
    if agent.num_members:
        of_all = f", {agent.num_members} seeds as one population: lanes go member by member"
    rows = {
        "agent": f"`{config['agent']['_target_']}`{of_all}",
        "environment": f"`{env_name(config)}`",
        "environment options": f"`{_json(given(config['env']))}`",
        "learnt from": f"{amount:,} {unit.replace('_', ' ')}{stopped}",
        "data": _of_data(without_paths(summary.get("data"))),
        "seed": config["seed"],
        "trained on": summary.get("device"),
        "trained with": _versions(config, summary),
        "commit": summary.get("commit"),
        **(facts or {}),
    }
    used = in_use(config) | {"agent": chosen_options(given(config["agent"]))}
    card = f"""# {config["agent"]["_target_"].split(".")[-1]} in {env_name(config)}

{opening}

{table(("", ""), [(name, fact) for name, fact in rows.items() if fact not in (None, "")])}
## Scores

{table(("return", "mean", "per seed"), _scores(config, directory, agent, member))}
## Use

{usage}
## Configuration

```json
{_json(used, indent=1)}
```
"""
    write_whole(out / "README.md", [card.encode()])


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary of a run, empty if there is none."""
    return _read(directory / "summary.json")


def later_evaluations(directory: Path, agent: Agent) -> list[dict[str, Any]]:
    """Results of `scripts/evaluate.py` for this agent; a published agent has them in its summary.

    Skips evaluations from before a resume.
    """
    files = [_read(path) for path in sorted(directory.glob("evaluation_*.json"))]
    results = [*read_summary(directory).get("evaluations", []), *files]
    return [result for result in results if learnt(agent).items() <= result.items()]


def _of_data(data: Any) -> str | None:
    """A summary's description of a data set; earlier versions have only its path."""
    if not isinstance(data, Mapping):
        return data and f"`{data}`"
    source = f", from `{_json(data['source'])}`" if data["source"] else ""
    return (
        f"{data['transitions']:,} transitions in {data['episodes']:,} episodes of "
        f"`{data['env']}`{source}, checksum `{data['checksum']}`"
    )


def _json(value: Any, indent: int | None = None) -> str:
    """JSON with non-finite numbers as strings."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [finite(part) for part in value]
        is_number = isinstance(value, float)
        return str(value) if is_number and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def _scores(
    config: Config, directory: Path, agent: Agent, member: int | None
) -> list[tuple[str, str, str]]:
    """Rows of scores from training and later evaluations."""
    epsilon = given(config.get("eval", {})).get("epsilon", 0.0)
    how = f"with ε = {epsilon}" if epsilon else "greedy"
    names = {
        "eval_return_per_seed": f"at the end of training, {how}",
        "best_eval_return_per_seed": f"best during training, {how}",
        "train_return_per_seed": "in training, with exploration",
    }
    summary = read_summary(directory)
    results = [(name, summary, key) for key, name in names.items()]
    if not learnt(agent).items() <= summary.items():  # from before a resume
        results = []
    for result in later_evaluations(directory, agent):
        name = f"{result['protocol']}: {result['episodes']} episodes, ε = {result['epsilon']}"
        results.append((name, result, "return_per_seed"))
    rows = []
    for name, result, key in results:
        values = result.get(key) or []
        if member is not None:
            values = values[member : member + 1]
        known = [x for x in values if x is not None]
        if known:
            each = ", ".join("–" if x is None else f"{x:.4g}" for x in values)
            rows.append((name, f"{sum(known) / len(known):.4g}", each))
    return rows


def table(head: Sequence[str], rows: Any) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _versions(config: Config, summary: Mapping[str, Any]) -> str:
    """Versions of the packages of the agent and its environment."""
    packages = ("eqx_q", "python", "jax", "equinox", SUITES[config["env"]["suite"]].package)
    versions = summary.get("versions", {})
    return ", ".join(f"{name} {versions[name]}" for name in packages if name in versions)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
