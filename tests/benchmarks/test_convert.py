"""The benchmark of conversion: files in the original formats hold the played games."""

import json
import os
import sys

import convert
import numpy as np
import report
from recorded import stored_transitions

import eqx_q.data


def test_end_to_end_on_games_that_were_played(tmp_path, monkeypatch):
    played = []

    def play(*arguments):
        played.append(real(*arguments))
        return played[-1]

    pinned, real = [], convert.play
    monkeypatch.setattr(convert, "play", play)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: pinned.append(cores))
    originals = ["--originals", str(tmp_path / "originals"), "--out", str(tmp_path / "out.json")]
    command = ["convert.py", "--games", "Pong", "--frames", "90", "--repetitions", "2"]
    monkeypatch.setattr(sys, "argv", [*command, *originals])
    convert.main()
    assert len(pinned) == 1 and len(pinned[0]) == 1
    result = json.loads((tmp_path / "out.json").read_text())["games"]["Pong"]
    assert [result[name]["frames"] for name in ("rlu", "dqn_replay")] == [91, 91]
    assert len(result["rlu"]["frames_per_second_each"]) == 2

    (expected,) = played
    home = tmp_path / "originals" / "Pong-90"
    folder = home / "rlu" / "Pong"
    rlu = eqx_q.data.convert(eqx_q.data.from_rlu(folder), tmp_path / "rlu")
    for ours, theirs in zip(rlu.rows, expected.rows, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    folder = home / "dqn_replay" / "Pong"
    replay = eqx_q.data.convert(eqx_q.data.from_dqn_replay(folder), tmp_path / "replay")
    # There every last row is terminal, and what it led to is not known.
    assert len(stored_transitions(replay)) == 90 and replay.rows.terminated[-2]
    np.testing.assert_array_equal(replay.rows.obs[:-1], expected.rows.obs[:-1])
    np.testing.assert_array_equal(replay.rows.reward, np.sign(expected.rows.reward))


def test_speeds_are_told_with_their_range():
    rlu = {"frames": 30_000, "bytes_per_frame": 590.4, "frames_per_second": 20_000.0}
    rlu |= {"frames_per_second_each": [19_000.0, 20_000.0, 21_500.0]}
    (row,) = report.conversion_table({"games": {"Pong": {"rlu": rlu}}}).splitlines()[2:]
    assert row == "| Pong | rlu | 590 B | **20,000** (19,000–21,500) |"
