"""Configurations are read once: defaults that depend on the run, and invalid numbers."""

from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from eqx_q.errors import UsageError
from eqx_q.run import read_settings
from eqx_q.run.settings import OFFLINE, ONLINE

pytestmark = pytest.mark.quick

CONF = Path(__file__).resolve().parent.parent / "conf"


def settings(*overrides):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", [*overrides, "tuned=none"])
    return read_settings(OmegaConf.to_container(config, resolve=True))


def test_what_is_not_given_depends_on_the_length_of_the_run():
    found = settings("total_steps=40_000", "num_envs=4", "num_seeds=3")
    assert (found.kind, found.total, found.num_envs, found.num_seeds) == (ONLINE, 40_000, 4, 3)
    assert (found.eval.every, found.checkpoint.every, found.video.every) == (2_000, 4_000, 10_000)
    assert (found.eval.num_envs, found.eval.min_steps, found.eval.time_fraction) == (None, 0, 0.1)
    assert (found.pbt, found.data, found.log_every, found.checkpoint.keep) == (None, None, None, 2)
    tiny = settings("total_steps=7")
    assert (tiny.eval.every, tiny.checkpoint.every, tiny.video.every) == (1, 1, 1)


def test_from_data_updates_count_and_lanes_do_not():
    found = settings("data=some", "num_updates=400", "num_envs=64", "total_steps=wrong")
    assert (found.kind, found.total, found.num_envs, found.data) == (OFFLINE, 400, 1, "some")
    assert found.eval.every == 20
    evolving = settings("data=5", "pbt.every=7", "pbt.fitness=loss")
    assert evolving.data == "5" and evolving.pbt is not None


def test_what_is_given_is_taken():
    found = settings("eval.every=0", "video.every=0", "checkpoint.every=5e3", "log_every=3")
    assert (found.eval.every, found.video.every, found.checkpoint.every) == (0, 0, 5_000)
    assert found.log_every == 3
    evolution = settings("pbt.every=100", "pbt.spread=2", "pbt.hyperparameters=[lambda_]").pbt
    assert evolution is not None
    assert (evolution.every, evolution.spread, evolution.fraction) == (100, 2.0, 0.25)
    assert list(evolution.hyperparameters) == ["lambda_"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.every=-1", "eval.every=-1: give a whole number of at least 0"),
        ("video.max_steps=0", "video.max_steps=0: give a whole number of at least 1"),
        ("eval.time_fraction=2", "eval.time_fraction=2.0: give a number from 0 to 1"),
        ("num_envs=none", "num_envs=none: give a whole number"),
        ("seed=-1", "seed=-1: give a whole number of at least 0"),
        ("pbt.every=5 pbt.spread=0.5", "pbt.spread=0.5: give a number of at least 1"),
        ("pbt.every=5 pbt.factors=[a,b]", r"pbt.factors=\['a', 'b'\]: give a list of numbers"),
        ("pbt.every=5 pbt.hyperparameters=[3]", r"pbt.hyperparameters=\[3\]: give a list of names"),
        ("pbt.every=5 pbt.fitness=eval/return eval.every=0", "leave out eval.every=0"),
        ("pbt.every=5 data=some", "episode_return does not exist .* give pbt.fitness=eval/return"),
        ("pbt=3", "pbt=3: set its entries instead, such as pbt.every=..."),
        ("eval=3", "eval=3: set its entries instead, such as eval.every=..."),
        ("pbt.every=5 pbt.fraction=7", "pbt.fraction=7.0: give a number from 0 to 1"),
    ],
)
def test_numbers_that_make_no_sense(override, message):
    with pytest.raises(UsageError, match=message):
        settings(*override.split())
