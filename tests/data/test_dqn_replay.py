"""Dopamine's replay files against the raw episodes that filled the ring buffer."""

import gzip

import numpy as np
import pytest
from formats import Raw, Ring, load_gz, save_gz
from recorded import raw_episodes, stored_transitions, transitions

from eqx_q.data import atari, convert, dqn_replay, from_dqn_replay
from eqx_q.data.dqn_replay import read_columns
from eqx_q.errors import CorruptFileError, UsageError


@pytest.fixture
def pong(tmp_path):
    return tmp_path / "Pong"


def record(pong, lengths, capacity, run=1, seed=0, **options):
    """Plays random episodes into a ring buffer; returns them and what each file holds."""
    episodes = raw_episodes(lengths, seed)
    ring = Ring(pong / str(run) / "replay_logs", capacity, **options)
    ring.play(episodes)
    return episodes, ring.files


def expected(episodes, files, longest=10**9):
    """The episodes that files hold of raw ones, by a loop."""
    found = []
    for owners in files:
        begin = 0
        for i, (number, t) in enumerate(owners):
            episode, length = episodes[number], len(episodes[number].action)
            ends = t == length - 1
            if not ends and i < len(owners) - 1:
                continue
            steps = [step for _, step in owners[begin : i + 1]]
            begin = i + 1
            frames, action = episode.frames[steps], episode.action[steps]
            reward, over = episode.reward[steps], ends and length != longest
            if over:  # the final observation was not stored: the last one again
                frames = np.concatenate([frames, frames[-1:]])
            else:  # what the last action led to is unknown
                action, reward = action[:-1], reward[:-1]
            if len(action):
                found.append(Raw(frames, action, reward, over))
    return found


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1024])
@pytest.mark.parametrize("capacity", [11, 23, 37, 1000])
def test_every_row_of_every_file(pong, tmp_path, monkeypatch, block, capacity):
    monkeypatch.setattr(dqn_replay, "_BLOCK", block)
    lengths = [9, 1, 14, 6, 3, 1, 1, 20, 8, 2, 5]
    episodes, files = record(pong, lengths, capacity)
    assert len(files) > 100 // capacity - 2
    assert transitions(expected(episodes, files))
    dataset = convert(from_dqn_replay(pong), tmp_path / "out", num_workers=2)
    dataset.verify()
    assert stored_transitions(dataset) == transitions(expected(episodes, files))
    assert dataset.num_episodes == len(expected(episodes, files))
    assert dataset.description.preprocessing["reward_clip"] is True
    if capacity == 1000:  # one file: nothing but the endings differs from what was played
        played = [one._replace(frames=one.frames[[*range(len(one.action)), -2]], terminated=True)
                  for one in episodes]  # fmt: skip
        assert stored_transitions(dataset) == transitions(played)


def test_files_that_end_anywhere(pong, tmp_path, monkeypatch):
    """In padding, at an episode's first row, at its last."""
    monkeypatch.setattr(dqn_replay, "_BLOCK", 3)
    for capacity in range(6, 16):
        game = pong / str(capacity) / "Pong"
        episodes, files = record(game, [2, 3, 1, 4], capacity)
        dataset = convert(from_dqn_replay(game), tmp_path / str(capacity))
        assert stored_transitions(dataset) == transitions(expected(episodes, files))


def test_a_game_that_was_cut_is_truncated(pong, tmp_path, monkeypatch):
    monkeypatch.setattr(atari, "LONGEST_GAME", 14)
    for block in (1, 5, 1024):
        monkeypatch.setattr(dqn_replay, "_BLOCK", block)
        episodes, files = record(pong / str(block) / "Pong", [9, 14, 13, 15, 11, 14, 2], 1000)
        dataset = convert(from_dqn_replay(pong / str(block) / "Pong"), tmp_path / f"out{block}")
        assert stored_transitions(dataset) == transitions(expected(episodes, files, longest=14))
        assert dataset.rows.terminated.sum() == 5 and dataset.rows.truncated.sum() == 2


