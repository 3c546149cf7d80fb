"""Processes killed at every change of a file, and files with a flipped bit."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import crash
import pytest
from omegaconf import OmegaConf

from eqx_q.errors import UsageError
from eqx_q.run.summary import read_json, write_json
from eqx_q.saving.checkpoint import load, save
from eqx_q.tracking import JsonlTracker, read_metrics

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_killed_goes_on(tmp_path):
    """In a process without JAX's threads, which could not be forked."""
    command = [sys.executable, "benchmarks/crash.py", "--only", "save,record,log"]
    command += ["--points", "5", "--out", str(tmp_path / "told.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert [told[name]["calls"] for name in ("save", "record", "log")] == [33, 109, 11]
    for name in ("save", "record", "log"):
        for mode in crash.MODES:
            assert told[name][mode]["failed"] == [], (name, mode)
            assert told[name][mode]["tried"] == told[name][mode]["recovered"] == 5


def log(path):
    tracker = JsonlTracker(path)
    for step in (1, 2):
        tracker.log({"loss": step / 8, "name": "a"}, step)
    tracker.close()


def store(path):
    import _app

    _app.store_config(OmegaConf.create({"agent": {"bins": 2}, "env": {"name": "x"}}), path.parent)


def stored(path):
    import _app

    return _app.settings(_app.stored_config(path.parent))


FILES = {
    "metrics.jsonl": (log, lambda path: list(read_metrics(path, 2))),
    "summary.json": (lambda path: write_json(path, {"a": [1.5, None], "b": "c"}), read_json),
    "config.yaml": (store, stored),
    "agent.eqx": (lambda path: save(path, {"a": 1}), load),
}


@pytest.mark.parametrize("name", FILES)
def test_any_bit_that_is_another_is_found_or_harmless(name, tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    make, read = FILES[name]
    path = tmp_path / name
    make(path)
    whole, before = path.read_bytes(), read(path)
    assert not caplog.records
    bits = [(at, 1 << bit) for at in range(len(whole)) for bit in range(8)]
    damaged = [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at, bit in bits]
    damaged = damaged[:: max(1, len(damaged) // 1500)]
    for content in [*damaged, *(whole[:at] for at in range(1, len(whole)))]:
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            outcome = crash._outcome(read, path, before, caplog.records)
        assert outcome in ("found", "warned", "harmless"), content
    path.write_bytes(whole)
    assert read(path) == before


def test_what_was_edited_says_how_it_is_meant(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    path = tmp_path / "config.yaml"
    store(path)
    seal, text = path.read_text().split("\n", 1)
    path.write_text(f"{seal}\n{text.replace('bins: 2', 'bins: 3')}")
    with pytest.raises(UsageError, match=r"config.yaml' is damaged or was edited.*first line"):
        stored(path)
    path.write_text(text.replace("bins: 2", "bins: 3"))
    assert stored(path)["agent"]["bins"] == 3
