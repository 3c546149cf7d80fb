"""Data sets on disk: reading returns what was written, and damage is refused."""

import json
import os
import shutil
import zlib
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest
from recordings import ACTIONS, STACK, VECTOR, describe, random_episode, random_episodes, write

from eqx_q.data import Dataset, Description, Rows, Shard, Writer
from eqx_q.errors import CorruptFileError, UsageError

pytestmark = pytest.mark.quick

ARRAYS = ("action", "reward", "terminated", "truncated", "first")


def concatenated(episodes):
    return jax.tree.map(lambda *x: np.concatenate(x), *episodes)


def assert_rows(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_an_episode_as_rows():
    rows = Rows.of_episode(np.arange(3), np.array([2, 1]), np.array([0.5, -1.0]), terminated=False)
    assert rows.action.tolist() == [2, 1, -1] and rows.action.dtype == np.int32
    assert rows.reward.tolist() == [0.5, -1, 0] and rows.reward.dtype == np.float32
    assert rows.terminated.tolist() == [False] * 3
    assert rows.truncated.tolist() == [False, True, False]
    assert rows.first.tolist() == [True, False, False]
    rows = Rows.of_episode(np.arange(2), np.array([0]), np.array([1.0]), terminated=True)
    assert rows.terminated.tolist() == [True, False]
    assert rows.truncated.tolist() == [False, False]


@pytest.mark.parametrize("stack", [None, 4])
def test_what_is_written_is_what_is_read(tmp_path, stack):
    space = VECTOR if stack is None else STACK
    description = describe(
        space, stack, preprocessing={"sticky": 0.25, "size": [84, 84]}, source={"of": "a test"}
    )
    episodes = random_episodes(0, stack=stack)
    written = write(tmp_path / "data", [(episodes[:3], 1), (episodes[3:], 2)], description)
    for dataset in (written, Dataset(str(tmp_path / "data"))):
        assert_rows(dataset.rows, concatenated(episodes))
        assert all(isinstance(x, np.memmap) for x in jax.tree.leaves(dataset.rows))
        for ours, theirs in zip(dataset.episodes(), episodes, strict=True):
            assert_rows(ours, theirs)
        assert dataset.description == description
        num = sum(len(rows.action) for rows in episodes[:3])
        assert dataset.shards == [
            Shard("shard0", 0, num, 1),
            Shard("shard1", num, len(dataset) - num, 2),
        ]
        assert len(dataset) == sum(len(rows.action) for rows in episodes)
        assert dataset.num_episodes == len(episodes)
        assert dataset.num_transitions == len(dataset) - len(episodes)
        dataset.verify()
    names = {path.name for path in (tmp_path / "data").iterdir()}
    obs = "obs" if stack is None else "frames"
    assert names == {"header.json", *(f"{name}.npy" for name in (obs, *ARRAYS))}
    plain = np.load(tmp_path / "data" / f"{obs}.npy")  # with nothing of ours
    np.testing.assert_array_equal(plain, concatenated(episodes).obs)
    assert not (tmp_path / "data.partial").exists()


def test_the_header_says_it_all(tmp_path):
    rows = random_episode(np.random.default_rng(0), 5, terminated=True)
    write(tmp_path / "data", [([rows], 7)], describe(source={"files": 1}))
    header = json.loads((tmp_path / "data" / "header.json").read_text())
    checksum = header.pop("crc32")
    assert checksum == zlib.crc32((json.dumps(header, indent=1) + "\n").encode())
    arrays = header.pop("arrays")
    assert header == {
        "format": 2,
        "env": "test/Env-v0",
        "observation_space": {"shape": [3], "dtype": "<f4", "low": "-inf", "high": "inf"},
        "num_actions": 4,
        "stack": None,
        "stack_start": "zeros",
        "preprocessing": {},
        "source": {"files": 1},
        "shards": [{"name": "shard0", "start": 0, "rows": 6, "run": 7, "source": {}}],
    }
    assert arrays["obs"]["dtype"] == "<f4" and arrays["obs"]["shape"] == [6, 3]
    assert arrays["truncated"]["dtype"] == "|b1" and arrays["truncated"]["shape"] == [6]


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (-np.inf, np.inf, np.float32),
        ([-np.inf, 0.0, -1.5], [np.inf, np.inf, 0.1], np.float32),
        (0, 255, np.uint8),
        (0, 1, np.int8),
        (-1e300, np.inf, np.float64),
        (np.iinfo(np.int64).min, np.iinfo(np.int64).max, np.int64),
    ],
)
def test_spaces_come_back(low, high, dtype):
    low, high = (np.broadcast_to(np.array(x, dtype), (3,)) for x in (low, high))
    description = describe(gymnasium.spaces.Box(low, high, (3,), dtype))
    text = json.dumps(description.as_json(), allow_nan=False)  # JSON that others read, too
    ours = Description.from_json(json.loads(text))
    assert ours.observation_space == description.observation_space
    assert ours.observation_space.dtype == dtype
    assert ours.action_space == ACTIONS


