"""Numbers of short trainings and files of earlier versions, compared with today's."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import Relay
from golden_cases import CASES, TRACES, trace
from golden_configs import NAMES, QUICK, TRACES as CONFIGS, compare

import eqx_q

SAVED = TRACES.parent / "saved"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
OF_RUNS = ("run_rnn", "run_team")


@pytest.mark.parametrize("name", CASES)
def test_a_short_training_gives_what_it_gave(name):
    expected = json.loads(TRACES.read_text())[name]
    found = trace(*CASES[name]())
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        # Biases before a normalisation learn from rounding alone.
        atol = 5e-4 if (name, kind) == ("pqn_normalised", "parameters") else 1e-5
        np.testing.assert_allclose(found[kind], values, rtol=2e-4, atol=atol, err_msg=kind)


@pytest.mark.parametrize("name", QUICK)
def test_a_tuned_configuration_begins_as_it_did(name):
    compare(name)


def test_every_tuned_configuration_has_a_trace():
    assert list(json.loads(CONFIGS.read_text())) == NAMES


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in OF_RUNS])
def test_an_agent_of_an_earlier_version_acts_as_it_did(name):
    agent = eqx_q.load(SAVED / f"{name}.eqx")
    team = () if agent.num_agents is None else (agent.num_agents,)
    num_envs, memory, rng = 2 * (agent.num_members or 1), None, np.random.default_rng(0)
    for step, (action, value) in enumerate(EXPECTED[name]):
        obs = rng.normal(size=(num_envs, *team, *agent.observation_space.shape))
        decision = agent.act(
            obs.astype(agent.observation_space.dtype),
            memory,
            first=np.full(num_envs, step == 0),
            reward=np.full(num_envs, float(step), np.float32),
        )
        memory = decision.memory
        np.testing.assert_array_equal(np.ravel(decision.action), action)
        np.testing.assert_allclose(np.ravel(decision.value), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OF_RUNS)
def test_a_run_of_an_earlier_version_ends_as_it_would_have(name):
    memory_chain = eqx_q.make("gymnax/MemoryChain-bsuite", 4, memory_length=3)
    env = {"run_rnn": memory_chain, "run_team": Relay(4)}[name]
    state = eqx_q.load(SAVED / f"{name}.eqx")  # after three of its six updates
    agent, _ = eqx_q.train(
        state.agent, env, total_steps=6 * 8 * 4, key=jax.random.key(2), run_state=state
    )
    parameters = jax.tree.leaves(eqx.filter(agent.network, eqx.is_inexact_array))
    norms = [float(jnp.linalg.norm(x)) for x in parameters]
    np.testing.assert_allclose(norms, EXPECTED[name], rtol=1e-5)
