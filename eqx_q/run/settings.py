"""What the numbers of a configuration mean, checked before anything begins."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import UsageError

Config = Mapping[str, Any]

_ROUNDS = {"eval": 20, "checkpoint": 10, "video": 4}  # of a run, by default


class Kind(NamedTuple):
    """How a run counts: in the agent's `unit`, up to the configuration's `total`.

    `metric` is the total in metrics, `rate` the speed; `sizes` are what memory depends on.
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
    """The key `eval`. `every`, in the unit of the run: 0 for none; `time_fraction`: up to 1."""

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
    """The key `video`. `every`: 0 for none."""

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
    """A configuration, read once.

    **Attributes:** those named as keys of `conf/config.yaml` mean the same.

    - `config`: the configuration itself, with the options of agent, environment and tracker.
    - `kind`, `total`: what the run counts, and how much of it is asked for.
    - `num_envs`: lanes that are learnt from, per seed; 1 from data.
    - `data`: path of a data set, or `None`.
    - `pbt`: `None` without.
    """

    config: Config
    kind: Kind
    total: int
    num_envs: int
    data: str | None
    seed: int
    num_seeds: int
    devices: int | None
    log_every: int | None
    eval: EvalSettings
    checkpoint: CheckpointSettings
    video: VideoSettings
    pbt: PBTSettings | None


def read_settings(config: Config) -> Settings:
    """What a configuration asks for. Raises `UsageError` for numbers that make no sense."""
    data = config.get("data")
    kind = ONLINE if data is None else OFFLINE
    total = whole(config, kind.total, least=1)
    every = {name: _every(config, name, total) for name in _ROUNDS}
    limited = config["eval"]["time_fraction"] is not None
    return Settings(
        config=config,
        kind=kind,
        total=total,
        num_envs=whole(config, "num_envs", least=1) if data is None else 1,
        data=data,
        seed=whole(config, "seed"),
        num_seeds=whole(config, "num_seeds", least=1),
        devices=config["devices"],
        log_every=whole_or_none(config, "log_every"),
        eval=EvalSettings(
            every=every["eval"],
            num_envs=whole_or_none(config, "eval.num_envs"),
            num_episodes=whole_or_none(config, "eval.num_episodes"),
            epsilon=fraction(config, "eval.epsilon"),
            min_steps=whole_or_none(config, "eval.min_steps") or 0,
            max_episode_steps=whole_or_none(config, "eval.max_episode_steps"),
            time_fraction=fraction(config, "eval.time_fraction") if limited else None,
        ),
        checkpoint=CheckpointSettings(
            every=every["checkpoint"], keep=whole_or_none(config, "checkpoint.keep")
        ),
        video=VideoSettings(
            every=every["video"], max_steps=whole(config, "video.max_steps", least=1)
        ),
        pbt=_evolution(config),
    )


def _every(config: Config, section: str, total: int) -> int:
    """Steps between rounds: as configured, else so many rounds in a run."""
    if config[section]["every"] is not None:
        return whole(config, f"{section}.every", least=int(section == "checkpoint"))
    return max(1, total // _ROUNDS[section])


def _evolution(config: Config) -> PBTSettings | None:
    options = config.get("pbt")
    if options is None or options["every"] is None:
        return None
    if number(config, "pbt.spread") < 1:
        raise UsageError(f"pbt.spread={options['spread']:g}: give a number of at least 1")
    return PBTSettings(
        every=whole(config, "pbt.every", least=1),
        hyperparameters=options["hyperparameters"],
        fitness=str(options["fitness"]),
        fraction=fraction(config, "pbt.fraction"),
        factors=options["factors"],
        spread=number(config, "pbt.spread"),
    )


def whole(config: Config, name: str, *, least: int = 0) -> int:
    """A whole number of the configuration, also where it is written `5e5`.

    **Arguments:** `name`: of the key, with dots between levels.

    **Raises:** `UsageError` where it is something else, or below `least`.
    """
    value = _at(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
        raise UsageError(f"{name}={value}: give a whole number")
    if value < least:
        raise UsageError(f"{name}={value}: give a whole number of at least {least}")
    return int(value)


def number(config: Config, name: str) -> float:
    """A number of the configuration. Raises `UsageError` where it is something else."""
    value = _at(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name}={value}: give a number")
    return float(value)


def fraction(config: Config, name: str) -> float:
    """A number from 0 to 1. Raises `UsageError` where it is something else."""
    value = number(config, name)
    if not 0 <= value <= 1:
        raise UsageError(f"{name}={value}: give a number from 0 to 1")
    return value


def whole_or_none(config: Config, name: str) -> int | None:
    """Like `whole`, of at least 1, where the key may be null."""
    given = _at(config, name) is not None
    return whole(config, name, least=1) if given else None


def _at(config: Config, name: str) -> Any:
    return functools.reduce(operator.getitem, name.split("."), config)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not null, at any depth."""
    return {
        name: given(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if value is not None
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is in nested mappings, by paths with dots between levels."""
    found = {}
    for key, node in tree.items():
        inner = isinstance(node, Mapping)
        found |= flat(node, f"{prefix}{key}.") if inner else {prefix + key: node}
    return found


def replaced(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Nested mappings with another value at a path."""
    key, _, rest = path.partition(".")
    return {**tree, key: replaced(tree[key], rest, value) if rest else value}


def env_name(config: Config) -> str:
    """`"<suite>/<name>"`."""
    return f"{config['env']['suite']}/{config['env']['name']}"
