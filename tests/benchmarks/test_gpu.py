"""The unattended benchmark of a GPU, in tiny sizes and without one."""

import json
import sys
import time

import gpu
import profile_library
import pytest
import record


def run(monkeypatch, tmp_path, *arguments):
    """Runs the command; returns the steps of its results."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    out = tmp_path / "gpu.json"
    given = ["--tiny", "--out", str(out), "--runs", str(tmp_path / "runs"), *arguments]
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *given])
    try:
        gpu.main()
    finally:
        found = json.loads(out.read_text())["steps"] if out.exists() else {}
    return found


def test_a_training_is_run_and_read(monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path, "cartpole")["cartpole"]
    assert found["status"] == "done" and found["env_steps"] == 4096
    assert found["steps_per_second"] > 0 and len(found["train_return_per_seed"]) == 4
    assert found["evaluations"] == []  # they are off


def test_every_step_asks_for_what_there_is(monkeypatch, tmp_path):
    """In both sizes: configurations compose, and options of trainings are known."""
    asked = []

    def drive(python, driver, request, seed, timeout):
        assert (gpu.ROOT / "benchmarks" / "drivers" / f"{driver}.py").exists()
        asked.append(request.get("config"))
        found = {"env_steps": 10, "seconds": 1.0, "seen_per_update": 5.0}
        found |= dict.fromkeys(("compile_seconds", "peak_device_memory_mb", "device"))
        parts = ("environment_seconds", "environment_and_acting_seconds", "env_steps_per_update")
        return found | dict.fromkeys(("matmul_flops", "matmul_seconds", *parts), 1.0)

    def training(name, overrides, limits):
        asked.append(record.compose(overrides))
        return {"status": "done", "steps_per_second": 1.0, "evaluations": [(5, 2.0, 20.5)]}

    monkeypatch.setattr(gpu, "drive", drive)
    monkeypatch.setattr(gpu, "training", training)
    monkeypatch.setattr(gpu, "play", lambda *_: None)
    monkeypatch.setattr(gpu.eqx_q, "load", lambda _: 1.0)
    for tiny in (False, True):
        limits = gpu.Limits(tiny, tmp_path, deadline=time.monotonic() + 60)
        found = {name: step.measure(limits) for name, step in gpu.STEPS.items()}
        assert all(map(gpu.is_whole, found.values())) and found["pong"]["seconds_to_20"] == 2.0
    for config in filter(None, asked):
        batch = config["num_envs"] * config["agent"]["rollout_length"]
        assert batch % config["agent"]["num_minibatches"] == 0


def test_a_step_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    def broken(limits):
        raise RuntimeError("no such game")

    def good(limits):
        return {"x": next(times)}

    times = iter(range(10))
    monkeypatch.setattr(gpu, "STEPS", {"broken": gpu.Step(broken), "good": gpu.Step(good)})
    for _ in range(2):  # only what failed is tried again
        with pytest.raises(SystemExit, match="without a result: broken"):
            run(monkeypatch, tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert found["broken"]["error"] == "no such game" and found["good"]["x"] == 0
    assert run(monkeypatch, tmp_path, "good")["good"]["x"] == 1
    monkeypatch.setattr(gpu, "STEPS", {"good": gpu.Step(broken)})
    with pytest.raises(SystemExit, match="without a result: good"):
        run(monkeypatch, tmp_path, "good")
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert found["good"]["x"] == 1 and "error" in found["good"]  # what was found is kept
    monkeypatch.setattr(gpu, "STEPS", {"broken": gpu.Step(broken), "good": gpu.Step(good)})
    with pytest.raises(SystemExit, match="without a result: broken"):
        run(monkeypatch, tmp_path)
    monkeypatch.setattr(gpu, "commit", lambda _: "another")
    with pytest.raises(SystemExit, match="broken"):
        run(monkeypatch, tmp_path)
    assert next(times) == 4


def test_a_training_that_was_cut_is_continued(monkeypatch, tmp_path):
    status = iter(["stopped", "done"])
    step = gpu.Step(lambda _: {"seeds": {"status": next(status)}})
    monkeypatch.setattr(gpu, "STEPS", {"long": step})
    with pytest.raises(SystemExit, match="without a result: long"):
        run(monkeypatch, tmp_path)
    assert run(monkeypatch, tmp_path)["long"]["seeds"] == {"status": "done"}
    run(monkeypatch, tmp_path)  # nothing is left to do


def test_without_time_nothing_is_begun(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "STEPS", {"never": gpu.Step(lambda _: pytest.fail("it began"))})
    with pytest.raises(SystemExit, match="without a result: never"):
        run(monkeypatch, tmp_path, "--minutes", "0")


@pytest.mark.parametrize("arguments", [["pnog"], []])
def test_wrong_arguments(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", "--tiny", *arguments])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert ("pong" if arguments else "--out") in capsys.readouterr().err


def test_the_time_to_an_evaluation_goes_on_after_a_resume():
    lines = [
        {"train_seconds": 2.0, "env_steps": 10, "eval/return": 1.0},
        {"train_seconds": 3.0, "env_steps": 20},
        {"train_seconds": 0.5, "env_steps": 30, "eval/return": [2.0, 4.0]},  # a resume
        {"train_seconds": 1.5, "env_steps": 40, "eval/return": None},
        {"train_seconds": None, "env_steps": 40},  # it was killed after its last checkpoint
    ]
    assert gpu.course(lines) == (4.5, [(10, 2.0, 1.0), (30, 3.5, 3.0)])


def test_kernels_are_the_events_on_the_streams_of_gpus():
    def named(kind, name, pid, tid=0):
        return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}

    def event(name, pid, tid):
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "dur": 1}

    events = [
        named("process", "/device:GPU:0", 1),
        named("process", "/host:CPU", 7),
        named("thread", "Stream #13(Compute)", 1, 13),
        named("thread", "XLA Ops", 1, 2),
        named("thread", "Stream #13", 7, 13),
        event("fusion", 1, 13),
        event("fusion", 1, 13),
        event("gemm", 1, 13),
        event("fusion", 1, 2),  # the same once more, by its operation
        event("fusion", 7, 13),
    ]
    assert profile_library.kernels({"traceEvents": events}) == {"fusion": 2, "gemm": 1}
