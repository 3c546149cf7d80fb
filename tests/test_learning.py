"""Agents learn tasks that take seconds: with memory, and in teams."""

import jax
import numpy as np
import pytest
from environments import MatrixGame

import eqx_q

# The sum of a row's worth (0, 3, 1) and a column's (2, 0, 4): what VDN can represent. Best: 7.
ADDITIVE = ((2.0, 0.0, 4.0), (5.0, 3.0, 7.0), (3.0, 1.0, 5.0))


def train(env, total_steps, **options):
    agent = eqx_q.PQN.create(
        env.observation_space,
        env.action_space,
        key=jax.random.key(0),
        num_agents=env.num_agents,
        **options,
    )
    return eqx_q.train(agent, env, total_steps=total_steps, key=jax.random.key(1))[0]


@pytest.mark.parametrize("num_members", [None, 2])
def test_vdn_finds_the_best_of_a_matrix_game_and_what_each_agent_adds(num_members):
    options = {
        "network_options": {"hidden_sizes": [16]},
        "mixer": "vdn",
        "rollout_length": 8,
        "num_epochs": 4,
        "num_minibatches": 4,
        "learning_rate": 0.01,
        "epsilon_end": 1.0,
    }
    env = MatrixGame(16, ADDITIVE)
    if num_members is None:
        agent = train(env, 6000, **options)
    else:
        create = jax.vmap(
            lambda key: eqx_q.PQN.create(
                env.observation_space, env.action_space, key=key, num_agents=2, **options
            )
        )
        population = eqx_q.Population(create(jax.random.split(jax.random.key(0), num_members)))
        lanes = MatrixGame(16 * num_members, ADDITIVE)
        population, _ = eqx_q.train(population, lanes, total_steps=6000, key=jax.random.key(1))
        agent = population.member(1)
    decision = agent.act(np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(decision.action, [1, 2])
    np.testing.assert_allclose(np.sum(decision.value), 7.0, atol=0.3)


@pytest.mark.parametrize(("memory", "low", "high"), [("gru", 0.9, 1.0), ("none", -0.5, 0.5)])
def test_only_an_agent_with_memory_remembers(memory, low, high):
    """bsuite's MemoryChain: the first observation is asked for at the end; 1 or -1."""
    env = eqx_q.make("gymnax/MemoryChain-bsuite", num_envs=16, memory_length=5)
    agent = train(
        env,
        12_000,
        network_options={"hidden_sizes": [32], "memory": memory, "memory_size": 32},
        rollout_length=16,
        num_epochs=4,
        num_minibatches=4,
        learning_rate=3e-3,
        lambda_=0.9,
        epsilon_decay=0.5,
    )
    returns = eqx_q.evaluate(agent, env.replicate(64), num_episodes=256, key=jax.random.key(2))
    assert low <= returns.mean() <= high
