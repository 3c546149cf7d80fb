"""Shows the agent of a finished run in a window, or as a GIF."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ..errors import UsageError
from ..loops.media import Frame, draw, play, write_gif
from ..wrappers.drawing import quiet_pygame
from ..wrappers.host import closing
from .card import read_summary
from .evaluation import trained_agent
from .making import emulator_seed as seed_of_emulators, episode_cap, make_env
from .publishing import one_of
from .settings import Config, env_name, given

logger = logging.getLogger(__name__)

# Shows a frame for the duration of a step, and returns whether the window is still open.
Show = Callable[[Frame], bool]

_MOST_FRAMES = 1000  # of a GIF
_SIDE = 480  # pixels of a window, roughly


def watch_run(
    config: Config,
    directory: Path,
    *,
    out: Path | None,
    otherwise: Path,
    episodes: int = 1,
    member: int | None = None,
    fps: float = 20.0,
    epsilon: float = 0.0,
    seed: int = 0,
    protocol: Mapping[str, Any] | None = None,
) -> list[float]:
    """Plays episodes in a window, if there is a screen, and logs their returns.

    **Arguments:**

    - `out`: a GIF to write. `otherwise`: the GIF to write without a screen if `out` is `None`.
    - `member`: the one to watch of several seeds; by default the best in the last evaluation.
    - `fps`: steps per second.
    - `epsilon`: probability of a random action; 0 is greedy.
    - `protocol`: environment options that differ from training; by default those of the run's own
        evaluations.

    **Returns:** the returns of the episodes; closing the window ends the last one early.
    **Raises:** `UsageError` if the environment cannot be rendered, or the run is not finished.
    """
    agent, _ = one_of(trained_agent(directory), read_summary(directory), member)
    frames, stride, steps, returns = [], 1, 0, []
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(closing(make_env(config, 1)))
        options = given(config["protocol"] if protocol is None else protocol)
        seeds = seed_of_emulators(seed, "afterwards")
        env = stack.enter_context(closing(one.replicate(1, seed=seeds, **options)))
        show = stack.enter_context(_window(env_name(config), fps))
        if show is None and out is None:
            out = otherwise
        is_open = True
        for episode in range(episodes):
            key = jax.random.fold_in(jax.random.key(seed), episode)
            how = {"max_steps": episode_cap(env), "epsilon": epsilon or None}
            for state, timestep in play(agent, env, key=key, **how):
                frame = draw(env, state, timestep)
                if frame is None:
                    raise UsageError(
                        f"{env_name(config)} cannot be rendered: see the agent's returns with "
                        "scripts/evaluate.py"
                    )
                if out is not None and steps % stride == 0:
                    frames.append(frame)
                if len(frames) > _MOST_FRAMES:
                    frames, stride = frames[::2], 2 * stride
                steps += 1
                is_open = show is None or show(frame)
                if not is_open:
                    break
            returns.append(float(timestep.episode.returns[0]))
            logger.info("episode %d: return %.4g", episode + 1, returns[-1])
            if not is_open:
                break
    if out is not None:
        write_gif(out, frames, fps / stride, max_bytes=2_000_000)
        logger.info("wrote %s", out)
    return returns


@contextlib.contextmanager
def _window(title: str, fps: float) -> Iterator[Show | None]:
    """A window of pygame, which most environments render with, else of Matplotlib.

    Yields `None` if there is no screen.
    """
    show, close = _of_pygame(title, fps) or _of_matplotlib(title, fps) or (None, lambda: None)
    try:
        yield show
    finally:
        close()


def _of_pygame(title: str, fps: float) -> tuple[Show, Callable[[], Any]] | None:
    quiet_pygame()
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import pygame

        pygame.display.init()
    except ImportError:
        return None
    except pygame.error:  # DISPLAY names a missing screen
        return None
    if pygame.display.get_driver() in ("dummy", "offscreen"):
        pygame.display.quit()
        return None
    clock = pygame.time.Clock()

    def show(frame: Frame) -> bool:
        height, width = frame.shape[:2]
        scale = max(1, round(_SIDE / max(height, width)))
        size = width * scale, height * scale
        screen = pygame.display.get_surface()
        if screen is None or screen.get_size() != size:
            screen = pygame.display.set_mode(size)
            pygame.display.set_caption(title)
        picture = pygame.surfarray.make_surface(frame.swapaxes(0, 1))
        screen.blit(pygame.transform.scale(picture, size), (0, 0))
        pygame.display.flip()
        clock.tick(fps)
        return not any(
            event.type == pygame.QUIT
            or (event.type == pygame.KEYDOWN and event.key == pygame.K_ESCAPE)
            for event in pygame.event.get()
        )

    return show, pygame.display.quit


def _of_matplotlib(title: str, fps: float) -> tuple[Show, Callable[[], Any]] | None:
    try:
        import matplotlib.pyplot as plt
        from matplotlib.backends.registry import BackendFilter, backend_registry
    except ImportError:
        return None
    if plt.get_backend().lower() not in backend_registry.list_builtin(BackendFilter.INTERACTIVE):
        return None
    figure, axes = plt.subplots(num=title, layout="constrained")
    axes.set_axis_off()

    def show(frame: Frame) -> bool:
        if axes.images:
            axes.images[0].set_data(frame)
        else:
            axes.imshow(frame)
        plt.pause(1 / fps)
        return plt.fignum_exists(figure.number)

    return show, lambda: plt.close(figure)
