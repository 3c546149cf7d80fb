"""GIFs are small and true to the frames; episodes are recorded whole."""

import builtins
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eqx_q import spaces, wrappers
from eqx_q.agents.agent import Agent, Rollouts
from eqx_q.errors import MissingExtraError, UsageError
from eqx_q.loops.media import record_episode, write_gif
from eqx_q.types import Decision, Episode, TimeStep
from eqx_q.wrappers import Env
from eqx_q.wrappers.host import closing


class Corridor(Env):
    """A lane counts its steps; the reward is the action. A life is lost at 3, the game at 7."""

    observation_space: Any = eqx.field(static=True)
    action_space: Any = eqx.field(static=True)
    num_envs: int
    num_agents: None = None
    on_host: bool = False
    max_episode_steps: int = 7
    drawable: bool = True

    def _timestep(self, position, returns, reward, first):
        ended = position == 7
        return TimeStep(
            obs=position[:, None].astype(jnp.float32),
            reward=reward,
            terminated=ended | (position == 3),
            truncated=jnp.zeros_like(ended),
            first=first,
            episode=Episode(ended, returns, position),
        )

    def reset(self, key):
        position, returns = jnp.zeros(self.num_envs, int), jnp.zeros(self.num_envs)
        timestep = self._timestep(position, returns, returns, position == 0)
        return (position, returns), timestep

    def step(self, state, action, key):
        position, returns = state[0] + 1, state[1] + action
        return (position, returns), self._timestep(
            position, returns, action.astype(jnp.float32), jnp.zeros(self.num_envs, bool)
        )

    def replicate(self, num_envs, *, seed=0, **options):
        return self

    def render(self, state, lane=0):
        if not self.drawable:
            return None
        frame = np.zeros((20, 30, 3), np.uint8)
        frame[:, int(state[0][lane])] = 255
        return frame

    def close(self):
        pass


class Counter(Agent):
    """Plays 1, 2, ... and 0 after the last, as its memory counts; it is never asked to explore."""

    observation_space: Any = eqx.field(static=True)
    action_space: Any = eqx.field(static=True)
    learnt: jax.Array
    learns_from: Rollouts = Rollouts(1)
    num_agents: int | None = None
    num_choices: int = eqx.field(static=True, default=2)
    num_members: None = None

    def initial_memory(self, num_envs):
        return jnp.zeros(num_envs, int)

    def act(self, obs, memory=None, *, first=None, action_mask=None, reward=None, epsilon=None,
            key=None):  # fmt: skip
        assert key is None
        memory = jnp.where(first, 0, memory) + 1
        action = memory % self.action_space.n
        if self.num_agents is not None:
            action = jnp.repeat(action[:, None], self.num_agents, 1)
        return Decision(action, jnp.zeros(action.shape), memory)

    def update(self, rollout, *, key):
        return self, {}

    def with_schedule(self, steps):
        return self

    def hyperparameters(self):
        return {}

    def with_hyperparameters(self, values):
        raise AssertionError("it has none")

    def measure(self, fn, rollout):
        return fn(rollout)


@pytest.fixture
def agent_and_env():
    box = spaces.Box(gymnasium.spaces.Box(0, 9, (1,), np.float32))
    discrete = spaces.Discrete(gymnasium.spaces.Discrete(2))
    agent = Counter(box, discrete, jnp.zeros((), jnp.uint32))
    return agent, Corridor(box, discrete, 2)


def columns(frames):
    return [int(frame[0, :, 0].argmax()) for frame in frames]


def test_records_the_game_from_first_to_last(agent_and_env):
    frames, episode_return = record_episode(*agent_and_env, key=jax.random.key(0))
    assert columns(frames) == [0, 1, 2, 3, 4, 5, 6, 7]  # on past the lost life
    assert episode_return == 4.0


def test_long_episodes_are_cut_and_thinned(agent_and_env):
    key = jax.random.key(0)
    frames, episode_return = record_episode(*agent_and_env, key=key, max_steps=2)
    assert columns(frames) == [0, 1, 2] and episode_return == 1.0
    frames, episode_return = record_episode(*agent_and_env, key=key, max_frames=3)
    assert columns(frames) == [0, 4, 7] and episode_return == 4.0


