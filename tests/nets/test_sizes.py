"""Parameters and multiplications of encoders against what their papers publish."""

import equinox as eqx
import gymnasium
import jax
import measure_split
import numpy as np
import pytest
from record import compose

import eqx_q
from eqx_q.run.parts import chosen_options
from eqx_q.run.settings import given

# For stacks of four frames of 84 × 84 and four actions: parameters, and multiplications in millions
# (aftab, arXiv 2608.07335, tables "Model Complexity"). Two entries of theirs are corrected:
# - In the table of base variants, the parameters of the head contain those of the encoder, and lack
#   the normalisation of the hidden layer (1,024); their sum counts the encoder twice.
# - Their Hadamax pads its first two convolutions to an even size (85 × 85 and 22 × 22), unlike the
#   authors' code, and has 159.014 million multiplications in its convolutions.
HADAMAX = 2e-6 * (84**2 * 64 * 4 * 32 + 21**2 * 16 * 32 * 64 + 11**2 * 9 * 64 * 64)
PUBLISHED = {
    "nature_cnn": (1_686_500 + 1_024, 9.347),
    "gamma": (1_725_364 + 1_024, 24.512),
    "gamma_hadamax": (1_843_556, 123.611),
    "hadamax": (4_125_124, 162.984 - 159.014 + HADAMAX),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name):
    agent = eqx_q.PQN.create(
        gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gymnasium.spaces.Discrete(4),
        key=jax.random.key(0),
        network=name,
        network_options={"lowering": "conv"},
    )
    parameters, multiplications = PUBLISHED[name]
    leaves = jax.tree.leaves(eqx.filter(agent.network, eqx.is_inexact_array))
    assert sum(leaf.size for leaf in leaves) == parameters
    ours = measure_split.flops(measure_split.forward_products(agent, 1)) / 2e6
    # They also count additions of biases.
    assert ours == pytest.approx(multiplications, abs=0.005)


def test_the_strong_combination_is_the_published_one():
    """aftab's distributional dueling network: a hidden layer of 512 in each stream, 51 bins."""
    config = compose(["env=atari", "tuned=pqn_atari_strong"])
    options = chosen_options(given(config["agent"]))
    del options["_target_"]
    frames = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    agent = eqx_q.PQN.create(frames, gymnasium.spaces.Discrete(4), key=jax.random.key(0), **options)
    hidden = 7 * 7 * 64 * 512 + 512 + 2 * 512
    leaves = jax.tree.leaves(eqx.filter(agent.network, eqx.is_inexact_array))
    heads = 2 * hidden + (1 + 4) * (512 * 51 + 51)
    assert sum(leaf.size for leaf in leaves) == 234_336 + heads
    assert (agent.value.num_bins, float(agent.value.v_max)) == (51, 10)
