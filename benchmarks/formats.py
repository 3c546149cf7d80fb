"""Independent minimal writers of public data formats.

RL Unplugged's TFRecords and Dopamine's replay buffers, which tests compare with raw episodes, and
`convert.py` times.
"""

import gzip
import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Raw(NamedTuple):
    """An episode: one frame more than actions."""

    frames: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: bool


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


# TFRecords: naive implementation of protobuf's wire format, and records with CRC-32C checksums.


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[crc & 255 ^ byte]
    return crc ^ 0xFFFFFFFF


def remainder(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


TABLE = [remainder(byte) for byte in range(256)]


def tfrecord(data: bytes) -> bytes:
    def masked(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(number: int) -> bytes:
    if number < 128:
        return bytes([number])
    return bytes([number & 127 | 128]) + varint(number >> 7)


def message(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(features: dict[str, list]) -> bytes:
    """A tf.train.Example; the first value determines the kind of a list."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            value = message(1, b"".join(message(1, one) for one in values))
        elif isinstance(values[0], float):
            value = message(2, message(1, np.array(values, "<f4").tobytes()))
        else:
            value = message(3, message(1, b"".join(varint(one) for one in values)))
        entries += message(1, message(1, name.encode()) + message(2, value))
    return message(1, entries)


def rlu_features(episode: Raw, number: int = 0) -> dict[str, list]:
    """An episode in RL Unplugged's form: other data at the last observation are padding."""
    reward = [*episode.reward.tolist(), 0.0]
    return {
        "checkpoint_idx": [0],
        "episode_idx": [number],
        "episode_return": [float(episode.reward.sum())],
        "clipped_episode_return": [float(np.sign(episode.reward).sum())],
        "clipped_rewards": np.sign(reward).tolist(),
        "unclipped_rewards": reward,
        "actions": [*episode.action.tolist(), 99],
        "discounts": [1.0] * len(episode.action) + [0.0 if episode.terminated else 1.0],
        "observations": [png(frame) for frame in episode.frames],
    }


def write_rlu(folder: Path, run: int, shard: int, episodes: Sequence[Raw]) -> Path:
    """Writes a shard; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"run_{run}-{shard:05d}-of-00050"
    records = [
        tfrecord(example(rlu_features(episode, number))) for number, episode in enumerate(episodes)
    ]
    path.write_bytes(gzip.compress(b"".join(records)))
    return path


# Dopamine's replay buffer: a ring, written out when it is one short of full.


class Ring:
    """Writes `capacity - 1` rows per file, and the rest at the end.

    `files`: for each file, the (episode, step) of its rows, in order.
    """

    def __init__(
        self, logs: Path, capacity: int, size: Sequence[int] = (8, 6), add_count: bool = True
    ):
        logs.mkdir(parents=True, exist_ok=True)
        self.logs, self.capacity, self.add_count = logs, capacity, add_count
        self.store = {
            "observation": np.full((capacity, *size), 77, np.uint8),
            "action": np.full(capacity, 1, np.int32),
            "reward": np.full(capacity, 0.5, np.float32),
            "terminal": np.zeros(capacity, np.uint8),
        }
        self.owners: list[tuple[int, int] | None] = [None] * capacity
        self.count, self.files = 0, []

    def play(self, episodes: Sequence[Raw]) -> None:
        for number, episode in enumerate(episodes):
            for _ in range(3):
                self._add(None, np.zeros_like(episode.frames[0]), 0, 0, 0)
            last = len(episode.action) - 1
            for t in range(last + 1):
                values = episode.frames[t], episode.action[t], episode.reward[t], t == last
                self._add((number, t), *values)
        self.write(self.count % self.capacity)

    def _add(self, owner: tuple[int, int] | None, *values) -> None:
        cursor = self.count % self.capacity
        for column, value in zip(self.store.values(), values, strict=True):
            column[cursor] = value
        self.owners[cursor] = owner
        self.count += 1
        if self.count % self.capacity == self.capacity - 1:
            self.write(self.count)

    def write(self, count: int) -> None:
        shard, own = len(self.files), count % self.capacity
        self.files.append([owner for owner in self.owners[:own] if owner is not None])
        for name, column in self.store.items():
            save_gz(self.logs / f"$store$_{name}_ckpt.{shard}.gz", column)
        if self.add_count:
            save_gz(self.logs / f"add_count_ckpt.{shard}.gz", np.array(count))
        save_gz(self.logs / f"invalid_range_ckpt.{shard}.gz", np.arange(5))


def save_gz(path: Path, array: np.ndarray) -> None:
    with gzip.GzipFile(path, "wb") as file:
        np.save(file, array)


def load_gz(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        return np.load(file)
