"""Files appear complete or not at all."""

import errno
import os
import resource

import pytest

from eqx_q.errors import UsageError
from eqx_q.saving.files import alone_in, write_whole

pytestmark = pytest.mark.quick


def test_a_power_failure_does_not_undo_it(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def tell(file):
        calls.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(os, "fsync", tell)
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write_whole(tmp_path / "a", [b"new"])
    assert calls == [f"{tmp_path}/.a.tmp", "replace", str(tmp_path)]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failing_call_leaves_the_old_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a"
    write_whole(path, [b"o", b"ld"])
    monkeypatch.setattr(os, call, full)
    with pytest.raises(UsageError, match=r"cannot write .*a' \(No space left.*free space"):
        write_whole(path, [b"ne", b"w"])
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_half_way(tmp_path):
    path = tmp_path / "a"
    write_whole(path, [b"old"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as good as a full disk
    try:
        with pytest.raises(UsageError, match="File too large"):
            write_whole(path, [bytes(9_000), bytes(9_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_swept_up(tmp_path):
    path = tmp_path / "a"
    (tmp_path / ".a.tmp").write_bytes(b"half of a file")
    write_whole(path, [b"ne", b"w"])
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "file" / "a", tmp_path / "directory"):
        with pytest.raises(UsageError, match=r"cannot write .*choose a directory"):
            write_whole(path, [b"new"])
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_makes_the_directory(tmp_path):
    write_whole(tmp_path / "b" / "c" / "a", [b"new"])
    assert (tmp_path / "b" / "c" / "a").read_bytes() == b"new"


def test_nobody_else_comes_in_while_one_is_there(tmp_path):
    expected = pytest.raises(UsageError, match="another process is using")
    with alone_in(tmp_path / "run"), expected, alone_in(tmp_path / "run"):
        raise AssertionError
    with alone_in(tmp_path / "run"):  # it is free again
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"), alone_in(tmp_path / "file" / "run"):
        raise AssertionError
