"""Files of trees: any damage is detected, and the previous checkpoint is used."""

import logging
import random
import re

import jax
import numpy as np
import pytest

from eqx_q.errors import CorruptFileError, UsageError
from eqx_q.saving.checkpoint import load, load_latest, read_header, save, save_checkpoint


def small_file(path):
    save(path, {"a": np.arange(3, dtype=np.int16), "b": (1.5, "x")})
    return path.read_bytes()


def test_header_is_readable(tmp_path):
    data = small_file(tmp_path / "a")
    text = data[:2000].decode("ascii", errors="replace")
    assert text.startswith("eqx_q-file 0002 ")
    assert (
        '{"path": "[\'a\']", "kind": "numpy", "dtype": "int16", "shape": [3], "offset": 0}' in text
    )
    header = read_header(tmp_path / "a")
    assert header["versions"]["jax"] == jax.__version__ and "eqx_q" in header["versions"]
    assert data.endswith(np.arange(3, dtype="<i2").tobytes())
    assert (len(data) - 6) % 64 == 0


def test_zeros_have_no_bytes(tmp_path):
    tree = {
        "moment": np.zeros((1000, 3), np.float32),
        "sign": np.full(3, -0.0, np.float32),
        "none": np.zeros((0, 4), np.int8),
        "b": jax.numpy.zeros(2, jax.numpy.bfloat16),
    }
    save(tmp_path / "a", tree)
    assert read_header(tmp_path / "a")["payload"]["bytes"] == 12
    for name, found in load(tmp_path / "a").items():
        assert type(found) is type(tree[name]) and found.dtype == tree[name].dtype
        assert found.shape == tree[name].shape and found.tobytes() == tree[name].tobytes()


def test_every_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "a"
    data = small_file(path)
    damaged = bytearray(data)
    for position in range(len(data)):
        bit = 1 << random.Random(position).randrange(8)
        damaged[position] ^= bit
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError):
            load(path)
        damaged[position] ^= bit
    path.write_bytes(damaged)
    load(path)


def test_every_bit_of_the_first_line(tmp_path):
    path = tmp_path / "a"
    data = small_file(path)
    for position in range(data.index(b"\n") + 1):
        for bit in (0, 4, 5):  # another digit, a space for a digit, the other case
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CorruptFileError):
                load(path)


def test_every_truncation_is_detected(tmp_path):
    path = tmp_path / "a"
    data = small_file(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptFileError):
            load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CorruptFileError, match="appended"):
        load(path)


def test_says_what_is_wrong(tmp_path):
    path = tmp_path / "agent.eqx"
    data = small_file(path)
    for content, message in [
        (b"\x80\x04pickle", "not an eqx_q file"),
        (b"", "not an eqx_q file"),
        (data.replace(b"eqx_q-file 0002", b"eqx_q-file 0003"), "format 3.*upgrade eqx_q"),
        (data[:200], "ends inside its header"),
        (data[:-1], "truncated"),
        (data[:-1] + b"!", "checksum of its arrays"),
        (data.replace(b'"kind"', b'"Kind"'), "checksum of its header"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=message):
            load(path)
    with pytest.raises(UsageError, match=r"does not exist: did you mean agent\.eqx"):
        load(tmp_path / "agnet.eqx")
    with pytest.raises(UsageError, match="give a file"):
        load(tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_keeps_the_newest(tmp_path):
    for step in (0, 5, 10, 200):
        path = save_checkpoint(tmp_path / "c", {"x": np.arange(step)}, step)
        assert path.name == f"{step:012d}.ckpt"
    assert [int(p.stem) for p in sorted((tmp_path / "c").iterdir())] == [10, 200]
    tree, path = load_latest(tmp_path / "c")
    assert tree["x"].shape == (200,) and int(path.stem) == 200
    (tmp_path / "c" / "notes.ckpt").write_text("mine")  # other people's files stay
    save_checkpoint(tmp_path / "c", 1, 300, keep=1)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["000000000300.ckpt", "notes.ckpt"]
    with pytest.raises(UsageError, match="keep=0: give a whole number of checkpoints"):
        save_checkpoint(tmp_path / "c", 1, 400, keep=0)
    assert (tmp_path / "c" / "000000000300.ckpt").exists()


def test_what_a_killed_process_left_of_a_checkpoint_goes_with_the_next(tmp_path):
    (tmp_path / ".000000000001.ckpt.tmp").write_bytes(b"half of one")
    save_checkpoint(tmp_path, 1, 2)  # which is at another step
    assert [path.name for path in tmp_path.iterdir()] == ["000000000002.ckpt"]


@pytest.mark.parametrize("damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-3])])
def test_falls_back_to_the_one_before(tmp_path, caplog, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, np.full(3, step), step)
    damage(tmp_path / "000000000002.ckpt")
    with caplog.at_level(logging.WARNING):
        tree, path = load_latest(tmp_path)
    assert tree.tolist() == [1, 1, 1] and int(path.stem) == 1
    assert re.search("000000000002.*trying the previous checkpoint", caplog.text)


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, np.full(3, step), step)
    flip(tmp_path / "000000000002.ckpt")
    save_checkpoint(tmp_path, np.full(3, 3), 3)
    flip(tmp_path / "000000000003.ckpt")
    assert load_latest(tmp_path)[0].tolist() == [1, 1, 1]
    flip(tmp_path / "000000000001.ckpt")
    with pytest.raises(CorruptFileError, match="all 3 checkpoints"):
        load_latest(tmp_path)


def test_no_checkpoint(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="has no checkpoint"):
            load_latest(directory)
