"""Masks and types of actions, against Gymnasium's own sampling."""

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from eqx_q import spaces
from eqx_q.errors import UsageError
from eqx_q.spaces import factors
from eqx_q.wrappers.conversion import (
    arrays,
    as_taken,
    legal_action,
    read_mask,
    write_mask,
)

NESTED = MultiDiscrete(np.array([[2, 3], [1, 4]]), start=np.array([[0, 1], [2, 3]]))


def test_types():
    boxes = {
        "f64": Box(-1e300, 0.5, (2,), np.float64),
        "i64": Box(-(2**40), 7, (2,), np.int64),
        "u8": Box(0, 255, (2,), np.uint8),
        "i8": Box(-3, 3, (2,), np.int8),
    }
    space = spaces.of_observations(Tuple([Discrete(3, start=2), Dict(boxes)]))
    assert space == Tuple(
        [
            Discrete(3, start=2),
            Dict(
                {
                    "f64": Box(-np.inf, 0.5, (2,), np.float32),
                    "i64": Box(-(2**31), 7, (2,), np.int32),
                    "u8": Box(0, 255, (2,), np.uint8),
                    "i8": Box(-3, 3, (2,), np.int32),
                }
            ),
        ]
    )
    values = {name: np.ones((5, 2), box.dtype) for name, box in boxes.items()}
    seen = arrays(space, (np.full(5, 4), values | {"more": "text"}), 5)
    kinds = {"f64": np.float32, "i64": np.int32, "u8": np.uint8, "i8": np.int32}
    assert {name: x.dtype.type for name, x in seen[1].items()} == kinds
    assert seen[0].dtype == np.int32 and seen[0].tolist() == [4] * 5
    with pytest.raises(
        UsageError, match=r"shape \(3,\) at '1.f64', but its space has shape \(2,\)"
    ):
        arrays(space, (np.full(5, 4), values | {"f64": np.ones((5, 3))}), 5)


def test_actions_stay_what_the_environment_takes():
    assert spaces.of_actions(Discrete(3, start=-1)) == Discrete(3, start=-1)
    whole = Box(np.array([-1, 2]), np.array([1, 5]), dtype=np.int16)
    assert spaces.of_actions(whole) == MultiDiscrete([3, 4], start=[-1, 2])
    assert as_taken(whole, np.array([[1, 5]], np.int32)).dtype == np.int16
    third = Box(-0.1, 1 / 3, (1,), np.float64)
    assert spaces.of_actions(third).dtype == np.float32
    bounds = np.stack([spaces.of_actions(third).low, spaces.of_actions(third).high])
    assert not third.contains(np.float64([np.float32(1 / 3)]))  # float32 is not as fine
    assert all(third.contains(x) for x in bounds.astype(np.float64))
    assert all(third.contains(x) for x in as_taken(third, bounds))
    fixed = spaces.of_actions(Box(0.1, 0.1, (1,), np.float64))  # no float32 lies in between
    assert fixed.low == fixed.high == np.float32(0.1)
    with pytest.raises(UsageError, match="more than 65536 choices"):
        spaces.of_actions(Box(0, 2**31 - 1, (2,), np.int32))


@pytest.mark.parametrize(
    ("actions", "sizes"),
    [
        (Discrete(4, start=2), [4]),
        (MultiDiscrete([2, 3, 1], start=[0, 5, 1]), [2, 3, 1]),
        (NESTED, [2, 3, 1, 4]),
        (MultiBinary((2, 2)), [2] * 4),
    ],
)
def test_masks_read_and_written(actions, sizes):
    rng, actions = np.random.default_rng(0), spaces.of_actions(actions)
    assert list(factors(actions)) == sizes
    for _ in range(20):
        parts = [rng.random(n) < 0.5 for n in sizes]
        given = np.concatenate(parts)
        completed = np.concatenate([x if x.any() else ~x for x in parts])
        np.testing.assert_array_equal(read_mask(actions, given), completed)
        own = write_mask(actions, completed)
        np.testing.assert_array_equal(read_mask(actions, own), completed)
        for action in (actions.sample(mask=own), legal_action(actions, completed)):
            index = np.ravel(action - getattr(actions, "start", 0))
            starts = np.cumsum([0, *sizes[:-1]])
            assert completed[starts + index].all() and actions.contains(action)
    assert actions.contains(legal_action(actions, None))
    with pytest.raises(UsageError, match=f"has 9 entries, but there are {sum(sizes)} choices"):
        read_mask(actions, np.ones(9))


def test_a_box_has_no_masks():
    box = spaces.of_actions(Box(-1, 1, (2,)))
    assert factors(box) == () and box.contains(legal_action(box, None))
    assert isinstance(box, gymnasium.spaces.Box)
