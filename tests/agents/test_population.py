"""A population learns the same as its members alone."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_q
from eqx_q.errors import UsageError
from eqx_q.nets import Inputs
from eqx_q.types import Episode, Rollout, TimeStep

OBS = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
ACT = gymnasium.spaces.Discrete(3)
S, T, N = 3, 4, 2

# Compiled: in eager mode every operation is compiled for itself.
update = eqx.filter_jit(lambda agent, rollout, key: agent.update(rollout, key=key))


def make_member(key, learning_rate, norm="layer_norm"):
    return eqx_q.PQN.create(
        OBS,
        ACT,
        key=key,
        network="mlp",
        network_options={"hidden_sizes": [8], "norm": norm},
        rollout_length=T,
        num_minibatches=2,
        learning_rate=learning_rate,
        schedule_steps=100.0,
    )


def make_rollout(seed=0):
    rng = np.random.default_rng(seed)
    shape = (T + 1, S * N)
    ended = rng.random(shape) < 0.2
    first = np.concatenate([rng.random((1, S * N)) < 0.5, ended[:-1]])
    reward = rng.normal(size=shape).astype(np.float32)
    timesteps = TimeStep(
        obs=rng.normal(size=(*shape, 4)).astype(np.float32),
        reward=reward,
        terminated=ended & ~first,
        truncated=np.zeros(shape, bool),
        first=first,
        episode=Episode(ended & ~first, reward, np.ones(shape, np.int32)),
    )
    actions = rng.integers(0, 3, size=(T, S * N)).astype(np.int32)
    return jax.tree.map(jnp.asarray, Rollout(timesteps, actions))


def lanes_of(rollout, i):
    return jax.tree.map(lambda x: x[:, i * N : (i + 1) * N], rollout)


def q_values(agent, obs):
    return agent.network(Inputs(obs[None]), agent.statistics, ()).values[0, ..., 0]


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_update_equals_each_members_own(norm):
    keys = jax.random.split(jax.random.key(0), S)
    rates = jnp.array([1e-4, 3e-4, 1e-3])
    population = eqx_q.Population(
        eqx.filter_vmap(lambda key, rate: make_member(key, rate, norm))(keys, rates)
    )
    alone = [make_member(key, rate, norm) for key, rate in zip(keys, rates, strict=True)]
    for i in range(2):
        rollout, key = make_rollout(i), jax.random.key(i)
        population, metrics = update(population, rollout, key=key)
        for s, member_key in enumerate(jax.random.split(key, S)):
            alone[s], own = update(alone[s], lanes_of(rollout, s), key=member_key)
            np.testing.assert_allclose(metrics["loss"][s], own["loss"], rtol=1e-4)
    # Q-values, not parameters: the gradient of a bias before batch norm is 0 but for rounding, and
    # Adam's steps have the size of the learning rate however small the gradient.
    obs = make_rollout(7).timesteps.obs[0]
    for s in range(S):
        np.testing.assert_allclose(
            q_values(population.member(s), obs), q_values(alone[s], obs), rtol=1e-4, atol=1e-4
        )
    assert not np.allclose(metrics["loss"][0], metrics["loss"][1])


def test_members_act_on_their_own_lanes():
    keys = jax.random.split(jax.random.key(0), S)
    population = eqx_q.Population(eqx.filter_vmap(lambda key: make_member(key, 1e-3))(keys))
    obs = np.random.default_rng(0).normal(size=(S * N, 4)).astype(np.float32)
    decision = population.act(obs)
    for s in range(S):
        own = population.member(s).act(obs[s * N : (s + 1) * N])
        np.testing.assert_array_equal(decision.action[s * N : (s + 1) * N], own.action)
        np.testing.assert_allclose(decision.value[s * N : (s + 1) * N], own.value, rtol=1e-5)


def test_epsilon_may_be_one_for_each_member():
    keys = jax.random.split(jax.random.key(0), S)
    population = eqx_q.Population(eqx.filter_vmap(lambda key: make_member(key, 1e-3))(keys))
    obs = np.zeros((S * 500, 4), np.float32)
    actions = population.act(
        obs, epsilon=jnp.array([0.0, 1.0, 0.0]), key=jax.random.key(0)
    ).action.reshape(S, 500)
    assert [len(np.unique(a)) for a in actions] == [1, 3, 1]


def test_bad_input():
    member = make_member(jax.random.key(0), 1e-3)
    with pytest.raises(UsageError, match="filter_vmap"):
        eqx_q.Population(member)
    keys = jax.random.split(jax.random.key(0), S)
    population = eqx_q.Population(eqx.filter_vmap(lambda key: make_member(key, 1e-3))(keys))
    with pytest.raises(UsageError, match="4 lanes do not divide over 3 members"):
        population.act(np.zeros((4, 4), np.float32))
    with pytest.raises(UsageError, match=r"obs has no axis of lanes: .* all 3 members"):
        population.act(np.zeros(4, np.float32))


@pytest.mark.parametrize(("memory", "num_agents"), [("gru", 2), ("lstm", None), ("mingru", None)])
def test_members_with_memory_act_and_learn_as_they_would_alone(memory, num_agents):
    """With separate parameters for the agents of a team: one more axis in all of them."""

    def create(key):
        return eqx_q.PQN.create(
            OBS,
            ACT,
            key=key,
            num_agents=num_agents,
            mixer="vdn",
            network_options={
                "hidden_sizes": [8],
                "memory": memory,
                "memory_size": 5,
                "share_parameters": False,
            },
            rollout_length=T,
            num_minibatches=2,
            num_epochs=1,
        )

    rng, agents = np.random.default_rng(0), num_agents or 1
    alone = [create(key) for key in jax.random.split(jax.random.key(0), S)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x) if eqx.is_array(x[0]) else x[0], *alone)
    population = eqx_q.Population(stacked)
    team = () if num_agents is None else (num_agents,)
    rollout = make_rollout()
    obs = jnp.asarray(rng.normal(size=(T + 1, S * N, *team, 4)), jnp.float32)
    actions = jnp.asarray(rng.integers(0, 3, size=(T, S * N, *team)), jnp.int32)
    start = population.initial_memory(S * N)
    decision = population.act(obs[0], start, first=rollout.timesteps.first[0])
    timesteps = eqx.tree_at(lambda s: s.obs, rollout.timesteps, obs)
    learnt, _ = update(
        population, Rollout(timesteps, actions, decision.memory), key=jax.random.key(1)
    )
    for i, (agent, key) in enumerate(
        zip(alone, jax.random.split(jax.random.key(1), S), strict=True)
    ):
        lanes, rows = slice(i * N, (i + 1) * N), slice(i * N * agents, (i + 1) * N * agents)
        own = agent.act(
            obs[0, lanes], agent.initial_memory(N), first=rollout.timesteps.first[0, lanes]
        )
        np.testing.assert_array_equal(own.action, decision.action[lanes])
        memory_there = jax.tree.map(lambda x, rows=rows: x[rows], decision.memory)
        for ours, theirs in zip(
            jax.tree.leaves(memory_there), jax.tree.leaves(own.memory), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        part = jax.tree.map(lambda x, lanes=lanes: x[:, lanes], (timesteps, actions))
        expected, _ = update(agent, Rollout(*part, own.memory), key=key)
        for ours, theirs in zip(
            jax.tree.leaves(learnt.member(i)), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
