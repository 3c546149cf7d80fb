"""Exported agents act as they do here, with only JAX and NumPy installed."""

import importlib.metadata
import json
import subprocess
import sys

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import eqx_q
from eqx_q.errors import MissingExtraError, UsageError
from eqx_q.nets import AbstractQNetwork
from eqx_q.policy import Policy
from eqx_q.run import make_agent, make_env
from eqx_q.wrappers.host import closing

SMALL = {"hidden_sizes": [8]}
SCRIPT = """
import sys, json, pathlib
site, folder, *runs = sys.argv[1:]
sys.path[:0] = [site, folder]
import jax, numpy as np
from policy import Policy
for run in runs:
    run = pathlib.Path(run)
    policy, memory, out = Policy(run / "agent.jaxexport"), None, {}
    with np.load(run / "steps.npz") as steps:
        for t, obs in enumerate(steps["obs"]):
            rest = {name: steps[name][t] for name in steps.files if name != "obs"}
            if "key" in rest:
                rest["key"] = jax.random.wrap_key_data(rest["key"])
            decision = policy.act(obs, memory, **rest)
            memory = decision.memory
            out |= {f"action{t}": decision.action, f"value{t}": decision.value}
    np.savez(run / "out.npz", **out)
imported = {name.split(".")[0] for name in sys.modules}
print(json.dumps(sorted(imported & {"eqx_q", "equinox", "gymnasium", "optax", "jaxtyping"})))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What `pip install jax numpy` brings, linked into a directory."""
    site, todo, found = tmp_path_factory.mktemp("site"), ["jax", "numpy"], {"jax", "numpy"}
    while todo:
        name = todo.pop()
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            needed = canonicalize_name(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and needed not in found:
                found.add(needed)
                todo.append(needed)
    assert not (site / "flatbuffers").exists() and not (site / "equinox").exists()
    return site


def alone(script, *arguments):
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def box(*shape, dtype=np.float32, high=1):
    return gymnasium.spaces.Box(0, high, shape, dtype)


def teams():
    """Two members that are teams of two agents with memory, which look at the last reward."""

    def create(key):
        options = SMALL | {"memory": "lstm", "memory_size": 4, "last_reward": True}
        options |= {"last_action": True}
        return eqx_q.PQN.create(
            box(3),
            gymnasium.spaces.Discrete(3),
            key=key,
            num_agents=2,
            mixer="vdn",
            network_options=options,
        )

    agent = eqx_q.Population(eqx.filter_vmap(create)(jax.random.split(jax.random.key(0))))
    rng = np.random.default_rng(0)
    steps = {
        "obs": rng.normal(size=(4, 6, 2, 3)).astype(np.float32),
        "first": np.array([[True] * 6, [False] * 6, [False, True] * 3, [False] * 6]),
        "action_mask": rng.random((4, 6, 2, 3)) < 0.6,
        "reward": rng.normal(size=(4, 6, 2)).astype(np.float32),
        "epsilon": np.tile(np.float32([0.0, 0.9]), (4, 1)),
        "key": jax.random.key_data(jax.random.split(jax.random.key(1), 4)),
    }
    return agent, steps


def images():
    agent = eqx_q.CQL.create(
        box(6, 6, 4, dtype=np.uint8, high=255), gymnasium.spaces.Discrete(5), key=jax.random.key(0)
    )
    obs = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 6, 4), np.uint8)
    return agent, {"obs": obs}


def test_acts_the_same_with_jax_and_numpy_alone(site, tmp_path):
    cases = {"teams": teams(), "images": images()}
    for name, (agent, steps) in cases.items():
        path = eqx_q.export(tmp_path / name, agent, platforms=("cpu",))
        assert path == tmp_path / name / "agent.jaxexport"
        np.savez(tmp_path / name / "steps.npz", **steps)
    folders = [tmp_path / name for name in cases]
    assert json.loads(alone(SCRIPT, site, folders[0], *folders)) == []
    for name, (agent, steps) in cases.items():
        act, memory = eqx.filter_jit(agent.act), agent.initial_memory(steps["obs"].shape[1])
        with np.load(tmp_path / name / "out.npz") as out:
            for t in range(len(steps["obs"])):
                step = {key: value[t] for key, value in steps.items()}
                if "key" in step:
                    step["key"] = jax.random.wrap_key_data(step["key"])
                decision = act(step.pop("obs"), memory, **step)
                memory = decision.memory
                np.testing.assert_array_equal(out[f"action{t}"], decision.action)
                np.testing.assert_allclose(out[f"value{t}"], decision.value, rtol=1e-5, atol=1e-6)


