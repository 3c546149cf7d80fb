"""Something in the place of trackers."""

import json
from pathlib import Path

import pytest

from eqx_q.tracking import remote


@pytest.fixture
def in_place(tmp_path, monkeypatch):
    """Puts a program in the place of a tracker, whether that is installed or not."""

    def put(code=None, name="aim"):
        code = code or (Path(__file__).parent / "fake.py").read_text()
        (tmp_path / "programs").mkdir(exist_ok=True)
        (tmp_path / "programs" / f"{name}.py").write_text(code)
        monkeypatch.setattr(remote, "_PROGRAMS", tmp_path / "programs")
        there = remote.BACKENDS[name]._replace(package="json")
        monkeypatch.setitem(remote.BACKENDS, name, there)

    return put


@pytest.fixture
def received():
    """What such a program was told of a member, in a directory."""

    def read(directory, member=0):
        lines = (Path(directory) / f"received {member}").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return read
