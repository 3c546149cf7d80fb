"""Networks saved by earlier versions load as today's networks."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import make

from eqx_q.errors import UsageError
from eqx_q.nets import FromModule, PerAgent, make_network
from eqx_q.nets.layers import MaxPool
from eqx_q.saving.renames import like, todays
from eqx_q.saving.structure import decode, encode

KEY = jax.random.key(0)
VECTOR = gymnasium.spaces.Box(-1, 1, (4,), np.float32)


def today(reference, fields):
    """What a file's class and fields are today: those of today's files stay as they are."""
    name, fields = todays(f"eqx_q.nets.{reference}", fields)
    assert todays(name, fields) == (name, fields)
    return name.rpartition(":")[2], fields


@pytest.mark.parametrize(
    ("memory", "head", "num_members"), [("none", "dueling", None), ("lstm", "linear", 2)]
)  # `num_members` of a population
def test_networks_with_and_without_memory(memory, head, num_members):
    options = {"hidden_sizes": (8,), "memory": memory, "memory_size": 3, "head": head}
    if num_members is None:
        network = make("mlp", VECTOR, 5, key=KEY, **options)
    else:
        create = eqx.filter_vmap(lambda key: make("mlp", VECTOR, 5, key=key, **options))
        network = create(jax.random.split(KEY, num_members))
    if head == "linear":
        old = network.head.linear
    else:
        of_head = {"value": network.head.value, "advantage": network.head.advantage}
        assert today("heads:Dueling", of_head) == ("Dueling", vars(network.head))
        old = network.head
    fields = {"encoder": network.encoder, "head": old}
    reference = "feedforward:FeedForward"
    if memory != "none":
        fields |= {"recurrences": network.recurrences, "num_actions": 5}
        fields |= {"last_action": True, "last_reward": False}
        reference = "recurrent:Recurrent"
    name, fields = today(reference, fields)
    assert name == "Network" and eqx.tree_equal(fields, dict(vars(network)))


def test_pooling_had_the_padding_of_same():
    pool = MaxPool(3, 2)
    assert today("layers:MaxPool", {"window": 3, "stride": 2}) == ("MaxPool", vars(pool))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("impala", {"channels": (4,), "spectral_norm": True, "pool_size": 2}),
        ("gamma_hadamax", {"head": "dueling", "head_sizes": (6,)}),
        ("mlp", {"torso": "multi_skip", "torso_options": {"size": 8}, "simplex_size": 4}),
        ("mlp", {"memory": "gtrxl", "memory_size": 8, "memory_options": {"context": 2}}),
    ],
)
def test_todays_networks_are_saved_and_loaded(name, options):
    space = VECTOR if name == "mlp" else gymnasium.spaces.Box(0, 255, (36, 36, 1), np.uint8)
    network = make(name, space, 2, key=KEY, hidden_sizes=(4,), **options)
    assert eqx.tree_equal(decode(*encode(network), "test"), network)


def test_quantiles():
    network = make_network("mlp", VECTOR, (5,), num_values=7, key=KEY, hidden_sizes=(8,))
    inside = make("mlp", VECTOR, 35, key=KEY, hidden_sizes=(8,))
    name, fields = today("quantiles:Quantiles", {"network": inside, "num_quantiles": 7})
    assert name == "Network" and eqx.tree_equal(fields, dict(vars(network)))


def test_modules_and_teams():
    module = eqx.nn.Linear(4, 2, key=KEY)
    name, fields = today("feedforward:FromModule", {"module": module})
    assert name == "FromModule" and fields == vars(FromModule(module))
    team = make("mlp", VECTOR, 5, key=KEY, num_agents=3, share_parameters=False)
    assert isinstance(team, PerAgent)
    fields = {"members": team.members, "num_agents": 3}
    assert today("team:PerAgent", fields) == ("PerAgent", vars(team))


def test_statistics():
    network = make("mlp", VECTOR, 5, key=KEY, hidden_sizes=(8,), norm="batch_norm")
    first = network.initial_statistics()
    found = jax.tree.map(lambda x: x + jnp.ones_like(x), first)
    old = (((None, None, None, found[0][0][3], None),), None)
    assert eqx.tree_equal(like(first, old), found)
    plain = make("mlp", VECTOR, 5, key=KEY).initial_statistics()
    assert eqx.tree_equal(like(plain, None), plain)


def test_what_can_no_longer_be_is_refused():
    encoder = make("mlp", VECTOR, 5, key=KEY).encoder
    with pytest.raises(UsageError, match=r"a head of type 'Activation'.*the version that saved it"):
        today("feedforward:FeedForward", {"encoder": encoder, "head": encoder.layers[0].layers[-1]})
    fields = {"network": FromModule(eqx.nn.Linear(4, 10, key=KEY)), "num_quantiles": 5}
    with pytest.raises(UsageError, match="quantiles of a network other than the shipped"):
        today("quantiles:Quantiles", fields)
