"""Times purejaxql's training call. Runs under purejaxql's own Python, from its own checkout.

Training is one compiled call: it is lowered and compiled first, then timed alone.
The argument is JSON: `path`, `script`, `algorithm` (its configuration file), `overrides`, `seed`.
"""

import copy
import importlib
import json
import resource
import sys
import time
import types
from pathlib import Path
from typing import Any

request = json.loads(sys.argv[1])
sys.path.insert(0, request["path"])
sys.modules["wandb"] = types.ModuleType("wandb")  # imported there; not called when disabled

import jax  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

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
key = jax.random.PRNGKey(request["seed"])
if hasattr(script, "env_from_config"):  # for teams, the environment is made before
    env, _ = script.env_from_config(copy.deepcopy(config))
    train = script.make_train(config, env)
else:
    train = script.make_train(config)

start = time.perf_counter()
compiled = jax.jit(train).lower(key).compile()
compile_seconds = time.perf_counter() - start
start = time.perf_counter()
jax.block_until_ready(compiled(key))
seconds = time.perf_counter() - start

memory = jax.devices()[0].memory_stats() or {}
result = {
    "env_steps": int(config["NUM_UPDATES"]) * config["NUM_ENVS"] * config["NUM_STEPS"],
    "seconds": seconds,
    "compile_seconds": compile_seconds,
    "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "peak_device_memory_mb": memory.get("peak_bytes_in_use", 0) / 2**20,
    "device": jax.devices()[0].device_kind,
    "versions": {"jax": jax.__version__},
    "config": config,
}
print(json.dumps(result))
