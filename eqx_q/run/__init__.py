"""Runs, as the scripts make them: from a configuration to a directory of results.

A configuration is a nested dictionary with the keys of `conf/config.yaml`. The directory has

    config.yaml  metrics.jsonl  summary.json  agent.eqx  checkpoints/  media/
"""

from .collecting import collect_run as collect_run
from .evaluation import evaluate_run as evaluate_run
from .exporting import export_run as export_run
from .making import (
    changeable as changeable,
    make_agent as make_agent,
    make_env as make_env,
)
from .publishing import publish_run as publish_run
from .replaying import replay_run as replay_run
from .search import search_run as search_run
from .settings import (
    Config as Config,
    Settings as Settings,
    fraction as fraction,
    number as number,
    read_settings as read_settings,
    whole as whole,
    whole_or_none as whole_or_none,
)
from .summary import finished as finished, provenance as provenance, write_json as write_json
from .sweeps import as_markdown as as_markdown, summarize_sweep as summarize_sweep
from .training import train_run as train_run
from .watching import watch_run as watch_run
