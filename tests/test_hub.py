"""Agents by name: published, pushed, pulled, and found in the zoo."""

import json
import sys

import equinox as eqx
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hubs import TOKEN, serving

import eqx_q
from eqx_q.errors import UsageError
from eqx_q.run import make_agent, make_env
from eqx_q.saving.hub import ZOO, locate, zoo
from eqx_q.types import Count
from eqx_q.wrappers.host import closing

CONFIG = {
    "agent": {"_target_": "eqx_q.PQN", "network_options": {"hidden_sizes": [8]}},
    "env": {"suite": "gymnax", "name": "CartPole-v1", "max_steps_in_episode": 9},
    "protocol": {},
    "eval": {},
    "seed": 5,
    "num_seeds": 3,
    "total_steps": 64,
    "num_envs": 2,
    "resume": "/home/me/runs/before",
    "data": None,
    "tracker": {"_target_": "eqx_q.tracking.AimTracker", "repo": "aim://my-host:53800"},
    "distributed": {"coordinator": "my-host:1234"},
}
SUMMARY = {
    "status": "done",
    "env_steps": 64,
    "transitions": [60, 61, 62],
    "eval_return_mean": 4.0,
    "eval_return_per_seed": [3.0, 5.5, None],
    "eval_per_seed": {"length": [30.0, 55.0, 60.0]},
    "train_return_per_seed": [1.0, 2.0, 3.0],
    "device": "cpu",
    "data": {"path": "/home/me/data/cart", "env": "x", "source": {"runs": ["/home/me/runs/a"]},
             "transitions": 7, "episodes": 1, "checksum": "abc"},
}  # fmt: skip
EVALUATION = {"protocol": "as_trained", "episodes": 9, "epsilon": 0.5, "env_steps": 64}
EVALUATION |= {"return_per_seed": [7.0, 8.25, 9.0], "returns": [[7.0], [8.25], [9.0]]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three seeds as training leaves it behind, with moments and all."""
    run = tmp_path_factory.mktemp("of") / "run"
    with closing(make_env(CONFIG, 1)) as env:
        agent = make_agent({**CONFIG, "num_seeds": 1}, env)

    def of_members(x):
        """Members whose numbers differ, moments among them."""
        return jnp.asarray(np.stack([np.asarray(x) + np.asarray(i, x.dtype) for i in range(3)]))

    arrays, rest = eqx.partition(agent, eqx.is_array)
    members = eqx.combine(jax.tree.map(of_members, arrays), rest)
    members = eqx.tree_at(lambda agent: agent.env_steps, members, Count.of(np.full(3, 64)))
    eqx_q.save(run / "agent.eqx", eqx_q.Population(members))
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "evaluation_as_trained.json").write_text(json.dumps(EVALUATION))
    return run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path) as hub:
        yield hub


def networks(agent):
    return agent.network, agent.statistics


def test_the_best_member_is_published(run, script, tmp_path):
    status, out, err = script("publish", f"run={run}", "out=out")
    assert status == 0, err
    assert "wrote out" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "agent.eqx", "config.yaml", "summary.json", "README.md"
    }  # fmt: skip
    member = eqx_q.load(run / "agent.eqx").member(1)
    agent = eqx_q.load(tmp_path / "out" / "agent.eqx")
    assert eqx.tree_equal(networks(agent), networks(member))
    fresh = eqx_q.PQN.create(
        agent.observation_space, agent.action_space, key=jax.random.key(0),
        network_options={"hidden_sizes": [8]},
    )  # fmt: skip
    assert eqx.tree_equal(agent.optimizer_state, fresh.optimizer_state)
    assert int(agent.env_steps) == 64

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["eval_return_mean"] == 5.5 and summary["eval_return_per_seed"] == [5.5]
    assert summary["eval_per_seed"] == {"length": [55.0]} and summary["transitions"] == [61]
    assert summary["member"] == 1
    (evaluation,) = summary["evaluations"]
    assert evaluation["return_per_seed"] == [8.25] and "returns" not in evaluation
    card = (tmp_path / "out" / "README.md").read_text()
    for told in (
        "`eqx_q.PQN`, member 1 of 3 |",
        "| the best member in the last evaluation |",
        "end of training, greedy | 5.5 | 5.5 |",
        "as_trained: 9 episodes, ε = 0.5 | 8.25 | 8.25 |",
        'eqx_q.load("agent.eqx")',
        'make("gymnax/CartPole-v1", num_envs=8, max_steps_in_episode=9)',
    ):
        assert told in card
    for path in (tmp_path / "out").iterdir():
        assert b"/home" not in path.read_bytes() and b"my-host" not in path.read_bytes(), path
    assert b"# crc32" in (tmp_path / "out" / "config.yaml").read_bytes()

    status, _, err = script("publish", "run=out", "out=again")  # of what was published
    assert status == 0, err
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again == summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no run to publish: give run=DIR"),
        (["run=nowhere"], "there is no destination: give out=DIR or to=hf:USER/NAME"),
        (["run=nowhere", "out=out"], "'nowhere' is not a run directory"),
        (["run=RUN", "out=out", "member=3"], "choose one of this run's members 0 to 2"),
        (["run=RUN", "out=a_run"], "'a_run' holds a run: choose another directory"),
        (["run=RUN", "to=me/thing"], "'me/thing' is not a name on the hub: give hf:USER/NAME"),
        (["run=RUN", "to=hf:me/thing@main"], "leave out @main"),
        (["run=zoo:pqn/Breakout", "out=out"], "the nearest are pqn/Breakout-MinAtar"),
    ],
)
def test_bad_input_of_publishing(run, script, tmp_path, arguments, message):
    (tmp_path / "a_run" / "checkpoints").mkdir(parents=True)
    arguments = [argument.replace("RUN", str(run)) for argument in arguments]
    status, _, err = script("publish", *arguments)
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err


def test_without_evaluations_a_member_must_be_named(run, script, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("agent.eqx", "config.yaml"):
        (tmp_path / "run" / name).write_bytes((run / name).read_bytes())
    summary = {"env_steps": 32, "train_return_per_seed": [1.0, 2.0, 3.0]}  # it went on since
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    status, _, err = script("publish", "run=run", "out=out")
    assert status == 1 and "choose a member with member=0" in err
    assert script("publish", "run=run", "out=out", "member=2")[0] == 0
    assert "in training" not in (tmp_path / "out" / "README.md").read_text()
    member = eqx_q.load(run / "agent.eqx").member(2)
    assert eqx.tree_equal(networks(eqx_q.load(tmp_path / "out" / "agent.eqx")), networks(member))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
def test_pushed_and_pulled(run, script, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    status, out, err = script("publish", f"run={run}", "to=hf:me/thing", "private=true")
    assert status == 0, err
    assert "load it with eqx_q.load('hf:me/thing')" in out
    assert hub.repositories["me/thing"]["private"] and hub.messages == ["PQN in gymnax/CartPole-v1"]
    pulled = eqx_q.load("hf:me/thing")
    assert eqx.tree_equal(networks(pulled), networks(eqx_q.load(run / "agent.eqx").member(1)))

    card = hub.repositories["me/thing"]["commits"][-1]["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "eqx_q" and "reinforcement-learning" in metadata["tags"]
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["type"] == "gymnax/CartPole-v1"
    assert result["metrics"][0] == {"type": "mean_reward", "value": 8.25}
    assert "`pip install 'eqx_q[jax-envs,hub]'`" in card and 'load("hf:me/thing")' in card

    # Another revision, and again without a server: of the cache.
    first = locate("hf:me/thing").name
    assert script("publish", f"run={run}", "to=hf:me/thing", "member=2")[0] == 0
    members = [eqx_q.load(run / "agent.eqx").member(i) for i in range(3)]
    assert eqx.tree_equal(networks(eqx_q.load("hf:me/thing")), networks(members[2]))
    before = f"hf:me/thing@{first}"
    assert eqx.tree_equal(networks(eqx_q.load(before)), networks(members[1]))
    hub.shutdown()
    hub.server_close()
    assert eqx.tree_equal(networks(eqx_q.load("hf:me/thing")), networks(members[2]))

    status, out, err = script("evaluate", f"run={before}", "episodes=2")
    assert status == 0, err
    assert f"wrote runs/hf/me/thing@{first}/evaluation_as_trained.json" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:me/nothing", "hf:me/nothing does not exist on the hub, or you have no access"),
        ("hf:me/secret", "check the name, or log in with `hf auth login`, or set HF_TOKEN"),
        (
            "hf:me/thing@nowhere",
            "has no such revision: give a commit, branch or tag, or leave it out",
        ),
        ("hf:me/other", "hf:me/other has no agent.eqx: give a repository of scripts/publish.py"),
        ("hf:me", "'hf:me' is not a name on the hub: give hf:USER/NAME"),
        ("hf:me/--", "'hf:me/--' is not a name on the hub: give hf:USER/NAME"),
    ],
)
def test_what_the_hub_does_not_give(hub, name, message):
    hub.commit("me/thing", {"agent.eqx": b""})
    hub.commit("me/other", {"README.md": b"# Other"})
    hub.commit("me/secret", {"agent.eqx": b""})
    hub.repositories["me/secret"]["private"] = True
    with pytest.raises(UsageError) as raised:
        eqx_q.load(name)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device"),
            "cannot store hf:me/thing ([Errno 28] No space left",
        ),
        (
            OSError("the line broke"),
            "the transfer of hf:me/thing failed (the line broke): try again",
        ),
    ],
)
def test_what_goes_wrong_on_the_way(hub, monkeypatch, error, message):
    hub.commit("me/thing", {"agent.eqx": b"x"})

    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UsageError) as raised:
        eqx_q.load("hf:me/thing")
    assert message in str(raised.value)


def test_what_the_hub_does_not_take(run, script, hub, monkeypatch):
    def error(*arguments):
        status, _, err = script("publish", f"run={run}", *arguments)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    assert "the hub refused hf:" in error("to=hf:me/thing")  # no token
    assert "or set HF_TOKEN, with write access" in error("to=hf:me/thing")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "the hub refused hf:" in error("to=hf:you/thing")
    assert not hub.repositories
    hub.shutdown()
    hub.server_close()
    assert "cannot reach the hub for hf:me/thing" in error("to=hf:me/thing")
    with pytest.raises(UsageError, match="cannot reach the hub for hf:me/thing: check"):
        eqx_q.load("hf:me/thing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "run `pip install 'eqx_q[hub]'`" in error("to=hf:me/thing")


@pytest.mark.parametrize("name", zoo())
def test_agents_of_the_zoo_act(name):
    directory = ZOO / name
    summary = json.loads((directory / "summary.json").read_text())
    assert f"zoo:{name}" in (directory / "README.md").read_text()
    assert summary["evaluations"][0]["episodes"] == 128
    agent = eqx_q.load(f"zoo:{name}")
    decision = eqx.filter_jit(agent.act)(
        jax.tree.map(lambda *x: np.stack(x), *_observations(agent))
    )
    assert np.isfinite(decision.value).all()
    assert all(agent.action_space.contains(np.asarray(action)) for action in decision.action)
    assert (directory / "agent.eqx").stat().st_size < 700_000


def _observations(agent):
    agent.observation_space.seed(0)
    return [agent.observation_space.sample() for _ in range(2)]


def test_an_agent_of_the_zoo_plays_as_published(script, tmp_path):
    status, out, err = script("evaluate", "run=zoo:pqn/CartPole-v1", "episodes=8", "seed=3")
    assert status == 0, err
    assert "wrote runs/zoo/pqn/CartPole-v1/evaluation_as_trained.json" in out
    path = tmp_path / "runs" / "zoo" / "pqn" / "CartPole-v1" / "evaluation_as_trained.json"
    assert json.loads(path.read_text())["return_mean"] == 500.0
    assert not list(ZOO.rglob("evaluation_*"))
    card = (ZOO / "pqn" / "CartPole-v1" / "README.md").read_text()
    assert "| as_trained: 128 episodes, ε = 0.0 | 500 | 500 |" in card


def test_every_script_takes_a_name(script, tmp_path):
    status, out, err = script("export", "run=zoo:pqn/CartPole-v1", "platforms=[cpu]")
    assert status == 0 and "wrote runs/zoo/pqn/CartPole-v1/export/agent.jaxexport" in out, err
    card = (tmp_path / "runs" / "zoo" / "pqn" / "CartPole-v1" / "export" / "README.md").read_text()
    assert "member 0 of 5" in card and "| as_trained: 128 episodes, ε = 0.0 | 500 | 500 |" in card
    status, out, err = script("collect", "run=[zoo:pqn/CartPole-v1]", "steps=20", "out=data")
    assert status == 0 and "20 transitions" in out, err


def test_the_guide_lists_the_zoo():
    guide = (ZOO.parents[1] / "docs" / "guides" / "share.md").read_text()
    listed = {}
    for line in guide.splitlines():
        if line.startswith("| `zoo:"):
            name, _, _, score, spread = (cell.strip(" `") for cell in line.strip("|").split("|"))
            listed[name.removeprefix("zoo:")] = (float(score), float(spread))
    assert sorted(listed) == zoo()
    for name, told in listed.items():
        (last,) = json.loads((ZOO / name / "summary.json").read_text())["evaluations"]
        expected = last["return_per_seed"][0], last["return_std_per_seed"][0]
        np.testing.assert_allclose(told, expected, rtol=0.03)


def test_what_is_not_in_the_zoo():
    with pytest.raises(UsageError, match=r"unknown agent of the zoo 'pqn/CartPole': the nearest"):
        eqx_q.load("zoo:pqn/CartPole")
    with pytest.raises(UsageError, match=r"unknown agent of the zoo '\.\./nets'"):
        eqx_q.load("zoo:../nets")
