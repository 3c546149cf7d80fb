"""Times `eqx_q.train_offline` after compilation, and sampling batches alone.

The argument is JSON: `agent` and `config` (as `scripts/train.py` composes it), `data` (a data set),
`num_updates`, `num_batches` and `seed`.
"""

import json
import resource
import sys
import time
from importlib.metadata import version

import equinox as eqx
import jax
import jax.numpy as jnp

import eqx_q
from eqx_q.data import Blocks, Dataset, Sampling

request = json.loads(sys.argv[1])
started = time.perf_counter()
dataset = Dataset(request["data"])
replay = jax.block_until_ready(Blocks(dataset, Sampling()).load(0))
setup_seconds = time.perf_counter() - started
description = dataset.description
options = {name: value for name, value in request["agent"].items() if name[0] != "_"}
agent = eqx_q.DQN.create(
    description.observation_space,
    description.action_space,
    key=jax.random.key(request["seed"]),
    **options,
)


def train(num_updates):
    """Seconds of learning, and of compilation and loading the data before."""
    start = time.perf_counter()
    _, history = eqx_q.train_offline(
        agent, dataset, num_updates=num_updates, key=jax.random.key(request["seed"])
    )
    before = history[-1]["compile_seconds"]
    return time.perf_counter() - start - before, before


@eqx.filter_jit
def draw(replay, key):
    """Draws batches and reads every byte of them."""

    def body(index, total):
        place = replay.draw(jax.random.fold_in(key, index), (agent.learns_from.size,))
        batch = replay.transitions(place, agent.learns_from.n_step)
        return total + sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(batch))

    return jax.lax.fori_loop(0, request["num_batches"], body, 0.0)


_, compiling_and_loading = train(1)
seconds, loading = train(request["num_updates"])
jax.block_until_ready(draw(replay, jax.random.key(0)))
start = time.perf_counter()
jax.block_until_ready(draw(replay, jax.random.key(1)))
result = {
    "updates_per_second": request["num_updates"] / seconds,
    "batches_per_second": request["num_batches"] / (time.perf_counter() - start),
    "setup_seconds": setup_seconds,
    "compile_seconds": compiling_and_loading - loading,
    "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "device": jax.devices()[0].device_kind,
    "versions": {package: version(package) for package in ("jax", "equinox", "optax")},
}
print(json.dumps(result))
