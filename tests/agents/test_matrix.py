"""Combinations of an agent's parts: a few cells of the matrix that cover every pair."""

import itertools
from collections import Counter

import pytest
from matrix import AXES, cells, check, cover, create, is_refused

from eqx_q.errors import UsageError

COVER = cover()


@pytest.mark.parametrize("cell", COVER, ids=lambda cell: "-".join(cell.values()))
def test_it_acts_learns_and_is_saved(cell):
    check(cell)


@pytest.mark.parametrize("learning", AXES["learning"])
@pytest.mark.parametrize("mixer", ["vdn", "qmix"])
def test_quantiles_are_not_mixed(mixer, learning):
    cell = cells()[0] | {"value": "quantile", "team": mixer, "learning": learning}
    assert is_refused(cell)
    with pytest.raises(UsageError, match="quantiles: choose value=scalar, rescaled or hl_gauss"):
        create(cell)


def test_every_two_choices_meet():
    """But for those that are refused; and there are hardly more cells than there must be."""
    found = Counter(pair for cell in COVER for pair in itertools.product(cell.items(), repeat=2))
    choices = [(axis, choice) for axis, every in AXES.items() for choice in every]
    for one, other in itertools.product(choices, repeat=2):
        refused = {one, other} in ({("value", "quantile"), ("team", x)} for x in ("vdn", "qmix"))
        if one[0] != other[0]:
            assert (found[one, other] == 0) == refused, (one, other)
    assert len(COVER) <= 25
