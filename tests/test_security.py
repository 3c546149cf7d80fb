"""Files from untrusted sources are read, and nothing in them is executed."""

import hashlib
import pickle
import sys

import equinox as eqx
import gymnasium
import jax
import numpy as np
import pytest
import yaml
from hubs import serving
from recordings import describe, random_episodes, write

import eqx_q
from eqx_q.data import Dataset
from eqx_q.errors import CorruptFileError, UsageError
from eqx_q.saving.hub import locate

AGENT = eqx_q.PQN.create(
    gymnasium.spaces.Box(-1, 1, (4,), np.float32),
    gymnasium.spaces.Discrete(2),
    key=jax.random.key(0),
    network_options={"hidden_sizes": [4]},
)


class Bomb:
    def __reduce__(self):
        return open, ("executed", "w")


NAMES_OF_PQN = b"eqx_q:PQN", b"eqx_q.agents.pqn:PQN"


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that tells when it is imported, where Python finds it."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "evil.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
        "import eqx_q\nclass Agent(eqx_q.PQN): pass\n"
        "def run(*args, **kwargs): open('executed', 'w').close()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "theirs"))
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()
    assert "evil" not in sys.modules


def rewrite(path, old, new):
    """Replaces text in a header, and mends its checksum, as an attacker would."""
    line, rest = path.read_bytes().split(b"\n", 1)
    size = int(line.split()[2])
    text = rest[:size].replace(old, new)
    assert text != rest[:size]
    digest = hashlib.sha256(text).hexdigest().encode()
    path.write_bytes(b"eqx_q-file 0001 %010d %s\n" % (len(text), digest) + text + rest[size:])


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"eqx_q:PQN", b"evil:Agent"), (b"jax.nn:relu", b"evil:run"), (b'"eqx_q', b'"evil')],
)
def test_an_agent(evil, tmp_path, old, new):
    tree = {"agent": AGENT, "function": jax.nn.relu}
    eqx_q.save(tmp_path / "a.eqx", tree)
    assert eqx.tree_equal(eqx_q.load(tmp_path / "a.eqx")["agent"], AGENT)
    text = (tmp_path / "a.eqx").read_bytes()
    if old not in text:  # by the name that the file has
        old = NAMES_OF_PQN[1]
    rewrite(tmp_path / "a.eqx", old, new)
    with pytest.raises(UsageError, match=r"import evil.* first, if you trust the author of"):
        eqx_q.load(tmp_path / "a.eqx")


def test_an_agent_of_the_hub(evil, tmp_path, monkeypatch, script):
    """Beside it lies what other libraries would unpickle or import."""
    eqx_q.save(tmp_path / "a.eqx", AGENT)
    data = (tmp_path / "a.eqx").read_bytes()
    rewrite(tmp_path / "a.eqx", next(x for x in NAMES_OF_PQN if x in data), b"evil:Agent")
    config = b"env: {suite: gymnax, name: CartPole-v1}\nagent: {_target_: evil.Agent}\n"
    config += b"protocol: !!python/object/apply:os.system ['touch executed']\n"
    with serving(monkeypatch, tmp_path) as hub:
        files = {"agent.eqx": (tmp_path / "a.eqx").read_bytes(), "config.yaml": config}
        hub.commit(
            "you/thing", {**files, "evil.py": b"", "pytorch_model.bin": pickle.dumps(Bomb())}
        )
        with pytest.raises(UsageError, match="import evil first, if you trust the author of"):
            eqx_q.load("hf:you/thing")
        status, _, err = script("evaluate", "run=hf:you/thing")
        assert status == 1 and "config.yaml' is damaged" in err
        assert {path.name for path in locate("hf:you/thing").iterdir()} == set(files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agent": {"_target_": "evil.Agent"}}, "import evil first, if you trust its author"),
        ({"agent": {"_target_": "os.system"}}, "_target_=os.system is not a subclass of Agent"),
        ({"agent": {"_target_": "eqx_q.save"}}, "_target_=eqx_q.save is not a subclass of Agent"),
        ({"tracker": {"_target_": "subprocess.Popen"}}, "is not a subclass of Tracker"),
        ({"tracker": {"_target_": "evil.run"}}, "import evil first"),
    ],
)
def test_a_configuration(evil, script, tmp_path, change, message):
    small = ["num_envs=2", "agent.rollout_length=4", "agent.num_minibatches=2", "total_steps=64"]
    small += ["agent.network_options.hidden_sizes=[4]", "eval.every=0", "video.every=0"]
    assert script("train", *small, "tracker=jsonl", "hydra.run.dir=run")[0] == 0
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for group, options in change.items():
        config[group] |= options
    path.write_text(yaml.safe_dump(config))
    status, _, err = script("train", "resume=run", "total_steps=128")
    assert status == 1 and message in err and err.count("\n") == 1, err


def test_a_configuration_of_python(script, tmp_path):
    (tmp_path / "run").mkdir()
    text = "env: !!python/object/apply:os.system ['touch executed']\n"
    (tmp_path / "run" / "config.yaml").write_text(text)
    status, _, err = script("evaluate", "run=run")
    assert status == 1 and "config.yaml' is damaged" in err
    assert not (tmp_path / "executed").exists()


def test_a_data_set_with_pickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", [random_episodes(0)], describe())
    rows = len(Dataset(tmp_path / "data"))
    np.save(tmp_path / "data" / "reward.npy", np.array([Bomb()] * rows), allow_pickle=True)
    with pytest.raises(CorruptFileError, match=r"reward\.npy' is damaged"):
        Dataset(tmp_path / "data")
    assert not (tmp_path / "executed").exists()


def test_what_is_trusted_is_said(script, tmp_path, monkeypatch):
    """A class of one's own, that the command line imports."""
    (tmp_path / "mine.py").write_text("import eqx_q\nPQN = eqx_q.PQN\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["agent._target_=mine.PQN", "total_steps=64", "num_envs=2", "tracker=jsonl"]
    options += ["agent.rollout_length=4", "agent.num_minibatches=2", "eval.every=0"]
    status, _, err = script("train", *options, "video.every=0")
    assert status == 1 and "(in scripts: +imports=[mine])" in err
    assert script("train", *options, "video.every=0", "+imports=[mine]")[0] == 0
    status, _, err = script("train", *options, "+imports=[nowhere.mine]")
    assert status == 1 and "cannot import 'nowhere.mine'" in err
    del sys.modules["mine"]
