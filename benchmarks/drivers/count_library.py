"""Counts what a training program of ours launches on a GPU.

The argument is JSON: `config` (as `scripts/train.py` composes it) and `program`: `"train"` (acting
and learning), `"rollout"` (learning from a recorded rollout) or `"batch"` (from transitions).
"""

import h200  # isort: split

import json
import sys
from typing import Any

import equinox as eqx
import hlo
import jax
import jax.numpy as jnp
import numpy as np

import eqx_q
from eqx_q import spaces
from eqx_q.loops.training import start
from eqx_q.run import make_agent, make_env
from eqx_q.types import TimeStep, Transitions

Shape = jax.ShapeDtypeStruct


def shapes(tree: Any) -> Any:
    """A tree with shapes in place of arrays."""
    return jax.tree.map(lambda x: Shape(x.shape, x.dtype) if eqx.is_array(x) else x, tree)


def compiled(fn: Any, agent: Any, *arguments: Any) -> Any:
    """`fn(agent, *arguments)` compiled for a GPU; parts that are no arrays are constants."""
    arrays, rest = eqx.partition(agent, lambda x: isinstance(x, Shape))

    def of_arrays(arrays: Any, *arguments: Any) -> Any:
        return eqx.filter(fn(eqx.combine(arrays, rest), *arguments), eqx.is_array)

    return h200.compile_for_gpu(of_arrays, arrays, *arguments)


def recorded(agent: Any, num_lanes: int) -> Any:
    """The shapes of a rollout of a single agent without memory."""
    obs = spaces.shapes(agent.observation_space, num_lanes)
    timestep = TimeStep.initial(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), obs))
    length = agent.learns_from.length
    timesteps = jax.tree.map(lambda x: Shape((length + 1, *x.shape), x.dtype), timestep)
    actions: Any = Shape((length, num_lanes), jnp.int32)
    values: Any = Shape((length, num_lanes), jnp.float32)
    return eqx_q.Rollout(timesteps, actions, None, values)


def batch(agent: Any) -> Transitions:
    """The shapes of a batch of transitions."""
    size, n_step = agent.learns_from.size, agent.learns_from.n_step
    obs: Any = spaces.shapes(agent.observation_space, size)
    whole: Any = Shape((size,), jnp.int32)
    rewards: Any = Shape((size, n_step), jnp.float32)
    ended: Any = Shape((size,), jnp.bool_)
    return Transitions(obs, whole, rewards, whole, ended, obs)


request = json.loads(sys.argv[1])
config, program = request["config"], request["program"]
lanes = config["num_envs"] * config["num_seeds"]
env = make_env(config, lanes if program == "train" else 1)
agent = make_agent(config, env)
key = jax.random.key(0)

if program == "train":
    state = shapes(eqx.filter_eval_shape(lambda key: start(agent, env, key=key), key))
    done = compiled(lambda state, n: eqx_q.advance(state, env, n), state, Shape((), jnp.int32))
    loops = hlo.read(done.as_text()).loops  # the one over updates, of a length not known
    update = max(loops, key=lambda loop: loop.total)
else:
    experience = recorded(agent, lanes) if program == "rollout" else batch(agent)
    done = compiled(
        lambda agent, experience, key: agent.update(experience, key=key),
        shapes(agent),
        experience,
        Shape(key.shape, key.dtype),
    )
    update = hlo.read(done.as_text())

options = config["agent"]
length, epochs = options.get("rollout_length", 0), options.get("num_epochs", 1)
counted = hlo.counts(update, length, epochs * options.get("num_minibatches", 1))
memory = done.memory_analysis().temp_size_in_bytes
print(json.dumps({**counted, "temporary_mb": memory / 2**20}))
