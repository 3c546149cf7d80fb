"""Every layer against NumPy: values, gradients, statistics, and one copy per seed."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q.errors import UsageError
from eqx_q.nets import layers
from eqx_q.nets.layers import BatchNorm, BatchRenorm, Conv, LayerNorm, Linear

KEY = jax.random.key(0)


def normal(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


@eqx.filter_jit
def output(layer, x, *args):
    return layer(x, layer.initial_statistics(), *args)[0]


# Convolutions ----------------------------------------------------------------------------------


def loop_conv(x, kernel, bias, stride, padding):
    """A convolution of `[B, H, W, C]`, written out."""
    window = kernel.shape[1]
    if padding == "SAME":
        total = [max((-(-n // stride) - 1) * stride + window - n, 0) for n in x.shape[1:3]]
        x = np.pad(x, ((0, 0), *[(t // 2, t - t // 2) for t in total], (0, 0)))
    height, width = ((n - window) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], height, width, kernel.shape[0]))
    for i in range(height):
        for j in range(width):
            top, left = i * stride, j * stride
            seen = x[:, top : top + window, left : left + window]
            y[:, i, j] = np.tensordot(seen, kernel, ([1, 2, 3], [1, 2, 3])) + bias
    return y


@pytest.mark.parametrize("lowering", ["patches", "conv"])
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (4, 2), (3, 1), (3, 2), (2, 3)])
def test_convolution_is_the_loop(window, stride, padding, lowering):
    conv = Conv(3, 5, window, stride, padding, key=KEY, lowering=lowering)
    conv = eqx.tree_at(lambda c: c.bias, conv, normal(5))
    x = np.asarray(normal(2, 13, 11, 3))
    expected = loop_conv(x, np.asarray(conv.kernel), np.asarray(conv.bias), stride, padding)
    np.testing.assert_allclose(output(conv, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize(("window", "stride", "size"), [(8, 4, 12), (3, 1, 7), (3, 2, 9)])
def test_both_lowerings_have_the_same_gradients(window, stride, size, padding):
    x = normal(2, size, size, 4)

    def loss(kernel_and_x, lowering):
        kernel, x = kernel_and_x
        conv = Conv(4, 6, window, stride, padding, key=KEY, lowering=lowering)
        y = output(eqx.tree_at(lambda c: c.kernel, conv, kernel), x)
        return jnp.sum(jnp.sin(y))

    weight = Conv(4, 6, window, key=KEY).kernel
    a = jax.jit(jax.grad(loss), static_argnums=1)((weight, x), "patches")
    b = jax.jit(jax.grad(loss), static_argnums=1)((weight, x), "conv")
    for ours, reference in zip(a, b, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", ["patches", "conv"])
@pytest.mark.parametrize(("window", "stride", "size"), [(8, 4, 20), (3, 1, 10), (2, 2, 7)])
def test_raw_images(window, stride, size, lowering):
    """Bytes, channels first, to be scaled: as if they came as scaled floats, channels last."""
    images = jax.random.randint(KEY, (2, 4, size, size), 0, 256).astype(jnp.uint8)
    options = {"key": KEY, "lowering": lowering}
    raw = Conv(4, 5, window, stride, **options, input_scale=1 / 255, channels_first=True)
    plain = Conv(4, 5, window, stride, **options)
    floats = jnp.moveaxis(images, 1, -1) / 255
    np.testing.assert_allclose(output(raw, images), output(plain, floats), rtol=1e-4, atol=1e-5)
    # Channels last, where four bytes make a word too.
    last = Conv(4, 5, window, stride, **options, input_scale=1 / 255)
    bytes_last = jnp.moveaxis(images, 1, -1)
    np.testing.assert_allclose(
        output(last, bytes_last), output(plain, floats), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("lowering", "platform", "convolves"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("conv", "cpu", True),
        ("patches", "cuda", False),
    ],
)
def test_on_cpu_a_convolution_is_a_matrix_product(lowering, platform, convolves):
    conv = Conv(4, 5, 4, 2, key=KEY, lowering=lowering)
    traced = jax.jit(lambda x: output(conv, x)).trace(normal(2, 8, 8, 4))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in program) is convolves
    assert ("stablehlo.dot_general" in program) is not convolves


def test_one_convolution_per_seed():
    x = normal(3, 2, 8, 8, 4)
    convs = eqx.filter_vmap(lambda key: Conv(4, 5, 4, 2, key=key))(jax.random.split(KEY, 3))
    together = eqx.filter_vmap(output)(convs, x)
    for i in range(3):
        alone = jax.tree.map(lambda leaf, i=i: leaf[i], convs)
        np.testing.assert_allclose(together[i], output(alone, x[i]), rtol=1e-4, atol=1e-5)


# Linear, pooling, composition ------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3), (4, 4)])
def test_linear_either_way_round(inputs, outputs):
    layer = eqx.tree_at(lambda m: m.bias, Linear(inputs, outputs, key=KEY), normal(outputs))
    x = normal(5, inputs)
    w = np.asarray(layer.weight.T if layer.transposed else layer.weight)
    assert w.shape == (inputs, outputs) and layer.weight.shape[0] <= layer.weight.shape[1]
    np.testing.assert_allclose(output(layer, x), x @ w + layer.bias, rtol=1e-5, atol=1e-5)
    gradient = eqx.filter_grad(lambda layer: jnp.sum(jnp.sin(output(layer, x))))(layer)
    expected = np.asarray(x).T @ np.cos(x @ w + layer.bias)
    expected = expected.T if layer.transposed else expected
    np.testing.assert_allclose(gradient.weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (2, 2), (3, 1), (3, 2)])
def test_max_pool(window, stride):
    x = np.asarray(normal(2, 8, 7, 3))
    y = np.asarray(output(layers.MaxPool(window, stride), jnp.asarray(x)))
    height, width = -(-8 // stride), -(-7 // stride)
    assert y.shape == (2, height, width, 3)
    before = [max((o - 1) * stride + window - n, 0) // 2 for o, n in ((height, 8), (width, 7))]
    for i in range(height):
        for j in range(width):
            top, left = i * stride - before[0], j * stride - before[1]
            seen = x[:, max(top, 0) : top + window, max(left, 0) : left + window]
            np.testing.assert_array_equal(y[:, i, j], seen.max((1, 2)))


def test_composition():
    a, b = Linear(3, 3, key=KEY), Linear(3, 3, key=jax.random.key(1))
    x = normal(4, 3)
    ya, yb = output(a, x), output(b, x)
    np.testing.assert_allclose(output(layers.Product(a, b), x), ya * yb, rtol=1e-6)
    np.testing.assert_allclose(output(layers.Residual(a), x), x + ya, rtol=1e-6)
    np.testing.assert_allclose(output(layers.Sequential((a, b)), x), output(b, ya), rtol=1e-6)
    assert layers.Sequential((a, layers.Flatten())).initial_statistics() == (None, None)
    tree = {"right": normal(4, 2, 3), "left": x}  # in the order of the names
    joined = output(layers.Join((a, layers.Flatten())), tree)
    np.testing.assert_allclose(joined, np.hstack([ya, tree["right"].reshape(4, 6)]), rtol=1e-6)


def test_composition_keeps_each_ones_statistics():
    norm = BatchNorm(3)
    first = layers.Join((layers.Product(norm, layers.Identity()),))
    layer = layers.Sequential((first, layers.Residual(norm)))
    x, mask = normal(6, 3), jnp.ones(6, bool)
    y, kept = layer(x, layer.initial_statistics(), mask)
    ((in_product, nothing),), in_residual = kept
    inner, expected_product = norm(x, norm.initial_statistics(), mask)
    outer, expected_residual = norm(inner * x, norm.initial_statistics(), mask)
    assert nothing is None
    np.testing.assert_allclose(in_product.mean, expected_product.mean, rtol=1e-6)
    np.testing.assert_allclose(in_residual.variance, expected_residual.variance, rtol=1e-6)
    np.testing.assert_allclose(y, inner * x + outer, rtol=1e-5, atol=1e-6)


# Of two numbers each: from 0 to 2, and from 5 to 8.
NUMBERS = np.array([[0, 5], [2, 8], [1, 6]])


def test_one_hot():
    y = np.asarray(output(layers.OneHot((3, 4), (0, 5)), jnp.asarray(NUMBERS)))
    expected = np.zeros((3, 7))
    for row, (a, b) in enumerate(NUMBERS):
        expected[row, [a, 3 + b - 5]] = 1
    np.testing.assert_array_equal(y, expected)
    same = output(layers.OneHot((4, 4), (5, 5)), jnp.asarray([[6, 8]]))  # all of one size
    np.testing.assert_array_equal(same, [[0, 1, 0, 0, 0, 0, 0, 1]])
    one = output(layers.OneHot((3,), (-1,)), jnp.asarray([-1, 1]))  # without axes of its own
    np.testing.assert_array_equal(one, [[1, 0, 0], [0, 0, 1]])
    for sizes in ((3, 4), (3, 3)):
        assert not np.any(layers.one_hots(jnp.asarray([[-1, 9]]), sizes))


def test_embedding_is_a_matrix_product_with_one_hot():
    layer = layers.Embedding((3, 4), (0, 5), 6, key=KEY)
    one_hot = np.asarray(output(layers.OneHot((3, 4), (0, 5)), jnp.asarray(NUMBERS)))
    table = np.asarray(layer.table)
    expected = np.hstack([one_hot[:, :3] @ table[:3], one_hot[:, 3:] @ table[3:]])
    np.testing.assert_allclose(output(layer, jnp.asarray(NUMBERS)), expected, rtol=1e-6)


def test_unknown_names_say_the_nearest():
    with pytest.raises(UsageError, match=r"unknown activation 'rellu'.*relu"):
        layers.Activation("rellu")
    with pytest.raises(UsageError, match=r"unknown norm 'layernorm'.*layer_norm"):
        layers.make_norm("layernorm", (3,))
    with pytest.raises(UsageError, match=r"unknown init 'ortogonal'.*orthogonal"):
        Linear(3, 3, key=KEY, init="ortogonal")


# Initialisation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "gain"), [("lecun_normal", 1), ("he_normal", 2)])
def test_variance_is_by_fan_in(init, gain):
    weight = Linear(400, 300, key=KEY, init=init).weight
    np.testing.assert_allclose(np.var(weight), gain / 400, rtol=0.03)
    kernel = Conv(16, 200, 3, key=KEY, init=init).kernel
    np.testing.assert_allclose(np.var(kernel), gain / (9 * 16), rtol=0.03)
    assert not np.any(Conv(16, 200, 3, key=KEY).bias)


def test_xavier_is_by_both_fans():
    kernel = Conv(16, 200, 3, key=KEY, init="xavier_normal").kernel
    np.testing.assert_allclose(np.var(kernel), 2 / (9 * 16 + 9 * 200), rtol=0.03)


def test_orthogonal_has_gain_sqrt_2():
    weight = Linear(8, 5, key=KEY, init="orthogonal").weight  # outputs × inputs
    np.testing.assert_allclose(weight @ weight.T, 2 * np.eye(5), atol=1e-5)
    kernel = Conv(4, 6, 3, key=KEY, init="orthogonal").kernel.reshape(6, -1)
    np.testing.assert_allclose(kernel @ kernel.T, 2 * np.eye(6), atol=1e-5)


# Normalisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axes"), [((5,), (-1,)), ((4, 3, 5), (1, 2, 3))])
def test_layer_norm(shape, axes):
    x = 3 + 2 * normal(2, 4, 3, 5)
    norm = LayerNorm(shape)
    norm = eqx.tree_at(
        lambda m: (m.scale, m.bias), norm, (normal(*shape, seed=2), normal(*shape, seed=3))
    )

    def plain(x, scale, bias):
        mean, variance = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-6) * scale + bias

    np.testing.assert_allclose(
        output(norm, x), plain(x, norm.scale, norm.bias), rtol=1e-4, atol=1e-5
    )
    ours = jax.grad(lambda x, norm: jnp.sum(jnp.sin(output(norm, x))), (0, 1))(x, norm)
    theirs = jax.grad(lambda *a: jnp.sum(jnp.sin(plain(*a))), (0, 1, 2))(x, norm.scale, norm.bias)
    for a, b in zip(jax.tree.leaves(ours), theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_layer_norm_far_from_zero_and_of_a_constant():
    x = normal(4, 64)
    norm = LayerNorm((64,))
    np.testing.assert_allclose(output(norm, x + 1000), output(norm, x), atol=5e-3)
    np.testing.assert_allclose(output(norm, jnp.full((2, 64), 7.0)), 0, atol=1e-3)


def test_batch_norm_in_training_uses_and_keeps_the_batch():
    x = np.asarray(1 + 2 * normal(6, 3, 2, 4))
    mask = np.array([True, False, True, True, False, True])
    norm = BatchNorm(4, momentum=0.9)
    y, kept = norm(jnp.asarray(x), norm.initial_statistics(), jnp.asarray(mask))
    mean, variance = x[mask].mean((0, 1, 2)), x[mask].var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept.mean, 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(kept.variance, 0.9 + 0.1 * variance, rtol=1e-4)
    assert kept.num_batches == 1
    # Inference: the running statistics, unchanged.
    z, same = norm(jnp.asarray(x), kept)
    expected = (x - kept.mean) / np.sqrt(kept.variance + 1e-5)
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)
    assert eqx.tree_equal(same, kept)


@pytest.mark.parametrize("norm", [BatchNorm(4), BatchRenorm(4, warmup=0)])
def test_rows_out_of_the_mask_do_not_count(norm):
    x = normal(5, 4)
    mask = jnp.array([True, True, False, True, False])
    y, kept = norm(x, norm.initial_statistics(), mask)
    other = jnp.where(mask[:, None], x, 1e3)
    y_other, kept_other = norm(other, norm.initial_statistics(), mask)
    np.testing.assert_array_equal(y[mask], y_other[mask])
    assert eqx.tree_equal(kept, kept_other)


@pytest.mark.parametrize("norm", [BatchNorm(4), BatchRenorm(4, warmup=0)])
def test_a_batch_without_rows_changes_nothing(norm):
    x, none = normal(5, 4), jnp.zeros(5, bool)
    _, seen = norm(x, norm.initial_statistics(), ~none)
    y, kept = norm(x, seen, none)
    assert np.all(np.isfinite(y))
    np.testing.assert_allclose(kept.mean, seen.mean, rtol=1e-6)
    np.testing.assert_allclose(kept.variance, seen.variance, rtol=1e-6)
    assert kept.num_batches == seen.num_batches == 1
    gradient = jax.grad(lambda x: jnp.sum(norm(x, seen, none)[0] ** 2))(x)
    assert np.all(np.isfinite(gradient))


def test_batch_norm_has_no_gradient_along_mean_and_scale():
    """The loss sees through the batch statistics: shifting or stretching `x` changes nothing."""
    x, mask, norm = normal(6, 3), jnp.ones(6, bool), BatchNorm(3, epsilon=0.0)

    def loss(x):
        return jnp.sum(jnp.sin(norm(x, norm.initial_statistics(), mask)[0]))

    gradient = jax.grad(loss)(x)
    np.testing.assert_allclose(jnp.sum(gradient, 0), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(gradient * x, 0), 0, atol=1e-5)


def test_batch_renorm_follows_the_paper():
    norm = BatchRenorm(3, momentum=0.8, epsilon=1e-3, r_max=1.5, d_max=0.5, warmup=2)
    statistics, mask = norm.initial_statistics(), jnp.ones(16, bool)
    running_mean, running_variance = np.zeros(3), np.ones(3)
    for step in range(5):
        x = np.asarray(0.3 * step + normal(16, 3, seed=step) * np.array([0.2, 1.0, 4.0]))
        y, statistics = norm(jnp.asarray(x, jnp.float32), statistics, mask)
        mean, std = x.mean(0), np.sqrt(x.var(0) + 1e-3)
        running_std = np.sqrt(running_variance + 1e-3)
        r = np.clip(std / running_std, 1 / 1.5, 1.5) if step >= 2 else 1.0
        d = np.clip((mean - running_mean) / running_std, -0.5, 0.5) if step >= 2 else 0.0
        np.testing.assert_allclose(y, (x - mean) / std * r + d, rtol=1e-3, atol=1e-4)
        running_mean = 0.8 * running_mean + 0.2 * mean
        running_variance = 0.8 * running_variance + 0.2 * x.var(0)
        np.testing.assert_allclose(statistics.mean, running_mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(statistics.variance, running_variance, rtol=1e-4)
    z, _ = norm(jnp.asarray(x, jnp.float32), statistics)
    expected = (x - running_mean) / np.sqrt(running_variance + 1e-3)
    np.testing.assert_allclose(z, expected, rtol=1e-3, atol=1e-4)


def test_batch_renorm_holds_its_corrections_constant():
    """`r` and `d` have no gradient (§3): with them constant, the gradient is `r` times BN's."""
    x, mask = 2 + normal(8, 2) * jnp.array([1.5, 9.0]), jnp.ones(8, bool)
    norm = BatchRenorm(2, r_max=2.5, warmup=0)
    plain = BatchRenorm(2, warmup=1000)
    weight = normal(8, 2, seed=5)

    def gradient(norm):
        return jax.grad(lambda x: jnp.sum(weight * output(norm, x, mask)))(x)

    # One `r` is within its bound, the other is not.
    r = np.minimum(np.sqrt((np.var(x, 0) + 1e-3) / (1 + 1e-3)), 2.5)
    assert r.min() < 2.5 == r.max()
    np.testing.assert_allclose(gradient(norm), r * gradient(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(layers.NORMS))
def test_one_norm_per_seed(name):
    x, mask = normal(3, 5, 2, 2, 4), jnp.array([True, True, False, True, True])
    norm = layers.make_norm(name, (2, 2, 4))
    together = jax.vmap(lambda x: norm(x, norm.initial_statistics(), mask))(x)
    for i in range(3):
        alone = norm(x[i], norm.initial_statistics(), mask)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


# Of BTR ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "size"), [(11, 6), (6, 6), (7, 3), (3, 5)])
def test_adaptive_max_pool_is_a_loop_over_windows(length, size):
    x = np.asarray(jax.random.normal(KEY, (2, length, length + 1, 3)))
    y, _ = layers.AdaptiveMaxPool(size)(jnp.asarray(x), None)
    expected = np.empty((2, size, size, 3), np.float32)
    for i in range(size):
        for j in range(size):
            rows = slice(math.floor(i * length / size), math.ceil((i + 1) * length / size))
            wide = length + 1
            columns = slice(math.floor(j * wide / size), math.ceil((j + 1) * wide / size))
            expected[:, i, j] = x[:, rows, columns].max((1, 2))
    np.testing.assert_array_equal(y, expected)


def test_spectral_norm_divides_by_the_largest_singular_value():
    conv = layers.Conv(3, 5, 3, key=KEY)
    layer = layers.SpectralNorm(conv)
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    statistics = layer.initial_statistics()
    step = jax.jit(lambda statistics: layer(x, statistics, jnp.ones(2, bool)))
    for _ in range(50):
        y, statistics = step(statistics)
    largest = np.linalg.svd(conv.kernel.reshape(5, -1), compute_uv=False)[0]
    np.testing.assert_allclose(y, conv(x, None)[0] / largest, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(statistics), 1, rtol=1e-5)
    acting, kept = layer(x, statistics)
    np.testing.assert_allclose(acting, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(kept, statistics)  # acting does not change it

    # Its gradient, against finite differences of the exact quotient.
    direction = jax.random.normal(jax.random.key(2), conv.kernel.shape)

    def loss(kernel):
        moved = eqx.tree_at(lambda layer: layer.conv.kernel, layer, kernel)
        return jnp.sum(jnp.sin(moved(x, statistics)[0]))

    def exact(by):
        kernel = np.float64(conv.kernel) + by * np.float64(direction)
        kernel /= np.linalg.svd(kernel.reshape(5, -1), compute_uv=False)[0]
        normed = eqx.tree_at(lambda c: c.kernel, conv, jnp.asarray(kernel, jnp.float32))
        return float(np.sum(np.sin(np.float64(normed(x, None)[0]))))

    slope = float(jnp.sum(jax.grad(loss)(conv.kernel) * direction))
    assert slope == pytest.approx((exact(1e-2) - exact(-1e-2)) / 2e-2, rel=2e-2)
