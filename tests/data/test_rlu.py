"""RL Unplugged's files against the raw episodes that they hold."""

import gzip

import numpy as np
import pytest
from formats import example, png, rlu_features, tfrecord, write_rlu
from recorded import raw_episodes, stored_transitions, transitions

from eqx_q.data import atari, convert, from_rlu, rlu
from eqx_q.data.rlu import decode_frames, read_episodes, read_records
from eqx_q.errors import CorruptFileError, UsageError

pytestmark = pytest.mark.quick


@pytest.fixture
def pong(tmp_path):
    return tmp_path / "Pong"


def test_every_frame_action_reward_and_ending_of_raw_episodes(pong, tmp_path, monkeypatch):
    monkeypatch.setattr(rlu, "_BLOCK", 4)  # an episode is of several blocks
    shards = {(1, 0): [5, 1, 9], (1, 3): [8, 2], (2, 0): [4]}
    episodes = {}
    for seed, ((run, shard), lengths) in enumerate(shards.items()):
        episodes[run, shard] = raw_episodes(lengths, seed)
        write_rlu(pong, run, shard, episodes[run, shard])
    dataset = convert(from_rlu(pong), tmp_path / "out", num_workers=3)
    dataset.verify()
    raw = [one for shard in episodes.values() for one in shard]
    assert stored_transitions(dataset) == transitions(raw)
    assert dataset.num_episodes == 6 and len(dataset) == sum(len(one.frames) for one in raw)
    assert [(shard.name, shard.rows, shard.run) for shard in dataset.shards] == [
        ("run_1-00000-of-00050", 18, 1),
        ("run_1-00003-of-00050", 12, 1),
        ("run_2-00000-of-00050", 5, 2),
    ]
    description = dataset.description
    assert description.env == "envpool/Pong-v5" and description.action_space.n == 6
    assert description.observation_space.shape == (4, 8, 6)
    assert (description.stack, description.stack_start) == (4, "zeros")
    assert description.preprocessing["repeat_action_probability"] == 0.25
    assert description.preprocessing["reward_clip"] is False

    some = convert(from_rlu(pong, run=1, shards=[3]), tmp_path / "some")
    assert stored_transitions(some) == transitions(episodes[1, 3])


def slim(pong, run):
    """As slimCQL's converter reads: every record is a transition, `is_terminals` are the ends of
    episodes, and there are fifty shards.
    """
    found = []
    for shard in range(50):
        records = read_records(pong / f"run_{run}-{shard:05d}-of-00050")
        for record in records:
            features = rlu._parse(record, pong)
            length = len(features["actions"])
            for t in range(length):
                found.append(
                    (features["actions"][t], features["unclipped_rewards"][t], t == length - 1)
                )
    return found


def test_a_game_with_49_shards(pong, tmp_path):
    episodes = {shard: raw_episodes([2], seed=shard) for shard in range(49)}
    for shard, one in episodes.items():
        write_rlu(pong, 1, shard, one)
    with pytest.raises(CorruptFileError, match="No such file"):
        slim(pong, 1)
    dataset = convert(from_rlu(pong, run=1), tmp_path / "out")
    assert stored_transitions(dataset) == transitions(
        [one for shard in episodes.values() for one in shard]
    )


def test_truncations_are_no_terminals_and_the_last_observation_no_transition(pong, tmp_path):
    episodes = raw_episodes([4, 3])  # terminated, truncated
    for shard in range(50):
        write_rlu(pong, 1, shard, episodes if shard == 0 else raw_episodes([1]))
    expected = transitions(episodes)
    naive = slim(pong, 1)[:9]  # four and three transitions, and two final observations
    assert [one[2] for one in naive] == [False] * 4 + [True] + [False] * 3 + [True]
    assert [one[0] for one in naive][4] == 99  # the action of what never happened

    dataset = convert(from_rlu(pong, run=1, shards=[0]), tmp_path / "out")
    stored = stored_transitions(dataset)
    assert len(stored) == 7 and stored == expected
    assert [one.terminated for one in stored] == [False] * 3 + [True] + [False] * 3
    assert [one.truncated for one in stored] == [False] * 6 + [True]
    assert [dataset.rows.action[4], dataset.rows.action[8]] == [-1, -1]


