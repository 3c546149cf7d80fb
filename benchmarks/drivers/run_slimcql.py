"""Times slimCQL's updates and sampling, called as in its own training loop.

Runs under its Python. The argument is JSON: `path`, `arrays` (an .npz of frames, actions, rewards,
terminals and episode ends), `algorithm`, `hyperparameters`, `num_updates`, `updates_per_call`,
`num_batches` and `seed`. Its loop makes 500 updates per call, whose batches take 7 GB of memory;
here it makes fewer, which does not affect its speed.
"""

import gzip
import json
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

request = json.loads(sys.argv[1])
sys.path.insert(0, request["path"])

import jax  # noqa: E402

# pyright: reportMissingImports=false
from slimcql.algorithms.cql import CQL  # noqa: E402
from slimcql.algorithms.dqn import DQN  # noqa: E402
from slimcql.sample_collection.dataset import Dataset  # noqa: E402
from slimcql.sample_collection.replay_buffer import ReplayBuffer  # noqa: E402
from slimcql.sample_collection.samplers import Uniform  # noqa: E402

arrays = np.load(request["arrays"])
values = request["hyperparameters"]
rows = len(arrays["actions"])
with tempfile.TemporaryDirectory() as directory:
    home = Path(directory, "1", "0")
    home.mkdir(parents=True)
    with gzip.GzipFile(home / "observations.gz", "wb", compresslevel=1) as file:
        np.save(file, arrays["frames"])
    sampling = (values["batch_size"], 4, values["n_step"], values["discount"], None)
    ReplayBuffer(Uniform(), rows, *sampling).save(
        str(home.parent),
        0,
        *(arrays[name] for name in ("actions", "rewards", "terminals", "ends")),
    )
    started = time.perf_counter()
    dataset = Dataset(str(home.parent), 1, rows, Uniform(), *sampling)
    dataset.load_dataset()
    setup_seconds = time.perf_counter() - started
options = {
    "features": [32, 64, 64, 512],
    "architecture_type": "cnn",
    "learning_rate": values["learning_rate"],
    "gamma": values["discount"],
    "update_horizon": values["n_step"],
    "target_update_period": values["target_update_period"],
    "adam_eps": values["adam_epsilon"],
}
if request["algorithm"] == "cql":
    options["alpha_cql"] = values["alpha"]
create = {"cql": CQL, "dqn": DQN}[request["algorithm"]]
agent = create(jax.random.PRNGKey(request["seed"]), (84, 84, 4), request["num_actions"], **options)
call = request["updates_per_call"]


def update():
    start = time.perf_counter()
    agent.n_updates_online_params(call, dataset)
    jax.block_until_ready(agent.params)
    return time.perf_counter() - start


compile_seconds = update()
seconds = sum(update() for _ in range(request["num_updates"] // call))
started = time.perf_counter()
for _ in range(request["num_batches"] // call):
    jax.block_until_ready(dataset.sample(call)[0])
result = {
    "updates_per_second": request["num_updates"] // call * call / seconds,
    "batches_per_second": request["num_batches"] // call * call / (time.perf_counter() - started),
    "setup_seconds": setup_seconds,
    "compile_seconds": compile_seconds,
    "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "versions": {package: version(package) for package in ("jax", "flax", "optax")},
}
print(json.dumps(result))
