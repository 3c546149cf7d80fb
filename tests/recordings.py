"""Data sets for tests: random episodes, written to disk."""

import gymnasium
import numpy as np

from eqx_q.data import Description, Rows, Writer

FRAME = (3, 2)
VECTOR = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
STACK = gymnasium.spaces.Box(0, 255, (4, *FRAME), np.uint8)
ACTIONS = gymnasium.spaces.Discrete(4)


def describe(space=VECTOR, stack=None, **options):
    return Description("test/Env-v0", space, ACTIONS, stack, **options)


def random_episode(rng, length, terminated, shape=(3,), dtype=np.float32):
    """Rows whose rewards go beyond [-1, 1]; no two observations are alike."""
    obs = rng.normal(size=(length + 1, *shape)) * 100
    obs = obs.astype(dtype) if dtype != np.uint8 else rng.integers(0, 256, obs.shape, dtype)
    return Rows.of_episode(
        obs,
        rng.integers(0, int(ACTIONS.n), length),
        rng.normal(scale=2, size=length),
        terminated=terminated,
    )


def random_episodes(seed, num=8, longest=8, stack=None, dtype=None):
    """Episodes of every length up to `longest` and more, each second one truncated."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.permutation(longest)[:num] + 1, *rng.integers(1, longest + 1, num)][:num]
    shape, kind = ((3,), np.float32) if stack is None else (FRAME, np.uint8)
    return [
        random_episode(rng, int(length), bool(i % 2), shape, dtype or kind)
        for i, length in enumerate(lengths)
    ]


def write(path, shards, description=None, **options):
    """A data set of these shards: lists of episodes, or `(episodes, run)`."""
    with Writer(path, description or describe(), **options) as writer:
        for i, shard in enumerate(shards):
            episodes, run = shard if isinstance(shard, tuple) else (shard, None)
            for rows in episodes:
                writer.append(rows)
            writer.commit(f"shard{i}", run)
        return writer.finish()


def observation(episode, t, stack, stack_start):
    """What the agent saw at time `t`, by a loop over frames."""
    if stack is None:
        return episode.obs[t]
    frames = []
    for back in reversed(range(stack)):
        if t - back >= 0:
            frames.append(episode.obs[t - back])
        else:
            frames.append(episode.obs[0] if stack_start == "repeat" else np.zeros(FRAME, np.uint8))
    return np.stack(frames)