def test_rows_per_shard_cut_an_episode_as_a_truncation(pong, tmp_path):
    episodes = raw_episodes([4, 6, 3])
    write_rlu(pong, 1, 0, episodes)
    write_rlu(pong, 1, 1, episodes)
    dataset = convert(from_rlu(pong, rows_per_shard=8), tmp_path / "out")
    cut = episodes[1]._replace(
        frames=episodes[1].frames[:3], action=episodes[1].action[:2], reward=episodes[1].reward[:2]
    )
    assert stored_transitions(dataset) == transitions([episodes[0], cut] * 2)
    # Of a terminated episode that is cut nothing is terminated.
    cut = convert(from_rlu(pong, rows_per_shard=4), tmp_path / "cut")
    assert not cut.rows.terminated.any() and cut.rows.truncated.sum() == 2
    # One observation is no transition.
    assert len(convert(from_rlu(pong, rows_per_shard=6), tmp_path / "lone")) == 10
    with pytest.raises(UsageError, match="rows_per_shard=1: give 2 or more"):
        from_rlu(pong, rows_per_shard=1)


def test_an_episode_without_a_transition_is_left_out(pong, tmp_path):
    write_rlu(pong, 1, 0, raw_episodes([0, 3]))
    dataset = convert(from_rlu(pong), tmp_path / "out")
    assert dataset.num_episodes == 1 and dataset.num_transitions == 3


def files(path):
    return {one.name: one.read_bytes() for one in path.iterdir()}


@pytest.mark.parametrize("after", [1, 2, 4, 5])
def test_interrupted_and_run_again_it_writes_the_same_bytes(pong, tmp_path, monkeypatch, after):
    monkeypatch.setattr(rlu, "_BLOCK", 4)
    for shard in range(3):
        write_rlu(pong, 1, shard, raw_episodes([5, 4], seed=shard))
    convert(from_rlu(pong), tmp_path / "whole")
    seen = []

    def stop(part, rows):
        seen.append(part)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(from_rlu(pong), tmp_path / "out", num_workers=2, on_rows=stop)
    again = []
    convert(
        from_rlu(pong), tmp_path / "out", num_workers=1, on_rows=lambda part, _: again.append(part)
    )
    assert len(set(again)) == 3 - (after - 1) // 4  # four blocks a part
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_conversion_does_not_go_on_in_its_place(pong, tmp_path):
    write_rlu(pong, 1, 0, raw_episodes([5]))
    write_rlu(pong, 1, 1, raw_episodes([5])).write_bytes(gzip.compress(b"abc"))
    with pytest.raises(CorruptFileError):
        convert(from_rlu(pong), tmp_path / "out")
    with pytest.raises(UsageError, match="beginning of another data set"):
        convert(from_rlu(pong, rows_per_shard=3), tmp_path / "out")


