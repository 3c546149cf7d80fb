"""Trees are restored exactly, or refused with a reason; nothing is executed."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import typing

import equinox as eqx
import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqx_q
from eqx_q import spaces
from eqx_q.errors import CorruptFileError, UsageError
from eqx_q.saving.checkpoint import load, read_header, save
from eqx_q.types import Decision

pytestmark = pytest.mark.quick


def scaled(x, scale=1.0):
    return jax.nn.relu(x) * scale


class Network(eqx.Module):
    layers: list[eqx.nn.Linear]
    activation: typing.Callable = eqx.field(static=True)
    width: int = eqx.field(static=True)
    name: str = eqx.field(static=True, default="mlp")


class Learner(eqx.Module):
    """Shaped like an agent: network, optimiser state, spaces, counters, hyperparameters."""

    network: Network
    optimiser: optax.OptState
    observation_space: gymnasium.Space = eqx.field(static=True)
    action_space: gymnasium.Space = eqx.field(static=True)
    env_steps: jax.Array
    learning_rate: jax.Array
    key: jax.Array
    schedule_steps: float
    nothing: None = None


class Point(typing.NamedTuple):
    x: typing.Any
    y: typing.Any


def make_network(activation=jax.nn.relu):
    keys = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.Linear(4, 8, key=keys[0]), eqx.nn.Linear(8, 2, use_bias=False, key=keys[1])]
    return Network(layers, activation, 8)


@eqx.filter_jit
def make_learner():
    network = make_network()
    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.radam(1e-3))
    params = eqx.filter(network, eqx.is_inexact_array)
    gradients = jax.tree.map(lambda x: jnp.sin(x) + 0.1, params)
    _, optimiser = tx.update(gradients, tx.init(params), params)
    low = np.array([-4.8, -np.inf, -0.4, -1e3], np.float32)
    return Learner(
        network,
        optimiser,
        gymnasium.spaces.Box(low, -low, dtype=np.float32),
        gymnasium.spaces.Discrete(2, start=1),
        jnp.array(123, jnp.int32),
        jnp.asarray(2.5e-4),
        jax.random.key(7),
        float("inf"),
    )


def assert_same(a, b, where="tree"):
    """Equal in type, dtype, shape, bits and structure. Written apart from the code under test."""
    assert type(a) is type(b), where
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        assert jax.random.key_impl(a) == jax.random.key_impl(b), where
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    if isinstance(a, jax.Array | np.ndarray | np.generic):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where
        assert getattr(a, "weak_type", None) == getattr(b, "weak_type", None), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for name in a:
            assert_same(a[name], b[name], f"{where}[{name!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, functools.partial):
        assert_same(
            [a.func, a.args, a.keywords], [b.func, b.args, b.keywords], f"{where} (partial)"
        )
    elif hasattr(type(a), "__dataclass_fields__"):
        for name in a.__dataclass_fields__:
            assert_same(getattr(a, name), getattr(b, name), f"{where}.{name}")
    else:
        assert a == b or (a != a and b != b), where


def round_trip(tree, path):
    save(path, tree)
    loaded = load(path)
    assert_same(tree, loaded)
    return loaded


def test_agent_like_module(tmp_path):
    learner = make_learner()
    loaded = round_trip(learner, tmp_path / "agent.eqx")
    assert loaded.network.activation is jax.nn.relu
    assert jax.tree.structure(loaded) == jax.tree.structure(learner)
    x = jnp.arange(4.0)
    assert (loaded.network.layers[0](x) == learner.network.layers[0](x)).all()


def test_run_of_a_population(tmp_path):
    env = eqx_q.make("gymnax/CartPole-v1", num_envs=4)

    @eqx.filter_jit
    @eqx.filter_vmap
    def create(key):
        return eqx_q.PQN.create(env.observation_space, env.action_space, key=key)

    agent = eqx_q.Population(create(jax.random.split(jax.random.key(0))))
    run_state = eqx_q.start(agent, env, key=jax.random.key(1))
    loaded = round_trip(run_state, tmp_path / "run_state")
    assert jax.tree.structure(loaded) == jax.tree.structure(run_state)


def test_loaded_tree_compiles_nothing_anew(tmp_path):
    traces = []

    @eqx.filter_jit
    def count(tree):
        traces.append(1)
        return tree

    tree = {"weak": jnp.asarray(0.5), "weak_vector": jnp.full(3, 2), "strong": jnp.ones(3)}
    tree["learner"] = make_learner()
    save(tmp_path / "a", tree)
    count(tree)
    count(load(tmp_path / "a"))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "name", ["CartPole-v1", "Breakout-MinAtar", "MemoryChain-bsuite", "Pong-misc"]
)
def test_gymnax_state(tmp_path, name):
    env, params = gymnax.make(name)
    keys = jax.random.split(jax.random.key(0), 3)
    _, state = jax.vmap(env.reset, (0, None))(keys, params)
    round_trip((state, params), tmp_path / "state")


@pytest.mark.parametrize(
    "dtype",
    [
        *("bool", "uint8", "int8", "int16", "uint32", "int32"),
        *("float16", "bfloat16", "float32", "complex64", "float8_e4m3fn"),
    ],
)
def test_every_bit_of_every_dtype(tmp_path, dtype):
    bits = np.random.default_rng(0).integers(0, 256, 96, np.uint8)
    array = (bits % 2 if dtype == "bool" else bits).view(jnp.dtype(dtype)).reshape(2, 3, -1)
    round_trip({"numpy": array, "jax": jnp.array(array)}, tmp_path / "a")


def test_numpy_stays_numpy(tmp_path):
    tree = {
        "f64": np.array([0.1, np.nan, -np.inf, -0.0]),
        "i64": np.arange(6).reshape(2, 3).T,  # not contiguous
        "strided": np.arange(10)[::3],
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(0.1),
        "zero_d": np.array(3, np.int16),
        "jax_empty": jnp.zeros((2, 0)),
    }
    loaded = round_trip(tree, tmp_path / "a")
    loaded["f64"][0] = 1.0  # and can be written to
    big_endian = np.array([1.5, 2.5], ">f4")
    save(tmp_path / "b", big_endian)
    np.testing.assert_array_equal(load(tmp_path / "b"), big_endian)


def test_plain_values(tmp_path):
    leaves = [None, True, False, 0, -1, 2**80, 0.1, -0.0, 1e-320, float("nan"), -float("inf")]
    leaves += ["", "ünï\n\"'", "\x00", [], (), {}, [[]], ((),), Point(1, (2, [3]))]
    tree = {"leaves": leaves, 3: "int key", (1, None): "tuple key", "dtype": jnp.dtype("bfloat16")}
    tree["int16"] = np.dtype(np.int16)
    round_trip(tree, tmp_path / "a")
    assert str(load(tmp_path / "a")["leaves"][7]) == "-0.0"
    for leaf in leaves:
        round_trip(leaf, tmp_path / "a")


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys(tmp_path, impl):
    keys = jax.random.split(jax.random.key(5, impl=impl), (2, 3))
    loaded = round_trip({"typed": keys, "raw": jax.random.PRNGKey(1)}, tmp_path / "a")
    np.testing.assert_array_equal(
        jax.random.uniform(loaded["typed"][1, 2]), jax.random.uniform(keys[1, 2])
    )


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Box(0, 255, (5, 4), np.uint8),
        gymnasium.spaces.Box(-np.inf, np.inf, (), np.float64),
        gymnasium.spaces.Discrete(6),
        gymnasium.spaces.Discrete(3, start=-1),
        gymnasium.spaces.MultiDiscrete([3, 2], start=[1, 0]),
        gymnasium.spaces.MultiBinary(4),
        gymnasium.spaces.MultiBinary([2, 3]),
        gymnasium.spaces.Dict(b=gymnasium.spaces.Discrete(2), a=gymnasium.spaces.MultiBinary(1)),
        spaces.Box(gymnasium.spaces.Box(-1, 2, (3,), np.float32)),
        spaces.Discrete(gymnasium.spaces.Discrete(6)),
        gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(2), gymnasium.spaces.Box(0, 1, (1,))]),
    ],
    ids=repr,
)
def test_spaces(tmp_path, space):
    save(tmp_path / "a", space)
    loaded = load(tmp_path / "a")
    assert type(loaded) is type(space) and loaded == space
    assert getattr(space, "__hash__", None) is None or hash(loaded) == hash(space)
    assert loaded.dtype == space.dtype and repr(loaded) == repr(space)
    space.seed(3)
    loaded.seed(3)
    np.testing.assert_equal(loaded.sample(), space.sample())


def test_functions_and_classes(tmp_path):
    tree = [jax.nn.relu, jax.nn.gelu, jnp.tanh, jax.lax.tanh, jnp.float32, scaled, Network, jnp.add]
    tree += [functools.partial(scaled, scale=2.0), jax.lax.Precision.HIGHEST, optax.huber_loss]
    tree += [jax.tree_util.Partial(scaled, jnp.ones(2))]
    tree += [eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))]  # with a lambda that has a name
    round_trip(tree, tmp_path / "a")
    text = json.dumps(read_header(tmp_path / "a"))
    # By public names, which outlive a library's private layout.
    assert "jax.nn:relu" in text and "optax.losses:huber_loss" in text and "_src" not in text


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        (Network([], lambda x: x, 1), "activation"),
        ({"a": [1, lambda: 0]}, r"\['a'\]\[1\]"),
        ((functools.partial(lambda x: x),), r"\[0\]\.func"),
        ({"a": "".join}, r"\['a'\]"),
        ({"o": object()}, r"\['o'\]"),
        ([np.array(["text"])], r"\[0\]"),
        ([np.array([object()])], r"\[0\]"),
        ({"set": {1, 2}}, r"\['set'\]"),
        (os.system, "the tree itself"),
    ],
)
def test_refuses_what_cannot_be_loaded_again(tmp_path, tree, place):
    with pytest.raises(UsageError, match=place) as caught:
        save(tmp_path / "a", tree)
    assert "\n" not in str(caught.value) and ": " in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_local_class_is_refused(tmp_path):
    class Local(eqx.Module):
        x: int = 1

    with pytest.raises(UsageError, match=r"'\['net'\]' is .*Local.*module level"):
        save(tmp_path / "a", {"net": Local()})


def test_loads_in_a_fresh_process(tmp_path):
    """Nothing but the path: no import of the classes beforehand."""
    save(tmp_path / "a", {"decision": Decision(jnp.arange(3), jnp.ones(3)), "f": jax.nn.relu})
    code = f"""
        from eqx_q.saving.checkpoint import load
        tree = load({str(tmp_path / "a")!r})
        print(tree["decision"].action.tolist(), tree["f"](-1.0))
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[0, 1, 2] 0.0"


