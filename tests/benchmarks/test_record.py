"""Results are written compactly, and summary values are not rounded."""

import json

import pytest
from record import as_json

pytestmark = pytest.mark.quick


def test_a_curve_is_a_line_of_five_digits_and_the_rest_is_exact():
    curve = [[1024.0 * i, 1 / (i + 3)] for i in range(100)]
    result = {"a": {"return": 1 / 3, "each": [1 / 7, 2], "curve": curve, "names": ["x", "[1, 2]"]}}
    text = as_json(result)
    assert len(text.splitlines()) == 8
    read = json.loads(text)
    for found, expected in zip(read["a"].pop("curve"), result["a"].pop("curve"), strict=True):
        assert found == [float(f"{x:.5g}") for x in expected]
    assert read == result