def test_what_a_naive_reader_takes_for_data(pong, tmp_path):
    """Padding, rows of another file, and a next game's frame after a terminal row."""
    episodes, files = record(pong, [9, 14, 6], 24)
    logs = pong / "1" / "replay_logs"
    naive = []
    for shard in range(2):
        frames, action, terminal = (
            load_gz(logs / f"$store$_{name}_ckpt.{shard}.gz")
            for name in ("observation", "action", "terminal")
        )
        for t in range(len(action) - 1):
            naive.append((frames[t].tobytes(), action[t], terminal[t], frames[t + 1].tobytes()))
    truth = {(one.frame, one.next_frame) for one in transitions(episodes)}
    ends = {one.frames[-2].tobytes() for one in episodes}
    bogus = [one for one in naive if not one[2] and (one[0], one[3]) not in truth]
    assert len(bogus) > 6  # three rows of padding an episode, and stale ones
    assert len(naive) > len(transitions(episodes))

    stored = stored_transitions(convert(from_dqn_replay(pong), tmp_path / "out"))
    assert len(stored) == len(transitions(expected(episodes, files))) < 29
    for one in stored:
        if one.terminated:
            assert one.frame in ends and one.next_frame == one.frame
        else:
            assert (one.frame, one.next_frame) in truth


def test_without_the_count_a_file_is_taken_for_a_full_one(pong, tmp_path):
    episodes, files = record(pong, [9, 14, 6], 24, add_count=False)
    dataset = convert(from_dqn_replay(pong, shards=[0]), tmp_path / "out")
    assert stored_transitions(dataset) == transitions(expected(episodes, files[:1]))


def test_data_without_padding(pong, tmp_path):
    """As other recorders leave it; and a real frame may be black."""
    episodes, logs = raw_episodes([5, 4, 1]), pong / "1" / "replay_logs"
    episodes[1].frames[2] = 0
    logs.mkdir(parents=True)
    columns = {
        "observation": np.concatenate([one.frames[:-1] for one in episodes]),
        "action": np.concatenate([one.action for one in episodes]).astype(np.int32),
        "reward": np.concatenate([one.reward for one in episodes]),
        "terminal": np.isin(np.arange(10), [4, 8, 9]),
    }
    columns["action"][7] = columns["reward"][7] = 0
    episodes[1].action[2] = episodes[1].reward[2] = 0
    for name, column in columns.items():
        save_gz(logs / f"$store$_{name}_ckpt.0.gz", column)
    save_gz(logs / "add_count_ckpt.0.gz", np.array(10))
    dataset = convert(from_dqn_replay(pong), tmp_path / "out")
    owners = [(number, t) for number, one in enumerate(episodes) for t in range(len(one.action))]
    assert stored_transitions(dataset) == transitions(expected(episodes, [owners]))


def test_runs_and_shards(pong, tmp_path):
    one, files_one = record(pong, [9, 14, 6, 30], 24, run=1)
    two, files_two = record(pong, [5, 5], 24, run=12, seed=1)
    dataset = convert(from_dqn_replay(pong), tmp_path / "out")
    both = expected(one, files_one) + expected(two, files_two)
    assert stored_transitions(dataset) == transitions(both)
    names = [(shard.name, shard.run) for shard in dataset.shards]
    assert names == [(f"run_1-ckpt.{k}", 1) for k in range(len(files_one))] + [
        ("run_12-ckpt.0", 12)
    ]
    some = convert(from_dqn_replay(pong, run=[12, 1], shards=[0]), tmp_path / "some")
    both = expected(two, files_two) + expected(one, files_one[:1])
    assert stored_transitions(some) == transitions(both)


def test_the_first_rows_alone(pong, tmp_path):
    """The rest of a file is read to check it, and must not be damaged either."""
    frames = np.random.default_rng(0).integers(0, 256, (3000, 8, 6), np.uint8)
    record(pong, [1400, 1400], 3000)
    logs = pong / "1" / "replay_logs"
    path = logs / "$store$_observation_ckpt.0.gz"
    save_gz(path, frames)
    dataset = convert(from_dqn_replay(pong, rows_per_shard=50), tmp_path / "out")
    np.testing.assert_array_equal(dataset.rows.obs, frames[:50])
    assert dataset.rows.truncated[-2] and dataset.rows.action[-1] == -1
    assert len(read_columns(logs, 0, 50).action) == 50
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for rows in (None, 50):
        source = from_dqn_replay(pong, rows_per_shard=rows)
        with pytest.raises(CorruptFileError, match=r"observation_ckpt.0.gz' is damaged \(Compr"):
            convert(source, tmp_path / f"damaged{rows}")
        assert not (tmp_path / f"damaged{rows}").exists()