PARTS = gymnasium.spaces.Dict(
    {
        "a/b": gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(3, start=-1), VECTOR]),
        "image": gymnasium.spaces.Box(0, 255, (2, 2), np.uint8),
    }
)
MULTI = gymnasium.spaces.MultiDiscrete([2, 3], start=[-1, 4])
TEAM = Description(
    "test/Team-v0", PARTS, MULTI, num_agents=2, extras={"agent_mask": (2,), "agent_reward": (2,)}
)
PLAY = Rows.of_episode(
    {
        "image": np.arange(32, dtype=np.uint8).reshape(4, 2, 2, 2),
        "a/b": (np.array([[-1, 0], [1, 1], [0, 0], [1, -1]]), np.ones((4, 2, 3), np.float32)),
    },
    np.array([[[-1, 4], [0, 6]], [[0, 5], [0, 5]], [[-1, 6], [-1, 6]]]),
    np.array([1.0, 2.0, 3.0]),
    terminated=True,
    agent_mask=np.array([[True, True], [True, False], [False, True], [False, False]]),
    agent_reward=np.array([[1, 0], [1, 1], [0, 3]]),
)


def test_every_part_is_a_file(tmp_path):
    dataset = write(tmp_path / "data", [[PLAY, PLAY]], TEAM)
    dataset.verify()
    assert_rows(dataset.rows, concatenated([PLAY, PLAY]))
    assert dataset.rows.acted.tolist() == [True, True, True, False] * 2
    assert dataset.rows.action[3].tolist() == [[-1, -1]] * 2 and dataset.description == TEAM
    header = json.loads((tmp_path / "data" / "header.json").read_text())
    parts = ["obs.a%2Fb.0", "obs.a%2Fb.1", "obs.image"]
    assert list(header["arrays"]) == [*parts, *ARRAYS, "agent_mask", "agent_reward"]
    assert {x.stem for x in (tmp_path / "data").glob("*.npy")} == header["arrays"].keys()
    assert header["format"] == 3 and header["num_agents"] == 2
    assert header["action_space"] == {
        "kind": "MultiDiscrete", "nvec": [2, 3], "start": [-1, 4], "dtype": "<i8"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (PLAY._replace(agent_mask=None), "rows have agent_reward, but the description has"),
        (PLAY._replace(obs=PLAY.obs["image"]), r"lacks \['a/b', 'image'\]"),
        (PLAY._replace(obs=PLAY.obs | {"image": np.zeros((4, 2, 2))}), r"obs.image is float64"),
        (PLAY._replace(action=PLAY.action[..., 0]), r"action is int32\[4, 2\]: give int32\[4, 2,"),
        (PLAY._replace(action=PLAY.action + np.float32(0.5)), "action is float64"),
        (PLAY._replace(action=PLAY.action + 1), "row 0 has no legal action"),
        (PLAY._replace(agent_reward=PLAY.agent_reward + 1), "row 3 is a final observation with"),
        (PLAY._replace(agent_reward=PLAY.agent_reward * np.nan), "has an agent reward that is not"),
    ],
)  # fmt: skip
def test_rows_of_other_parts_are_refused(tmp_path, rows, message):
    with (
        Writer(tmp_path / "data", TEAM) as writer,
        pytest.raises(UsageError, match=message),
    ):
        writer.append(rows)


