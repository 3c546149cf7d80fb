"""Evaluates a trained agent: `python scripts/evaluate.py --help`."""

import logging

from _app import hydra, launch, settings, stored_config, task
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from eqx_q.errors import UsageError
from eqx_q.run import evaluate_run, fraction, whole, whole_or_none, write_json
from eqx_q.saving.hub import locate, results_of

logger = logging.getLogger("eqx_q")


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
@task
def main(config: DictConfig) -> float:
    """Evaluates; returns the mean return."""
    if OmegaConf.is_missing(config, "run"):
        raise UsageError("there is no run to evaluate: give run=DIR")
    directory, results = locate(str(config.run)), results_of(str(config.run))
    stored, given = settings(stored_config(directory)), settings(config)
    protocol = HydraConfig.get().runtime.choices.get("protocol")
    protocol = protocol or stored.get("chosen", {}).get("protocol", "as_trained")
    result = evaluate_run(
        stored,
        directory,
        episodes=whole(given, "episodes", least=1),
        num_envs=whole_or_none(given, "num_envs"),
        seed=whole(given, "seed"),
        epsilon=fraction(given, "epsilon"),
        max_episode_steps=whole_or_none(given, "max_episode_steps"),
        min_steps=whole_or_none(given, "min_steps") or 0,
        protocol=given.get("protocol"),
        video=results / "media" / f"evaluation_{protocol}.gif" if given["video"] else None,
    )
    path = results / f"evaluation_{protocol}.json"
    write_json(path, {"protocol": protocol, **result})
    print(_table(result))
    logger.info("wrote %s", path)
    return result["return_mean"]


def _table(result: dict) -> str:
    rows = [f"{'member':>8}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}"]
    for member, returns in enumerate(result["returns"]):
        mean, std = result["return_per_seed"][member], result["return_std_per_seed"][member]
        rows.append(
            f"{member:>8}{mean:>12.2f}{std:>12.2f}{min(returns):>12.2f}{max(returns):>12.2f}"
        )
    rows.append(f"{'all':>8}{result['return_mean']:>12.2f}")
    for name, values in result["per_seed"].items():
        rows.append(f"{name}: {', '.join(f'{value:.4g}' for value in values)}")
    return "\n".join(rows)


if __name__ == "__main__":
    launch(main)
