"""Hyperparameters of an agent's parts by path: what a run may change, search and evolve."""

import equinox as eqx
import gymnasium
import jax
import numpy as np
import pytest
from environments import Guess
from parts import Parted

import eqx_q
from eqx_q.errors import UnknownNameError, UsageError
from eqx_q.loops.evolution import PopulationBasedTraining, scale
from eqx_q.run import changeable, make_agent
from eqx_q.run.space import read_space

pytestmark = pytest.mark.quick

CONFIG = {
    "agent": {
        "_target_": "parts.Parted",
        "learning_rate": 0.5,
        "blur": {"sigma": 2.0, "bins": 7},
    },
    "seed": 0,
    "num_seeds": 2,
    "num_envs": 4,
    "sampling": {},
}
SPACE = gymnasium.spaces.Box(0, 1, (1,), np.float32)


@pytest.fixture
def population():
    def create(key, sigma):
        actions = gymnasium.spaces.Discrete(2)
        return Parted.create(SPACE, actions, key=key, blur={"sigma": sigma})

    keys = jax.random.split(jax.random.key(0), 4)
    return eqx_q.Population(eqx.filter_vmap(create)(keys, np.arange(1.0, 5.0, dtype=np.float32)))


def test_members_tell_theirs_and_take_others(population):
    np.testing.assert_array_equal(population.hyperparameters()["blur.sigma"], [1, 2, 3, 4])
    changed = population.with_hyperparameters(
        {"blur.sigma": np.arange(5.0, 9.0), "learning_rate": 0.2}
    )
    np.testing.assert_array_equal(changed.members.blur.sigma, [5, 6, 7, 8])
    np.testing.assert_array_equal(changed.members.learning_rate, np.full(4, 0.2, np.float32))
    assert changed.member(2).hyperparameters()["blur.sigma"] == 7
    with pytest.raises(UnknownNameError, match=r"'blur.sigm': the nearest are blur.sigma"):
        population.with_hyperparameters({"blur.sigm": 1.0})


def test_evolution_scales_those_of_parts(population):
    scaled = scale(population, {"blur.sigma": np.array([1.0, 2.0, 3.0, 4.0])})
    np.testing.assert_array_equal(scaled.members.blur.sigma, [1, 4, 9, 16])
    PopulationBasedTraining(["blur.sigma"], every=1).check(population)
    with pytest.raises(UnknownNameError, match=r"'blur.bins': the nearest are blur.sigma"):
        PopulationBasedTraining(["blur.bins"], every=1).check(population)


def test_what_a_run_in_progress_may_change():
    assert changeable(CONFIG) == {"learning_rate", "blur.sigma"}


def test_a_search_varies_those_of_parts_inside_a_population():
    search = {"agent": {"blur": {"sigma": [1.0, 4.0], "bins": [3, 7]}, "learning_rate": [0.1]}}
    space = read_space({**CONFIG, "search": search})
    assert space.traced == {"agent.blur.sigma", "agent.learning_rate"}
    trials = [
        {"agent.blur.sigma": sigma, "agent.learning_rate": 0.1, "agent.blur.bins": 3}
        for sigma in (1.0, 4.0)
    ]
    config = space.apply(CONFIG, space.static(trials[0]))
    agent = make_agent(config, Guess(4), [space.leaves(trial) for trial in trials])
    np.testing.assert_array_equal(agent.members.blur.sigma, [1, 1, 4, 4])
    np.testing.assert_allclose(agent.members.learning_rate, 0.1)
    assert agent.members.blur.bins == 3


def test_what_is_no_number():
    wrong = {**CONFIG, "agent": {**CONFIG["agent"], "learning_rate": "soon"}}
    with pytest.raises(UsageError, match=r"agent.learning_rate=soon: give a number"):
        make_agent(wrong, Guess(4))
