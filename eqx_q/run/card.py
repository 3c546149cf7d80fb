"""A model card: what an agent is, what it scored, and how to use it."""

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
    use: str,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes `README.md` into `out`, about the agent of a run.

    **Arguments:** `member`: which one of several seeds it is; `None` where it is all of them, or
    the only one. `opening`, `use`: what it says first, and how the agent is used. `facts`: that are
    told beside those of the run.
    """
    summary = read_summary(directory)
    ((unit, amount),) = learnt(agent).items()
    stopped = ", where training was stopped" if summary.get("status") == "stopped" else ""
    which = summary.get("member") if member is None else member  # of a published one
    of_all = f", member {which} of {config['num_seeds']}" if which is not None else ""
    if agent.num_members:
        of_all = f", {agent.num_members} seeds as one: lanes are theirs, member by member"
    told = {
        "agent": f"`{config['agent']['_target_']}`{of_all}",
        "environment": f"`{env_name(config)}`",
        "options of the environment": f"`{_json(given(config['env']))}`",
        "learnt from": f"{amount:,} {unit.replace('_', ' ')}{stopped}",
        "data": _of_data(without_paths(summary.get("data"))),
        "seed": config["seed"],
        "trained on": summary.get("device"),
        "trained with": _versions(config, summary),
        "commit": summary.get("commit"),
        **(facts or {}),
    }
    used = in_use(config) | {"agent": chosen_options(given(config["agent"]))}
    scores = _scores(config, directory, agent, member)
    card = f"""# {config["agent"]["_target_"].split(".")[-1]} in {env_name(config)}

{opening}

{table(("", ""), [(name, fact) for name, fact in told.items() if fact not in (None, "")])}
## Scores

{table(("return", "mean", "each seed"), scores)}
## Use

{use}
## Configuration

```json
{_json(used, indent=1)}
```
"""
    write_whole(out / "README.md", [card.encode()])


def read_summary(directory: Path) -> dict[str, Any]:
    """What a run came to, as far as it says so."""
    return _read(directory / "summary.json")


def _of_data(data: Any) -> str | None:
    """What a summary says of a data set; one of earlier versions knows its path only."""
    if not isinstance(data, Mapping):
        return data and f"`{data}`"
    source = f", from `{_json(data['source'])}`" if data["source"] else ""
    return (
        f"{data['transitions']:,} transitions in {data['episodes']:,} episodes of "
        f"`{data['env']}`{source}, checksum `{data['checksum']}`"
    )


def _json(value: Any, indent: int | None = None) -> str:
    """JSON, which has no number for what is infinite: a word says so."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [finite(part) for part in value]
        is_number = isinstance(value, float)
        return str(value) if is_number and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def evaluations_afterwards(directory: Path, agent: Agent) -> list[dict[str, Any]]:
    """What evaluations of this agent came to after training; a published one's summary has them.

    A run may have gone on since, and been evaluated before: that was another agent.
    """
    files = [_read(path) for path in sorted(directory.glob("evaluation_*.json"))]
    found = [*read_summary(directory).get("evaluations", []), *files]
    return [result for result in found if learnt(agent).items() <= result.items()]


def _scores(
    config: Config, directory: Path, agent: Agent, member: int | None
) -> list[tuple[str, str, str]]:
    """What training and evaluations afterwards came to."""
    epsilon = given(config.get("eval", {})).get("epsilon", 0.0)
    how = f"with ε = {epsilon}" if epsilon else "greedy"
    names = {
        "eval_return_per_seed": f"at the end of training, {how}",
        "best_eval_return_per_seed": f"the best during training, {how}",
        "train_return_per_seed": "in training, with exploration",
    }
    summary = read_summary(directory)
    results = [(name, summary, key) for key, name in names.items()]
    if not learnt(agent).items() <= summary.items():  # of before a resume
        results = []
    for result in evaluations_afterwards(directory, agent):
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
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _versions(config: Config, summary: Mapping[str, Any]) -> str:
    """Of what the agent and its environment are made of."""
    packages = ("eqx_q", "python", "jax", "equinox", SUITES[config["env"]["suite"]].package)
    versions = summary.get("versions", {})
    return ", ".join(f"{name} {versions[name]}" for name in packages if name in versions)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
