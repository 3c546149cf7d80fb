"""Run by `test_sharding.py` in a process with eight devices; prints its findings as JSON."""

import contextlib
import dataclasses
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook("eqx_q", "typechecker.typechecked")

import equinox as eqx  # noqa: E402
import gymnasium  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from environments import Guess  # noqa: E402
from recordings import ACTIONS, VECTOR, random_episodes, write  # noqa: E402

import eqx_q  # noqa: E402
from eqx_q.data import Sampling  # noqa: E402
from eqx_q.loops import running  # noqa: E402
from eqx_q.loops.callbacks import Checkpoint, restore  # noqa: E402
from eqx_q.processes import join_processes  # noqa: E402
from eqx_q.sharding import place_on  # noqa: E402
from eqx_q.wrappers import make_for  # noqa: E402

COLLECTIVE = r"(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"


def collectives(compiled) -> list[list[str]]:
    """The shapes that each collective of a compiled program exchanges, by the loop it stands in."""
    by_computation, here = {}, None
    for line in compiled.compiled.as_text().splitlines():
        if line and line[0] in "%E":
            here = line.split()[0]
        found = re.match(rf"\s+(?:ROOT )?%\S+ = (.*?) ({COLLECTIVE})(?:-start)?\(", line)
        if found:
            shapes = re.findall(r"[a-z]+\d*\[[\d,]*\]", found[1])
            by_computation.setdefault(here, []).append([found[2], *shapes])
    return list(by_computation.values())


@contextlib.contextmanager
def watched():
    """The collectives of the program that training runs, filled in once it is compiled."""
    advance_chunk, compiled, found = running.advance_chunk, [], []

    def advance(*arguments):
        if not compiled:
            compiled.append(advance_chunk.lower(*arguments).compile())
            found.extend(collectives(compiled[0]))
        return compiled[0](*arguments)

    running.advance_chunk = advance
    yield found
    running.advance_chunk = advance_chunk


def difference(a, b) -> float:
    """The largest between the parameters of two agents."""
    networks = [getattr(agent, "members", agent).network for agent in (a, b)]
    pairs = zip(*(jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in networks), strict=True)
    return max(float(np.max(np.abs(x - y))) for x, y in pairs)


def make_agent(env, key, **options):
    defaults = {
        "network": "mlp",
        "network_options": {"hidden_sizes": [16]},
        "rollout_length": 16,
        "num_epochs": 1,
        "num_minibatches": 4,
        "learning_rate": 1e-2,
        "epsilon_end": 0.1,
    }
    return eqx_q.PQN.create(
        env.observation_space, env.action_space, key=key, **(defaults | options)
    )


def lanes(found):
    """One agent, whose lanes are shared; then its checkpoint, resumed on one device."""
    env = eqx_q.make("gymnax/CartPole-v1", 32)
    agent = make_agent(env, jax.random.key(0), lane_groups=8)
    how = {"total_steps": 8192, "key": jax.random.key(1), "log_every": 8}
    one, history = eqx_q.train(agent, env, **how)
    with tempfile.TemporaryDirectory() as directory:
        saved = Checkpoint(Path(directory), every=4096, keep=None)
        with watched() as exchanged:
            eight, history_of_eight = eqx_q.train(agent, env, devices=8, callbacks=[saved], **how)
        max(Path(directory).iterdir()).unlink()  # that of the end
        half = restore(Path(directory), env)
        continued, _ = eqx_q.train(agent, env, run_state=half, **how)
    found["lanes"] = {
        "moved": difference(one, agent),
        "difference": difference(one, eight),
        "resumed on one": difference(one, continued),
        "half": int(half.num_updates),
        "devices of the result": len(eight.learnt.low.devices()),
        "metrics": [[h[-1]["loss"], h[-1]["transitions"]] for h in (history, history_of_eight)],
        "collectives": exchanged,
        "arrays": len(jax.tree.leaves(eqx.filter(agent.network, eqx.is_inexact_array))),
    }


def members(found):
    env = Guess(32)
    population = eqx_q.Population(
        eqx.filter_vmap(partial(make_agent, env))(jax.random.split(jax.random.key(0), 16))
    )
    how = {"total_steps": 1024, "key": jax.random.key(1)}
    one, _ = eqx_q.train(population, env, **how)
    with watched() as exchanged:
        eight, history = eqx_q.train(population, env, devices=8, **how)
    found["members"] = {
        "difference": difference(one, eight),
        "losses": history[-1]["loss"].shape,
        "collectives": exchanged,
    }


