"""`scripts/convert.py`: its files, its continuation, and its messages for bad input."""

import re
import resource

import numpy as np
import pytest
from formats import Ring, write_rlu
from recorded import raw_episodes, stored_transitions, transitions

from eqx_q.data import Dataset

RUN = ["format=rlu", "run=1", "out=out"]


@pytest.fixture
def pong(tmp_path):
    """A folder with two runs, and their episodes."""
    runs = {run: [raw_episodes([6, 3], 10 * run + shard) for shard in range(3)] for run in (1, 2)}
    for run, shards in runs.items():
        for shard, episodes in enumerate(shards):
            write_rlu(tmp_path / "rlu" / "Pong", run, shard, episodes)
    return runs


def flat(shards):
    return transitions([episode for shard in shards for episode in shard])


def test_rlu(script, pong, tmp_path):
    status, out, err = script("convert", *RUN, "source=rlu/Pong")
    assert (status, err) == (0, "")
    assert "wrote out: 27 transitions of envpool/Pong-v5; episodes: 6, shards: 3" in out
    assert stored_transitions(Dataset(tmp_path / "out")) == flat(pong[1])
    options = ["run=[2,1]", "shards=[1]", "rows_per_shard=8", "num_workers=1", "env=atari"]
    status, _, err = script("convert", "format=rlu", "source=rlu/Pong", "out=some", *options)
    assert (status, err) == (0, "")
    first = [pong[run][1][0] for run in (2, 1)]
    assert stored_transitions(Dataset(tmp_path / "some")) == transitions(first)


def test_dqn_replay(script, tmp_path):
    episodes = raw_episodes([9, 4])
    Ring(tmp_path / "dqn" / "Pong" / "3" / "replay_logs", 100).play(episodes)
    status, out, err = script("convert", "format=dqn_replay", "source=dqn/Pong", "out=out")
    assert (status, err) == (0, "")
    assert "13 transitions of envpool/Pong-v5; episodes: 2, shards: 1" in out
    (shard,) = Dataset(tmp_path / "out").shards
    assert shard.run == 3


def test_minari_there_and_back(script, pong, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    script("convert", *RUN, "source=rlu/Pong")
    status, out, err = script("convert", "format=to_minari", "source=out", "out=atari/pong-v0")
    assert (status, err) == (0, "")
    assert "wrote the Minari data set 'atari/pong-v0'" in out
    status, _, err = script("convert", "format=minari", "source=atari/pong-v0", "out=back")
    assert (status, err) == (0, "")
    before, after = Dataset(tmp_path / "out").rows, Dataset(tmp_path / "back").rows
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_progress_without_a_terminal(script, pong, monkeypatch):
    monkeypatch.setattr("time.perf_counter", iter(range(0, 10_000, 9)).__next__)
    _, _, err = script("convert", *RUN, "source=rlu/Pong")
    assert re.findall(r"\d+ frames  [\d,]+ frames/s  run_1-0000\d-of-00050\n", err)


def test_progress_with_a_terminal(script, pong, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, _, err = script("convert", *RUN, "source=rlu/Pong")
    assert re.search(r"33.0 frames \[\d\d:\d\d, .* frames/s, run_1-00002-of-00050\]", err)


def test_a_full_disk_and_on_from_there(script, pong, tmp_path):
    script("convert", *RUN, "source=rlu/Pong")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a disk on which no file grows beyond the second shard's frames
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 + 25 * 48, before[1]))
        status, _, err = script("convert", *RUN, "source=rlu/Pong", "out=small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert re.fullmatch(
        r"error: cannot write '.*small.partial' \(File too large\): free space on that disk or "
        r"choose a directory that you can write to; 2 of 3 parts are converted and kept: run this "
        r"again to continue\n",
        err,
    )
    assert not (tmp_path / "small").exists()
    status, out, _ = script("convert", *RUN, "source=rlu/Pong", "out=small")
    assert status == 0 and "2 of 3 parts are done from an earlier attempt" in out
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "small" / path.name).read_bytes() == path.read_bytes()


def test_interrupted(script, pong, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("eqx_q.data.conversion.Writer.commit", interrupted)
        status, _, err = script("convert", *RUN, "source=rlu/Pong")
    assert status == 1 and err == "error: stopped: run this again to continue\n"
    assert script("convert", *RUN, "source=rlu/Pong")[0] == 0
    assert stored_transitions(Dataset(tmp_path / "out")) == flat(pong[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["format=rlu", "out=out"], "there is no source: give source="),
        (["source=rlu/Pong", "out=out"], "there is no format: give format="),
        (["format=rlu", "source=rlu/Pong"], "there is no out: give out="),
        (["format=rul", "source=rlu/Pong", "out=out"], "unknown format 'rul': the nearest are rlu"),
        ([*RUN, "source=/nosuch"], "'/nosuch' is not a folder\n"),
        ([*RUN, "source=rlu/Pnog"], "'rlu/Pnog' is not a folder: did you mean 'rlu/Pong'?"),
        ([*RUN, "source=rlu"], "give a game's folder, such as 'rlu/Pong'"),
        ([*RUN, "source=rlu/Pong", "run=5"], "has no run 5: choose from 1 to 2"),
        ([*RUN, "source=rlu/Pong", "run=[1,x]"], "give whole numbers, such as run=[0,1]"),
        ([*RUN, "source=rlu/Pong", "shards=3"], "give whole numbers, such as shards=[0,1]"),
        ([*RUN, "source=rlu/Pong", "shards=[3]"], "has no shard 3: choose from 0 to 2"),
        ([*RUN, "source=rlu/Pong", "num_workers=0"], "num_workers=0: give a whole number of at"),
        ([*RUN, "source=rlu/Pong", "rows_per_shard=1"], "rows_per_shard=1: give 2 or more"),
        ([*RUN, "source=rlu/Pong", "num_actions=5"], "num_actions=5, but Pong has 6"),
        (
            [*RUN, "source=rlu/Pong", "env=atari", "env.name=Breakout-v5"],
            "'rlu/Pong' holds Pong, but env is envpool/Breakout-v5",
        ),
        ([*RUN, "source=rlu/Pong", "out=rlu"], "'rlu' exists already"),
        ([*RUN, "source=rlu/Pong", "shard=[0]"], "unknown option 'shard': the nearest are shards"),
        (["format=minari", "source=x-v0", "out=out", "run=1"], "does not support run: leave it"),
        (["format=minari", "source=x-v0", "out=out"], "unknown Minari data set 'x-v0'"),
        (["format=to_minari", "source=rlu", "out=x-v0"], "'rlu' is not a data set"),
    ],
)
def test_wrong_input_ends_with_one_line(script, pong, tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    status, _, err = script("convert", *options)
    assert status == 1 and message in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_help(script):
    status, out, _ = script("convert", "--help")
    assert status == 0 and "format=dqn_replay" in out and "rows_per_shard: null" in out
