"""Measures the split of an update's time, and the time of its matrix products alone.

The argument is JSON: `config` (as `scripts/train.py` composes it), `seed` and, if wanted, the
`steps` to measure the environment with. All times are seconds per update; matrix products are timed
alone in float32, in a compiled scan as in training.
"""

import json
import math
import statistics
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp

import eqx_q
from eqx_q import spaces
from eqx_q.agents import decide
from eqx_q.nets import Inputs
from eqx_q.run import make_agent, make_env

Product = tuple[int, int, int]  # rows x inner x columns


def forward_products(agent, lanes: int, steps: int = 1) -> list[tuple[Product, int]]:
    """The network's matrix products in order, each with its number of repetitions.

    A convolution is a product of patches; a recurrence has a product per step.
    """
    rows = lanes * (agent.num_agents or 1)

    def values(obs, action, reward):
        inputs = Inputs(obs, last_action=action, last_reward=reward)
        memory = agent.network.initial_memory(rows)
        return agent.network(inputs, agent.statistics, memory).values

    obs = spaces.shapes(agent.observation_space, steps, rows)
    action = jax.ShapeDtypeStruct((steps, rows, agent.actions.num_factors), jnp.int32)
    reward = jax.ShapeDtypeStruct((steps, rows), jnp.float32)
    products = _products(jax.make_jaxpr(values)(obs, action, reward).jaxpr, 1)
    # A product with a single column is a plain sum, as in layer normalisation, unless it has a
    # weight.
    heads = {x.shape[0] for x in jax.tree.leaves(agent.network) if x.shape[1:] == (1,)}
    return [
        ((rows, inner, columns), times)
        for (rows, inner, columns), times in products
        if columns > 1 or inner in heads
    ]


def _products(jaxpr, times):
    for equation in jaxpr.eqns:
        repeated = times * equation.params.get("length", 1)  # a scan's iterations
        for value in equation.params.values():
            if equation.primitive.name == "cond" and isinstance(value, tuple):
                value = value[0]  # the CPU's branch of `platform_dependent`
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner, repeated)
        dimensions = equation.params.get("dimension_numbers")
        if equation.primitive.name == "dot_general":
            left, right = (variable.aval for variable in equation.invars)
            inner = math.prod(left.shape[axis] for axis in dimensions[0][0])
            yield (left.size // inner, inner, right.size // inner), times
        elif equation.primitive.name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            columns = kernel.shape[dimensions.rhs_spec[0]]
            yield (out.size // columns, kernel.size // columns, columns), times


def learning_products(forward: list[tuple[Product, int]]) -> list[tuple[Product, int]]:
    """Forward and backward products: gradients of all weights, and of inputs except observations.

    The gradient of a weight that is used at every step is one product over all steps.
    """
    weights = [((inner, rows * times, columns), 1) for (rows, inner, columns), times in forward]
    inputs = [((rows, columns, inner), times) for (rows, inner, columns), times in forward[1:]]
    return forward + weights + inputs


def flops(products: list[tuple[Product, int]]) -> int:
    return sum(2 * math.prod(product) * times for product, times in products)


def median_seconds(function, *args, repetitions: int = 5) -> float:
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def seconds_of(products: list[tuple[Product, int]], times: int) -> float:
    """Seconds that `times` rounds of these products take, one after the other.

    A repeated product, as in a recurrence, has the same weight every time.
    """
    operands = [
        (jnp.full((rows, inner), 1e-3), jnp.full((inner, columns), 1e-3))
        for (rows, inner, columns), _ in products
    ]

    def corner(left, right):  # while the whole product must be computed
        return jax.lax.optimization_barrier(left @ right)[0, 0]

    def round_(operands, _):
        # Each product depends on the one before, so that none can be optimized away.
        after = []
        for (left, right), (_, repeated) in zip(operands, products, strict=True):
            left = jax.lax.fori_loop(
                0, repeated, lambda _, x, right=right: x.at[0, 0].set(corner(x, right)), left
            )
            after.append((left, right.at[0, 0].set(left[0, 0])))
        return after, None

    rounds = jax.jit(lambda operands: jax.lax.scan(round_, operands, None, length=times)[0])
    return median_seconds(rounds, operands)


def measure(config, env_steps: int = 20_000) -> dict[str, float]:
    env = make_env(config, config["num_envs"])
    agent = make_agent(config, env)
    lanes, length = env.num_envs, agent.rollout_length
    num_minibatches = config["agent"]["num_minibatches"]
    gradient_steps = config["agent"]["num_epochs"] * num_minibatches
    acting = forward_products(agent, lanes)
    if agent.initial_memory(lanes) is not None:
        forward = forward_products(
            agent, lanes // num_minibatches, agent.burn_in + agent.rollout_length + 1
        )
    else:
        forward = forward_products(agent, lanes * length // num_minibatches)
    learning = learning_products(forward)
    num_updates = max(1, env_steps // (lanes * length))

    def steps(act):
        @eqx.filter_jit
        def run(agent, state, timestep, key):
            def step(carry, key):
                state, timestep, memory = carry
                act_key, env_key = jax.random.split(key)
                action, memory = act(agent, timestep, memory, act_key)
                return (*env.step(state, action, env_key), memory), None

            keys = jax.random.split(key, num_updates * length)
            carry = (state, timestep, agent.initial_memory(lanes))
            # The whole carry, since in some games observations do not depend on actions.
            return jax.lax.scan(step, carry, keys)[0]

        first = eqx_q.start(agent, env, key=jax.random.key(0))
        args = (agent, first.env_state, first.timestep, jax.random.key(1))
        return median_seconds(run, *args, repetitions=3) / num_updates

    def at_random(agent, timestep, memory, key):
        agents = () if env.num_agents is None else (env.num_agents,)
        return jax.random.randint(key, (lanes, *agents), 0, agent.action_space.n), memory

    def by_network(agent, timestep, memory, key):
        decision = decide(agent, timestep, memory, key=key)
        return decision.action, decision.memory

    return {
        # Acting evaluates every lane at every step, and once more to bootstrap.
        "matmul_seconds": seconds_of(acting, length + 1) + seconds_of(learning, gradient_steps),
        "matmul_flops": (length + 1) * flops(acting) + gradient_steps * flops(learning),
        "environment_seconds": steps(at_random),
        "environment_and_acting_seconds": steps(by_network),
        "env_steps_per_update": lanes * length,
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    config = {**request["config"], "seed": request["seed"]}
    print(json.dumps(measure(config, request.get("steps", 20_000))))
