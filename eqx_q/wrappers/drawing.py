"""Helpers for drawing."""

import colorsys
import os

import jax
import numpy as np
from jaxtyping import Float, UInt8

from .. import spaces
from ..spaces import Space
from ..types import Observation

_SIDE = 240  # pixels, approximately
_SMALLEST = 16  # smaller pictures would be useless


def draw_grid(grid: Float[np.ndarray, "height width *channels"]) -> UInt8[np.ndarray, "H W 3"]:
    """Draws a grid of cells, each in the colour of its last nonzero channel.

    A single channel is drawn in shades of grey.
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


def picture_in(space: Space, obs: Observation) -> UInt8[np.ndarray, "H W 3"] | None:
    """The first image in an observation of lanes, in the first lane; `None` if there is none."""
    for (_, leaf), x in zip(spaces.leaves(space), jax.tree.leaves(obs), strict=True):
        shape = leaf.shape or ()
        is_picture = leaf.dtype == np.uint8 and len(shape) == 3 and shape[2] in (1, 3)
        if is_picture and min(shape[:2]) >= _SMALLEST:
            picture = np.asarray(x).reshape(-1, *shape)[0]
            return np.broadcast_to(picture, (*shape[:2], 3))
    return None


def draw_discs(
    centres: Float[np.ndarray, "K 2"],
    radii: Float[np.ndarray, " K"],
    colours: UInt8[np.ndarray, "K 3"],
    low: Float[np.ndarray, "2"],
    high: Float[np.ndarray, "2"],
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws discs on black, the last on top, in the rectangle from `low` to `high` (y upwards)."""
    width, height = high - low
    scale = _SIDE / max(width, height)
    x = low[0] + (np.arange(round(width * scale)) + 0.5) / scale
    y = high[1] - (np.arange(round(height * scale)) + 0.5) / scale
    picture = np.zeros((len(y), len(x), 3), np.uint8)
    for centre, radius, colour in zip(centres, radii, colours, strict=True):
        inside = (x - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2 <= radius**2
        picture[inside] = colour
    return picture


def quiet_pygame() -> None:
    """Stops pygame from using sound, and a screen if there is none, and from complaining."""
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
