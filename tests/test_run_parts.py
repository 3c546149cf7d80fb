"""Parts in a configuration: short forms, options of other choices, earlier versions' keys."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import Guess, Relay

from eqx_q.errors import UsageError
from eqx_q.run import changeable, make_agent
from eqx_q.run.parts import check_of_chosen, chosen_options, full_overrides
from eqx_q.run.settings import with_values

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("override", "full"),
    [
        ("agent.value=hl_gauss", ["agent.value.name=hl_gauss"]),
        ("agent.mixer=vdn,qmix", ["agent.mixer.name=vdn,qmix"]),
        ("agent.value={name: hl_gauss}", ["agent.value={name: hl_gauss}"]),
        ("agent.value.sigma=1", ["agent.value.sigma=1"]),
        ("agent.td_loss=huber", ["agent.value.td_loss=huber"]),
        ("agent.adam_epsilon=1e-6", ["agent.optimizer.eps=1e-6"]),
        (
            "agent.network_options.num_quantiles=5",
            ["agent.value.name=quantile", "agent.value.num_quantiles=5"],
        ),
        ("agent=pqn", ["agent=pqn"]),
        ("env.value=3", ["env.value=3"]),
        ("--help", ["--help"]),
    ],
)
def test_what_an_override_is_short_for(override, full):
    assert full_overrides(override) == full


def test_a_part_keeps_the_options_that_it_has():
    value = {"name": "quantile", "td_loss": "huber", "sigma": 1.0, "num_quantiles": 3, "colour": 1}
    chosen = chosen_options({"value": value})["value"]
    assert chosen == {"name": "quantile", "num_quantiles": 3, "colour": 1}  # the last is refused


def test_an_option_of_a_part_that_is_not_chosen_is_told():
    options = {"value": "scalar", "optimizer": {"name": "sgd"}, "mixer": {"name": "vdn"}}
    message = "agent.value.sigma needs agent.value=hl_gauss, but scalar is chosen: leave it out"
    with pytest.raises(UsageError, match=message):
        check_of_chosen(options, "value.sigma")
    with pytest.raises(
        UsageError, match=r"agent.optimizer.b1 needs .*=adabelief or adam.* but sgd"
    ):
        check_of_chosen(options, "optimizer.b1", ["rmsprop"])
    check_of_chosen(options, "value.sigma", ["quantile", "hl_gauss"])
    for path in ("value.td_loss", "value.name", "value.colour", "optimizer.momentum", "discount"):
        check_of_chosen(options, path)


def test_values_are_put_in_by_path():
    options = {"value": {"name": "hl_gauss"}, "discount": 0.9}
    new = with_values(options, {"value.sigma": 2.0, "discount": 0.5})
    assert new == {"value": {"name": "hl_gauss", "sigma": 2.0}, "discount": 0.5}
    assert options == {"value": {"name": "hl_gauss"}, "discount": 0.9}


def config(**options):
    agent = {"network_options": {"hidden_sizes": [4]}, **options}
    return {"agent": agent, "env": {"suite": "x", "name": "y"}, "seed": 0, "num_seeds": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": {"name": "hl_gauss", "sigma": "abc"}}, "agent.value.sigma=abc: give a number"),
        ({"optimizer": {"name": "adam", "eps": [1]}}, r"agent.optimizer.eps=\[1\]: give a number"),
        ({"learning_rate": "abc"}, "agent.learning_rate=abc: give a number"),
        ({"reward_scale": "abc"}, "agent.reward_scale=abc: give a number"),
        ({"network_options": 3}, "agent.network_options=3: give a mapping"),
    ],
)
def test_what_is_of_the_wrong_kind_is_told(options, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        make_agent(config(_target_="eqx_q.PQN", **options), Guess(2))


def test_members_leave_out_the_values_that_their_part_lacks():
    """A search may choose the part, and an option of one of those."""
    told = config(_target_="eqx_q.PQN", value={"name": "scalar"})
    values = [{"value.sigma": 0.5, "discount": 0.8}, {"value.sigma": 0.7, "discount": 0.9}]
    members = make_agent(told, Guess(2), values).members
    np.testing.assert_array_equal(members.discount, np.float32([0.8, 0.9]))


def test_agents_that_are_alike_are_of_one_kind():
    network = {"hidden_sizes": [4], "share_parameters": "kind"}
    agent = make_agent(config(_target_="eqx_q.PQN", network_options=network), Relay(2))
    assert agent.network.kinds == (0, 0)
    assert {len(x) for x in jax.tree.leaves(eqx.filter(agent.network.members, eqx.is_array))} == {1}


def test_what_an_old_run_may_change_is_told_by_todays_names():
    old = config(_target_="eqx_q.CQL", adam_epsilon=0.25, alpha=0.5)
    assert changeable(old) == {"optimizer.eps", "alpha"}
    assert changeable(config(_target_="eqx_q.CQL", alpha=0.5)) == {"alpha"}


def test_a_configuration_of_an_earlier_version_makes_the_same_agent():
    """An old run that is gone on with keeps its own."""
    old = config(_target_="eqx_q.CQL", td_loss="huber", adam_epsilon=0.25, alpha=0.5)
    agent = make_agent(old, Guess(2))
    assert agent.value.td_loss == "huber"
    np.testing.assert_array_equal(agent.optimizer.options["eps"], jnp.float32(0.25))
    old["agent"]["optimizer"] = {"eps": 0.125}  # as an override of a run that goes on
    np.testing.assert_array_equal(make_agent(old, Guess(2)).optimizer.options["eps"], 0.125)
    old = config(_target_="eqx_q.DQN", network_options={"num_quantiles": 5})
    assert make_agent(old, Guess(2)).value.num_quantiles == 5
    assert type(make_agent(config(_target_="eqx_q.PQN", mixer="vdn"), Guess(2)).mixer).__name__ == (
        "VDN"
    )
    with pytest.raises(UsageError, match="eps=small"):
        make_agent(config(_target_="eqx_q.CQL", adam_epsilon="small"), Guess(2))


def test_no_two_seeds_share_parameters():
    """Neither those of two runs, nor members of one."""

    def weights(seed, num_seeds):
        told = config(_target_="eqx_q.PQN") | {"seed": seed, "num_seeds": num_seeds}
        agent = make_agent(told, Guess(2))
        network = agent.network if num_seeds == 1 else agent.members.network
        first = jax.tree.leaves(eqx.filter(network, eqx.is_array))[0]
        return np.asarray(first).reshape(num_seeds, -1).tolist()

    every = [row for seed in (0, 1) for num in (1, 3) for row in weights(seed, num)]
    assert len({tuple(row) for row in every}) == len(every) == 8
