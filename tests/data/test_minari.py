"""Conversion from and to Minari's data sets."""

import functools
import warnings

import gymnasium
import jax
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from minari.data_collector import EpisodeBuffer
from recorded import Transition, raw_episodes, stored_transitions, transitions
from recordings import describe, random_episode

import eqx_q
import eqx_q.data.minari as ours
from eqx_q.data import (
    Dataset,
    Description,
    Rows,
    Writer,
    convert,
    from_minari,
    to_minari,
)
from eqx_q.errors import CorruptFileError, UsageError
from eqx_q.spaces import Box as HashableBox, Discrete as HashableDiscrete


@pytest.fixture(autouse=True)
def _local(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def vectors(lengths, dtype=np.float32, seed=0):
    """Episodes of vectors, which need all their bits."""
    rng = np.random.default_rng(seed)
    return [
        one._replace(frames=rng.normal(size=(len(one.frames), 3)).astype(dtype))
        for one in raw_episodes(lengths, seed)
    ]


def write_theirs(name, episodes, space, actions=None, **options):
    """As somebody would with Minari alone."""
    buffers = []
    for one in episodes:
        ends = np.arange(len(one.action)) == len(one.action) - 1
        buffers.append(
            EpisodeBuffer(
                observations=list(one.frames),
                actions=list(one.action),
                rewards=list(one.reward),
                terminations=list(ends & one.terminated),
                truncations=list(ends & (not one.terminated)),
            )
        )
    return create(name, buffers, space, actions or Discrete(6), **options)


def create(name, buffers, space, actions, **options):
    with warnings.catch_warnings(action="ignore"):  # Minari wants to know authors and links
        return minari.create_dataset_from_buffers(
            name, buffers, observation_space=space, action_space=actions, **options
        )


def write_ours(path, episodes, space, stack=None, start="zeros"):
    description = Description(
        env="envpool/Pong-v5",
        observation_space=HashableBox(space),
        action_space=HashableDiscrete(Discrete(6)),
        stack=stack,
        stack_start=start,
        preprocessing={"frame_skip": 4},
        source={"seed": 3},
    )
    with Writer(path, description, dtype=episodes[0].frames.dtype) as writer:
        for one in episodes:
            writer.append(
                Rows.of_episode(one.frames, one.action, one.reward, terminated=one.terminated)
            )
        writer.commit("all")
        return writer.finish()


def read_theirs(name):
    """The transitions of a Minari data set, of its public episodes."""
    found = []
    for one in minari.load_dataset(name):
        for t in range(len(one)):
            found.append(
                Transition(
                    one.observations[t].tobytes(),
                    int(one.actions[t]),
                    float(one.rewards[t]),
                    one.observations[t + 1].tobytes(),
                    bool(one.terminations[t]),
                    bool(one.truncations[t]),
                    t == 0,
                )
            )
    return found


VECTOR = Box(-np.inf, np.inf, (3,), np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_theirs_to_ours(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(ours, "_EPISODES", 2)
    episodes = vectors([4, 1, 7, 3, 2], dtype)
    write_theirs("ab/cd-v0", episodes, Box(-np.inf, np.inf, (3,), np.float32))
    dataset = convert(from_minari("ab/cd-v0"), tmp_path / "out")
    assert stored_transitions(dataset) == transitions(episodes) == read_theirs("ab/cd-v0")
    assert dataset.rows.obs.dtype == dtype
    assert [shard.name for shard in dataset.shards] == [
        "episodes 0 to 1", "episodes 2 to 3", "episodes 4 to 4"
    ]  # fmt: skip
    assert dataset.description.env == "minari/ab/cd-v0" and dataset.description.stack is None
    assert from_minari("ab/cd-v0", env="gymnasium/X-v0").description.env == "gymnasium/X-v0"


def test_the_environment_is_theirs(tmp_path):
    space = gymnasium.make("CartPole-v1").observation_space
    episodes = [
        one._replace(frames=np.zeros((3, 4), np.float32), action=np.array([0, 1]))
        for one in vectors([2])
    ]
    write_theirs("cartpole-v0", episodes, space, Discrete(2), env="CartPole-v1")
    description = convert(from_minari("cartpole-v0"), tmp_path / "out").description
    assert description.env == "gymnasium/CartPole-v1" and description.action_space.n == 2
    np.testing.assert_array_equal(description.observation_space.low, space.low)
    to_minari(Dataset(tmp_path / "out"), "back-v0")
    spec = gymnasium.spec("CartPole-v1")
    assert minari.load_dataset("back-v0").env_spec.to_json() == spec.to_json()
    # Of what was played here the environment is known by its name.
    to_minari(write_ours(tmp_path / "ours", vectors([4]), VECTOR), "unknown-v0")
    assert minari.load_dataset("unknown-v0").env_spec is None
    named = describe()._replace(env="gymnasium/Acrobot-v1")
    with Writer(tmp_path / "named", named) as writer:
        writer.append(random_episode(np.random.default_rng(0), 3, terminated=True))
        writer.commit("all")
        to_minari(writer.finish(), "named-v0")
    assert minari.load_dataset("named-v0").env_spec.id == "Acrobot-v1"


def test_ours_to_theirs_and_back(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_BYTES", 100)  # several calls to Minari
    episodes = vectors([4, 1, 7, 3, 2])
    dataset = write_ours(tmp_path / "ours", episodes, VECTOR)
    seen = []
    data = to_minari(dataset, "ab/cd-v0", on_rows=lambda _, rows: seen.append(rows))
    assert len(seen) > 1 and sum(seen) == len(dataset)
    assert data.total_steps == 17 and read_theirs("ab/cd-v0") == transitions(episodes)
    check_same(dataset, convert(from_minari("ab/cd-v0"), tmp_path / "back"))


def check_same(dataset, back):
    assert jax.tree.structure(dataset.rows) == jax.tree.structure(back.rows)
    kinds = [[x.dtype for x in jax.tree.leaves(one.rows)] for one in (dataset, back)]
    assert kinds[0] == kinds[1]
    jax.tree.map(np.testing.assert_array_equal, dataset.rows, back.rows)
    before, after = dataset.description.as_json(), back.description.as_json()
    assert after.pop("source") == before.pop("source") | {
        "format": "minari", "id": back.description.source["id"]
    }  # fmt: skip
    assert before == after


@pytest.mark.parametrize("start", ["zeros", "repeat"])
def test_frames_go_as_stacks_and_come_back_as_frames(tmp_path, start):
    episodes = raw_episodes([5, 1, 2], size=(33, 40))
    space = Box(0, 255, (4, 33, 40), np.uint8)
    dataset = write_ours(tmp_path / "ours", episodes, space, 4, start)
    to_minari(dataset, "pong-v0")
    for raw, one in zip(episodes, minari.load_dataset("pong-v0"), strict=True):
        for t in range(len(raw.frames)):
            for k in range(4):  # the newest is the last
                before = t - 3 + k
                frame = raw.frames[max(before, 0)] * (before >= 0 or start == "repeat")
                np.testing.assert_array_equal(one.observations[t, k], frame)
    check_same(dataset, convert(from_minari("pong-v0"), tmp_path / "back"))


def test_images_keep_every_bit_which_minari_by_default_does_not(tmp_path):
    episodes = raw_episodes([5, 3], size=(32, 40, 3))
    space = Box(0, 255, (32, 40, 3), np.uint8)
    write_theirs("naive-v0", episodes, space)
    assert read_theirs("naive-v0") != transitions(episodes)
    assert from_minari("naive-v0").description.source["jpeg"] == "yes"

    dataset = write_ours(tmp_path / "ours", episodes, space)
    to_minari(dataset, "exact-v0")
    assert read_theirs("exact-v0") == transitions(episodes)
    check_same(dataset, convert(from_minari("exact-v0"), tmp_path / "back"))


def test_an_episode_that_was_left_is_truncated_and_one_with_both_flags_terminated(tmp_path):
    (one,) = vectors([3])
    buffer = dict(observations=one.frames, actions=one.action, rewards=one.reward)
    none, last = np.zeros(3, bool), np.array([False, False, True])
    buffers = [
        EpisodeBuffer(**buffer, terminations=none, truncations=none),
        EpisodeBuffer(**buffer, terminations=last, truncations=last),
    ]
    create("x-v0", buffers, VECTOR, Discrete(6))
    dataset = convert(from_minari("x-v0"), tmp_path / "out")
    assert dataset.rows.truncated.tolist() == [False, False, True] + [False] * 5
    assert dataset.rows.terminated.tolist() == [False] * 6 + [True, False]


def test_interrupted_and_run_again_it_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_EPISODES", 2)
    write_theirs("x-v0", vectors([4, 1, 7, 3, 2]), VECTOR)
    convert(from_minari("x-v0"), tmp_path / "whole")
    seen = []

    def stop(part, rows):
        seen.append(part)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(from_minari("x-v0"), tmp_path / "out", on_rows=stop)
    again = []
    convert(from_minari("x-v0"), tmp_path / "out", on_rows=lambda part, _: again.append(part))
    assert set(again) == {"episodes 2 to 3", "episodes 4 to 4"}
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


PARTS = {"arm": Tuple([VECTOR, Discrete(9, start=-4)]), "image": Box(0, 255, (33, 34, 3), np.uint8)}
SPACES = {
    "multi": (Dict(PARTS), MultiDiscrete([3, 2], start=[-1, 5])),
    "box": (Dict(PARTS), Box(-1, 1, (2,), np.float32)),
    "bits": (MultiBinary(3), MultiBinary(2)),
    "shifted": (Discrete(5), Discrete(9, start=-3)),
}


def sampled_episodes(space, actions, lengths):
    """Of spaces' own samples: observations, actions and rewards."""
    for length in lengths:
        obs = [space.sample() for _ in range(length + 1)]
        taken = np.stack([actions.sample() for _ in range(length)])
        yield jax.tree.map(lambda *x: np.stack(x), *obs), taken, np.arange(length, dtype=np.float32)


@pytest.mark.parametrize("name", SPACES)
def test_any_space_goes_both_ways(tmp_path, name):
    """Theirs to ours, ours to theirs and back."""
    space, actions = SPACES[name]
    space.seed(0)
    actions.seed(0)
    episodes = list(sampled_episodes(space, actions, [3, 1, 4]))
    buffers = [
        EpisodeBuffer(
            observations=obs,
            actions=taken,
            rewards=reward,
            terminations=np.arange(len(taken)) == len(taken) - 1,
            truncations=np.zeros(len(taken), bool),
        )
        for obs, taken, reward in episodes
    ]
    create("theirs-v0", buffers, space, actions, jpeg_encoding=False)
    dataset = convert(from_minari("theirs-v0"), tmp_path / "ours")
    assert dataset.description.action_space == actions
    assert dataset.description.observation_space == space
    for rows, (obs, taken, reward) in zip(dataset.episodes(), episodes, strict=True):
        jax.tree.map(np.testing.assert_array_equal, rows.obs, obs)
        np.testing.assert_array_equal(rows.action[:-1], taken)
        np.testing.assert_array_equal(rows.reward[:-1], reward)
    to_minari(dataset, "back-v0")
    for one, (obs, taken, _) in zip(minari.load_dataset("back-v0"), episodes, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.observations, obs)
        np.testing.assert_array_equal(one.actions, taken)
        assert one.actions.dtype == actions.dtype
    check_same(dataset, convert(from_minari("back-v0"), tmp_path / "back"))


LEARNABLE = {
    "float64 observations": (Box(-1, 1, (3,), np.float64), Discrete(6)),
    "whole observations": (Box(-9, 9, (3,), np.int64), Discrete(6)),
    "float64 actions": (VECTOR, Box(-0.1, 1 / 3, (2,), np.float64)),
    "whole actions": (VECTOR, Box(0, 5, (2,), np.int64)),
}


class Theirs(gymnasium.Env):
    """Has spaces."""

    def __init__(self, name):
        self.observation_space, self.action_space = LEARNABLE[name]

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, self.observation_space.dtype), {}


@pytest.mark.parametrize("name", LEARNABLE)
def test_an_agent_of_their_environment_learns_from_their_data(tmp_path, name):
    space, actions = LEARNABLE[name]
    buffers = [
        EpisodeBuffer(
            observations=obs,
            actions=taken,
            rewards=reward,
            terminations=np.zeros(len(taken), bool),
            truncations=np.arange(len(taken)) == len(taken) - 1,
        )
        for obs, taken, reward in sampled_episodes(space, actions, [9, 9])
    ]
    create("theirs-v0", buffers, space, actions)
    dataset = convert(from_minari("theirs-v0"), tmp_path / "ours")
    env = eqx_q.make(functools.partial(Theirs, name), num_envs=1)
    agent = eqx_q.CQL.create(env.observation_space, env.action_space, key=jax.random.key(0))
    learnt, _ = eqx_q.train_offline(agent, dataset, num_updates=2, key=jax.random.key(0))
    assert int(learnt.num_updates) == 2


def test_masks_of_their_data_are_kept(tmp_path):
    masks = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1]])
    buffer = EpisodeBuffer(
        observations=np.zeros((3, 3), np.float32),
        actions=np.array([0, 1]),
        rewards=np.ones(2),
        terminations=np.array([False, True]),
        truncations=np.zeros(2, bool),
        infos={"action_mask": masks},
    )
    create("masked-v0", [buffer], VECTOR, Discrete(3))
    dataset = convert(from_minari("masked-v0"), tmp_path / "ours")
    np.testing.assert_array_equal(dataset.rows.action_mask, masks.astype(bool))


