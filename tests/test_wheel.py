"""The wheel and the light core alone: no extra is installed."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import gymnasium
import jax
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import eqx_q
from eqx_q.wrappers.registry import SUITES

ROOT = Path(__file__).parent.parent


def core_distributions() -> set[str]:
    """Everything that `pip install eqx_q`, without extras, brings along."""
    found, todo = set(), ["eqx_q"]
    while todo:
        for line in importlib.metadata.requires(todo.pop()) or []:
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and name not in found:
                found.add(name)
                todo.append(name)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site directory with the light core, linked, and the installed wheel."""
    wheels, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, ROOT]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "-t", site, wheel], check=True)
    for name in core_distributions():
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))
    return site


def run_alone(site: Path, script: str, *arguments: object) -> str:
    """Runs a script that sees the standard library and `site`, and nothing else."""
    script = f"import sys; sys.path.append({str(site)!r})\n{script}"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_extras_are_out_of_sight(site):
    script = "import importlib.util as u; print([u.find_spec(n) for n in sys.argv[1:]])"
    extras = ["gymnax", "envpool", "craftax", "jaxmarl", "pettingzoo", "hydra", "aim", "tqdm"]
    extras += ["tensorboardX", "wandb", "trackio", "mlflow"]
    extras += ["PIL", "matplotlib", "flax", "chex", "optuna", "yaml", "huggingface_hub"]
    assert run_alone(site, script, *extras).strip() == str([None] * len(extras))


def test_wheel_holds_the_library_only(site):
    (record,) = site.glob("eqx_q-*.dist-info/RECORD")
    tops = {line.split("/")[0] for line in record.read_text().splitlines()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"eqx_q"}
    assert "eqx_q/py.typed" in record.read_text()
    for file in ("agent.eqx", "config.yaml", "summary.json", "README.md"):
        assert f"eqx_q/zoo/pqn/CartPole-v1/{file}" in record.read_text()


def test_imports_need_no_extra(site):
    """Only the modules that wrap one package need that package, and nothing imports them early."""
    script = """
import eqx_q, importlib, json, pkgutil
missing = {}
for module in pkgutil.walk_packages(eqx_q.__path__, "eqx_q."):
    try:
        importlib.import_module(module.name)
        missing[module.name] = None
    except ModuleNotFoundError as error:
        missing[module.name] = error.name
print(json.dumps(missing))
"""
    missing = json.loads(run_alone(site, script))
    sources = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "eqx_q").rglob("*.py")
    }
    assert set(missing) == sources - {"eqx_q"}
    needs = {f"eqx_q.wrappers{suite.module}": suite.package for suite in SUITES.values()}
    needs["eqx_q.wrappers.jaxmarl_rules"] = "jaxmarl"  # a part of that suite
    needs["eqx_q.wrappers.pettingzoo_bridge"] = "pettingzoo"  # its face loads it when it is used
    for module, package in missing.items():
        assert package in (None, needs.get(module)), f"{module} imports {package}"


def test_missing_extra_is_named(site):
    script = """
import eqx_q
from eqx_q.errors import MissingExtraError
try:
    eqx_q.make("envpool/Pong-v5", num_envs=1)
except MissingExtraError as error:
    print(error)
"""
    assert "pip install 'eqx_q[atari]'" in run_alone(site, script)


def test_loads_an_agent_and_acts(site, tmp_path):
    """The same actions and values as the agent that was saved, on plain NumPy."""
    env = gymnasium.make("CartPole-v1")
    agent = eqx_q.PQN.create(env.observation_space, env.action_space, key=jax.random.key(0))
    eqx_q.save(tmp_path / "agent.eqx", agent)
    obs = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    np.save(tmp_path / "obs.npy", obs)
    script = """
import json, pathlib, numpy, eqx_q
folder = pathlib.Path(sys.argv[1])
decision = eqx_q.load(folder / "agent.eqx").act(numpy.load(folder / "obs.npy"))
print(json.dumps([decision.action.tolist(), decision.value.tolist()]))
"""
    actions, values = json.loads(run_alone(site, script, tmp_path))
    expected = eqx.filter_jit(agent.act)(obs)
    np.testing.assert_array_equal(actions, expected.action)
    np.testing.assert_allclose(values, expected.value, rtol=1e-5, atol=1e-6)


def test_loads_an_agent_of_the_zoo(site):
    script = """
import eqx_q, numpy
print(eqx_q.load("zoo:pqn/CartPole-v1").act(numpy.array([0, 0, 0.2, 1], "float32")).action)
try:
    eqx_q.load("hf:me/thing")
except eqx_q.errors.MissingExtraError as error:
    print(error)
"""
    action, error = run_alone(site, script).splitlines()
    assert action == "1"  # it runs after the pole
    assert "run `pip install 'eqx_q[hub]'`" in error
