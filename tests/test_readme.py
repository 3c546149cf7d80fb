"""The README is true: its Python runs, its commands compose, its files exist."""

import re
import shlex
from pathlib import Path

import hydra
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_python_runs_and_every_metric_is_explained(tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would paste it."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    explained = re.findall(
        r"`([a-z_/]+)`", "".join(re.findall(r"^\|(.*?)\|", README, re.MULTILINE))
    )
    assert set(namespace["history"][-1]) <= set(explained)
    assert set(namespace["offline_history"][-1]) <= set(explained)


@pytest.mark.parametrize(
    "command",
    [line for line in "".join(blocks("sh")).replace("\\\n", "").splitlines() if "scripts/" in line],
)
def test_commands_compose(command: str):
    """Every group, key and choice that a command names exists."""
    _, script, *overrides = shlex.split(command, comments=True)
    if overrides[:1] == ["-m"]:  # of what is swept over, the first
        overrides = [override.split(",")[0] for override in overrides[1:]]
    name = {"scripts/train.py": "config"}.get(script, Path(script).stem)
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra.compose(name, overrides)


def test_ci_runs_the_test_command():
    (command,) = (block for block in blocks("sh") if "pytest" in block)
    script = (ROOT / ".ci" / "run").read_text().replace("--quiet ", "")
    for line in re.split(r" && |\n", command.strip()):
        assert f"\n{line}\n" in script


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
