"""The unattended benchmark of a GPU, in tiny sizes and without one."""

import json
import sys

import gpu
import profile_library
import pytest


def run(monkeypatch, tmp_path, *arguments):
    """Runs the command; returns the steps of its results."""
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


def test_a_step_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    def broken(limits):
        raise RuntimeError("no such game")

    times = iter(range(10))
    monkeypatch.setattr(gpu, "STEPS", {"broken": broken, "good": lambda _: {"x": next(times)}})
    for _ in range(2):  # only what failed is tried again
        with pytest.raises(SystemExit, match="without a result: broken"):
            run(monkeypatch, tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert found["broken"]["error"] == "no such game" and found["good"]["x"] == 0
    assert run(monkeypatch, tmp_path, "good")["good"]["x"] == 1
    monkeypatch.setattr(gpu, "commit", lambda _: "another")
    with pytest.raises(SystemExit, match="broken"):
        run(monkeypatch, tmp_path)
    assert next(times) == 3


def test_a_training_that_was_cut_is_continued(monkeypatch, tmp_path):
    status = iter(["stopped", "done"])
    monkeypatch.setattr(gpu, "STEPS", {"long": lambda _: {"seeds": {"status": next(status)}}})
    with pytest.raises(SystemExit, match="without a result: long"):
        run(monkeypatch, tmp_path)
    assert run(monkeypatch, tmp_path)["long"]["seeds"] == {"status": "done"}
    run(monkeypatch, tmp_path)  # nothing is left to do


def test_without_time_nothing_is_begun(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "STEPS", {"never": lambda _: pytest.fail("it began")})
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