def test_parts_that_would_share_a_file_are_refused(tmp_path):
    nested = gymnasium.spaces.Dict({"b": VECTOR})
    space = gymnasium.spaces.Dict({"a": nested, "a.b": VECTOR})
    with pytest.raises(UsageError, match=r"two parts of observations have the path 'a\.b'"):
        Writer(tmp_path / "data", describe(space))


def test_continuous_actions(tmp_path):
    """There is no action where there is none, and what is not a number is none."""
    description = describe()._replace(action_space=gymnasium.spaces.Box(-1, 1, (2,), np.float32))
    action = np.array([[-1, 1], [0.5, -1]])
    rows = Rows.of_episode(np.zeros((3, 3)), action, np.ones(2), terminated=True)
    dataset = write(tmp_path / "data", [[rows]], description)
    assert dataset.rows.action.dtype == np.float32 and dataset.num_transitions == 2
    np.testing.assert_array_equal(dataset.rows.action, [*action, [np.nan, np.nan]])
    wrong = rows._replace(action=np.where(rows.action == 0.5, np.nan, rows.action))
    with (
        Writer(tmp_path / "wrong", description) as writer,
        pytest.raises(UsageError, match="row 1 has no legal action"),
    ):
        writer.append(wrong)


def test_minus_one_may_be_an_action(tmp_path):
    """Then it is where the row before ended that an observation is a final one."""
    space = gymnasium.spaces.Discrete(3, start=-2)
    rows = ROWS._replace(action=np.array([-1, -2, -1, -1], np.int32))
    dataset = write(tmp_path / "data", [[rows]], describe()._replace(action_space=space))
    assert dataset.rows.acted.tolist() == [True, True, True, False]
    assert dataset.description.action_space == space


def test_observations_may_be_stored_narrower(tmp_path):
    space = gymnasium.spaces.Box(0, 1, (3,), np.float32)
    rows = random_episode(np.random.default_rng(0), 4, terminated=False)
    rows = rows._replace(obs=rows.obs > 0)
    dataset = write(tmp_path / "data", [[rows]], describe(space), dtype=np.bool_)
    assert dataset.rows.obs.dtype == np.bool_
    np.testing.assert_array_equal(dataset.rows.obs, rows.obs)
    assert dataset.description.observation_space.dtype == np.float32


def files(path):
    return {x.name: x.read_bytes() for x in sorted(path.iterdir())}


@pytest.mark.parametrize("torn", ["rows", "half a row", "nothing"])
def test_after_a_crash_another_writer_goes_on(tmp_path, torn):
    """What was committed stays; what was not is forgotten, to the byte."""
    episodes = random_episodes(1, num=6)
    shards = {"a": episodes[:2], "b": episodes[2:4], "c": episodes[4:]}
    whole = write(tmp_path / "whole", list(shards.values()))

    crashed = Writer(tmp_path / "data", describe())
    for rows in shards["a"]:
        crashed.append(rows)
    crashed.commit("shard0")
    if torn != "nothing":
        crashed.append(shards["c"][1])
    if torn == "half a row":
        for file in crashed._files.values():
            file.write(b"\1")
    crashed.close()  # as the operating system would

    with Writer(tmp_path / "data", describe()) as writer:
        assert writer.done == {"shard0"}
        assert len(writer) == whole.shards[0].rows
        for rows in shards["b"]:
            writer.append(rows)
        writer.commit("shard1")
    with Writer(tmp_path / "data", describe()) as writer:
        assert writer.done == {"shard0", "shard1"}
        for rows in shards["c"]:
            writer.append(rows)
        writer.commit("shard2")
        writer.finish().verify()
    assert files(tmp_path / "data") == files(tmp_path / "whole")


