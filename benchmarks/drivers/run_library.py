"""Times `eqx_q.train` after compilation.

The argument is JSON: `config` (as `scripts/train.py` composes it) and `seed`.
"""

import json
import resource
import sys
import time
from importlib.metadata import version

import jax

import eqx_q
from eqx_q.run import make_agent, make_env

request = json.loads(sys.argv[1])
config = {**request["config"], "seed": request["seed"]}
num_seeds = config["num_seeds"]
env = make_env(config, num_seeds * config["num_envs"])
agent = make_agent(config, env)


def train(total_steps):
    start = time.perf_counter()
    _, history = eqx_q.train(agent, env, total_steps=total_steps, key=jax.random.key(1))
    return time.perf_counter() - start, history


_, history = train(1)  # one update: everything is compiled after it
compile_seconds = history[-1]["compile_seconds"]
# Times the whole call: resets, copies, chunks, and the host's work between them.
seconds, history = train(config["total_steps"])

memory = jax.devices()[0].memory_stats() or {}
result = {
    "env_steps": num_seeds * history[-1]["env_steps"],
    "seconds": seconds,
    "compile_seconds": compile_seconds,
    "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "peak_device_memory_mb": memory.get("peak_bytes_in_use", 0) / 2**20,
    "device": jax.devices()[0].device_kind,
    "versions": {package: version(package) for package in ("jax", "equinox", "optax")},
    "config": config,
}
print(json.dumps(result))
