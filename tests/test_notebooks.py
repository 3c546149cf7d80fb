"""Notebooks run, with small sizes; and those in the repository hold what they printed and drew."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SMALL = {
    "from_data": {"teacher_steps": 2048, "recorded_steps": 500, "num_updates": 20},
    "learning_rates": {
        "total_steps": 1024,
        "learning_rates": [1e-4, 1e-3],
        "num_seeds": 2,
        "lanes_each": 4,
    },
    "memory": {"total_steps": 1000, "memory_length": 5, "num_envs": 8},
    "own_loop": {"num_updates": 2, "rollout_length": 16, "num_envs": 4},
    "team": {"total_steps": 1000, "num_envs": 8},
    "tour": {"total_steps": 2048, "num_envs": 16, "evaluate_every": 1024},
}


def cells(name: str) -> list[dict]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]


def test_every_notebook_is_tested():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in cells(name):
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            if "IPython" in code:  # shows a file
                assert all(Path(name).exists() for name in re.findall(r'"(\S+\.gif)"', code))
                continue
            exec(compile(code, f"{name}.ipynb", "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                assert SMALL[name].keys() <= namespace.keys()
                namespace.update(SMALL[name])


@pytest.mark.parametrize("name", SMALL)
def test_it_shows_what_it_did(name):
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 600_000
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
