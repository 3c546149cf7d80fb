"""Makes an agent's parts from their names, for every agent's `create`."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .. import spaces
from ..errors import UsageError, check_whole, explained
from ..nets import AbstractQNetwork, Inputs, NetworkOutput, as_network, make_network
from ..nets.parameters import split_parameters
from ..nets.precision import check_precision
from ..types import Observation
from .actions import Actions, as_bins
from .exploration import AbstractExploration, make_exploration
from .mixers import AbstractMixer, make_mixer
from .model import size_of_observations
from .optimizers import AnyOptimizer, make_optimizer
from .values import AbstractValue, make_value

Choice = str | Mapping[str, Any]  # of a part: its name, or {"name": ..., **options}


def make_parts(
    observation_space: gymnasium.Space,
    action_space: gymnasium.Space,
    *,
    key: PRNGKeyArray,
    num_agents: int | None,
    state_size: int | None,
    network: str | eqx.Module,
    network_options: Mapping[str, Any] | None,
    value: Choice | AbstractValue,
    bins: int | Sequence[int],
    mixer: Choice | AbstractMixer,
    exploration: Choice | AbstractExploration,
    optimizer: AnyOptimizer,
    precision: str,
) -> dict[str, Any]:
    """Makes an agent's parts and their initial state, as fields of the agent.

    **Arguments:**

    - `observation_space`, `action_space`: Gymnasium spaces of one lane; in a team, of one agent.
    - `key`: for the parameters.
    - `num_agents`: `M` of a team, else `None`.
    - `state_size`: size of the global state, for mixers that use it. `None`: they use all
        observations concatenated.
    - `network`: the name of a shipped network (`eqx_q.nets.make_network`), or an Equinox module: an
        `AbstractQNetwork`, or any that maps one observation to values `[A]` (`[A, K]` if the value
        has `K` numbers per choice).
    - `network_options`: options of the named network.
    - `value`, `mixer`, `exploration`, `optimizer`: each a name, a mapping with `name` and options,
        or an object.
    - `bins`: see `Actions`.
    - `precision`: of the products in the network, `"float32"` or `"bfloat16"`; see
        `eqx_q.nets.precision`.

    **Raises:** `UsageError` for spaces, names, options or sizes that do not work together.
    """
    check_whole(num_agents=1 if num_agents is None else num_agents)
    check_precision(precision)
    observation_space = spaces.of_observations(observation_space)
    actions = Actions(spaces.of_actions(action_space), as_bins(bins))
    value = make_value(value)
    if "num_agents" in (network_options or {}):
        raise UsageError("num_agents is not an option of the network: pass it to create instead")
    if "num_quantiles" in (network_options or {}):
        raise UsageError(
            "num_quantiles is an option of the value: give value={'name': 'quantile', "
            "'num_quantiles': ...} (agent.value=quantile agent.value.num_quantiles=...)"
        )
    if isinstance(network, str):
        network = make_network(
            network,
            observation_space,
            actions.choices,
            num_values=value.num_outputs,
            num_agents=num_agents,
            key=key,
            **(network_options or {}),
        )
    elif network_options:
        raise UsageError("network_options are for named networks: remove them, or name a network")
    network = as_network(network, value.num_outputs)
    check_network(network, observation_space, actions, value, num_agents or 1)
    if state_size is None:
        state_size = size_of_observations(observation_space, num_agents)
    mixer = make_mixer(
        mixer, num_agents=num_agents or 1, state_size=state_size, key=jax.random.fold_in(key, 1)
    )
    check_mixer(mixer, num_agents or 1, state_size)
    check_together(value, mixer)
    optimizer = make_optimizer(optimizer)
    parameters, _ = split_parameters((network, mixer))
    return {
        "network": network,
        "mixer": mixer,
        "value": value,
        "exploration": make_exploration(exploration),
        "optimizer": optimizer,
        "statistics": network.initial_statistics(),
        "optimizer_state": optimizer.init(parameters),
        "observation_space": observation_space,
        "action_space": actions.space,
        "bins": actions.bins,
        "precision": precision,
        "num_agents": num_agents,
    }


def check_burn_in(burn_in: int, has_memory: bool) -> None:
    """Raises `UsageError` for an invalid number of steps, or a network without memory."""
    check_whole(burn_in=burn_in, least=0)
    if burn_in and not has_memory:
        raise UsageError(
            f"burn_in={burn_in} warms up memory, but this network has none: set it to 0, or choose "
            "a memory (network_options.memory)"
        )


def check_together(value: AbstractValue, mixer: AbstractMixer) -> None:
    """Checks that the value and the mixer work together.

    **Raises:** `UsageError` if a joint mixer would mix quantiles.
    """
    if mixer.is_joint and value.num_samples > 1:
        raise UsageError(
            f"{type(mixer).__name__} mixes expected values, so it cannot learn quantiles: choose "
            "value=scalar, rescaled or hl_gauss, or mixer=independent"
        )


def check_mixer(mixer: AbstractMixer, num_agents: int, state_size: int) -> None:
    """Checks a mixer's shapes on one lane, without computing anything.

    **Raises:** `UsageError` if it cannot mix `num_agents` agents with a state of `state_size`.
    """
    values = jax.ShapeDtypeStruct((1, num_agents), jnp.float32)
    state = jax.ShapeDtypeStruct((1, state_size), jnp.float32) if mixer.is_joint else None
    team = f"{num_agents} agents with a global state of {state_size} numbers"
    with explained(f"{type(mixer).__name__} does not mix the values of {team}"):
        mixed = eqx.filter_eval_shape(mixer.mix, values, state)
    expected = (1, 1 if mixer.is_joint else num_agents)
    if mixed.shape != expected:
        raise UsageError(
            f"{type(mixer).__name__} mixes the values of {team} into shape {mixed.shape[1:]}: "
            f"return shape {expected[1:]}"
        )


def check_network(
    network: AbstractQNetwork,
    observation_space: spaces.Space,
    actions: Actions,
    value: AbstractValue,
    num_agents: int,
) -> None:
    """Checks a network's shapes on one observation of each agent, without computing anything.

    **Raises:** `UsageError` if it does not accept the observation, does not return values for each
    choice, or changes the shapes or types of memory or statistics.
    """
    rows = (1, num_agents)
    action = jax.ShapeDtypeStruct((*rows, actions.num_factors), jnp.int32)
    reward = jax.ShapeDtypeStruct(rows, jnp.float32)

    def compute(obs: Observation, action: Array, reward: Array):
        kept = network.initial_statistics(), network.initial_memory(num_agents)
        inputs = Inputs(obs=obs, last_action=action, last_reward=reward)
        return kept, network(inputs, *kept)

    with explained(f"the network cannot take observations of {observation_space}"):
        (statistics, memory), output = eqx.filter_eval_shape(
            compute, spaces.shapes(observation_space, *rows), action, reward
        )
    if not isinstance(output, NetworkOutput):
        raise UsageError(f"a network must return a NetworkOutput, not {type(output).__name__}")
    for name, before, after in (
        ("memory", memory, output.memory),
        ("statistics", statistics, output.statistics),
    ):
        if not eqx.tree_equal(before, after):  # compares shapes and types
            raise UsageError(
                f"the network's {name} must keep its shapes and types: before a step it is "
                f"{before}, after it {after}"
            )
    if any(x.shape[:1] != (num_agents,) for x in jax.tree.leaves(memory)):
        raise UsageError("the network's memory must have a leading axis of lanes")
    expected = (*rows, actions.num_choices, value.num_outputs)
    if output.values.shape != expected:
        raise UsageError(
            f"the network returns values of shape {output.values.shape[2:]}, but there are "
            f"{expected[2]} choices of action with {expected[3]} values each: its output must have "
            f"shape {expected[2:]}"
        )