@pytest.mark.parametrize("name", ["observation", "action", "reward", "terminal", "add_count"])
def test_a_flipped_bit_is_found_or_harmless(pong, tmp_path, name):
    """`gzip` tells it at the end of the file only, behind the rows that the cursor makes ours."""
    record(pong, [9, 14, 6], 24)
    whole = stored_transitions(convert(from_dqn_replay(pong), tmp_path / "whole"))
    stem = name if name == "add_count" else f"$store$_{name}"
    path = pong / "1" / "replay_logs" / f"{stem}_ckpt.1.gz"
    data, found = path.read_bytes(), 0
    for bit in np.random.default_rng(0).permutation(8 * len(data))[:60].tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        out = tmp_path / f"out{bit}"
        try:
            assert stored_transitions(convert(from_dqn_replay(pong), out)) == whole
        except UsageError:
            found += 1
            assert not out.exists()
    assert found > 40


def test_interrupted_and_run_again_it_writes_the_same_bytes(pong, tmp_path, monkeypatch):
    monkeypatch.setattr(dqn_replay, "_BLOCK", 5)
    record(pong, [9, 14, 6, 30, 11], 24)
    convert(from_dqn_replay(pong), tmp_path / "whole")
    for after in (1, 5, 7, 12):
        seen, out = [], tmp_path / f"out{after}"

        def stop(part, rows, seen=seen, after=after):
            seen.append(part)
            if len(seen) == after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(from_dqn_replay(pong), out, on_rows=stop)
        convert(from_dqn_replay(pong), out)
        for path in (tmp_path / "whole").iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes()


def test_blocks_are_small(pong, tmp_path):
    record(pong, [3000], 4000)
    seen = []
    convert(from_dqn_replay(pong), tmp_path / "out", on_rows=lambda _, rows: seen.append(rows))
    assert max(seen) <= 1024 and sum(seen) == 3001


def file(pong, column, shard=1):
    return pong / "1" / "replay_logs" / f"$store$_{column}_ckpt.{shard}.gz"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda pong: file(pong, "reward").unlink(), "reward_ckpt.1.gz' is missing: fetch it, or"),
        (lambda pong: cut(file(pong, "reward")), "reward_ckpt.1.gz' is damaged .*: fetch it again"),
        (lambda pong: cut(file(pong, "observation", 0)), "observation_ckpt.0.gz' is damaged"),
        (lambda pong: file(pong, "observation").unlink(), "observation_ckpt.1.gz' is missing"),
        (
            lambda pong: file(pong, "reward").write_bytes(
                gzip.compress(gzip.decompress(file(pong, "reward").read_bytes()) + b"more")
            ),
            r"reward_ckpt.1.gz' is damaged \(its length differs from its header\)",
        ),
        (lambda pong: file(pong, "action").write_bytes(b"x"), "action_ckpt.1.gz' is damaged"),
        (
            lambda pong: save_gz(file(pong, "terminal"), np.zeros(7)),
            r"has shape \[7\], but there are 24 actions",
        ),
        (
            lambda pong: save_gz(file(pong, "observation"), np.zeros((24, 9, 6), np.uint8)),
            r"frames of \[9, 6\], but earlier ones are of \[8, 6\]: convert data with different",
        ),
        (
            lambda pong: save_gz(file(pong, "observation", 0), np.zeros((24, 8, 6), np.float32)),
            r"float32\[24, 8, 6\], not uint8\[rows, height, width\]",
        ),
        (
            lambda pong: save_gz(file(pong, "action"), np.full(24, 9)),
            "action_ckpt.1.gz' has action 9, but Pong has 6 actions: check the name",
        ),
        (
            lambda pong: pong.rename(pong.with_name("Pnog")) and pong.mkdir(),
            r"Pong' has no files '.*replay_logs.*': give a game's folder$",
        ),
    ],
)
def test_what_is_not_as_it_should_be(pong, tmp_path, harm, message):
    record(pong, [9, 14, 6], 24)
    harm(pong)
    with pytest.raises(UsageError, match=message):
        convert(from_dqn_replay(pong, run=1), tmp_path / "out")


def test_folders_runs_and_games_that_are_not_there(pong, tmp_path):
    record(pong, [9], 24, run=2)
    with pytest.raises(UsageError, match="has no run 1: choose from 2"):
        from_dqn_replay(pong, run=1)
    with pytest.raises(UsageError, match=r"run 2 in '.*' has no shard 4: choose from 0"):
        from_dqn_replay(pong, shards=[4])
    with pytest.raises(UsageError, match=f"give a game's folder, such as '{pong}'"):
        from_dqn_replay(tmp_path)
    with pytest.raises(UsageError, match="holds Pong, but env is envpool/Qbert-v5"):
        from_dqn_replay(pong, env="envpool/Qbert-v5")
