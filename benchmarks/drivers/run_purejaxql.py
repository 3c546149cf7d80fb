"""Times purejaxql's training call. Runs under purejaxql's own Python.

Training is one compiled call: it is lowered and compiled first, then timed alone.
The argument is JSON: see `purejaxql_program`.
"""

import json
import resource
import sys
import time

import jax
import purejaxql_program

request = json.loads(sys.argv[1])
train, config = purejaxql_program.make(request)
key = jax.random.PRNGKey(request["seed"])

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
