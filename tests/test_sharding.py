"""Many devices and processes, simulated on CPU: equal results, and what they exchange."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from eqx_q.saving.checkpoint import load

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = 1e-5


def environment(flags):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def found(pytestconfig):
    """What `on_eight_devices.py` prints. Warnings are errors there too, but for pytest's `-W`."""
    given = pytestconfig.getoption("pythonwarnings") or []
    warnings = [f"-W{each}" for each in ("error", *given)]
    run = subprocess.run(
        [sys.executable, *warnings, str(ROOT / "tests" / "on_eight_devices.py")],
        env=environment("--xla_force_host_platform_device_count=8"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_shared_lanes_learn_what_one_device_learns(found):
    lanes = found["lanes"]
    assert lanes["moved"] > 0.1
    assert lanes["difference"] < ROUNDING
    np.testing.assert_allclose(*lanes["metrics"], rtol=1e-4)
    assert lanes["devices of the result"] == 1


def size(shape):
    """Numbers in an array of such a shape, `f32[2,16]`."""
    return int(np.prod([int(n) for n in shape[shape.index("[") + 1 : -1].split(",") if n]))


def test_shared_lanes_exchange_gradients_and_count_at_once(found):
    """One all-reduce in the loop over minibatches, and no more than metrics outside of it."""
    for part in ("lanes", "memory"):
        (minibatch,), *others = sorted(
            found[part]["collectives"], key=lambda loop: -max(size(s) for s in loop[0][1:])
        )
        assert minibatch[0] == "all-reduce"
        outside = [collective for loop in others for collective in loop]
        restarts = [1] if part == "memory" else []  # whose environment is outside JAX
        assert {(kind, *map(size, shapes)) for kind, *shapes in outside} == {
            ("all-reduce", 1),  # transitions
            ("all-reduce", *restarts, 3),  # episodes, their returns and lengths
        }
    # Parameters and the four metrics of the loss, and the count.
    arrays = found["lanes"]["arrays"]
    (minibatch,) = found["lanes"]["collectives"][0]
    assert len(minibatch) - 1 == arrays + 4 + 1


def test_a_checkpoint_of_eight_devices_resumes_on_one(found):
    assert found["lanes"]["half"] == 8
    assert found["lanes"]["resumed on one"] < ROUNDING


@pytest.mark.parametrize("part", ["members", "members from data"])
def test_shared_members_exchange_nothing(found, part):
    assert found[part]["difference"] < ROUNDING
    assert found[part]["collectives"] == []


def test_every_member_tells_its_own(found):
    assert found["members"]["losses"] == [16]


def test_shared_batches_exchange_gradients_once(found):
    """And, for a metric, which units are dead."""
    assert found["batches"]["difference"] < ROUNDING
    ((dead, gradients),) = found["batches"]["collectives"]
    assert dead == ["all-reduce", "pred[8]"]
    assert gradients[0] == "all-reduce"


def test_each_device_has_an_environment_outside_jax_and_memory(found):
    assert found["memory"]["difference"] < ROUNDING
    np.testing.assert_allclose(*found["memory"]["returns"], rtol=1e-5)


def test_what_cannot_be_shared_is_refused(found):
    expected = [
        "the processes do not find each other",
        "the processes do not find each other",
        "devices=9, but JAX sees 8 (cpu)",
        "batch_size=12 does not divide over 8 devices",
        "this environment lives outside JAX and was made for 1",
        "this environment lives outside JAX and was made for 8",
        "devices=9, but JAX sees 8 (cpu)",
        "lane_groups=12 does not divide over 8 devices",
        "devices=0: give a whole number of devices",
        "lane_groups=32 does not divide the 48 lanes",
        "members (num_seeds)=6 does not divide over 8 devices",
        "lanes (num_envs)=12 does not divide over 8 devices",
    ]
    for message, beginning in zip(found["refused"], expected, strict=True):
        assert message.startswith(beginning)


def start_two(options, directory, run_dir=None, **variables):
    """Two processes that train together."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    together = ["devices=null", f"distributed.coordinator=localhost:{port}"]
    together += ["distributed.num_processes=2"]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *options, *together]
    return [
        subprocess.Popen(
            [
                *command,
                f"distributed.process_id={i}",
                *([f"hydra.run.dir={run_dir}_{i}"] if run_dir else []),
            ],
            env=environment("") | variables,
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def end_well(processes):
    """What they said."""
    try:
        told = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], told
        return told
    finally:
        for process in processes:
            process.kill()


def test_two_processes_train_what_one_trains(script, tmp_path):
    """And the first of them alone leaves a run."""
    options = [
        "tracker=jsonl", "tuned=none", "eval.every=0", "video.every=0", "num_envs=8", "log_every=5",
        "total_steps=1280", "agent.lane_groups=2", "agent.rollout_length=8", "agent.num_epochs=1",
        "agent.num_minibatches=4", "agent.network_options.hidden_sizes=[16]",
        "agent.learning_rate=0.01",
    ]  # fmt: skip
    processes = start_two(options, tmp_path, "two")
    status, _, err = script("train", *options, "hydra.run.dir=one")
    assert status == 0, err
    end_well(processes)
    assert {path.name for path in (tmp_path / "two_1").iterdir()} == {"log.txt"}
    one, two = (load(tmp_path / name / "agent.eqx") for name in ("one", "two_0"))
    for x, y in zip(jax.tree.leaves(one.network), jax.tree.leaves(two.network), strict=True):
        np.testing.assert_allclose(x, y, atol=ROUNDING)
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two_0")]
    assert len(rows[0].splitlines()) == len(rows[1].splitlines())


def test_a_notice_to_one_process_stops_all_at_one_step_and_the_same_command_goes_on(tmp_path):
    """As Slurm gives it, which is asked once to start the job again."""
    options = [
        "resume=auto", "tracker=jsonl", "tuned=none", "eval.every=0", "video.every=0", "num_envs=8",
        "log_every=1", "total_steps=6400", "agent.lane_groups=2", "agent.rollout_length=8",
        "agent.num_epochs=1", "agent.num_minibatches=1", "agent.network_options.hidden_sizes=[4]",
    ]  # fmt: skip
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path / 'asked'}\n")
    scontrol.chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    processes = start_two(options, tmp_path, **path)
    rows = []
    while not rows and processes[0].poll() is None:
        time.sleep(0.01)
        rows = [path for path in tmp_path.glob("runs/*/*/metrics.jsonl") if path.read_text()]
    processes[1].send_signal(signal.SIGUSR1)
    told = end_well(processes)
    assert "requeued" in told[0]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    (directory,) = tmp_path.glob("runs/*/*")
    stopped = json.loads((directory / "summary.json").read_text())
    assert stopped["status"] == "stopped" and 0 < stopped["env_steps"] < 6400
    told = end_well(start_two(options, tmp_path, **path))
    assert f"{stopped['env_steps']:012}.ckpt" in told[0]
    assert json.loads((directory / "summary.json").read_text())["env_steps"] == 6400
