"""What short trainings gave and earlier versions saved, compared with today's."""

import json

import numpy as np
import pytest
from golden_cases import CASES, TRACES, trace

import eqx_q

SAVED = TRACES.parent / "saved"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
OF_RUNS = ("run_rnn", "run_team")


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", CASES)
def test_a_short_training_gives_what_it_gave(name):
    expected = json.loads(TRACES.read_text())[name]
    found = trace(*CASES[name]())
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        np.testing.assert_allclose(found[kind], values, rtol=2e-4, atol=1e-5, err_msg=kind)


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
