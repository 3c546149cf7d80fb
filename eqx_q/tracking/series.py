"""Under which names trackers show the metrics of a run.

`metrics.jsonl` keeps the names that a run uses.
"""

# Told once, as parameters: these never change, and those only count.
CONSTANTS = frozenset({"compile_seconds", "total_steps", "total_updates"})
COUNTS = frozenset({"env_steps", "num_updates", "transitions", "done"})

_LOSSES = {"loss", "td_error", "grad_norm"}
_LOSSES |= {"conservative_gap", "out_of_range", "action_rounding", "dead_units"}


def series(metric: str) -> str | None:
    """The series that a metric belongs to, `"<group>/<name>"`; `None` for what is none.

    | metric | series |
    |---|---|
    | `eval/return`, and all that has a group | the same |
    | `episode_return`, `episode_length`, ... | `train/return`, `train/length`, ... |
    | `loss`, `td_error`, `grad_norm`, ... | `loss/loss`, ... |
    | `steps_per_second`, `train_seconds`, `eval/seconds`, ... | `time/steps_per_second`, ... |
    | `q_value`, `epsilon`, ... | `train/q_value`, ... |
    """
    if metric in CONSTANTS | COUNTS:
        return None
    if metric.endswith(("_seconds", "/seconds", "_per_second")):
        return "time/" + metric.replace("/", "_")
    if "/" in metric:
        return metric
    if metric in _LOSSES:
        return f"loss/{metric}"
    return "train/" + metric.removeprefix("episode_")
