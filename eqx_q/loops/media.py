"""GIFs of an agent's episodes."""

import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree, UInt8

from ..agents import Agent, decide
from ..errors import MissingExtraError, UsageError
from ..saving.files import write_whole
from ..types import Memory, Scalar, TimeStep
from ..wrappers import Env
from ..wrappers.drawing import picture_in

Frame = UInt8[np.ndarray, "height width 3"]

_COLOURS = 128
_FEW_FRAMES, _SMALLEST_SIDE = 100, 32  # smaller pictures would be useless
_SHORTEST_FRAME = 20  # ms: browsers slow down shorter frames


def write_gif(
    path: str | os.PathLike,
    frames: Sequence[Frame],
    fps: int | float = 30,
    *,
    max_bytes: int = 400_000,
    max_side: int = 320,
) -> None:
    """Writes frames of one size as a looping GIF.

    It is scaled down to `max_side` pixels. If it is still larger than `max_bytes`, frames are left
    out and it is scaled down further; its duration stays.

    **Raises:** `UsageError` if there is no frame, or `path` cannot be written.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "train") from None
    if not frames:
        raise UsageError("frames is empty: record at least one frame")
    images = [Image.fromarray(np.asarray(frame)) for frame in frames]
    scale = min(1.0, max_side / max(images[0].size))
    while True:
        width, height = (max(1, round(side * scale)) for side in images[0].size)
        data = _encode(
            [image.resize((width, height), Image.Resampling.BOX) for image in images],
            len(frames) / fps,
        )
        if len(data) <= max_bytes or max(width, height) <= _SMALLEST_SIDE:
            break
        if len(images) > _FEW_FRAMES:
            images = images[::2]
        else:
            scale *= max(0.5, min(0.9, (max_bytes / len(data)) ** 0.5))
    write_whole(Path(path), [data])


def _encode(images: list, seconds: float) -> bytes:
    from PIL import Image

    # One palette for all frames, from a sample of them: less flicker and better compression.
    samples = images[:: max(1, len(images) // 8)]
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(samples), height))
    for i, image in enumerate(samples):
        strip.paste(image, (i * width, 0))
    palette = strip.quantize(_COLOURS)
    first, *rest = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    duration = max(_SHORTEST_FRAME, round(1000 * seconds / len(images)))
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return buffer.getvalue()


def record_episode(
    agent: Agent,
    env: Env,
    *,
    key: PRNGKeyArray,
    max_steps: int = 1000,
    max_frames: int = 300,
) -> tuple[list[Frame], float]:
    """Plays one greedy episode of the game in the first lane (of a population's first member).

    **Arguments:**

    - `env`: for this alone, with one lane, or one lane per member of a population.
    - `max_steps`: longer episodes are cut here.
    - `max_frames`: if there are more, every second frame is kept, or every fourth, and so on.

    **Returns:** the frames (images in the observations if the environment cannot draw, or none),
    and the return so far.
    """
    frames, stride, returns = [], 1, 0.0
    for step, (state, timestep) in enumerate(play(agent, env, key=key, max_steps=max_steps)):
        returns = float(timestep.episode.returns[0])
        if step % stride == 0 or timestep.episode.ended[0]:
            frame = draw(env, state, timestep)
            if frame is not None:
                frames.append(frame)
        if len(frames) > max_frames:
            frames, stride = frames[::2], 2 * stride
    return frames, returns


def play(
    agent: Agent,
    env: Env,
    *,
    key: PRNGKeyArray,
    max_steps: int | None = None,
    epsilon: Scalar | None = None,
) -> Iterator[tuple[PyTree, TimeStep]]:
    """Yields states and timesteps of one episode of the game in the first lane, from its reset.

    **Arguments:** see `record_episode`. `epsilon`: probability of a random action; `None`: greedy.
    """
    key, reset_key = jax.random.split(key)
    state, timestep = env.reset(reset_key)
    memory = agent.initial_memory(env.num_envs)
    for step in itertools.count():
        yield state, timestep
        if timestep.episode.ended[0] or step == max_steps:
            return
        key, step_key = jax.random.split(key)
        state, timestep, memory = _step(agent, env, state, timestep, memory, step_key, epsilon)


def draw(env: Env, state: PyTree, timestep: TimeStep) -> Frame | None:
    """A frame of the first lane: rendered, else an image in the observation, if there is one."""
    frame = env.render(state, 0)
    return picture_in(env.observation_space, timestep.obs) if frame is None else frame


@eqx.filter_jit
def _step(
    agent: Agent,
    env: Env,
    state: PyTree,
    timestep: TimeStep,
    memory: Memory,
    key: PRNGKeyArray,
    epsilon: Scalar | None,
) -> tuple[PyTree, TimeStep, Memory]:
    act_key = None if epsilon is None else jax.random.fold_in(key, 0)
    decision = decide(agent, timestep, memory, epsilon=epsilon, key=act_key)
    state, timestep = env.step(state, jnp.asarray(decision.action), key)
    return state, timestep, decision.memory
