"""Publishing what a run left behind: one agent, with what others need to use it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..agents import Agent
from ..agents.acting import QAgent
from ..errors import UsageError
from ..saving.checkpoint import save
from ..saving.hub import AGENT, name_of
from ..wrappers.registry import SUITES
from .card import evaluations_afterwards, read_summary, write_card
from .evaluation import trained_agent
from .exporting import member_of
from .settings import Config, env_name, given, without_paths
from .summary import write_json

_OF_THIS_MACHINE = ("resume", "distributed", "tracker")  # of a configuration
_OF_NO_USE = {"returns", "return_mean", "device", "versions", "commit"}  # of an evaluation


def publish_run(
    config: Config,
    directory: Path,
    out: Path,
    *,
    member: int | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Writes the agent of a run, its summary and a model card into `out`.

    The agent is one that only acts: its optimiser begins anew. Nothing tells of the machine that it
    was trained on but the kind of its device.

    **Arguments:** `member`: of several seeds the one to publish, by default the best in the last
    evaluation. `name`: by which others will load it, where it goes to the hub.

    **Returns:** the configuration, which belongs beside it.
    **Raises:** `UsageError` where the run is not finished, has no such member, or `out` is a run.
    """
    if (out / "metrics.jsonl").exists() or (out / "checkpoints").exists():
        raise UsageError(f"'{out}' holds a run: choose another directory with out=DIR")
    summary = read_summary(directory)
    agent, which = one_of(trained_agent(directory), summary, member)
    is_best = which is not None and member is None
    if isinstance(agent, QAgent):
        agent = agent.with_fresh_optimizer()
    used = without_paths({k: v for k, v in config.items() if k not in _OF_THIS_MACHINE})
    save(out / AGENT, agent)
    evaluations = [
        _of_member({k: v for k, v in result.items() if k not in _OF_NO_USE}, which)
        for result in evaluations_afterwards(directory, agent)
    ]
    told = {"agent": used["agent"]["_target_"], "env": env_name(used)}
    told |= without_paths(_of_member(summary, which)) | {"evaluations": evaluations}
    if which is not None:
        (mean,) = told.get("eval_return_per_seed") or [None]
        told |= {"member": which, "eval_return_mean": mean}
    write_json(out / "summary.json", told)
    write_card(
        out,
        used,
        directory,
        agent,
        which,
        opening="An agent of eqx_q. It acts, and can learn on; its optimiser begins anew.",
        use=_use(used, name or name_of(out)),
        facts={"chosen as": "the best member in the last evaluation"} if is_best else {},
    )
    return used


def one_of(
    agent: Agent, summary: Mapping[str, Any], member: int | None
) -> tuple[Agent, int | None]:
    """One agent and which member it was: the given one, or the best in the last evaluation.

    **Raises:** `UsageError` where there is no such member, or none was evaluated.
    """
    if agent.num_members is None:
        return member_of(agent, member or 0), None
    if member is None:
        returns = enumerate(summary.get("eval_return_per_seed") or [])
        known = {index: value for index, value in returns if value is not None}
        if not known:
            raise UsageError("no member of this run was evaluated: choose one with member=0")
        member = max(known, key=known.__getitem__)
    return member_of(agent, member), member


def _of_member(told: Mapping[str, Any], member: int | None) -> dict[str, Any]:
    """What a summary or an evaluation says of one member."""
    if member is None:
        return dict(told)

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cut(part) for name, part in value.items()}
        return value[member : member + 1] if isinstance(value, list) else value

    return {
        name: cut(value) if name.endswith("per_seed") or name == "transitions" else value
        for name, value in told.items()
    }


def _use(config: Config, name: str | None) -> str:
    """How to load it, and how to see it play."""
    env = given(config["env"]) | given(config["protocol"])
    suite = SUITES[env.pop("suite")]
    del env["name"]
    options = "".join(f", {option}={value!r}" for option, value in env.items())
    extras = [suite.extra, "hub" if name and name.startswith("hf:") else None]
    package = f"eqx_q[{','.join(filter(None, extras))}]".removesuffix("[]")
    where, run = ("", name) if name else ("In this directory, with ", "DIR")
    return f"""{where}`pip install '{package}'`:

```python
import eqx_q
import jax

agent = eqx_q.load("{name or AGENT}")
env = eqx_q.make("{env_name(config)}", num_envs=8{options})
returns = eqx_q.evaluate(agent, env, num_episodes=8, key=jax.random.key(0))
print(returns.mean())
```

In a checkout of eqx_q{"" if name else ", with this directory as DIR"}:

```sh
python scripts/evaluate.py run={run}
python scripts/watch.py run={run}
```
"""
