"""Reads and checks the values of a configuration before a run begins."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError

Config = Mapping[str, Any]


class Kind(NamedTuple):
    """How a run counts: in the agent's `unit`, up to the configuration's `total`.

    `metric` is the total's name in metrics, `rate` the speed's; `sizes` are options that determine
    memory use.
    """

    unit: str
    total: str
    metric: str
    rate: str
    sizes: str


ONLINE = Kind(
    "env_steps", "total_steps", "total_steps", "steps_per_second", "num_envs, agent.rollout_length"
)
OFFLINE = Kind(
    "num_updates", "num_updates", "total_updates", "updates_per_second", "sampling.memory_gb"
)


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """The key `eval`. `every`: in the unit of the run, 0 for never; `time_fraction`: up to 1."""

    every: int
    num_envs: int | None
    num_episodes: int | None
    epsilon: float
    min_steps: int
    max_episode_steps: int | None
    time_fraction: float | None


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """The key `checkpoint`. `keep`: `None` for all."""

    every: int
    keep: int | None


@dataclasses.dataclass(frozen=True)
class VideoSettings:
    """The key `video`. `every`: 0 for never."""

    every: int
    max_steps: int


@dataclasses.dataclass(frozen=True)
class PBTSettings:
    """The key `pbt`."""

    every: int
    hyperparameters: Sequence[str]
    fitness: str
    fraction: float
    factors: Sequence[float]
    spread: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """The checked values of a configuration.

    **Attributes:** those with names of keys in `conf/config.yaml` have the same meaning.

    - `config`: the configuration itself, with the options of agent, environment and tracker.
    - `kind`, `total`: what the run counts, and its total.
    - `num_envs`: training lanes per seed; 1 offline.
    - `data`: path of a data set, or `None`.
    - `pbt`: `None` without population-based training.
    """

    config: Config
    kind: Kind
    total: int
    num_envs: int
    data: str | None
    seed: int
    num_seeds: int
    devices: int | None
    exact_resume: bool
    log_every: int | None
    eval: EvalSettings
    checkpoint: CheckpointSettings
    video: VideoSettings
    pbt: PBTSettings | None


def read_settings(config: Config) -> Settings:
    """Reads a configuration. Raises `UsageError` for invalid values."""
    data = config.get("data")
    kind = ONLINE if data is None else OFFLINE
    total = whole(config, kind.total, least=1)
    evaluations = _every(config, "eval", total, rounds=20)
    limited = _at(config, "eval.time_fraction") is not None
    return Settings(
        config=config,
        kind=kind,
        total=total,
        num_envs=whole(config, "num_envs", least=1) if data is None else 1,
        data=None if data is None else str(data),
        seed=whole(config, "seed"),
        num_seeds=whole(config, "num_seeds", least=1),
        devices=config["devices"],
        exact_resume=config.get("exact_resume", False),
        log_every=whole_or_none(config, "log_every"),
        eval=EvalSettings(
            every=evaluations,
            num_envs=whole_or_none(config, "eval.num_envs"),
            num_episodes=whole_or_none(config, "eval.num_episodes"),
            epsilon=fraction(config, "eval.epsilon"),
            min_steps=whole_or_none(config, "eval.min_steps") or 0,
            max_episode_steps=whole_or_none(config, "eval.max_episode_steps"),
            time_fraction=fraction(config, "eval.time_fraction") if limited else None,
        ),
        checkpoint=CheckpointSettings(
            every=_every(config, "checkpoint", total, rounds=10, least=1),
            keep=whole_or_none(config, "checkpoint.keep"),
        ),
        video=VideoSettings(
            every=_every(config, "video", total, rounds=4),
            max_steps=whole(config, "video.max_steps", least=1),
        ),
        pbt=_evolution(config, kind, evaluations),
    )


def _every(config: Config, section: str, total: int, *, rounds: int, least: int = 0) -> int:
    """Steps between rounds: as configured, else for `rounds` rounds in a run."""
    if _at(config, f"{section}.every") is None:
        return max(1, total // rounds)
    return whole(config, f"{section}.every", least=least)


def _evolution(config: Config, kind: Kind, evaluations: int) -> PBTSettings | None:
    """**Arguments:** `evaluations`: steps between evaluations; 0: none."""
    if config.get("pbt") is None or _at(config, "pbt.every") is None:
        return None
    fitness = str(_at(config, "pbt.fitness"))
    if fitness.startswith("eval/") and evaluations == 0:
        raise UsageError(f"pbt.fitness={fitness} needs evaluations: leave out eval.every=0")
    if fitness.startswith("episode") and kind is OFFLINE:
        raise UsageError(
            f"pbt.fitness={fitness} does not exist when learning from data: give "
            "pbt.fitness=eval/return"
        )
    return PBTSettings(
        every=whole(config, "pbt.every", least=1),
        hyperparameters=_list(config, "pbt.hyperparameters", str, "names, such as [learning_rate]"),
        fitness=fitness,
        fraction=fraction(config, "pbt.fraction"),
        factors=_list(config, "pbt.factors", int | float, "numbers, such as [0.8, 1.2]"),
        spread=number(config, "pbt.spread", least=1),
    )


def whole(config: Config, name: str, *, least: int = 0) -> int:
    """Reads a whole number from the configuration; `5e5` is one, too.

    **Arguments:** `name`: the key, with dots between levels.

    **Raises:** `UsageError` if it is something else, or below `least`.
    """
    value = _at(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
        raise UsageError(f"{name}={value}: give a whole number")
    if value < least:
        raise UsageError(f"{name}={value}: give a whole number of at least {least}")
    return int(value)


def number(config: Config, name: str, *, least: float = -math.inf) -> float:
    """Reads a number from the configuration.

    **Raises:** `UsageError` if it is something else, or below `least`.
    """
    value = _at(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name}={value}: give a number")
    if value < least:
        raise UsageError(f"{name}={value}: give a number of at least {least:g}")
    return float(value)


def fraction(config: Config, name: str) -> float:
    """Reads a number from 0 to 1. Raises `UsageError` if it is something else."""
    value = number(config, name)
    if not 0 <= value <= 1:
        raise UsageError(f"{name}={value}: give a number from 0 to 1")
    return value


def whole_or_none(config: Config, name: str) -> int | None:
    """Like `whole`, at least 1, but the key may be null."""
    given = _at(config, name) is not None
    return whole(config, name, least=1) if given else None


def _list(config: Config, name: str, kind: Any, what: str) -> list[Any]:
    """Reads a list of entries of a kind. Raises `UsageError` if it is something else."""
    value = _at(config, name)
    if not isinstance(value, list | tuple) or not all(isinstance(x, kind) for x in value):
        raise UsageError(f"{name}={value}: give a list of {what}")
    return list(value)


def _at(config: Config, name: str) -> Any:
    """The value at a key. Raises `UsageError` if a level on the way has no keys."""
    node, keys = config, name.split(".")
    for depth, key in enumerate(keys):
        if not isinstance(node, Mapping):
            section = ".".join(keys[:depth])
            raise UsageError(f"{section}={node}: set its entries instead, such as {name}=...")
        node = node[key]
    return node


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not null, at any depth."""
    return {
        name: given(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if value is not None
    }


def in_use(config: Config) -> dict[str, Any]:
    """The entries that a run uses: those for data only if it has data, and so on."""
    idle = {"resume", "distributed"}
    idle |= {"total_steps", "num_envs"} if config.get("data") else {"num_updates", "sampling"}
    if not given(config.get("pbt") or {}).get("every"):
        idle.add("pbt")
    return {name: value for name, value in given(config).items() if name not in idle}


def without_paths(value: Any) -> Any:
    """A configuration or summary in which absolute paths are cut to their last part."""
    if isinstance(value, Mapping):
        return {name: without_paths(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to paths with dots between levels."""
    found = {}
    for key, node in tree.items():
        inner = isinstance(node, Mapping)
        found |= flat(node, f"{prefix}{key}.") if inner else {prefix + key: node}
    return found


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces values in nested mappings, by path: `"learning_rate"`, `"value.sigma"`."""
    tree = dict(tree)
    for path, value in values.items():
        head, dot, rest = path.partition(".")
        tree[head] = with_values(tree.get(head) or {}, {rest: value}) if dot else value
    return tree


def env_name(config: Config) -> str:
    """`"<suite>/<name>"`."""
    return f"{config['env']['suite']}/{config['env']['name']}"