def write_masked(path, **options):
    """One episode, with action masks, of whatever else is said."""
    description = Description(
        "made/Up", VECTOR, Discrete(3), **{"extras": {"action_mask": (3,)}, **options}
    )
    rng = np.random.default_rng(0)
    team = () if description.num_agents is None else (description.num_agents,)
    with Writer(path, description) as writer:
        writer.append(
            Rows.of_episode(
                rng.normal(size=(4, *team, 3)).astype(np.float32),
                rng.integers(3, size=(3, *team)),
                np.ones(3),
                terminated=True,
                action_mask=rng.random((4, *team, 3)) < 0.5,
            )
        )
        writer.commit("all")
        return writer.finish()


def test_masks_go_along_and_come_back(tmp_path):
    dataset = write_masked(tmp_path / "ours")
    to_minari(dataset, "x-v0")
    check_same(dataset, convert(from_minari("x-v0"), tmp_path / "back"))


def test_what_minari_has_no_place_for(tmp_path):
    team = write_masked(tmp_path / "team", num_agents=2, extras={"action_mask": (2, 3)})
    with pytest.raises(UsageError, match="is of a team of 2, but Minari's data sets are of one"):
        to_minari(team, "x-v0")


def test_spaces_that_nothing_is_learnt_from(tmp_path):
    (one,) = vectors([2])
    endless = one._replace(action=np.zeros((2, 3), np.float32))
    write_theirs("endless-v0", [endless], VECTOR, VECTOR)
    with pytest.raises(UsageError, match="a Box of actions is divided into bins"):
        from_minari("endless-v0")
    said = [{"place": one.frames[t], "mission": "go"} for t in range(3)]
    buffer = EpisodeBuffer(
        observations={name: [x[name] for x in said] for name in said[0]},
        actions=one.action,
        rewards=one.reward,
        terminations=[False, True],
        truncations=[False] * 2,
    )
    create("told-v0", [buffer], Dict(place=VECTOR, mission=Text(5)), Discrete(6))
    with pytest.raises(UsageError, match=r"\('mission'\) .*leave_out=\['mission'\]"):
        from_minari("told-v0")
    dataset = convert(from_minari("told-v0", leave_out=["mission"]), tmp_path / "out")
    np.testing.assert_array_equal(dataset.rows.obs["place"], one.frames)


