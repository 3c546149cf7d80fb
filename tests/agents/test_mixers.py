"""Mixers against sums by hand, and QMIX's properties: monotone, and more than a sum."""

from typing import ClassVar

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from environments import TwoStep

from eqx_q import PQN
from eqx_q.agents.mixers import QMIX, VDN, AbstractMixer, Independent, make_mixer
from eqx_q.errors import UsageError
from eqx_q.types import Episode, TimeStep

M, S = 3, 5
CONTEXT = {"num_agents": M, "state_size": S, "key": jax.random.key(0)}


def make_model(mixer):
    box, discrete = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(2)
    agent = PQN.create(
        box, discrete, mixer=mixer, num_agents=M, state_size=S, key=jax.random.key(0)
    )
    return agent.model


def make_timestep(agent_reward):
    zeros, no = np.zeros(2, np.float32), np.zeros(2, bool)
    reward = np.float32([1.0, 2.0])
    episode = Episode(no, zeros, np.zeros(2, np.int32))
    return TimeStep(zeros, reward, no, no, no, episode, agent_reward=agent_reward)


def random(*shape, scale=1.0, seed=0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", ["vdn", "qmix"])
def test_a_joint_mixer_makes_one_value_of_the_teams_reward(name):
    mixer = make_mixer(name, **CONTEXT)
    assert mixer.is_joint and mixer.mix(random(4, 2, M), random(4, 2, S)).shape == (4, 2, 1)
    model = make_model(mixer)
    for own in (None, np.ones((2, M), np.float32)):
        np.testing.assert_array_equal(model.reward(make_timestep(own)), [[1.0], [2.0]])
    acting = jnp.array([[True, False, False], [False, False, False]])
    np.testing.assert_array_equal(model.acts(acting), [[True], [False]])


def test_vdn_is_the_sum():
    values = random(4, 2, M)
    np.testing.assert_allclose(
        VDN().mix(values, None)[..., 0], np.asarray(values).sum(-1), rtol=1e-6
    )


def test_independent_agents_keep_what_is_their_own():
    mixer, values = make_mixer("independent", **CONTEXT), random(2, M)
    assert not mixer.is_joint
    np.testing.assert_array_equal(mixer.mix(values, None), values)
    model = make_model(mixer)
    np.testing.assert_array_equal(model.reward(make_timestep(None)), [[1.0], [2.0]])
    own = np.arange(6, dtype=np.float32).reshape(2, M)
    np.testing.assert_array_equal(model.reward(make_timestep(own)), own)
    acting = jnp.array([[True, False, True], [False, False, True]])
    np.testing.assert_array_equal(model.acts(acting), acting)


def dense(layer, x):
    weight = np.asarray(layer.weight)
    return x @ (weight.T if layer.transposed else weight) + np.asarray(layer.bias)


def slow_hypernetwork(network, state):
    first, *rest = network.layers
    x = dense(first, state)
    return dense(rest[-1], np.maximum(x, 0)) if rest else x


@pytest.mark.parametrize("hidden", [None, 7])
def test_qmix_is_the_network_of_the_paper(hidden):
    mixer = QMIX(M, S, key=jax.random.key(1), embed_size=4, hypernetwork_size=hidden)
    values, states = random(6, M), random(6, S, scale=3.0, seed=1)
    expected = []
    for value, state in zip(np.asarray(values), np.asarray(states), strict=True):
        state = state / np.sqrt(1 + np.mean(state**2))
        weight = np.abs(slow_hypernetwork(mixer.first_weight, state)).reshape(M, 4)
        hidden_units = value @ weight + slow_hypernetwork(mixer.first_bias, state)
        hidden_units = np.where(hidden_units > 0, hidden_units, np.expm1(hidden_units))
        weight = np.abs(slow_hypernetwork(mixer.last_weight, state))
        expected.append(hidden_units @ weight + slow_hypernetwork(mixer.last_bias, state)[0])
    np.testing.assert_allclose(mixer.mix(values, states)[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert len(mixer.last_bias.layers) == 3 and len(mixer.first_bias.layers) == 1


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("seed", range(5))
def test_qmix_rises_with_every_agents_value(seed, hidden):
    """For any parameters: those of a start, times 3, and any state and values."""
    mixer = QMIX(M, S, key=jax.random.key(seed), hypernetwork_size=hidden)
    mixer = jax.tree.map(lambda x: 3 * x if eqx.is_inexact_array(x) else x, mixer)
    values, states = random(200, M, scale=2.0, seed=seed), random(200, S, scale=10.0, seed=seed + 9)
    slopes = jax.vmap(jax.grad(lambda v, s: mixer.mix(v, s)[0]))(values, states)
    assert (slopes >= 0).all() and (slopes > 0).mean() > 0.99
    for agent in range(M):
        more = mixer.mix(values.at[:, agent].add(0.5), states)
        assert (more > mixer.mix(values, states)).all()


def test_a_state_changes_how_qmix_mixes_even_where_it_is_zero():
    mixer, value = QMIX(M, S, key=jax.random.key(0)), random(M)
    states = jnp.stack([jnp.zeros(S), jnp.ones(S), 1e4 * jnp.ones(S)])
    mixed = jax.vmap(mixer.mix, (None, 0))(value, states)
    assert len(np.unique(mixed)) == 3 and np.abs(mixed).max() < 100  # whatever a state's scale

    def loss(mixer):
        return mixer.mix(value, states[0])[0]

    gradients = eqx.filter_grad(loss)(mixer)
    for network in (gradients.first_weight, gradients.first_bias, gradients.last_weight):
        assert (network.layers[0].bias != 0).mean() > 0.9


def fit(mixer, payoff, steps=400):
    """Each agent has a table of values of its actions; all is regressed on the payoff matrix."""
    payoff = jnp.asarray(payoff)
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(2), jnp.arange(2), indexing="ij"), -1).reshape(-1, 2)
    optimizer = optax.adam(0.03)

    def joint(parameters):
        mixer, tables = parameters
        values = tables[jnp.arange(2), pairs]
        return mixer.mix(values, jnp.ones((4, S)))[:, 0].reshape(2, 2)

    def loss(parameters):
        return jnp.mean((joint(parameters) - payoff) ** 2)

    def step(carry, _):
        parameters, state = carry
        updates, state = optimizer.update(jax.grad(loss)(parameters), state)
        return (optax.apply_updates(parameters, updates), state), None

    parameters = (mixer, random(2, 2, scale=0.1))
    carry = parameters, optimizer.init(parameters)
    (parameters, _), _ = jax.lax.scan(step, carry, None, length=steps)
    return np.asarray(joint(parameters)), np.asarray(parameters[1])


@pytest.mark.parametrize("seed", range(3))
def test_qmix_fits_a_payoff_that_no_sum_is(seed):
    """State 2B of the two-step game (Rashid et al. 2018, §6.1): worth 8 together, 1 alone."""
    payoff = [[0.0, 1.0], [1.0, 8.0]]
    mixed, tables = fit(QMIX(2, S, key=jax.random.key(seed)), payoff)
    np.testing.assert_allclose(mixed, payoff, atol=0.05)
    np.testing.assert_array_equal(tables.argmax(-1), [1, 1])
    # The best sum, by least squares.
    summed, _ = fit(VDN(), payoff)
    np.testing.assert_allclose(summed, [[-1.5, 2.5], [2.5, 6.5]], atol=0.05)


def test_a_name_a_mapping_or_an_object():
    assert isinstance(make_mixer("independent", **CONTEXT), Independent)
    made = make_mixer({"name": "qmix", "embed_size": 6, "hypernetwork_size": 8}, **CONTEXT)
    shapes = [layer.weight.shape for layer in made.first_weight.layers[::2]]
    assert shapes == [(S, 8), (8, 18)]

    class Weighted(AbstractMixer):
        is_joint: ClassVar[bool] = True
        weight: jax.Array

        def mix(self, values, global_state=None):
            return jnp.sum(self.weight * values, axis=-1, keepdims=True)

    own = Weighted(jnp.array([1.0, 0.0, 2.0]))
    assert make_mixer(own, **CONTEXT) is own
    np.testing.assert_allclose(own.mix(jnp.array([1.0, 5.0, 3.0])), [7.0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("qmx", "unknown mixer 'qmx': the nearest are qmix"),
        ({"name": "qmix", "embed": 3}, "unknown option of mixer 'qmix': 'embed'"),
        ({"name": "qmix", "num_agents": 3}, "unknown option of mixer 'qmix': 'num_agents'"),
        ({"name": "vdn", "embed_size": 3}, "'embed_size': known are none"),
        ({"name": "qmix", "embed_size": 0}, "embed_size must be a whole number of at least 1"),
        ({"name": "qmix", "hypernetwork_size": 0}, "hypernetwork_size must be a whole number"),
    ],
)
def test_what_cannot_be_says_what_can(given, message):
    with pytest.raises(UsageError, match=message):
        make_mixer(given, **CONTEXT)


def test_the_two_step_game_pays_by_its_matrices():
    env = TwoStep(4)
    choose, then = jnp.array([[0, 1], [1, 0], [1, 1], [1, 0]]), [[1, 0], [0, 1], [1, 1], [0, 0]]
    state, steps = env.reset(jax.random.key(0))[0], []
    for action in (choose, jnp.array(then), 1 - choose, choose):
        state, timestep = env.step(state, action, jax.random.key(0))
        steps.append(timestep)
    one_hot = np.eye(4, dtype=np.float32)[:, :3]
    places = [[1, 2, 2, 2], [3, 3, 3, 3], [0, 0, 0, 0], [1, 2, 2, 2]]
    for timestep, place, reward, length in zip(
        steps, places, ([0] * 4, [7, 1, 8, 0], [0] * 4, [0] * 4), (1, 2, 0, 1), strict=True
    ):
        np.testing.assert_array_equal(timestep.global_state, one_hot[place])
        np.testing.assert_array_equal(timestep.obs, one_hot[place][:, None].repeat(2, 1))
        np.testing.assert_array_equal(timestep.reward, reward)
        assert (timestep.terminated == (length == 2)).all() and (
            timestep.first == (not length)
        ).all()
        assert (timestep.episode.length == length).all() and not timestep.truncated.any()
    assert env.state_size == timestep.global_state.shape[-1]
