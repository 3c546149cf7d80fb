"""Counts what purejaxql's training program launches on a GPU. Runs under its own Python.

The argument is JSON: see `purejaxql_program`, and `num_seeds`.
"""

import json
import sys

import h200  # before JAX
import hlo
import jax
import purejaxql_program

request = json.loads(sys.argv[1])
train, config = purejaxql_program.make(request)
keys = jax.random.split(jax.random.PRNGKey(request["seed"]), request["num_seeds"])
compiled = h200.compile_for_gpu(*((train, keys[0]) if len(keys) == 1 else (jax.vmap(train), keys)))
updates = [
    loop
    for loop in hlo.read(compiled.as_text()).everywhere()
    if loop.trips == int(config["NUM_UPDATES"])
]
update = max(updates, key=lambda loop: loop.total)
counted = hlo.counts(update, int(config["NUM_STEPS"]), int(config["NUM_MINIBATCHES"]))
memory = compiled.memory_analysis().temp_size_in_bytes
print(json.dumps({**counted, "temporary_mb": memory / 2**20}))
