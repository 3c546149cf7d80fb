"""README and docs are true: their Python runs, their commands compose, their links hold."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

import eqx_q

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [README, *sorted((ROOT / "docs").rglob("*.md"))]
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language in a page, in order, also those that are indented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands() -> list[str]:
    lines = [
        line
        for text in PAGES.values()
        for block in blocks(text, "sh")
        for line in block.replace("\\\n", "").splitlines()
    ]
    found = dict.fromkeys(line.strip() for line in lines if line.startswith("python scripts/"))
    return list(found)


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "python")])
def test_python_runs(page, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would paste it."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(PAGES[page], "python"):
        exec(compile(block, page, "exec"), namespace)
    if page not in ("docs/guides/embed.md", "docs/guides/data.md"):  # others add their own
        return
    cells = "".join(re.findall(r"^\|(.*?)\|", PAGES["docs/metrics.md"], re.MULTILINE))
    assert set(namespace["history"][-1]) <= set(re.findall(r"`([a-z_/]+)`", cells))


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command):
    """Every group, key and choice that a command names exists."""
    _, script, *overrides = shlex.split(command, comments=True)
    overrides = [override for override in overrides if not override.startswith("--")]
    if overrides[:1] == ["-m"]:  # of what is swept over, the first
        overrides = [override.split(",")[0] for override in overrides[1:]]
    name = {"scripts/train.py": "config"}.get(script, Path(script).stem)
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra.compose(name, overrides)


def test_ci_runs_the_test_command():
    (command,) = (block for block in blocks(README.read_text(), "sh") if "pytest" in block)
    script = (ROOT / ".ci" / "run").read_text().replace("--quiet ", "")
    for line in re.split(r" && |\n", command.strip()):
        assert f"\n{line}\n" in script


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / link).exists(), link


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_the_site_is_built_without_a_warning(tmp_path):
    """Links between pages and to anchors among them; every name on the pages of the API exists."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    page = (tmp_path / "algorithms" / "pqn" / "index.html").read_text()
    assert "<math" in page and "arithmatex" not in page


def public_names() -> dict[str, object]:
    found = {f"eqx_q.{name}": getattr(eqx_q, name) for name in eqx_q.__all__}
    for module in [thing for thing in found.values() if inspect.ismodule(thing)]:
        for name in getattr(module, "__all__", []):
            found[f"{module.__name__}.{name}"] = getattr(module, name)
    return found


@pytest.mark.parametrize("name", public_names())
def test_public_names_are_documented(name):
    """Each has a docstring of its own, and functions say what they raise or return."""
    thing = public_names()[name]
    text = inspect.getdoc(thing) if not inspect.isclass(thing) else thing.__doc__
    assert text and len(text.split()) >= 4, name
    pages = "".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    assert inspect.ismodule(thing) or f"::: {name}" in pages or f"::: {thing.__module__}\n" in pages