def test_episodes_that_make_no_sense(tmp_path):
    (one,) = vectors([3])
    ends = {"terminations": [False, True, False], "truncations": [False] * 3}
    buffer = EpisodeBuffer(observations=one.frames, actions=one.action, rewards=one.reward, **ends)
    create("middle-v0", [buffer], VECTOR, Discrete(6))
    with pytest.raises(UsageError, match="episode 0 continues after step 1, which ends it: split"):
        convert(from_minari("middle-v0"), tmp_path / "out")
    write_theirs("short-v0", [one._replace(frames=one.frames[1:])], VECTOR)
    with pytest.raises(CorruptFileError, match="episode 0 has 3 observations for 3 actions"):
        convert(from_minari("short-v0"), tmp_path / "out")
    write_theirs("wide-v0", [one._replace(action=np.array([0, 9, 1]))], VECTOR)
    with pytest.raises(UsageError, match="row 1 has no legal action"):
        convert(from_minari("wide-v0"), tmp_path / "out")


def test_names(tmp_path):
    dataset = write_ours(tmp_path / "ours", vectors([2]), VECTOR)
    to_minari(dataset, "atari/pong-v0")
    with pytest.raises(UsageError, match="the Minari data set 'atari/pong-v0' exists already"):
        to_minari(dataset, "atari/pong-v0")
    with pytest.raises(UsageError, match="'pong' is not a valid Minari name: write it like"):
        to_minari(dataset, "pong")
    with pytest.raises(UsageError, match="unknown Minari data set 'atari/pnog-v0': the nearest"):
        from_minari("atari/pnog-v0")


def test_where_it_fails_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_BYTES", 1)
    dataset = write_ours(tmp_path / "ours", vectors([2, 2, 2]), VECTOR)

    def full(part, rows):
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match=r"'pong-v0' \(No space left on device\): free space"):
        to_minari(dataset, "pong-v0", on_rows=full)
    assert "pong-v0" not in minari.list_local_datasets()
    to_minari(dataset, "pong-v0")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"run `pip install 'eqx_q\[offline\]'`"):
        from_minari("x-v0")