def damage(path, position, value=None):
    """Changes or cuts what is inside a compressed file."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    if value is None:
        del data[position:]
    else:
        data[position] ^= value
    path.write_bytes(gzip.compress(bytes(data)))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "Compressed file ended"),
        (lambda path: damage(path, -50), "it ends in the middle of a record"),
        (lambda path: damage(path, -300, 1), "a checksum is wrong"),
        (lambda path: damage(path, 2, 1), "a checksum is wrong"),  # of a length
        (lambda path: path.write_bytes(b"not gzip"), "Not a gzipped file"),
        (lambda path: path.write_bytes(gzip.compress(tfrecord(b"\xff" * 9))), "."),
    ],
)
def test_damaged_files_are_named(pong, tmp_path, harm, why):
    write_rlu(pong, 1, 0, raw_episodes([3]))
    path = write_rlu(pong, 1, 7, raw_episodes([5, 5]))
    harm(path)
    with pytest.raises(CorruptFileError, match=rf"run_1-00007-of-00050' is damaged \({why}"):
        list(read_episodes(path))
    with pytest.raises(CorruptFileError, match="1 of 2 parts are converted and kept: run this"):
        convert(from_rlu(pong), tmp_path / "out")
    write_rlu(pong, 1, 7, raw_episodes([5, 5]))
    assert convert(from_rlu(pong), tmp_path / "out").num_episodes == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"discounts": [1.0, 0.0, 1.0, 1.0]}, "a discount of 0 before its end"),
        ({"actions": [0, 1]}, "columns of different lengths"),
        (
            {"actions": [0, 6, 1, 99]},
            "has action 6, but Pong has 6 actions: check the name",
        ),
        ({"observations": [b"abc"] * 4}, "a frame that is not a PNG"),
        ({"observations": [png(np.zeros((8, 6, 3), np.uint8))] * 4}, "not all of one uint8"),
        (
            {"observations": [png(np.zeros((9, 6), np.uint8))] * 4},
            r"frames of \[9, 6\], but earlier ones are of \[8, 6\]: convert data with different",
        ),
        ({"observations": [png(np.zeros((8, i), np.uint8)) for i in (6, 6, 6, 5)]}, "not all of"),
        (None, "has no episodes: fetch it again"),
    ],
)
def test_what_is_not_as_it_should_be(pong, tmp_path, change, message):
    write_rlu(pong, 1, 0, raw_episodes([3]))
    path, content = pong / "run_1-00001-of-00050", b""
    if change is not None:
        content = tfrecord(example(rlu_features(raw_episodes([3])[0]) | change))
    path.write_bytes(gzip.compress(content))
    with pytest.raises(UsageError, match=message) as error:
        convert(from_rlu(pong), tmp_path / "out")
    assert str(path) in str(error.value)


def test_a_file_of_something_else(pong):
    features = rlu_features(raw_episodes([3])[0])
    del features["unclipped_rewards"], features["discounts"]
    pong.mkdir()
    (pong / "run_1-00001-of-00050").write_bytes(gzip.compress(tfrecord(example(features))))
    with pytest.raises(CorruptFileError, match="has no unclipped_rewards, discounts"):
        from_rlu(pong)
    (pong / "run_1-00001-of-00050").write_bytes(gzip.compress(b""))
    with pytest.raises(UsageError, match="has no episodes: fetch it again"):
        from_rlu(pong)


def test_folders_runs_and_shards_that_are_not_there(pong, tmp_path):
    for run, shard in [(1, 0), (1, 1), (1, 2), (1, 7), (4, 0)]:
        write_rlu(pong, run, shard, raw_episodes([1]))
    with pytest.raises(UsageError, match=f"Pnog' is not a folder: did you mean '{pong}'"):
        from_rlu(tmp_path / "Pnog")
    with pytest.raises(UsageError, match=f"files 'run_.*: give a game's folder, such as '{pong}'"):
        from_rlu(tmp_path)
    (tmp_path / "Qbert").mkdir()
    with pytest.raises(UsageError, match=r"has no files 'run_\*-of-\*': give a game's folder$"):
        from_rlu(tmp_path / "Qbert")
    with pytest.raises(UsageError, match="has no run 3: choose from 1, 4"):
        from_rlu(pong, run=[1, 3])
    with pytest.raises(UsageError, match="has no shard 3: choose from 0 to 2, 7"):
        from_rlu(pong, run=1, shards=[0, 3])
    with pytest.raises(UsageError, match="no run or no shard of"):
        from_rlu(pong, run=1, shards=[])


def test_the_game_is_the_name_of_the_folder(pong, tmp_path, monkeypatch):
    write_rlu(pong, 1, 0, raw_episodes([3]))
    with pytest.raises(UsageError, match="holds Pong, but env is envpool/Breakout-v5"):
        from_rlu(pong, env="envpool/Breakout-v5")
    assert from_rlu(pong, env="envpool/Pong-v5").description.action_space.n == 6
    with pytest.raises(UsageError, match="num_actions=18, but Pong has 6: leave it out"):
        from_rlu(pong, num_actions=18)
    write_rlu(tmp_path / "Pongg", 1, 0, raw_episodes([3]))
    with pytest.raises(UsageError, match="unknown game 'Pongg': the nearest are Pong"):
        from_rlu(tmp_path / "Pongg")

    monkeypatch.setitem(__import__("sys").modules, "envpool", None)  # as if it were not installed
    atari._known_actions.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"give num_actions=N, or run `pip install 'eqx_q\[at"):
            from_rlu(pong)
        assert from_rlu(pong, num_actions=7).description.action_space.n == 7
    finally:
        atari._known_actions.cache_clear()


@pytest.mark.parametrize("package", ["imagecodecs", "google_crc32c", "google.protobuf"])
def test_a_missing_package_is_named(pong, monkeypatch, package):
    write_rlu(pong, 1, 0, raw_episodes([3]))
    rlu._example_class.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=r"run `pip install 'eqx_q\[offline\]'`"):
        from_rlu(pong)


def test_frames_are_decoded_as_pillow_encodes_them():
    frames = np.random.default_rng(0).integers(0, 256, (5, 84, 84), np.uint8)
    frames[1:] //= 64  # few colours: other filters
    np.testing.assert_array_equal(decode_frames([png(one) for one in frames], "x"), frames)
