"""Several processes: none waits for one that has died, and only the first writes."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent

MEMBER = """
import sys, time
from eqx_q.processes import join_processes
from jax.experimental.multihost_utils import broadcast_one_to_all

process = int(sys.argv[1])
join_processes(f"localhost:{sys.argv[2]}", 3, process)
print("together", flush=True)
match sys.stdin.readline():
    case "fail\\n":
        raise ValueError("as asked")
    case "go on\\n":
        broadcast_one_to_all(0)  # waits for all
"""


@pytest.fixture
def members():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(i), str(port)], cwd=ROOT, text=True, **pipes
        )
        for i in range(3)
    ]
    for process in processes:
        while process.stdout.readline() not in ("together\n", ""):
            pass
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("word", "gone"), [("go on", 2), ("end", 0)])
def test_all_end_where_one_is_killed(members, word, gone):
    """While they wait for it; and those that are done wait for the first one's evaluation."""
    ends(members, gone, lambda: members[gone].send_signal(signal.SIGKILL), word)


def test_all_end_where_the_first_fails(members):
    """It does not wait for the others, either."""
    err = ends(members, 0, lambda: say(members[0], "fail"))
    assert err.rstrip().endswith("ValueError: as asked")


def ends(members, gone, end, word="go on"):
    """Ends one while the others wait for it; returns what it said."""
    others = [process for i, process in enumerate(members) if i != gone]
    for process in others:
        say(process, word)
    time.sleep(1 if word == "end" else 0)  # they get to where they wait
    end()
    begin = time.monotonic()
    for process in others:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        (line,) = re.findall("^error: .*$", err, re.MULTILINE)
        assert line.startswith(f"error: process {gone} of 3 has ended") and "resume=DIR" in line
        assert "***" not in err  # of C++
    assert time.monotonic() - begin < 30
    return members[gone].communicate()[1]


def say(process, word):
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def test_only_the_first_touches_the_directory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import _app

    hydra = SimpleNamespace(
        mode=None, runtime=SimpleNamespace(output_dir=str(tmp_path / "not there"))
    )
    monkeypatch.setattr(_app.HydraConfig, "get", lambda: hydra)
    monkeypatch.setattr(_app, "is_first_process", lambda: False)
    assert _app.run_directory({}, resume=False) == tmp_path / "not there"
    monkeypatch.setattr(_app, "is_first_process", lambda: True)
    with pytest.raises(_app.UsageError, match="cannot write to the run directory"):
        _app.run_directory({}, resume=False)