def from_data(found):
    def create(key):
        options = {"network_options": {"hidden_sizes": [8]}, "alpha": 0.1}
        return eqx_q.DQN.create(
            VECTOR, ACTIONS, key=key, network="mlp", batch_size=16, learning_rate=1e-3, **options
        )

    alone = create(jax.random.key(0))
    population = eqx_q.Population(eqx.filter_vmap(create)(jax.random.split(jax.random.key(0), 16)))
    with tempfile.TemporaryDirectory() as directory:
        dataset = write(Path(directory) / "data", [random_episodes(0, num=20)])
        for name, agent, sampling in (
            ("batches", alone, Sampling()),
            ("members from data", population, Sampling(priority_exponent=0.6)),
        ):
            how = {"num_updates": 20, "key": jax.random.key(1), "sampling": sampling}
            one, _ = eqx_q.train_offline(agent, dataset, **how)
            with watched() as exchanged:
                eight, _ = eqx_q.train_offline(agent, dataset, devices=8, **how)
            found[name] = {"difference": difference(one, eight), "collectives": exchanged}
        how = {"num_updates": 1, "key": jax.random.key(0)}
        refused(found, lambda: eqx_q.train_offline(alone, dataset, devices=9, **how))
        uneven = eqx_q.DQN.create(VECTOR, ACTIONS, key=jax.random.key(0), batch_size=12)
        refused(found, lambda: eqx_q.train_offline(uneven, dataset, devices=8, **how))


class Drift(gymnasium.Env):
    """A random walk of up to 10 steps, from a generator of its own."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = self.np_random.normal(size=2).astype(np.float32)
        self.left = int(self.np_random.integers(3, 10))
        return self.at, {}

    def step(self, action):
        self.at = self.at + self.np_random.normal(size=2).astype(np.float32) + np.float32(action)
        self.left -= 1
        return self.at, float(self.at[0]), self.left == 0, False, {}


def outside_with_memory(found):
    """A Python environment for each device; another one is stepped alone between the chunks."""

    def make(num_envs, seed):
        return eqx_q.make(Drift, num_envs, seed=seed)

    options = {"hidden_sizes": [16], "memory": "gru", "memory_size": 8}
    trained = []
    for devices in (1, 8):
        env = make_for(place_on(devices), make, 16, seed=3)
        agent = make_agent(
            env, jax.random.key(0), lane_groups=8, num_minibatches=2, network_options=options
        )
        alone = env.replicate(2, seed=5)

        def evaluate(run_state, metrics, alone=alone):
            eqx_q.evaluate(run_state.agent, alone, num_episodes=2, key=jax.random.key(0))

        evaluate.every = 512
        callbacks = [evaluate] if devices == 8 else []
        how = {"total_steps": 1024, "key": jax.random.key(1), "log_every": 2}
        with watched() as exchanged:
            agent, history = eqx_q.train(agent, env, devices=devices, callbacks=callbacks, **how)
        trained.append((agent, history[-1]["episode_return"]))
        env.close()
        alone.close()
    (one, one_return), (eight, eight_return) = trained
    found["memory"] = {
        "difference": difference(one, eight),
        "returns": [one_return, eight_return],
        "collectives": exchanged,
    }
    env = make(16, 0)
    refused(found, lambda: eqx_q.train(one, env, total_steps=1, key=jax.random.key(0), devices=8))
    env.close()
    env = make_for(place_on(8), make, 16)
    refused(found, lambda: eqx_q.train(one, env, total_steps=1, key=jax.random.key(0)))
    env.close()


def refused(found, act):
    try:
        act()
        message = "accepted"
    except eqx_q.errors.UsageError as error:
        message = str(error)
    found.setdefault("refused", []).append(message)


def bad_input(found):
    env = Guess(48)
    one = make_agent(env, jax.random.key(0))
    six = eqx_q.Population(eqx.filter_vmap(lambda _: one)(np.arange(6)))
    agents = [(dataclasses.replace(one, lane_groups=n), d) for n, d in ((8, 9), (12, 8), (8, 0))]
    agents += [(dataclasses.replace(one, lane_groups=32), 8), (six, 8)]
    for agent, devices in agents:
        refused(
            found,
            lambda agent=agent, devices=devices: eqx_q.train(
                agent, env, total_steps=1, key=jax.random.key(0), devices=devices
            ),
        )
    refused(found, lambda: make_for(place_on(8), lambda n, seed: env.replicate(n), 12))


if __name__ == "__main__":
    found = {}
    refused(found, lambda: join_processes("here"))
    refused(found, lambda: join_processes("no port", 2, 0))
    for part in (lanes, members, from_data, outside_with_memory, bad_input):
        part(found)
        jax.clear_caches()
    json.dump(found, sys.stdout, default=np.ndarray.tolist)
