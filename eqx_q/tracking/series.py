"""Names of metrics in trackers. `metrics.jsonl` uses the original names."""

# Logged as hyperparameters: constants at the start, counts with their last values at the end.
CONSTANTS = frozenset({"compile_seconds", "total_steps", "total_updates"})
COUNTS = frozenset({"env_steps", "num_updates", "transitions", "done"})

_LOSSES = {"loss", "td_error", "grad_norm"}
_LOSSES |= {"conservative_gap", "out_of_range", "action_rounding", "dead_units"}


def series(metric: str) -> str | None:
    """Returns the series of a metric, `"<group>/<name>"`, or `None` if it is no series.

    | metric | series |
    |---|---|
    | `eval/return` and other names with a group | the same |
    | `episode_return`, `episode_length`, ... | `train/return`, `train/length`, ... |
    | `loss`, `td_error`, `grad_norm`, ... | `loss/loss`, ... |
    | `steps_per_second`, `train_seconds`, `eval/seconds`, ... | `time/steps_per_second`, ... |
    | `q_value`, `epsilon`, ... | `train/q_value`, ... |
    | `env_steps`, `total_steps`, `compile_seconds`, ... | `None`: a hyperparameter |
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