@pytest.mark.parametrize("last", ["header.json", "data"])
def test_a_crash_while_finishing_loses_nothing(tmp_path, monkeypatch, last):
    write(tmp_path / "whole", [random_episodes(1)])
    writer = Writer(tmp_path / "data", describe())
    for rows in random_episodes(1):
        writer.append(rows)
    writer.commit("shard0")
    replace = os.replace

    def crash(path, target):
        if Path(target).name == last:
            raise KeyboardInterrupt
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    with Writer(tmp_path / "data", describe()) as writer:
        assert writer.done == {"shard0"}
        writer.finish()
    assert files(tmp_path / "data") == files(tmp_path / "whole")


def test_a_shard_without_rows_is_none(tmp_path):
    with Writer(tmp_path / "data", describe()) as writer:
        writer.commit("empty")
        writer.append(random_episodes(0)[0])
        writer.commit("full")
        assert [shard.name for shard in writer.finish().shards] == ["full"]


def test_discarded(tmp_path):
    with Writer(tmp_path / "data", describe()) as writer:
        writer.append(random_episodes(0)[0])
        writer.discard()
    assert list(tmp_path.iterdir()) == []


ROWS = random_episode(np.random.default_rng(0), 3, terminated=True)


def changed(**columns):
    """The rows of an episode of 3 steps, some entries of columns changed: `{index: value}`."""
    new = {}
    for name, entries in columns.items():
        column = getattr(ROWS, name).copy()
        for index, value in entries.items():
            column[index] = value
        new[name] = column
    return ROWS._replace(**new)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS._replace(obs=ROWS.obs[:, :2]), r"observations are float32\[4, 2\]: give "),
        (ROWS._replace(obs=ROWS.obs[:3]), r"observations are float32\[3, 3\]"),
        (ROWS._replace(obs=ROWS.obs.astype(complex)), "observations are complex128"),
        (ROWS._replace(reward=ROWS.reward[:1]), r"reward is float32\[1\]: give float32\[4\]"),
        (ROWS._replace(first=np.tile(ROWS.first, (2, 1))), r"first is bool\[2, 4\]: give bool"),
        (changed(truncated={2: True}), "row 2 is both terminated and truncated"),
        (changed(action={1: 4}), "row 1 has no legal action"),
        (changed(action={1: -2}), "row 1 has no legal action"),
        (changed(reward={0: np.nan}), "row 0 has a reward that is not finite"),
        (changed(reward={1: np.inf}), "row 1 has a reward that is not finite"),
        (changed(reward={3: 1.0}), "row 3 is a final observation with a reward or end"),
        (changed(terminated={3: True}), "row 3 is a final observation with a reward or end"),
        (changed(truncated={3: True}), "row 3 is a final observation with a reward or end"),
        (changed(action={1: -1}, reward={1: 0.0}), "row 1 must be a final observation exactly if"),
        (changed(action={3: 0}), "row 3 must be a final observation exactly if"),
        (changed(terminated={2: False}), "row 3 must be a final observation exactly if"),
        (changed(terminated={1: True}), "row 2 must be a final observation exactly if"),
        (changed(first={0: False}), "row 0 must be marked first exactly after"),
        (changed(first={2: True}), "row 2 must be marked first exactly after"),
    ],
)  # fmt: skip
def test_rows_that_make_no_episodes_are_refused(tmp_path, rows, message):
    with Writer(tmp_path / "data", describe()) as writer:
        with pytest.raises(UsageError, match=message):
            writer.append(rows)
        # Nothing of them is there, and what is right may follow; also one by one.
        for t in range(4):
            writer.append(ROWS.part(t, t + 1))
        row = int(message.split()[1]) if message.startswith("row") else 0
        with pytest.raises(UsageError, match=message.replace(f"row {row}", f"row {row + 4}")):
            writer.append(rows)
        writer.commit("shard0")
        assert_rows(writer.finish().rows, ROWS)