# ---- what a hostile or outdated header asks for


def rewrite(path, old, new):
    """Replaces text in a header, and mends the checksum, as an attacker would."""
    data = path.read_bytes()
    line, rest = data.split(b"\n", 1)
    size = int(line.split()[2])
    text, payload = rest[:size], rest[size:]
    assert old in text
    text = text.replace(old, new)
    digest = hashlib.sha256(text).hexdigest().encode()
    path.write_bytes(b"eqx_q-file 0001 %010d %s\n" % (len(text), digest) + text + payload)


@pytest.mark.parametrize(
    "reference",
    [
        "os:system",
        "posix:system",
        "subprocess:run",
        "builtins:eval",
        "antigravity:fly",
        "os.path:join",
        "eqx_q.saving.files:os.system",
    ],
)
def test_standard_library_is_refused_before_it_is_imported(tmp_path, reference):
    save(tmp_path / "a", [jax.nn.relu, Point(1, 2)])
    rewrite(tmp_path / "a", b"jax.nn:relu", reference.encode())
    with pytest.raises(CorruptFileError, match=f"'{reference}'.*do not trust"):
        load(tmp_path / "a")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "reference", ["os:system", "numpy:ndarray", "numpy:savetxt", "jax:numpy", "optax:__name__"]
)
def test_builds_only_dataclasses_and_named_tuples(tmp_path, reference):
    save(tmp_path / "a", Point(1, 2))
    module = Point.__module__.encode()
    rewrite(tmp_path / "a", module + b":Point", reference.encode())
    with pytest.raises(CorruptFileError, match=f"'{reference}'"):
        load(tmp_path / "a")


