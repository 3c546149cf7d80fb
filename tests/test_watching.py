"""`scripts/watch.py`: a window where there is a screen, else a GIF."""

import jax
import matplotlib.pyplot as plt
import numpy as np
import pygame
import pytest
import yaml
from matplotlib.backends.registry import backend_registry
from PIL import Image

import eqx_q
from eqx_q.run.watching import _window

CARTPOLE = "zoo:pqn/CartPole-v1"


@pytest.fixture
def pictures(monkeypatch):
    """A screen that is not there, and what stands on it frame by frame."""
    shown = []
    monkeypatch.setattr(pygame.display, "get_driver", lambda: "x11")
    flip = lambda: shown.append(pygame.surfarray.array3d(pygame.display.get_surface()))  # noqa: E731
    monkeypatch.setattr(pygame.display, "flip", flip)
    yield shown
    assert not pygame.display.get_init()


def frames(path):
    with Image.open(path) as image:
        durations = []
        for i in range(image.n_frames):
            image.seek(i)
            durations.append(image.info["duration"])
        return durations, image.size


def test_without_a_screen_there_is_a_gif(script, tmp_path):
    status, out, err = script("watch", "run=zoo:pqn/Acrobot-v1", "fps=25")
    assert status == 0, err
    (episode_return,) = [float(line.split()[-1]) for line in out.splitlines() if "return" in line]
    assert -120 < episode_return <= -60
    assert "wrote runs/zoo/pqn/Acrobot-v1/media/watch.gif" in out
    durations, size = frames(
        tmp_path / "runs" / "zoo" / "pqn" / "Acrobot-v1" / "media" / "watch.gif"
    )
    assert sum(durations) == 40 * (2 - episode_return) and max(size) <= 320


def test_in_a_window_too(script, pictures, tmp_path):
    options = ["out=a.gif", "episodes=2", "fps=1000", "epsilon=1", "seed=1"]
    status, out, err = script("watch", f"run={CARTPOLE}", *options)
    assert status == 0, err
    returns = [float(line.split()[-1]) for line in out.splitlines() if "return" in line]
    assert len(returns) == 2 and max(returns) < 200  # at random
    assert len(pictures) == sum(returns) + 2
    assert len(frames(tmp_path / "a.gif")[0]) <= len(pictures)
    assert pictures[0].shape == (600, 400, 3) and (pictures[0] != pictures[5]).any()
    status, out, _ = script("watch", f"run={CARTPOLE}", *options[1:])
    assert status == 0 and "wrote" not in out


def test_closing_the_window_ends_it(script, pictures, caplog):
    pygame.display.init()
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_ESCAPE))
    status, out, err = script("watch", f"run={CARTPOLE}", "episodes=3")
    assert status == 0, err
    assert len(pictures) == 1 and out.count("episode ") == 1


def test_without_pygame_a_window_of_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pygame", None)
    with _window("a", 50) as show:
        assert show is None  # Agg has none
    monkeypatch.setattr(backend_registry, "list_builtin", lambda kind: ["agg"])
    pauses, others = [], plt.get_fignums()
    monkeypatch.setattr(plt, "pause", pauses.append)
    with _window("a", 50) as show:
        for value in (0, 200):
            assert show(np.full((4, 6, 3), value, np.uint8))
        (axes,) = plt.gcf().axes
        assert (axes.images[0].get_array() == 200).all() and pauses == [0.02, 0.02]
        plt.close()
        assert not show(np.zeros((4, 6, 3), np.uint8))
    assert plt.get_fignums() == others


def test_small_pictures_are_enlarged(pictures):
    with _window("a", 1000) as show:
        picture = np.zeros((80, 80, 3), np.uint8)
        picture[0, 1] = 255
        assert show(picture)
    assert pictures[0].shape == (480, 480, 3)
    assert (pictures[0].sum(-1) > 0).nonzero()[0].tolist() == [
        x for x in range(6, 12) for _ in range(6)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no run to watch: give run=DIR"),
        (["run=zoo:pqn/Cart"], "unknown agent of the zoo 'pqn/Cart': the nearest are pqn/CartPole"),
        (["run=bandit"], "gymnax/BernoulliBandit-misc cannot be rendered"),
        ([f"run={CARTPOLE}", "fps=0"], "fps=0: give a number of at least 1"),
        ([f"run={CARTPOLE}", "member=1"], "choose one of this run's members 0 to 0"),
    ],
)
def test_bad_input(script, tmp_path, arguments, message):
    (tmp_path / "bandit").mkdir()
    env = {"suite": "gymnax", "name": "BernoulliBandit-misc"}
    config = {"env": env, "protocol": {}, "seed": 0, "agent": {"_target_": "eqx_q.PQN"}}
    (tmp_path / "bandit" / "config.yaml").write_text(yaml.safe_dump(config))
    if "run=bandit" in arguments:
        space = eqx_q.make("gymnax/BernoulliBandit-misc", 1)
        agent = eqx_q.PQN.create(space.observation_space, space.action_space, key=jax.random.key(0))
        eqx_q.save(tmp_path / "bandit" / "agent.eqx", agent)
    status, _, err = script("watch", *arguments)
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
