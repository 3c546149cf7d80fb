"""The first twenty updates of every tuned configuration at tiny sizes, kept in `golden/`.

`python tests/golden_configs.py compare [NAMES]` compares all of them, or some, in some minutes;
the tests compare those of `QUICK`. `write` instead of `compare` replaces the stored numbers: only
do so on purpose.
"""

import json
import sys
from pathlib import Path

import equinox as eqx
import hydra
import jax
import numpy as np
from golden_cases import trace
from omegaconf import OmegaConf

import eqx_q
from eqx_q.agents import Batches, Rollouts
from eqx_q.run import make_agent, make_env
from eqx_q.spaces import factors, leaves, shapes

CONF = Path(__file__).resolve().parent.parent / "conf"
TRACES = Path(__file__).parent / "golden" / "configs.json"

_UPDATES = 20
_LANES, _LENGTH, _BATCH = 4, 8, 8
_NETWORK = ("hidden_sizes=[8]", "memory_size=8", "channels=4", "embedding_size=8")


def _names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _choice(name):
    """The agent and the environment that a tuned file is of."""
    agents = [agent for agent in _names("agent") if name.startswith(f"{agent}_")]
    agent = max(agents, key=len, default="pqn")
    envs = [env for env in _names("env") if env in name]
    return agent, max(envs, key=len, default="cartpole")


QUICK = (
    "bc_atari",
    "bc_minatar",
    "cleanrl_cartpole",
    "cql_atari",
    "cql_minatar",
    "dqn_minatar",
    "pqn_acrobot",
    "pqn_cartpole",
    "pqn_gymnasium",
    "pqn_hopper",
    "pqn_pendulum",
    "pqn_vdn_pettingzoo",
)
NAMES = [name for name in _names("tuned") if name != "none"]


def _compose(name, *overrides):
    agent, env = _choice(name)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(
            "config", [f"agent={agent}", f"env={env}", f"tuned={name}", "seed=3", *overrides]
        )
    return OmegaConf.to_container(config, resolve=True)


def _tiny(name):
    """The configuration, with small numbers for what is large in it."""
    agent = _compose(name)["agent"]
    own = agent["network_options"]
    sizes = [f"num_envs={_LANES}"]
    sizes += [
        f"agent.network_options.{size}"
        for size in _NETWORK
        if own[size.partition("=")[0]] is not None or size.startswith("hidden")
    ]
    if "rollout_length" in agent:
        sizes += [f"agent.rollout_length={_LENGTH}", "agent.num_minibatches=2"]
        sizes += [f"agent.burn_in={min(agent['burn_in'], 4)}"]
    else:
        sizes += [f"agent.batch_size={_BATCH}"]
    return _compose(name, *sizes)


def run(name):
    """Its metrics, and its parameters' norms afterwards."""
    config = _tiny(name)
    env = make_env(config, _LANES)
    try:
        agent = make_agent(config, env)
        learn = _offline if isinstance(agent.learns_from, Batches) else _online
        return trace(*learn(agent, env))
    finally:
        env.close()


def _online(agent, env):
    assert isinstance(agent.learns_from, Rollouts)
    total = _UPDATES * agent.learns_from.units(env.num_envs)
    return eqx_q.train(agent, env, total_steps=total, key=jax.random.key(4), log_every=1)


def _offline(agent, env):
    rng = np.random.default_rng(0)
    agent = agent.with_schedule(jax.numpy.float32(_UPDATES))
    update = eqx.filter_jit(lambda agent, batch, key: agent.update(batch, key=key)[:2])
    history = []
    for i in range(_UPDATES):
        agent, metrics = update(agent, _transitions(agent, env, rng), jax.random.key(i))
        history.append(jax.device_get(metrics))
    return agent, history


def _transitions(agent, env, rng):
    n = getattr(agent, "n_step", 1)
    (choices,) = factors(env.action_space)

    def obs():
        ((_, leaf),) = leaves(env.observation_space)
        shape = shapes(env.observation_space, _BATCH).shape
        return rng.integers(0, 2 if leaf.dtype == bool else 255, shape).astype(leaf.dtype)

    return eqx_q.Transitions(
        obs=obs(),
        action=rng.integers(0, choices, _BATCH).astype(np.int32),
        reward=rng.normal(size=(_BATCH, n)).astype(np.float32),
        length=np.full(_BATCH, n, np.int32),
        terminated=rng.random(_BATCH) < 0.2,
        next_obs=obs(),
    )


def compare(name):
    """Raises `AssertionError` where a configuration gives other numbers than it gave."""
    expected, found = json.loads(TRACES.read_text())[name], run(name)
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        np.testing.assert_allclose(found[kind], values, rtol=1e-3, atol=1e-4, err_msg=kind)


def _write(name):
    kept = json.loads(TRACES.read_text()) | {name: run(name)}
    rounded = {
        name: {kind: [float(f"{x:.6g}") for x in values] for kind, values in kept[name].items()}
        for name in NAMES
        if name in kept
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in rounded.items())
    TRACES.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    do = {"compare": compare, "write": _write}[sys.argv[1]]
    jax.config.update("jax_disable_most_optimizations", True)  # which compiles sooner
    for name in sys.argv[2:] or NAMES:
        do(name)
        print(name, flush=True)
        jax.clear_caches()
