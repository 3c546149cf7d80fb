"""Help with pictures."""

import colorsys
import os

import numpy as np
from jaxtyping import Float, UInt8

_SIDE = 240  # pixels, about


def draw_grid(grid: Float[np.ndarray, "height width *channels"]) -> UInt8[np.ndarray, "H W 3"]:
    """A grid of cells, each in the colour of the last channel that is not 0 there.

    One channel is drawn in shades of grey.
    """
    if grid.ndim == 2 or grid.shape[-1] == 1:
        grid = grid.reshape(grid.shape[:2])
        span = max(float(np.ptp(grid)), 1e-6)
        picture = np.repeat(((grid - grid.min()) / span)[..., None], 3, axis=-1)
    else:
        channels = grid.shape[-1]
        hues = [colorsys.hsv_to_rgb(i / channels, 0.7, 1.0) for i in range(channels)]
        colours = np.array([(0.0, 0.0, 0.0), *hues])
        picture = colours[((grid != 0) * np.arange(1, channels + 1)).max(-1)]
    scale = max(1, _SIDE // max(picture.shape[:2]))
    return np.kron(np.uint8(255 * picture), np.ones((scale, scale, 1), np.uint8))


def quiet_pygame() -> None:
    """Keeps pygame from looking, loudly, for a sound card, and for a screen where there is none."""
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