@pytest.mark.parametrize(
    ("stored", "given", "value", "holds"),
    [
        (np.uint8, np.uint16, 300, False),  # it would become 44
        (np.uint8, np.uint16, 255, True),
        (np.int8, np.int64, 128, False),
        (np.int8, np.int64, -128, True),
        (np.float32, np.float64, 1e39, False),  # it would become infinite
        (np.float32, np.float64, np.inf, True),
        (np.float32, np.float64, np.nan, True),
        (np.float32, np.float64, 0.1, True),
        (np.float32, np.int64, 2**24 + 1, True),  # rounded
    ],
)
def test_observations_that_do_not_fit_their_type_are_refused(tmp_path, stored, given, value, holds):
    obs = np.zeros((4, 3), given)
    obs[2, 1] = value
    space = gymnasium.spaces.Box(0, 1, (3,), stored)
    with Writer(tmp_path / "data", describe(space)) as writer:
        if holds:
            writer.append(ROWS._replace(obs=obs))
            writer.commit("shard0")
            np.testing.assert_array_equal(writer.finish().rows.obs, obs.astype(stored))
        else:
            with pytest.raises(
                UsageError, match=f"row 2 has an observation that does not fit {stored.__name__}"
            ):
                writer.append(ROWS._replace(obs=obs))


def test_rewards_that_become_infinite_are_refused(tmp_path):
    reward = np.array([0, 1e39, 0, 0])
    with (
        Writer(tmp_path / "data", describe()) as writer,
        pytest.raises(UsageError, match="row 1 has a reward that does not fit float32"),
    ):
        writer.append(ROWS._replace(reward=reward))


def test_what_follows_from_one_call_to_the_next(tmp_path):
    with Writer(tmp_path / "data", describe()) as writer:
        writer.append(ROWS.part(0, 0))
        with pytest.raises(UsageError, match="row 0 must be marked first"):
            writer.append(ROWS.part(1, 4))
        writer.append(ROWS.part(0, 2))
        with pytest.raises(UsageError, match="'here' has no final observation"):
            writer.commit("here")
        with pytest.raises(UsageError, match="row 2 must be marked first"):
            writer.append(ROWS.part(0, 2))
        writer.append(ROWS.part(2, 3))
        with pytest.raises(UsageError, match="has no final observation"):
            writer.commit("here")
        with pytest.raises(UsageError, match="row 3 must be a final observation"):
            writer.append(ROWS.part(0, 3))
        writer.append(ROWS.part(3, 4))
        with pytest.raises(UsageError, match="4 rows are not committed"):
            writer.finish()
        writer.commit("here")
        assert_rows(writer.finish().rows, ROWS)


def test_no_data_is_no_data_set(tmp_path):
    writer = Writer(tmp_path / "data", describe())
    with writer, pytest.raises(UsageError, match="there are no data"):
        writer.finish()
    assert not (tmp_path / "data").exists()


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match="already: choose another place"):
        Writer(tmp_path / "data", describe())
    assert [x.name for x in tmp_path.iterdir()] == ["data"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        Writer(tmp_path / "file" / "data", describe())
    writer = Writer(tmp_path / "late", describe())
    writer.append(ROWS)
    writer.commit("shard0")
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "theirs").touch()
    with pytest.raises(UsageError, match="cannot write"):
        writer.finish()
    assert [x.name for x in (tmp_path / "late").iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    "other",
    [
        describe(preprocessing={"frame_skip": 4}),
        describe(gymnasium.spaces.Box(-1, 1, (3,), np.float32)),
        describe(source={"from": "elsewhere"}),
        describe()._replace(action_space=gymnasium.spaces.Discrete(5)),
        describe()._replace(env="test/Other-v0"),
    ],
)
def test_a_beginning_of_something_else(tmp_path, other):
    with Writer(tmp_path / "data", describe()) as writer:
        writer.append(ROWS)
        writer.commit("shard0")
    before = files(tmp_path / "data.partial")
    with pytest.raises(UsageError, match="the beginning of another data set"):
        Writer(tmp_path / "data", other)
    with pytest.raises(UsageError, match="the beginning of another data set"):
        Writer(tmp_path / "data", describe(), dtype=np.float16)
    assert files(tmp_path / "data.partial") == before


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "obs.npy").write_bytes((path / "obs.npy").read_bytes()[:-1]),
        lambda path: (path / "reward.npy").unlink(),
        lambda path: flip(path / "reward.npy", -1),
        lambda path: flip(path / "obs.npy", -1),
        lambda path: (path / "progress.json").write_text("{"),
        lambda path: (path / "progress.json").write_text("{}"),
        lambda path: (path / "progress.json").write_text("[]"),
        lambda path: change(path / "progress.json", '"rows": 4', '"rows": 3'),
    ],
)
def test_a_beginning_that_is_damaged(tmp_path, damage):
    with Writer(tmp_path / "data", describe()) as writer:
        writer.append(ROWS)
        writer.commit("shard0")
    damage(tmp_path / "data.partial")
    with pytest.raises(CorruptFileError, match=r"delete '.*data\.partial'"):
        Writer(tmp_path / "data", describe())


