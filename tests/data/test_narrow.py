"""Whole numbers are stored in a byte each, until the first other number."""

import gymnasium
import numpy as np
import pytest

from eqx_q.data import Dataset, Description, Rows, Writer
from eqx_q.data.dataset import COLUMNS
from eqx_q.errors import UsageError
from eqx_q.spaces import Box, Discrete

pytestmark = pytest.mark.quick

WHOLE = np.arange(12, dtype=np.float32).reshape(4, 3)


def description():
    box = Box(gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32))
    return Description("made/Up", box, Discrete(gymnasium.spaces.Discrete(2)))


def writer(path):
    return Writer(path, description(), narrow=True)


def episode(obs):
    length = len(obs) - 1
    return Rows.of_episode(obs, np.zeros(length, int), np.ones(length), terminated=True)


def test_whole_numbers_take_a_byte_each(tmp_path):
    with writer(tmp_path / "data") as out:
        out.append(episode(WHOLE))
        out.commit("a")
    with writer(tmp_path / "data") as out:  # goes on
        out.append(episode(WHOLE + 244))
        out.commit("b", run=3, source={"epsilon": 0.5})
        dataset = out.finish()
    assert dataset.rows.obs.dtype == np.uint8
    np.testing.assert_array_equal(dataset.rows.obs, [*WHOLE, *WHOLE + 244])
    assert dataset.shards[1].source == {"epsilon": 0.5} and dataset.shards[1].run == 3
    dataset.verify()


@pytest.mark.parametrize("odd", [0.5, -1, 256, np.nan, np.inf])
@pytest.mark.parametrize("close", [False, True])
def test_the_first_that_is_none_widens_all(tmp_path, odd, close):
    """Committed or not, and also where another writer goes on afterwards."""
    parts = [WHOLE, WHOLE + 1, np.where(WHOLE == 7, np.float32(odd), WHOLE), WHOLE + 2]
    out = writer(tmp_path / "data")
    out.append(episode(parts[0]))
    out.commit("a")
    if close:
        out.close()
        out = writer(tmp_path / "data")
    out.append(episode(parts[1]))
    out.append(episode(parts[2]))
    if close:  # what was not committed is lost, and what was is whole
        out.close()
        out = writer(tmp_path / "data")
        assert len(out) == len(WHOLE)
        out.append(episode(parts[1]))
        out.append(episode(parts[2]))
    out.append(episode(parts[3]))
    out.commit("b")
    dataset = out.finish()
    dataset.verify()
    assert dataset.rows.obs.dtype == np.float32
    np.testing.assert_array_equal(dataset.rows.obs, np.concatenate(parts))
    assert sorted(path.name for path in dataset.path.iterdir()) == sorted(
        [f"{name}.npy" for name in ("obs", *COLUMNS)] + ["header.json"]
    )
    assert len(Dataset(dataset.path)) == 16


def test_a_wide_beginning_is_not_gone_on_with_by_another(tmp_path):
    with Writer(tmp_path / "data", description(), dtype=np.uint8) as out:
        out.append(episode(WHOLE.astype(np.uint8)))
        out.commit("a")
    with pytest.raises(UsageError, match="beginning of another data set"):
        Writer(tmp_path / "data", description())
