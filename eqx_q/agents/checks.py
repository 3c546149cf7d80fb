"""What agents check when they are created."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer

from ..errors import UsageError
from ..nets import AbstractQNetwork, NetworkOutput
from ..spaces import Box, Discrete
from ..types import Scalar

# Where a hyperparameter makes sense.
RANGES = {
    "learning_rate": (0.0, jnp.inf),
    "learning_rate_end": (0.0, jnp.inf),
    "max_grad_norm": (0.0, jnp.inf),
    "discount": (0.0, 1.0),
    "lambda_": (0.0, 1.0),
    "epsilon_start": (0.0, 1.0),
    "epsilon_end": (0.0, 1.0),
    "epsilon_decay": (0.0, jnp.inf),
    "schedule_steps": (1.0, jnp.inf),
    "adam_epsilon": (0.0, jnp.inf),
    "alpha": (0.0, jnp.inf),
    "td_weight": (0.0, jnp.inf),
    "epsilon": (0.0, 1.0),
}


def check_sizes(sizes: dict[str, int]) -> None:
    """Refuses what is not a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {size!r}")


def check_ranges(traced: dict[str, Scalar]) -> None:
    """Checks what is known before tracing: under `vmap` values are not."""
    for name in (name for name in RANGES if name in traced):
        value, (low, high) = traced[name], RANGES[name]
        if not isinstance(value, Tracer) and not low <= float(value) <= high:
            raise UsageError(f"{name}={value} makes no sense: choose it from {low:g} to {high:g}")


def check_network(
    network: AbstractQNetwork, observation_space: Box, action_space: Discrete, num_agents: int
) -> None:
    """Tries a network on one observation of each agent, without computing anything.

    **Raises:** `UsageError` where it does not take it, does not give a Q-value per action, or does
    not give back memory and statistics of the shapes and types that it started with.
    """
    obs = jax.ShapeDtypeStruct((1, num_agents, *observation_space.shape), observation_space.dtype)
    action = jax.ShapeDtypeStruct((1, num_agents), jnp.int32)
    reward = jax.ShapeDtypeStruct((1, num_agents), jnp.float32)

    def compute(obs, action, reward):
        kept = network.initial_statistics(), network.initial_memory(num_agents)
        return kept, network(obs, *kept, last_action=action, last_reward=reward)

    try:
        (statistics, memory), output = eqx.filter_eval_shape(compute, obs, action, reward)
    except (TypeError, ValueError, LookupError) as error:
        raise UsageError(
            f"the network cannot take observations of shape {observation_space.shape}: {error}"
        ) from error
    if not isinstance(output, NetworkOutput):
        raise UsageError(f"a network gives a NetworkOutput, not {type(output).__name__}")
    for name, before, after in (
        ("memory", memory, output.memory),
        ("statistics", statistics, output.statistics),
    ):
        if not eqx.tree_equal(before, after):  # of shapes and types
            raise UsageError(
                f"the network's {name} must keep its shapes and types: before a step it is "
                f"{before}, after it {after}"
            )
    if any(x.shape[:1] != (num_agents,) for x in jax.tree.leaves(memory)):
        raise UsageError("the network's memory must have a leading axis of lanes")
    expected = (1, num_agents, int(action_space.n))
    if output.q_values.shape != expected:
        raise UsageError(
            f"the network gives Q-values of shape {output.q_values.shape[2:]}, but the environment "
            f"has {expected[-1]} actions: its output size must be {expected[-1]}"
        )