class FullDisk:
    """A file that takes no more."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        self._file.write(bytes(data)[: len(data) // 2])
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("column", ["obs", "reward", "first"])
def test_a_full_disk_keeps_what_was_committed(tmp_path, column):
    episodes = random_episodes(1)
    whole = write(tmp_path / "whole", [episodes[:2], episodes[2:]])
    writer = Writer(tmp_path / "data", describe())
    for rows in episodes[:2]:
        writer.append(rows)
    writer.commit("shard0")
    writer.append(episodes[2])
    writer._files[column] = FullDisk(writer._files[column])
    with pytest.raises(UsageError, match=r"cannot write .*No space left"):
        writer.append(episodes[3])
    # It must not go on as if nothing had happened: its checksums are of what is not there.
    for attempt in (
        lambda: writer.append(episodes[3]),
        lambda: writer.commit("shard1"),
        lambda: writer.finish(),
    ):
        with pytest.raises(UsageError, match=r"closed|not committed"):
            attempt()
    with Writer(tmp_path / "data", describe()) as writer:
        assert writer.done == {"shard0"}
        for rows in episodes[2:]:
            writer.append(rows)
        writer.commit("shard1")
        writer.finish()
    assert files(tmp_path / "data") == files(tmp_path / "whole")
    whole.verify()


def test_a_disk_that_fills_up_at_the_first_rows_leaves_nothing_to_finish(tmp_path):
    writer = Writer(tmp_path / "data", describe())
    writer.append(ROWS)
    writer.commit("shard0")
    writer._files["reward"] = FullDisk(writer._files["reward"])
    with pytest.raises(UsageError, match="No space left"):
        writer.append(ROWS)
    with pytest.raises(UsageError, match="closed"):
        writer.finish()
    Writer(tmp_path / "data", describe()).finish().verify()


@pytest.mark.parametrize("when", ["commit", "progress", "finish"])
def test_a_disk_that_is_full_later(tmp_path, monkeypatch, when):
    writer = Writer(tmp_path / "data", describe())
    writer.append(ROWS)
    writer.commit("shard0")
    if when != "finish":
        writer.append(ROWS)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        where = {"commit": "eqx_q.data.writer", "progress": "eqx_q.saving.files"}
        patch.setattr(f"{where.get(when, 'eqx_q.data.writer')}.os.fsync", full)
        with pytest.raises(UsageError, match=r"cannot write .*No space left"):
            writer.finish() if when == "finish" else writer.commit("shard1")
    writer.close()
    with Writer(tmp_path / "data", describe()) as writer:
        assert writer.done == {"shard0"}
        assert_rows(writer.finish().rows, ROWS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "data"
    write(path, [random_episodes(0)])
    return path


@pytest.fixture
def path(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def test_what_is_no_data_set(tmp_path, path):
    for wrong in (tmp_path / "missing", tmp_path, path / "obs.npy"):
        with pytest.raises(UsageError, match="is not a data set, since it has no header"):
            Dataset(wrong)
    (path / "header.json").unlink()
    with pytest.raises(UsageError, match="is not a data set, since it has no header"):
        Dataset(path)


def test_a_data_set_that_one_is_in(path, monkeypatch):
    monkeypatch.chdir(path)
    assert len(Dataset(".")) == len(Dataset(path))


def test_one_that_is_not_finished(tmp_path):
    with Writer(tmp_path / "data", describe()) as writer:
        writer.append(ROWS)
        writer.commit("shard0")
    with pytest.raises(UsageError, match="is not finished: run the command"):
        Dataset(tmp_path / "data")


def rewrite(path, edit):
    header = json.loads((path / "header.json").read_text())
    header = edit(header) or header
    if isinstance(header, dict):  # as if it had been written so
        header.pop("crc32")
        header["crc32"] = zlib.crc32((json.dumps(header, indent=1) + "\n").encode())
    (path / "header.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h.update(format=4), "not a data set in a format"),
        (lambda h: h.pop("format") and None, "not a data set in a format"),
        (lambda h: [h], "not a data set in a format"),
        (lambda h: h.pop("env") and None, "has an invalid header"),
        (lambda h: h.pop("shards") and None, "has an invalid header"),
        (lambda h: h.update(stack=4), "has an invalid header"),
        (lambda h: h.update(arrays=[]), "has an invalid header"),
        (lambda h: h.update(num_actions=None), "has an invalid header"),
        (lambda h: h["arrays"].pop("first") and None, "has an invalid header"),
        (lambda h: h["arrays"].update(more=h["arrays"]["first"]), "has an invalid header"),
        (lambda h: h["observation_space"].update(dtype="nonsense"), "has an invalid header"),
        (lambda h: h["observation_space"].update(shape=[2]), "has an invalid header"),
        (lambda h: h["arrays"]["obs"].update(dtype="<f8"), "but the header says"),
        (lambda h: h["arrays"]["obs"]["shape"].__setitem__(0, 3), "but the header says"),
        (lambda h: h["arrays"]["action"].update(crc32=0), "checksum is wrong"),
    ],
)
def test_a_header_that_is_not_of_these_data(path, edit, message):
    rewrite(path, edit)
    with pytest.raises(CorruptFileError, match=message):
        Dataset(path)


def test_a_header_that_is_no_json(path):
    text = (path / "header.json").read_bytes()
    for damaged in (text[: len(text) // 2], b"", b"\xff\xfe" + text):
        (path / "header.json").write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"header\.json' is damaged"):
            Dataset(path)


def test_a_changed_character_of_the_header_is_found(path):
    text = (path / "header.json").read_text()
    for position, character in enumerate(text):
        if character.isspace():
            continue  # between words it means nothing
        other = "7" if character != "7" else "3"
        damaged = text[:position] + other + text[position + 1 :]
        (path / "header.json").write_text(damaged)
        with pytest.raises(CorruptFileError, match=r"is damaged \(.*: make|in a format"):
            Dataset(path)


@pytest.mark.parametrize("name", ["obs", *ARRAYS])
def test_arrays_that_are_cut_or_gone(path, name):
    file = path / f"{name}.npy"
    data = file.read_bytes()
    for damaged in (data[:-1], data[:256], data[:100], b""):
        file.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=rf"{name}\.npy' is damaged"):
            Dataset(path)
    file.unlink()
    with pytest.raises(CorruptFileError, match=rf"{name}\.npy' is damaged"):
        Dataset(path)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_flipped_byte_is_found_on_opening(path, name):
    flip(path / f"{name}.npy", -1)
    with pytest.raises(CorruptFileError, match=rf"{name}\.npy' is damaged, its checksum"):
        Dataset(path)


def test_a_flipped_bit_of_a_header_is_found_or_harmless(path):
    file, rows = path / "reward.npy", np.array(Dataset(path).rows.reward)
    found = 0
    for position in range(0, 256, 3):
        flip(file, position, position % 8)
        try:
            np.testing.assert_array_equal(Dataset(path).rows.reward, rows)
        except CorruptFileError:
            found += 1
        flip(file, position, position % 8)
    assert found > 40
    Dataset(path)  # as it was


def test_a_flipped_byte_of_what_is_large_is_found_by_verify(path):
    flip(path / "obs.npy", -1)
    dataset = Dataset(path)
    with pytest.raises(CorruptFileError, match=r"obs\.npy' is damaged, its checksum"):
        dataset.verify()


def test_two_writers_do_not_destroy_each_others_work(tmp_path):
    first = Writer(tmp_path / "data", describe())
    with pytest.raises(UsageError, match="another process is writing"):
        Writer(tmp_path / "data", describe())
    first.close()
    Writer(tmp_path / "data", describe()).close()
