"""Conversion reads, decodes and writes at the same time."""

import threading

import pytest
from recordings import describe, random_episodes

from eqx_q.data import Part, Source, convert

pytestmark = pytest.mark.quick


def test_while_one_file_is_written_the_next_is_read_and_decoded(tmp_path):
    one, other = random_episodes(0, num=2)
    is_decoded = threading.Event()

    def decode():
        is_decoded.set()
        return other

    parts = [
        Part("a", None, lambda: iter([lambda: one])),
        Part("b", None, lambda: iter([decode])),
    ]

    def write(part, rows):
        assert is_decoded.wait(timeout=10)

    dataset = convert(Source(describe(), parts), tmp_path / "out", num_workers=1, on_rows=write)
    assert [(shard.name, shard.rows) for shard in dataset.shards] == [
        ("a", len(one.action)),
        ("b", len(other.action)),
    ]
