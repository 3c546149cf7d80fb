"""Trees packed for compiled loops, and unpacked again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q.errors import UsageError
from eqx_q.loops.packing import Packed

pytestmark = pytest.mark.quick

N = 3
TREE = {
    "flag": jnp.array([True, False, True]),
    "number": jnp.array([1.5, -0.0, jnp.nan]),
    "count": jnp.array([-1, 0, 2**31 - 1], jnp.int32),
    "word": jnp.array([0, 1, 2**32 - 1], jnp.uint32),
    "image": jnp.arange(12, dtype=jnp.uint8).reshape(N, 4),
    "byte": jnp.arange(N, dtype=jnp.uint8),
    "of_others": jnp.ones(N + 1),
    "scalar": jnp.array(7.0),
    "keys": jax.random.split(jax.random.key(0), N),
    "none": None,
}


def bits(tree):
    def of(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return np.asarray(x).tobytes(), x.dtype, x.shape

    return jax.tree.map(of, tree)


def test_a_packed_tree_is_the_tree_bit_by_bit():
    packed = Packed.of(TREE, N)
    assert packed.words.shape == (4, N) and len(packed.arrays) == 5
    assert bits(packed.tree) == bits(TREE)
    nothing = Packed.of({"image": TREE["image"]}, N)
    assert bits(nothing.tree) == bits({"image": TREE["image"]})


def test_a_record_holds_what_was_written_at_each_step():
    tree = {name: x for name, x in TREE.items() if name != "keys"}
    steps = [tree, jax.tree.map(lambda x: x[::-1] if x.ndim else x + 1, tree)]

    @jax.jit
    def record():
        rows = [Packed.of(step, N) for step in steps]
        record = rows[0].blank(3)
        for step, row in enumerate(rows):
            record = record.write(jnp.asarray(step + 1), row)
        return record

    record = record()
    for step, expected in enumerate(steps):
        assert bits(record.at(step + 1).tree) == bits(expected)
        assert bits(jax.tree.map(lambda x, i=step + 1: x[i], record.tree)) == bits(expected)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("number", jnp.arange(N), "'number'.* is int32.3., not float32.3."),
        ("image", jnp.zeros((N, 4)), "'image'.* is float32.3, 4., not uint8.3, 4."),
        ("image", jnp.zeros((N, 5), jnp.uint8), "'image'.* is uint8.3, 5., not uint8.3, 4."),
    ],
)
def test_a_step_of_other_types_or_shapes_is_refused(name, other, message):
    record = Packed.of(TREE, N).blank(2)
    with pytest.raises(UsageError, match=message):
        record.write(1, Packed.of({**TREE, name: other}, N))