def test_one_file_takes_any_number_of_lanes_on_several_platforms(tmp_path):
    def create(key):
        options = SMALL | {"memory": "gru", "memory_size": 4}
        return eqx_q.PQN.create(
            box(3), gymnasium.spaces.Discrete(4), key=key, network_options=options
        )

    agent = create(jax.random.key(0))
    policy = Policy(eqx_q.export(tmp_path, agent, platforms=("cpu", "tpu")))
    assert policy.platforms == ("cpu", "tpu")
    assert str(policy.inputs["obs"].shape) == "(n, 3)"
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    whole = policy.act(obs)
    assert whole.action.shape == (5,) and whole.memory[0].shape == (5, 1, 4)
    one = policy.act(obs[2])
    assert one.action.shape == () and one.action == whole.action[2]
    again, later = policy.act(obs[2], one.memory), policy.act(obs, whole.memory)
    np.testing.assert_allclose(again.value, later.value[2], rtol=1e-5)
    assert not np.allclose(again.value, one.value)  # it remembers,
    forgetful = policy.act(obs[2], one.memory, first=True)
    np.testing.assert_array_equal(forgetful.value, one.value)  # unless it is to forget
    # A key without epsilon changes nothing; with it any legal action may come.
    keys, mask = jax.random.split(jax.random.key(0), 20), np.array([False, True, True, False])
    np.testing.assert_array_equal(policy.act(obs, key=keys[0]).action, whole.action)
    mask = np.tile(mask, (5, 1))
    random = [policy.act(obs, epsilon=1.0, key=key, action_mask=mask).action for key in keys]
    assert set(np.ravel(random)) == {1, 2}
    with pytest.raises(ValueError, match="shape"):
        policy.act(np.zeros((5, 7)))


def test_what_an_exported_agent_does_not_take_is_left_out(tmp_path):
    inner = gymnasium.spaces.Tuple([box(2), gymnasium.spaces.Discrete(3)])
    space = gymnasium.spaces.Dict(x=box(3), more=inner)
    agent = eqx_q.PQN.create(space, gymnasium.spaces.Discrete(4), key=jax.random.key(0))
    policy = Policy(eqx_q.export(tmp_path, agent, platforms=("cpu",)))
    obs = {"x": np.float32([1, 2, 3]), "more": (np.float32([4, 5]), np.asarray(2))}
    raw = {"x": [1, 2, 3], "mission": "go", "more": [[4, 5], 2]}
    np.testing.assert_allclose(policy.act(raw).value, agent.act(obs).value, rtol=1e-5)


class Fixed(AbstractQNetwork):
    """Counts its lanes in Python."""

    def initial_statistics(self):
        return None

    def initial_memory(self, num_lanes):
        return ()

    def __call__(self, inputs, statistics, memory):
        steps, rows = inputs.num_steps_and_rows
        values = jnp.asarray([0.0] * (steps * int(rows) * 2))
        return eqx_q.nets.NetworkOutput(values.reshape(steps, rows, 2, 1))


def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch):
    create = lambda **how: eqx_q.PQN.create(  # noqa: E731
        box(3), gymnasium.spaces.Discrete(2), key=jax.random.key(0), **how
    )
    with pytest.raises(UsageError, match="cannot be exported for any number of lanes"):
        eqx_q.export(tmp_path, create(network=Fixed()))
    agent = create(network_options=SMALL)
    with pytest.raises(UsageError, match="unknown platform 'gpu': known are cpu, cuda"):
        eqx_q.export(tmp_path, agent, platforms=["gpu"])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        eqx_q.export(tmp_path / "file", agent)
    monkeypatch.setattr(
        importlib.metadata, "files", lambda name: (_ for _ in ()).throw(
            importlib.metadata.PackageNotFoundError(name)
        )
    )  # fmt: skip
    with pytest.raises(MissingExtraError, match="flatbuffers"):
        eqx_q.export(tmp_path, agent)