class Loud(eqx.Module):
    """Every way in which code of a class could run."""

    x: int

    def __new__(cls, *args):
        Loud.calls.append("new")
        return super().__new__(cls)

    def __init__(self, x):
        Loud.calls.append("init")
        self.x = x

    def __check_init__(self):
        Loud.calls.append("check")


Loud.calls = []


def test_no_constructor_runs(tmp_path):
    save(tmp_path / "a", Loud(3))
    assert Loud.calls == ["new", "init", "check"]
    assert load(tmp_path / "a").x == 3
    assert Loud.calls == ["new", "init", "check"]


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (b'"x"', b'"z"', UsageError, r"has changed.*gone: \['z'\], new: \['x'\]"),
        (b":Point", b":Pont", UsageError, "Pont.*was not found"),
        (b'"shape": [3]', b'"shape": [9]', CorruptFileError, "invalid (arrays|tree)"),
        (b'"offset": 0', b'"offset": 64', CorruptFileError, "invalid (arrays|tree)"),
        (b'"int16"', b'"linalg"', CorruptFileError, "invalid (arrays|tree)"),
        (b'"array": 0', b'"array": 7', CorruptFileError, "invalid (arrays|tree)"),
        (b'"array": 0', b'"arrow": 0', CorruptFileError, "unknown node"),
        (b'"tree"', b'"trie"', CorruptFileError, "invalid (arrays|tree)"),
    ],
)
def test_outdated_or_nonsensical_header(tmp_path, old, new, error, message):
    save(tmp_path / "a", Point(np.arange(3, dtype=np.int16), 2))
    rewrite(tmp_path / "a", old, new)
    with pytest.raises(error, match=message):
        load(tmp_path / "a")


def test_class_of_a_script_says_so(tmp_path):
    save(tmp_path / "a", Point(1, 2))
    rewrite(tmp_path / "a", Point.__module__.encode() + b":Point", b"__main__:MyNetwork")
    with pytest.raises(UsageError, match=r"__main__:MyNetwork.*from that script"):
        load(tmp_path / "a")


def test_64_bit_arrays_ask_for_64_bit_jax(tmp_path):
    save(tmp_path / "a", jnp.arange(3))
    rewrite(tmp_path / "a", b'"int32"', b'"int64"')
    rewrite(tmp_path / "a", b'"shape": [3]', b'"shape": [1]')
    with pytest.raises(UsageError, match="JAX_ENABLE_X64"):
        load(tmp_path / "a")
