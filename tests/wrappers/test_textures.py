"""A package that keeps a file as Craftax does, imported by several processes at once."""

import os
import subprocess
import sys
import tempfile
import textwrap

import pytest

from eqx_q.wrappers.textures import load_constants

PACKAGE = """
import os, time
from pathlib import Path

kept, begun = Path(__file__).with_name("textures"), Path(__file__).with_name("begun")
if kept.exists() and not os.environ.get("CRAFTAX_RELOAD_TEXTURES"):
    if kept.read_text() != "all of them":
        raise EOFError("the file ends too early")
else:
    with begun.open("a") as file:
        file.write("drawn ")
    with kept.open("w") as file:
        file.write("all ")
        file.flush()
        time.sleep(1)
        file.write("of them")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    directory = tmp_path / "textured_game"
    directory.mkdir()
    (directory / "__init__.py").touch()
    (directory / "constants.py").write_text(textwrap.dedent(PACKAGE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of other processes
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield directory
    load_constants.cache_clear()
    for name in [name for name in sys.modules if name.startswith("textured_game")]:
        del sys.modules[name]


def test_processes_that_start_together_wait_for_each_other(package):
    code = "import sys; sys.path.insert(0, sys.argv[1]); from eqx_q.wrappers import textures"
    code += "; textures.load_constants('textured_game')"
    command = [sys.executable, "-c", code, str(package.parent)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.wait() == 0, process.stderr.read()
        process.stderr.close()
    assert (package / "begun").read_text() == "drawn "


def test_textures_that_cannot_be_read_are_drawn_again(package):
    (package / "textures").write_text("all ")
    assert load_constants("textured_game").kept.read_text() == "all of them"
    assert (package / "begun").read_text() == "drawn "


def test_a_link_in_the_place_of_the_lock_leads_nowhere(package, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("a trained agent")
    (tmp_path / f"eqx_q-textured_game-{os.getuid()}.lock").symlink_to(kept)
    load_constants("textured_game")
    assert kept.read_text() == "a trained agent"


def test_what_fails_for_another_reason_fails_at_once(package):
    (package / "constants.py").write_text("import nothing_like_it")
    with pytest.raises(ModuleNotFoundError, match="nothing_like_it"):
        load_constants("textured_game")