def test_a_run_is_exported_with_its_card(script, tmp_path, monkeypatch, capsys):
    config = {"agent": {"_target_": "eqx_q.PQN", "network_options": SMALL, "learning_rate": 1e-4}}
    config |= {"env": {"suite": "gymnax", "name": "CartPole-v1"}, "seed": 5, "num_seeds": 2}
    config |= {"eval": {"epsilon": 0.25}, "total_steps": 64}
    config["agent"] |= {"value": {"name": "scalar", "sigma": 0.7}, "max_grad_norm": np.inf}
    config |= {"num_updates": 7, "sampling": {"by": "shard"}, "pbt": {"every": None, "spread": 2}}
    run = tmp_path / "run"
    with closing(make_env(config, 2)) as env:
        eqx_q.save(run / "agent.eqx", make_agent(config, env))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {"eval_return_per_seed": [31.5, 47.25], "train_return_per_seed": [None, 20.5]}
    summary |= {"env_steps": 0, "status": "stopped", "versions": {"jax": "0.0.7"}}
    (run / "summary.json").write_text(json.dumps(summary))
    evaluation = {"protocol": "whole", "episodes": 9, "epsilon": 0.5, "env_steps": 0}
    evaluation |= {"return_per_seed": [8.5, 6.75]}
    (run / "evaluation_whole.json").write_text(json.dumps(evaluation))
    evaluation |= {"protocol": "before", "env_steps": 64}  # of another agent: the run went on
    (run / "evaluation_before.json").write_text(json.dumps(evaluation))
    status, out, err = script("export", "run=run", "member=1")
    assert status == 0, err
    assert "run/export/agent.jaxexport" in out
    obs = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    member = eqx_q.load(tmp_path / "run" / "agent.eqx").member(1)
    expected = eqx.filter_jit(member.act)(obs)
    exported = Policy(tmp_path / "run" / "export" / "agent.jaxexport").act(obs)
    np.testing.assert_array_equal(exported.action, expected.action)
    np.testing.assert_allclose(exported.value, expected.value, rtol=1e-5)

    card = (tmp_path / "run" / "export" / "README.md").read_text()
    for told in (
        "gymnax/CartPole-v1",
        "member 1 of 2",
        "| seed | 5 |",
        "| 0 env steps, then training was stopped |",
        "end of training, with ε = 0.25 | 47.25 | 47.25 |",
        "with exploration | 20.5 | 20.5 |",
        "whole: 9 episodes, ε = 0.5 | 6.75 | 6.75 |",
        "trained with | jax 0.0.7 |",
        f"exported with | jax {jax.__version__}, for cpu, cuda |",
        '"learning_rate"',
        "| `obs` | `[n, 4]` | float32 |",
    ):
        assert told in card
    assert "before: " not in card and "None" not in card
    used = json.loads(card.split("```json\n")[1].split("```")[0], parse_constant=pytest.fail)
    assert used["agent"]["max_grad_norm"] == "inf" and used["total_steps"] == 64
    assert not used.keys() & {"num_updates", "sampling", "pbt"} and "sigma" not in used["agent"]
    example = card.split("```python\n")[1].split("```")[0]
    with monkeypatch.context() as here:
        here.chdir(tmp_path / "run" / "export")
        here.syspath_prepend(".")
        exec(example, {})
        del sys.modules["policy"]
    assert capsys.readouterr().out.startswith("[")

    assert script("export", "run=run", "out=all", "platforms=[cpu]")[0] == 0
    both = Policy(tmp_path / "all" / "agent.jaxexport")
    assert str(both.inputs["obs"].shape) == "(2*n, 4)"
    card = (tmp_path / "all" / "README.md").read_text()
    assert "2 seeds as one" in card and "| seed | 5 |" in card
    assert "| 39.38 | 31.5, 47.25 |" in card and "| 20.5 | –, 20.5 |" in card
    np.testing.assert_array_equal(both.act(np.tile(obs, (2, 1))).action[2:], exported.action)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no run to export: give run=DIR"),
        (["run=nowhere"], "'nowhere' is not a run directory"),
        (["run=run"], "finish it with `python scripts/train.py resume=run`"),
        (["run=run", "member=x"], "member=x: give a whole number"),
    ],
)
def test_bad_input_of_an_export(script, tmp_path, arguments, message):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    eqx_q.save(tmp_path / "run" / "checkpoints" / f"{1:012d}.ckpt", np.zeros(1))
    (tmp_path / "run" / "config.yaml").write_text("env: {}")
    status, _, err = script("export", *arguments)
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
