"""Team networks against single networks applied agent by agent."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import call as call_all, make

from eqx_q.errors import UsageError
from eqx_q.nets import Inputs, PerAgent
from eqx_q.saving.structure import decode, encode

KEY = jax.random.key(0)
T, N, M, ACTIONS = 4, 2, 3, 5
VECTOR = gymnasium.spaces.Box(-1, 1, (6,), np.float32)
BYTES = gymnasium.spaces.Box(0, 255, (6,), np.uint8)
GRID = gymnasium.spaces.Box(0, 1, (5, 4, 2), np.float32)
FIRST = np.zeros((T, N * M), bool)
FIRST[2, 1::M] = FIRST[0, 0] = True
ACTION = np.random.default_rng(0).integers(0, ACTIONS, (T, N * M))


def observations(space):
    shape = (T, N * M, *space.shape)
    if space.dtype == np.uint8:
        return jax.random.randint(KEY, shape, 0, 256).astype(jnp.uint8)
    return jax.random.normal(KEY, shape)


def call(network, obs, statistics=None, memory=None, agent=None, **more):
    """The network on all lanes, or on those of one agent."""
    lanes = slice(None) if agent is None else slice(agent, None, M)
    given = {"first": FIRST, "last_action": np.where(FIRST, -1, ACTION)[..., None]} | more
    given = {name: jnp.asarray(value)[:, lanes] for name, value in given.items()}
    return call_all(network, obs[:, lanes], statistics, memory, **given)


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def with_one_hot(obs):
    """Vectors, then whose they are."""
    agents = np.tile(np.eye(M, dtype=np.float32), (T, N, 1))
    return jnp.concatenate([obs, agents], axis=-1)


@pytest.mark.parametrize("memory", ["none", "gru"])
@pytest.mark.parametrize("space", [VECTOR, BYTES])
def test_a_vector_is_followed_by_the_agent(space, memory):
    options = {"hidden_sizes": (8,), "memory": memory, "memory_size": 4, "key": KEY}
    team = make("auto", space, ACTIONS, num_agents=M, **options)
    wider = gymnasium.spaces.Box(-1, 1, (6 + M,), np.float32)
    single = make("auto", wider, ACTIONS, **options)
    obs = observations(space)
    floats = obs / 255 if space.dtype == np.uint8 else obs
    assert_close(call(team, obs).values, call(single, with_one_hot(floats)).values)


def test_normalised_input_leaves_the_agent_alone():
    options = {"hidden_sizes": (8,), "key": KEY, "norm": "none"}
    team = make("mlp", VECTOR, ACTIONS, num_agents=M, normalize_input=True, **options)
    wider = gymnasium.spaces.Box(-1, 1, (6 + M,), np.float32)
    single = make("mlp", wider, ACTIONS, **options)
    obs = 3 + 2 * observations(VECTOR)
    mask = jnp.ones((T, N * M), bool)
    output = call(team, obs, team.initial_statistics(), batch_mask=mask)
    rows = np.asarray(obs).reshape(-1, 6)
    normal = ((rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)).reshape(obs.shape)
    assert_close(output.values, call(single, with_one_hot(normal)).values)


FRAMES = gymnasium.spaces.Box(0, 255, (3, 5, 6), np.uint8)  # channels first


@pytest.mark.parametrize("space", [GRID, FRAMES])
def test_pictures_have_channels_that_say_whose_they_are(space):
    options = {"hidden_sizes": (8,), "key": KEY}
    team = make("minatar_cnn", space, ACTIONS, num_agents=M, **options)
    obs = observations(space)
    pictures = jnp.moveaxis(obs / 255, 2, -1) if space is FRAMES else obs
    agents = np.tile(np.eye(M, dtype=np.float32), (T, N, 1))[:, :, None, None]
    agents = np.broadcast_to(agents, (*pictures.shape[:-1], M))
    wider = jnp.concatenate([pictures, agents], axis=-1)
    single_space = gymnasium.spaces.Box(0, 1, wider.shape[2:], np.float32)
    single = make("minatar_cnn", single_space, ACTIONS, **options)
    assert_close(call(team, obs).values, call(single, wider).values)


@pytest.mark.parametrize("memory", ["none", "lstm", "mingru"])
def test_separate_parameters_are_single_networks(memory):
    options = {"hidden_sizes": (8,), "norm": "batch_norm", "memory": memory, "memory_size": 4}
    team = make("mlp", VECTOR, ACTIONS, key=KEY, num_agents=M, share_parameters=False, **options)
    assert isinstance(team, PerAgent)
    obs, mask = observations(VECTOR), jnp.asarray(~FIRST)
    before = team.initial_memory(N * M)
    before = jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), before)
    statistics = team.initial_statistics()
    output = call(team, obs, statistics, before, batch_mask=mask)
    acting = call(team, obs, output.statistics, before)
    for m, key in enumerate(jax.random.split(KEY, M)):
        single = make("mlp", VECTOR, ACTIONS, key=key, **options)
        own = jax.tree.map(lambda x, m=m: x[m::M], before)
        alone = call(single, obs, single.initial_statistics(), own, m, batch_mask=mask)
        assert_close(output.values[:, m::M], alone.values)
        assert_close(jax.tree.map(lambda x, m=m: x[m::M], output.memory), alone.memory)
        assert_close(jax.tree.map(lambda x, m=m: x[m], output.statistics), alone.statistics)
        later = call(single, obs, alone.statistics, own, m)
        assert_close(acting.values[:, m::M], later.values)
    assert_close(team.initial_memory(N * M), jax.tree.map(jnp.zeros_like, before))


def test_gradients_of_one_agents_loss_are_its_own():
    team = make("mlp", VECTOR, 2, key=KEY, num_agents=M, share_parameters=False)

    def loss(team):
        return jnp.sum(call(team, observations(VECTOR)).values[:, 1::M] ** 2)

    for gradient in jax.tree.leaves(eqx.filter_grad(loss)(team)):
        assert np.any(gradient[1]) and not np.any(gradient[0]) and not np.any(gradient[2])


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_agents_of_a_kind_share_their_parameters(memory):
    kinds, options = (0, 1, 0), {"hidden_sizes": (8,), "norm": "batch_norm", "key": KEY}
    options |= {"memory": memory, "memory_size": 4, "num_agents": M}
    team = make("mlp", VECTOR, ACTIONS, share_parameters="kind", agent_kinds=kinds, **options)
    each = make("mlp", VECTOR, ACTIONS, share_parameters=False, **options)
    # The same agents, each with a copy of its kind's parameters.
    copies = jax.tree.map(lambda x: x[jnp.array(kinds)], eqx.filter(team.members, eqx.is_array))
    each = eqx.tree_at(lambda team: team.members, each, eqx.combine(copies, each.members))
    obs, mask = observations(VECTOR), jnp.asarray(~FIRST)

    def learn(team):
        output = call(team, obs, batch_mask=mask)
        return jnp.sum(jnp.sin(output.values)), output

    gradient, output = eqx.filter_jit(eqx.filter_grad(learn, has_aux=True))(team)
    gradients, expected = eqx.filter_jit(eqx.filter_grad(learn, has_aux=True))(each)
    assert_close(output, expected)
    for own, of_copies in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradients), strict=True):
        assert own.shape[0] == 2
        summed = np.stack([of_copies[0] + of_copies[2], of_copies[1]])
        np.testing.assert_allclose(own, summed, rtol=1e-3, atol=1e-4)


def test_kinds_that_make_no_sense_are_told():
    options = {"key": KEY, "num_agents": M}
    for kinds in (None, (0, 1), (0, 2, 2), (1, 1, 1)):
        with pytest.raises(UsageError, match="needs the kind of each of 3 agents"):
            make("mlp", VECTOR, 2, share_parameters="kind", agent_kinds=kinds, **options)
    with pytest.raises(UsageError, match=r"unknown share_parameters 'kinds'.*kind"):
        make("mlp", VECTOR, 2, share_parameters="kinds", **options)


def test_agent_id_can_be_left_out():
    options = {"key": KEY, "hidden_sizes": (8,)}
    plain = make("mlp", VECTOR, 2, **options)
    assert eqx.tree_equal(make("mlp", VECTOR, 2, num_agents=M, agent_id=False, **options), plain)


@pytest.mark.parametrize("share_parameters", [True, False])
def test_a_team_is_whole(share_parameters):
    options = {"num_agents": M, "share_parameters": share_parameters, "memory": "gru"}
    team = make("mlp", VECTOR, ACTIONS, key=KEY, **options)
    inputs = Inputs(jnp.zeros((1, 4, 6)), last_action=jnp.zeros((1, 4, 1), int))
    kept = team.initial_statistics(), team.initial_memory(M)
    with pytest.raises(UsageError, match="4 lanes are not whole teams of 3 agents"):
        team(inputs, *kept)
    assert eqx.tree_equal(decode(*encode(team), "test"), team)