def test_what_cannot_be_drawn(agent_and_env):
    agent, env = agent_and_env
    env = eqx.tree_at(lambda e: e.drawable, env, False)
    assert record_episode(agent, env, key=jax.random.key(0)) == ([], 4.0)


class Camera(gymnasium.Env):
    """Cannot draw, but looks through a camera."""

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Dict(
        {
            "camera": gymnasium.spaces.Box(0, 255, (20, 30, 1), np.uint8),
            "a_small_one": gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8),
            "joints": gymnasium.spaces.Box(-1, 1, (20, 30, 1)),
        }
    )

    def _observe(self):
        low = {name: space.low.copy() for name, space in self.observation_space.items()}
        low["camera"][:, self.time] = 255
        return low

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return self._observe(), {}

    def step(self, action):
        self.time += 1
        return self._observe(), 0.0, self.time == 4, False, {}


def test_what_is_observed_is_drawn_where_there_is_nothing_else():
    with closing(wrappers.make(Camera, 1)) as env:
        agent = Counter(
            env.observation_space, env.action_space, jnp.zeros((), int), jnp.asarray(jnp.inf)
        )
        frames, _ = record_episode(agent, env, key=jax.random.key(0))
    assert columns(frames) == [0, 1, 2, 3, 4] and frames[0].shape == (20, 30, 3)


def read(path):
    with Image.open(path) as image:
        frames = []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
        return frames, image.info


def test_gif_shows_the_frames(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], np.uint8)
    frames = [np.broadcast_to(c, (40, 60, 3)).copy() for c in colours]
    frames[2][:20] = 255
    write_gif(tmp_path / "media" / "a.gif", frames, fps=10)
    shown, info = read(tmp_path / "media" / "a.gif")
    np.testing.assert_allclose(np.stack(shown).astype(int), np.stack(frames), atol=8)
    assert info["duration"] == 100 and info["loop"] == 0


SCENES = {  # of other games, and of Craftax, which takes long to compile, see tests/wrappers
    "gymnax/FourRooms-misc": (234, 234),
    "jaxmarl/coin_game": (240, 240),
    "envpool/Pong-v5": (210, 160),
    "gymnasium/CartPole-v1": (400, 600),
    "pettingzoo/mpe2.simple_spread_v3": (700, 700),
}


@pytest.mark.parametrize("name", SCENES)
def test_what_suites_draw_is_recorded(tmp_path, name):
    with closing(wrappers.make(name, 1)) as env:
        agent = Counter(
            env.observation_space,
            env.action_space,
            jnp.zeros((), int),
            jnp.asarray(jnp.inf),
            num_agents=env.num_agents,
        )
        frames, _ = record_episode(agent, env, key=jax.random.key(0), max_steps=12)
    assert 2 <= len(frames) <= 13
    assert {frame.shape for frame in frames} == {(*SCENES[name], 3)}
    assert all(frame.dtype == np.uint8 and frame.min() < frame.max() for frame in frames)
    assert any((frame != frames[0]).any() for frame in frames[1:])
    write_gif(tmp_path / "a.gif", frames)
    shown, _ = read(tmp_path / "a.gif")
    scale = min(1, 320 / max(SCENES[name]))
    assert shown[0].shape == (*(round(scale * side) for side in SCENES[name]), 3)
    np.testing.assert_allclose(shown[0].mean(), frames[0].mean(), atol=4)


def test_large_frames_are_scaled_down(tmp_path):
    write_gif(tmp_path / "a.gif", [np.full((400, 1000, 3), 9, np.uint8)])
    assert read(tmp_path / "a.gif")[0][0].shape == (128, 320, 3)


def test_size_is_bounded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 100, 80, 3), np.uint8)
    write_gif(tmp_path / "a.gif", list(noise), fps=25, max_bytes=100_000)
    assert 40_000 < (tmp_path / "a.gif").stat().st_size <= 100_000
    frames, info = read(tmp_path / "a.gif")
    assert len(frames) == 75 and info["duration"] == 80  # six seconds still


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="at least one"):
        write_gif(tmp_path / "a.gif", [])
    real_import = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name == "PIL":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(MissingExtraError, match=r"pip install 'eqx_q\[train\]'"):
        write_gif(tmp_path / "a.gif", [np.zeros((2, 2, 3), np.uint8)])
