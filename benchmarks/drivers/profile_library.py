"""Counts the kernels of training that the profiler sees on the device.

The argument is JSON: `config` (as `scripts/train.py` composes it), `num_updates` and `seed`.
"""

import gzip
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any


def kernels(trace: dict[str, Any]) -> Counter[str]:
    """Names of the events on a GPU's streams in a trace of Chrome's format."""
    events = trace["traceEvents"]
    named = [e for e in events if e.get("ph") == "M"]
    gpus = {
        e["pid"]
        for e in named
        if e["name"] == "process_name" and e["args"]["name"].startswith("/device:GPU")
    }
    streams = {
        (e["pid"], e["tid"])
        for e in named
        if e["name"] == "thread_name" and e["args"]["name"].startswith("Stream")
    }
    return Counter(
        e["name"]
        for e in events
        if e.get("ph") == "X" and e["pid"] in gpus and (e["pid"], e["tid"]) in streams
    )


def main() -> None:
    import equinox as eqx
    import jax

    import eqx_q
    from eqx_q.loops.training import start
    from eqx_q.run import make_agent, make_env

    request = json.loads(sys.argv[1])
    config = {**request["config"], "seed": request["seed"]}
    env = make_env(config, config["num_seeds"] * config["num_envs"])
    state = start(make_agent(config, env), env, key=jax.random.key(0))
    advance = eqx.filter_jit(eqx_q.advance)
    number = jax.numpy.int32(request["num_updates"])
    state, _ = jax.block_until_ready(advance(state, env, number))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, create_perfetto_trace=False):
            jax.block_until_ready(advance(state, env, number))
        (path,) = Path(directory).rglob("*.trace.json.gz")
        seen = kernels(json.loads(gzip.decompress(path.read_bytes())))
    print(
        json.dumps(
            {
                "seen_per_update": seen.total() / request["num_updates"],
                "most_frequent": dict(seen.most_common(20)),
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    main()
