"""Trackers are created from the configuration."""

import logging
import sys

import pytest
import yaml

import eqx_q.run
from eqx_q.errors import UnknownNameError, UsageError
from eqx_q.run.trackers import make_trackers
from eqx_q.tracking import RemoteTracker, Tracker, Trackers, remote


class Own(Tracker):
    def __init__(self, directory, *, num_members, word):
        self.made = directory, num_members, word

    def log(self, metrics, step):
        pass

    log_params = log_gif = close = log


def configured(**tracker):
    agent, env = {"_target_": "eqx_q.PQN"}, {"suite": "gymnax", "name": "CartPole-v1"}
    return {"agent": agent, "env": env, "tracker": tracker}


def made(tmp_path, **tracker):
    found = make_trackers(configured(**tracker), tmp_path, command="a=1", num_members=None)
    Trackers(*found).close()
    return found


def test_several_trackers_share_a_repo(tmp_path, replace_backend, received):
    for name in ("tensorboard", "wandb"):
        replace_backend(name=name)
    wandb = {"experiment": "x", "mode": "online", "entity": None}
    found = made(tmp_path, repo=str(tmp_path), tensorboard={}, wandb=wandb)
    assert [type(x) for x in found] == [RemoteTracker] * 2
    options = {row[1]["experiment"]: row[1] for row in received(tmp_path) if row[0] == "open"}
    assert options[None]["repo"] == options["x"]["repo"] == str(tmp_path)
    assert options["x"]["mode"] == "online" and "entity" not in options["x"]
    assert options[None]["description"] == "eqx_q.PQN in gymnax/CartPole-v1: a=1"
    assert options[None]["tags"] == ["eqx_q.PQN", "gymnax/CartPole-v1"]


def test_options_of_earlier_versions_and_own_trackers(
    tmp_path, replace_backend, received, monkeypatch
):
    replace_backend()
    monkeypatch.setitem(sys.modules, "own_tracker", sys.modules[__name__])
    aim = {"_target_": "eqx_q.tracking.AimTracker", "repo": str(tmp_path), "experiment": "x"}
    assert len(made(tmp_path, **aim)) == 1
    assert received(tmp_path)[0][1]["experiment"] == "x"
    assert made(tmp_path, _target_=None) == made(tmp_path, repo=".") == []
    options = {"_target_": "own_tracker.Own", "word": "hi"}
    for (own,) in (made(tmp_path, repo=".", mine=options), made(tmp_path, repo=".", **options)):
        assert own.made == (tmp_path, None, "hi")


def test_invalid_options_are_named(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown tracker 'wndb': the nearest are wandb"):
        made(tmp_path, wndb={})
    with pytest.raises(
        UsageError, match=r"tracker\.aim=3: set its entries instead, or take tracker=aim"
    ):
        made(tmp_path, aim=3)
    with pytest.raises(UsageError, match="is not a subclass of Tracker"):
        made(tmp_path, x={"_target_": "functools.partial"})


@pytest.mark.parametrize(
    ("python_below", "choice", "reason"),
    [
        ((9, 0), "aim", "since it is installed"),
        ((3, 0), "tensorboard", "not installed for this Py"),
    ],
)
def test_auto(
    tmp_path, replace_backend, received, caplog, monkeypatch, python_below, choice, reason
):
    replace_backend(name="aim")
    replace_backend(name="tensorboard")
    monkeypatch.setitem(
        remote.BACKENDS, "aim", remote.BACKENDS["aim"]._replace(python_below=python_below)
    )
    with caplog.at_level(logging.INFO):
        made(tmp_path, repo=str(tmp_path), auto={"experiment": "x"})
    assert f"tracker: {choice}, " in caplog.text and reason in caplog.text
    assert (tmp_path / f"{choice}.json").exists() and received(tmp_path)[-1] == ["close"]


def test_the_command_line_chooses_trackers(script, tmp_path, monkeypatch):
    seen = []

    def train_run(config, directory, *, resume, command, on_start):
        on_start()
        seen.append((config["tracker"], command))

    monkeypatch.setattr(eqx_q.run, "train_run", train_run)
    several = ["tracker=[aim,tensorboard]", "tracker.repo=a", "tracker.aim.views=false"]
    assert script("train", *several, "hydra.run.dir=run")[0] == 0
    name = {"experiment": "CartPole-v1"}
    stored = {"repo": "a", "aim": {**name, "views": False}, "tensorboard": name}
    assert seen == [(stored, " ".join(several))]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["tracker"] == stored

    for change, expected in [
        (["tracker.repo=b"], stored | {"repo": "b"}),
        (["tracker=mlflow"], {"repo": ".", "mlflow": {**name, "uri": None}}),  # replaces the others
    ]:
        status, _, err = script("train", "resume=run", *change)
        assert (status, seen[-1][0]) == (0, expected), err
    status, _, err = script("train", "tracker.wandb.mode=online")
    assert status == 1 and "unknown option 'tracker.wandb" in err and err.count("\n") == 1
