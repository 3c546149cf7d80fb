import json
import subprocess
import sys

import jax
import measure_split
import numpy as np
import pytest
import speed

import eqx_q


def _agent(name, **options):
    env = eqx_q.make(name, num_envs=2)
    return eqx_q.PQN.create(
        env.observation_space, env.action_space, key=jax.random.key(0), **options
    )


def test_matrix_products_of_an_mlp():
    agent = _agent("gymnax/CartPole-v1", network_options={"hidden_sizes": [64, 32]})
    products = [(8, 4, 64), (8, 64, 32), (8, 32, 2)]
    assert measure_split.forward_products(agent, 8) == [(product, 1) for product in products]


def test_matrix_products_of_a_convolutional_network_and_its_gradients():
    forward = measure_split.forward_products(_agent("gymnax/Breakout-MinAtar"), 8)
    # 8 x 8 positions of a 3 x 3 window on 4 channels, then 16 channels of them, flat
    assert forward == [((8 * 64, 36, 16), 1), ((8, 1024, 128), 1), ((8, 128, 3), 1)]
    learning = measure_split.learning_products(forward)
    work = 2 * 8 * np.array([64 * 36 * 16, 1024 * 128, 128 * 3])
    # Every layer thrice; but the observations need no gradient.
    assert measure_split.flops(learning) == 3 * work.sum() - work[0]


def test_matrix_products_of_a_recurrence_are_counted_at_every_step():
    agent = _agent(
        "gymnax/CartPole-v1",
        network_options={"hidden_sizes": [64], "memory": "gru", "memory_size": 16},
    )
    forward = measure_split.forward_products(agent, 2, steps=10)
    # All steps at once but for what goes from state to state; two actions are seen too.
    gate = ((2, 16, 16), 10)
    expected = [((20, 4, 64), 1), ((20, 66, 48), 1), gate, gate, gate, ((20, 16, 2), 1)]
    assert sorted(forward) == sorted(expected)
    work = sum(2 * rows * inner * columns * n for (rows, inner, columns), n in expected)
    learning = measure_split.learning_products(forward)
    assert measure_split.flops(learning) == 3 * work - 2 * 20 * 4 * 64


def test_products_timed_alone_are_computed_as_often_as_asked():
    products = [((256, 256, 256), 1)]
    once, often = (measure_split.seconds_of(products, times) for times in (20, 200))
    assert 3 < often / once < 30


def test_ratios_are_taken_pair_by_pair():
    ours = [{"steps_per_second": speed} for speed in (10.0, 40.0, 30.0)]
    theirs = [{"steps_per_second": speed} for speed in (5.0, 10.0, 10.0)]
    assert speed.ratios(ours, theirs) == {"median": 3.0, "pairs": [2.0, 4.0, 3.0]}


def test_the_split_adds_up():
    measured = {
        "env_steps_per_update": 100,
        "matmul_seconds": 0.25,
        "matmul_flops": 5e9,
        "environment_seconds": 0.1,
        "environment_and_acting_seconds": 0.3,
    }
    split = speed.split(measured, steps_per_second=200.0)
    assert split == pytest.approx(
        {
            "update_seconds": 0.5,
            "matmul_ceiling_fraction": 0.5,
            "matmul_gflops_alone": 20,
            "environment_fraction": 0.2,
            "acting_fraction": 0.4,
            "learning_fraction": 0.4,
        }
    )


def test_peers_get_our_hyperparameters_and_schedules_keep_their_length():
    case = speed.CASES["minatar"]
    config = speed.configuration([*case.overrides, "agent.lambda_=0.5"], 1_000_000)
    request = speed.peer_request(case, config, ".")
    assert request["script"] == "pqn_minatar"
    expected = {
        "TOTAL_TIMESTEPS": 1_000_000,
        "TOTAL_TIMESTEPS_DECAY": 10_000_000,
        "ENV_NAME": "Breakout-MinAtar",
        "NUM_ENVS": 128,
        "NUM_STEPS": 32,
        "LAMBDA": 0.5,
        "LR": 5e-4,
    }
    assert request["overrides"].items() >= expected.items()
    smax = speed.CASES["vdn_smax"]  # whose loss is not halved there
    config = speed.configuration(smax.overrides, 1_000_000)
    assert config["agent"]["max_grad_norm"] == 0.5
    assert speed.peer_request(smax, config, ".")["overrides"]["MAX_GRAD_NORM"] == 1.0


def test_the_library_alone_end_to_end(tmp_path):
    small = ["num_envs=4", "agent.rollout_length=8", "agent.num_minibatches=4"]
    out = tmp_path / "speed.json"
    command = [sys.executable, "benchmarks/speed.py", "cartpole", *small]
    options = ["--repetitions", "1", "--total-steps", "320", "--out", str(out)]
    subprocess.run([*command, *options], check=True, cwd=speed.ROOT)
    result = json.loads(out.read_text())
    assert result["contestants"]["eqx_q"]["env_steps"] == 320
    assert result["contestants"]["eqx_q"]["steps_per_second"] > 0
    assert result["split"]["matmul_ceiling_fraction"] > 0
    assert str(tmp_path.parent) not in result["command"]
    assert result["machine"]["cores"] >= 1 and result["versions"]["jax"]


def test_an_earlier_version_composes_its_own_configuration():
    config = speed.configuration(["env=cartpole", "num_envs=8"], 1000)
    assert speed.earlier_configuration(speed.ROOT, ["env=cartpole", "num_envs=8"], 1000) == config
