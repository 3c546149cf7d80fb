"""Runs an exported agent. Needs only JAX and NumPy: `eqx_q.export` copies this file along.

policy = Policy("agent.jaxexport")
decision = policy.act(obs)
"""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export

FILE, READER = "agent.jaxexport", "flatbuffers.zip"


class Decision(NamedTuple):
    """The action, the greedy value max_a Q (over legal actions) and the agent's memory.

    `memory` is a list of arrays with a leading lane axis, empty if the agent has none.
    """

    action: jax.Array
    value: jax.Array
    memory: list[jax.Array]


class Policy:
    """An agent that acts but no longer learns.

    **Arguments:** `path`: a file that `eqx_q.export` wrote.

    **Attributes:** `inputs`: shape and type of each input of `act`, by name; `n` stands for any
    number of lanes. `platforms`: the platforms it was exported for.

    **Raises:** `ImportError` if neither the package `flatbuffers` nor the copy of it is found.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        reader = str(path.with_name(READER))
        if reader not in sys.path:
            sys.path.append(reader)  # last: an installed one takes precedence
        exported = export.deserialize(bytearray(path.read_bytes()))
        (self.inputs,), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        self.platforms = exported.platforms
        self._call = jax.jit(exported.call)

    def act(
        self,
        obs: Any,
        memory: list[jax.Array] | None = None,
        *,
        first: Any = None,
        action_mask: Any = None,
        reward: Any = None,
        epsilon: Any = 0.0,
        key: jax.Array | None = None,
    ) -> Decision:
        """Chooses an action for one observation, or for one per lane.

        **Arguments:**

        - `obs`: with or without a lane axis: an array, or dicts and tuples of arrays, as in
            `inputs`. Extra dict entries are ignored. The lanes of a population are ordered member
            by member.
        - `memory`: from the previous decision; by default that of an episode's start.
        - `first`: lanes in which an episode starts, which resets their memory; by default none.
            Without `memory`, an episode starts in every lane.
        - `action_mask`: legal actions; by default all.
        - `reward`: the reward that came with `obs`, for networks that use it.
        - `epsilon`: probability of a random legal action, if there is a `key`; by default 0, since
            an exported agent has no schedule. For a population: one for all, or one per member.
        - `key`: source of randomness. Without it actions are greedy.

        **Raises:** `ValueError` if shapes do not match `inputs`.
        """
        kinds, structure = jax.tree.flatten(self.inputs["obs"])
        arrays = structure.flatten_up_to(_select(self.inputs["obs"], obs))
        arrays = [jnp.asarray(x, kind.dtype) for x, kind in zip(arrays, kinds, strict=True)]
        alone = arrays[0].ndim == len(kinds[0].shape) - 1
        obs = jax.tree.unflatten(structure, [x[None] for x in arrays] if alone else arrays)
        lanes = 1 if alone else len(arrays[0])

        def constant(value: Any, kind: Any) -> jax.Array:
            return jnp.full((lanes, *kind.shape[1:]), value, kind.dtype)

        def of_lanes(name: str, value: Any, default: Any) -> jax.Array:
            kind = self.inputs[name]
            if value is None:
                return constant(default, kind)
            value = jnp.asarray(value, kind.dtype)
            return value[None] if alone else value

        if key is None:
            epsilon, key = 0.0, jax.random.key(0)
        kinds = self.inputs
        told = self._call(
            {
                "obs": obs,
                # A reset in every lane replaces any memory by that of an episode's start.
                "memory": [constant(0, kind) for kind in kinds["memory"]]
                if memory is None
                else memory,
                "first": constant(True, kinds["first"])
                if memory is None
                else of_lanes("first", first, False),
                "action_mask": of_lanes("action_mask", action_mask, True),
                "reward": of_lanes("reward", reward, 0.0),
                "epsilon": jnp.broadcast_to(jnp.float32(epsilon), kinds["epsilon"].shape),
                "key": jax.random.key_data(key),
            }
        )
        if alone:
            return Decision(told["action"][0], told["value"][0], told["memory"])
        return Decision(**told)


def _select(kinds: Any, obs: Any) -> Any:
    """The part of an observation that the agent takes, as `kinds` describes it."""
    if isinstance(kinds, dict) and isinstance(obs, dict):
        return {name: _select(kinds[name], x) for name, x in obs.items() if name in kinds}
    if isinstance(kinds, tuple) and isinstance(obs, tuple | list) and len(kinds) == len(obs):
        return tuple(_select(kind, x) for kind, x in zip(kinds, obs, strict=True))
    return obs
