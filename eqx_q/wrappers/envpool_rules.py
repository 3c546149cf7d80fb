"""Rules of EnvPool's Atari, and of all its other environments."""

import abc
from typing import Any

from jaxtyping import Array, Bool, Float, Shaped

from .env import Recording

# Options that affect observations and actions.
_PREPROCESSING = ("frame_skip", "gray_scale", "img_height", "img_width", "use_inter_area_resize")
_PREPROCESSING += ("full_action_space", "repeat_action_probability", "mode", "difficulty")


class Rules(abc.ABC):
    """Interprets a pool's options and results."""

    @abc.abstractmethod
    def check(self, options: dict[str, Any]) -> None:
        """Raises `ValueError` for invalid options that EnvPool itself accepts."""

    @abc.abstractmethod
    def recording(self, config: dict[str, Any]) -> Recording:
        """How to record it, as configured."""

    @abc.abstractmethod
    def game(
        self,
        reward: Float[Array, " N"],
        terminated: Bool[Array, " N"],
        info: dict[str, Shaped[Array, "N ..."]],
    ) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
        """The game's own reward, and whether the game is over."""


class PlainRules(Rules):
    """The game's rewards and episodes are those of the learner."""

    def check(self, options: dict[str, Any]) -> None:
        for option in ("frame_skip", "frame_stack", "max_episode_steps"):
            _at_least_one(options, option)

    def recording(self, config: dict[str, Any]) -> Recording:
        return Recording()

    def game(self, reward, terminated, info):
        return reward, terminated


class AtariRules(Rules):
    """Rewards may be clipped, and a lost life may end the learner's episode, but not the game.

    EnvPool's next step then continues the game: it plays up to `noop_max` no-ops and, if the game
    begins with it, FIRE. It reports a reward of 0 for them, so returns lack what these steps score,
    which cannot be known. (In Space Invaders, whose score can be read from its memory, they scored
    nothing in 343 lives.)
    """

    def check(self, options: dict[str, Any]) -> None:
        at_least_one = ("frame_skip", "stack_num", "img_height", "img_width", "max_episode_steps")
        for option in (*at_least_one, "noop_max"):  # 1 counts the frame that it always plays
            _at_least_one(options, option)
        if not 0 <= options.get("repeat_action_probability", 0) <= 1:
            raise ValueError("repeat_action_probability must be between 0 and 1")

    def recording(self, config: dict[str, Any]) -> Recording:
        """Whole games with unclipped rewards. Colour frames are merged into channels: no stack."""
        return Recording(
            options={"episodic_life": False, "reward_clip": False},
            stack=config["stack_num"] if config["gray_scale"] else None,
            stack_start="repeat",
            preprocessing={name: config[name] for name in _PREPROCESSING},
        )

    def game(self, reward, terminated, info):
        return info["reward"], info["terminated"].astype(bool)


def _at_least_one(options: dict[str, Any], option: str) -> None:
    if options.get(option, 1) < 1:
        raise ValueError(f"{option}={options[option]}: give 1 or more")
