"""Short trainings whose numbers are kept in `golden/`, to reveal unintended changes.

`python tests/golden_cases.py` replaces `golden/traces.json`: only run it on purpose.
"""

import json
import sys
from pathlib import Path

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from environments import Relay

import eqx_q

TRACES = Path(__file__).parent / "golden" / "traces.json"

_UPDATES = 6
_SMALL = {"hidden_sizes": (16,)}
_PQN = {"rollout_length": 8, "num_minibatches": 2, "epsilon_decay": 1.0}


def online(env, network="auto", **options):
    """Metrics of the first updates in an environment, and the agent after them."""
    options = _PQN | options
    agent = eqx_q.PQN.create(
        env.observation_space,
        env.action_space,
        num_agents=env.num_agents,
        key=jax.random.key(1),
        network=network,
        **options,
    )
    total_steps = _UPDATES * options["rollout_length"] * env.num_envs
    agent, history = eqx_q.train(
        agent, env, total_steps=total_steps, key=jax.random.key(2), log_every=1
    )
    return agent, history


def offline(create, **options):
    """Metrics of the first updates on random transitions, and the agent after them."""
    space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    options = {"learning_rate": 0.01, "target_update_period": 2, "batch_size": 16} | options
    actions = gymnasium.spaces.Discrete(4)
    agent = create(space, actions, key=jax.random.key(1), network="mlp", **options)
    rng = np.random.default_rng(0)
    history = []
    update = eqx.filter_jit(lambda agent, batch, key: agent.update(batch, key=key)[:2])
    for i in range(_UPDATES):
        n = options.get("n_step", 1)
        batch = eqx_q.Transitions(
            obs=rng.normal(size=(16, 3)).astype(np.float32),
            action=rng.integers(0, 4, 16).astype(np.int32),
            reward=rng.normal(size=(16, n)).astype(np.float32),
            length=np.full(16, n, np.int32),
            terminated=rng.random(16) < 0.2,
            next_obs=rng.normal(size=(16, 3)).astype(np.float32),
        )
        agent, metrics = update(agent, batch, jax.random.key(i))
        history.append(jax.device_get(metrics))
    return agent, history


CASES = {
    "pqn": lambda: online(eqx_q.make("gymnax/CartPole-v1", 4), network_options=_SMALL),
    "pqn_cnn": lambda: online(
        eqx_q.make("gymnax/Breakout-MinAtar", 4),
        learning_rate_end=1e-5,
        network_options=_SMALL | {"channels": 4, "head": "dueling"},
    ),
    "pqn_normalised": lambda: online(
        eqx_q.make("gymnax/CartPole-v1", 4),
        lane_groups=2,
        network_options=_SMALL | {"normalize_input": True, "norm": "batch_renorm"},
    ),
    "pqn_rnn": lambda: online(
        eqx_q.make("gymnax/MemoryChain-bsuite", 4, memory_length=3),
        burn_in=4,
        network_options=_SMALL | {"memory": "gru", "memory_size": 8, "last_reward": True},
    ),
    "pqn_lstm": lambda: online(
        eqx_q.make("gymnax/CartPole-v1", 4, observe=[0, 2]),
        lane_groups=2,
        network_options=_SMALL | {"memory": "lstm", "memory_size": 8},
    ),
    "pqn_vdn": lambda: online(Relay(4), mixer="vdn", network_options=_SMALL),
    "pqn_independent": lambda: online(
        Relay(4, limit=True),
        reward_scale=0.5,
        network_options=_SMALL | {"share_parameters": False, "normalize_input": True},
    ),
    "pqn_vdn_rnn": lambda: online(
        Relay(4), mixer="vdn", network_options=_SMALL | {"memory": "mingru", "memory_size": 8}
    ),
    "dqn": lambda: offline(eqx_q.DQN.create, n_step=3, double=True, network_options=_SMALL),
    "cql": lambda: offline(eqx_q.CQL.create, network_options=_SMALL | {"head": "dueling"}),
    "cql_quantiles": lambda: offline(
        eqx_q.CQL.create, value={"name": "quantile", "num_quantiles": 5}, network_options=_SMALL
    ),
    "bc": lambda: offline(eqx_q.BC.create, network_options=_SMALL),
}

_NAMES = ("loss", "td_error", "q_value", "target", "grad_norm", "episode_return", "agreement")


def trace(agent, history):
    """What is compared: some metrics of every update, and the size of every parameter."""
    rows = {
        name: [float(row[name]) for row in history if np.isfinite(row[name])]
        for name in _NAMES
        if name in history[0]
    }
    parameters = jax.tree.leaves(eqx.filter(agent.network, eqx.is_inexact_array))
    return rows | {"parameters": sorted(float(jnp.linalg.norm(x)) for x in parameters)}


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(CASES)
    TRACES.write_text(json.dumps({name: trace(*CASES[name]()) for name in chosen}, indent=1) + "\n")
