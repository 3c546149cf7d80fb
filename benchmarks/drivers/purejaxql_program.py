"""purejaxql's training program, from its own checkout and its own configuration file.

A request has `path`, `script`, `algorithm` (its configuration file), `overrides` and `seed`.
"""

import copy
import importlib
import sys
import types
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def make(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The function that trains, given a key, and its configuration."""
    sys.path.insert(0, request["path"])
    sys.modules["wandb"] = types.ModuleType("wandb")  # imported there; not called when disabled
    script = importlib.import_module(f"purejaxql.{request['script']}")
    files = Path(request["path"], "purejaxql", "config")
    config: Any = OmegaConf.to_container(
        OmegaConf.merge(
            OmegaConf.load(files / "config.yaml"),
            OmegaConf.load(files / "alg" / f"{request['algorithm']}.yaml"),
            {"WANDB_MODE": "disabled", "TEST_DURING_TRAINING": False, "SEED": request["seed"]},
            request["overrides"],
        )
    )
    if not hasattr(script, "env_from_config"):
        return script.make_train(config), config
    env, _ = script.env_from_config(copy.deepcopy(config))  # for teams, it is made before
    return script.make_train(config, env), config
