"""Sampling of a data set: which transitions are used, and in which blocks they come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import describe, random_episode, random_episodes, write

from eqx_q.data import Blocks, Sampling
from eqx_q.errors import UsageError

pytestmark = pytest.mark.quick


def drawable(blocks, index=0):
    """Observations that transitions of a block begin with, which tell rows apart."""
    replay = blocks.load(index)
    rows = np.asarray(replay.drawable)[: int(replay.num_drawable)]
    return np.asarray(replay.obs)[rows]


def keys(obs):
    return sorted(map(bytes, np.asarray(obs)))


def transitions_of(*episodes):
    return np.concatenate([x.obs[:-1] for x in episodes])


@pytest.fixture(scope="module")
def shards():
    """Three of unequal sizes."""
    episodes = random_episodes(0, num=40)
    return [episodes[:20], episodes[20:36], episodes[36:]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, shards):
    path = tmp_path_factory.mktemp("data") / "data"
    return write(path, [(shards[0], 1), (shards[1], 2), (shards[2], 1)])


def test_all_of_it_by_default(dataset, shards):
    blocks = Blocks(dataset, Sampling())
    assert blocks.num_blocks == 1
    expected = transitions_of(*(x for shard in shards for x in shard))
    np.testing.assert_array_equal(drawable(blocks), expected)
    assert blocks.num_transitions == len(expected) == dataset.num_transitions
    replay = blocks.load(0)
    assert len(replay.action) == len(dataset) and len(replay.drawable) == len(expected)


@pytest.mark.parametrize("fraction", [0.05, 0.31, 0.5, 1.0])
def test_the_first_of_each_shard(dataset, shards, fraction):
    expected = []
    for shard in shards:
        rows = np.concatenate([x.obs for x in shard])
        actions = np.concatenate([x.action for x in shard])
        num = round(fraction * len(rows))
        expected.append(rows[:num][actions[:num] >= 0])
    blocks = Blocks(dataset, Sampling(fraction=fraction))
    np.testing.assert_array_equal(drawable(blocks), np.concatenate(expected))
    assert blocks.num_transitions == sum(map(len, expected))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_whole_episodes(dataset, shards, fraction):
    def draw(seed):
        sampling = Sampling(fraction=fraction, by="episode", seed=seed)
        return drawable(Blocks(dataset, sampling))

    ours = set(keys(draw(0)))
    chosen, others = [], 0
    for episode in (x for shard in shards for x in shard):
        theirs = set(keys(episode.obs[:-1]))
        assert theirs <= ours or not theirs & ours
        if theirs <= ours:
            chosen.append(len(theirs))
        else:
            others += 1
    assert others
    # Enough of them, and without the last one (of at most 8 steps) not enough.
    wanted = fraction * dataset.num_transitions
    assert sum(chosen) == len(ours)
    assert wanted <= len(ours) < wanted + 8
    assert keys(draw(0)) == keys(draw(0)) != keys(draw(1))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_single_transitions(dataset, shards, fraction):
    def draw(seed):
        sampling = Sampling(fraction=fraction, by="transition", seed=seed)
        return keys(drawable(Blocks(dataset, sampling)))

    everything = keys(transitions_of(*(x for shard in shards for x in shard)))
    assert len(draw(0)) == len(set(draw(0))) == round(fraction * len(everything))
    assert set(draw(0)) < set(everything)
    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize("by", ["shard", "episode", "transition"])
def test_all_is_all_whatever_it_is_counted_in(dataset, by):
    assert Blocks(dataset, Sampling(by=by)).num_transitions == dataset.num_transitions


def test_some_runs(dataset, shards):
    ours = drawable(Blocks(dataset, Sampling(runs=[1])))
    np.testing.assert_array_equal(ours, transitions_of(*shards[0], *shards[2]))
    ours = drawable(Blocks(dataset, Sampling(runs=(2,))))
    np.testing.assert_array_equal(ours, transitions_of(*shards[1]))
    # A share is a share of those.
    ours = drawable(Blocks(dataset, Sampling(runs=[2], fraction=0.5, by="transition")))
    of_run = keys(transitions_of(*shards[1]))
    assert set(keys(ours)) < set(of_run) and len(ours) == round(0.5 * len(of_run))


def gigabytes(dataset, share):
    """Of memory, so much of the data set's rows: 12 + 4 + 4 + 3 bytes of data, 8 of indices."""
    return share * len(dataset) * 31 / 2**30


def test_what_fits_is_one_block(dataset):
    assert Blocks(dataset, Sampling(memory_gb=gigabytes(dataset, 1.0))).num_blocks == 1
    assert Blocks(dataset, Sampling(memory_gb=gigabytes(dataset, 0.99))).num_blocks > 1
    # Only those episodes count that are learnt from.
    sampling = Sampling(memory_gb=gigabytes(dataset, 0.5), fraction=0.3, by="episode")
    assert Blocks(dataset, sampling).num_blocks == 1


@pytest.mark.parametrize("share", [0.9, 0.5, 0.4])
@pytest.mark.parametrize("options", [{}, {"fraction": 0.5, "by": "transition"}, {"runs": [1]}])
def test_a_pass_has_every_transition_in_one_block(dataset, share, options):
    options = {"memory_gb": gigabytes(dataset, share) * (0.6 if "runs" in options else 1)} | options
    whole = Blocks(dataset, Sampling(**(options | {"memory_gb": 1.0})))
    blocks = Blocks(dataset, Sampling(**options))
    num = blocks.num_blocks
    assert num > 1
    passes = [[blocks.load(turn * num + i) for i in range(num)] for turn in range(2)]
    shapes = {tuple(x.shape for x in jax.tree.leaves(r)) for r in passes[0] + passes[1]}
    assert len(shapes) == 1
    for turn in range(2):
        parts = [keys(drawable(blocks, turn * num + i)) for i in range(num)]
        assert all(parts)
        assert sorted(x for part in parts for x in part) == keys(drawable(whole))
    assert keys(drawable(blocks, 0)) != keys(drawable(blocks, num))  # put together anew
    size = (len(passes[0][0].action) - 1) * 31  # to the row
    assert 2 * size <= options["memory_gb"] * 2**30  # one that is learnt from, one that comes


def test_transitions_of_a_block_are_those_of_the_data(dataset, shards):
    """Episodes lie elsewhere in a block: what transitions lead to must, too."""
    of = {}
    for episode in (x for shard in shards for x in shard):
        length = len(episode.action) - 1
        for t in range(length):
            of[bytes(episode.obs[t])] = (
                episode.action[t],
                episode.reward[t],
                bytes(episode.obs[min(t + 2, length)]),
                bool(episode.terminated[-2]) and t + 2 >= length,
            )
    blocks = Blocks(dataset, Sampling(memory_gb=gigabytes(dataset, 0.5)))
    for index in range(blocks.num_blocks):
        replay = blocks.load(index)
        ours = replay.transitions(jnp.arange(int(replay.num_drawable)), 2)
        for obs, *theirs in zip(
            *map(np.asarray, (ours.obs, ours.action, ours.reward[:, 0], ours.next_obs)),
            np.asarray(ours.terminated),
            strict=True,
        ):
            action, reward, next_obs, terminated = theirs
            assert of[bytes(obs)] == (action, reward, bytes(next_obs), terminated)


def test_order_depends_on_seed_and_index_alone(dataset):
    sampling = Sampling(memory_gb=gigabytes(dataset, 0.5), seed=3)
    a, b = Blocks(dataset, sampling), Blocks(dataset, sampling)
    late = [keys(drawable(a, i)) for i in (7, 2, 11)]
    assert [keys(drawable(b, i)) for i in (2, 11, 7)] == [late[1], late[2], late[0]]
    other = Blocks(dataset, Sampling(memory_gb=gigabytes(dataset, 0.5), seed=4))
    assert keys(drawable(other, 7)) != late[0]


def test_no_block_is_empty_however_long_episodes_are(tmp_path):
    """Some as long as memory allows, among many short ones."""
    rng = np.random.default_rng(0)
    lengths = [*[1] * 20, *[60] * 40]
    episodes = [random_episode(rng, n, terminated=True) for n in lengths]
    dataset = write(tmp_path / "data", [episodes])
    for rows in (244, 246, 300, 305, 310, 400, 1000):
        sampling = Sampling(memory_gb=rows * 31 / 2**30)
        if rows < 5 * 61:
            with pytest.raises(UsageError, match="raise memory_gb"):
                Blocks(dataset, sampling)
            continue
        blocks = Blocks(dataset, sampling)
        for index in range(3 * blocks.num_blocks):
            replay = blocks.load(index)
            assert int(replay.num_drawable) > 0
            assert 2 * (len(replay.action) - 1) <= rows


def test_some_shards_at_a_time(dataset, shards):
    blocks = Blocks(dataset, Sampling(shards_per_block=2))
    assert blocks.num_blocks == 2
    of = [keys(transitions_of(*shard)) for shard in shards]
    pairs = {tuple(sorted(of[a] + of[b])): (a, b) for a, b in ((0, 1), (0, 2), (1, 2))}
    seen = [pairs[tuple(keys(drawable(blocks, i)))] for i in range(30)]
    assert set(seen) == set(pairs.values())
    again = Blocks(dataset, Sampling(shards_per_block=2))
    assert pairs[tuple(keys(drawable(again, 17)))] == seen[17]
    shapes = {tuple(x.shape for x in jax.tree.leaves(blocks.load(i))) for i in range(5)}
    assert len(shapes) == 1
    assert Blocks(dataset, Sampling(shards_per_block=3)).num_blocks == 1


def from_configuration(**options):
    """Nobody checks the types of that."""
    sampling = Sampling()
    for name, value in options.items():
        object.__setattr__(sampling, name, value)
    sampling.__post_init__()
    return sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction=0.0: give a number"),
        ({"fraction": 1.5}, "fraction=1.5: give a number"),
        ({"fraction": float("nan")}, "fraction=nan: give a number"),
        ({"by": "frame"}, "unknown by 'frame': .*episode, shard"),
        ({"shards_per_block": 0}, "shards_per_block must be .*, got 0"),
        ({"shards_per_block": 1.5}, r"shards_per_block must be .*, got 1\.5"),
        ({"updates_per_block": -1}, "updates_per_block must be .*, got -1"),
        ({"updates_per_block": 0.5}, r"updates_per_block must be .*, got 0\.5"),
        ({"memory_gb": 0}, "memory_gb=0"),
        ({"memory_gb": float("nan")}, "memory_gb=nan"),
        ({"priority_exponent": -0.5}, r"priority_exponent=-0\.5"),
        ({"priority_correction": 1.5}, r"priority_correction=1\.5"),
        ({"seed": -1}, "seed must be .*, got -1"),
        ({"fraction": 0.001}, "fraction=0.001 leaves nothing"),
        ({"fraction": 0.001, "by": "transition"}, "fraction=0.001 leaves nothing"),
        ({"runs": [1, 9, 3]}, "has no run 3, 9: it has 1, 2"),
        ({"runs": []}, "runs is empty: name at least one"),
        ({"shards_per_block": 4}, "there are 3 shards to learn from: give at most 3"),
        ({"shards_per_block": 2, "runs": [2]}, "there are 1 shards"),
        ({"shards_per_block": 2, "memory_gb": 1e-6}, "block=2 takes .* lower shards_per_block"),
        ({"memory_gb": 1e-7}, "raise memory_gb"),
    ],
)  # fmt: skip
def test_what_cannot_work(dataset, options, message):
    with pytest.raises(UsageError, match=message):
        Blocks(dataset, from_configuration(**options))


def test_runs_where_there_are_none(tmp_path):
    dataset = write(tmp_path / "data", [random_episodes(0)], describe())
    with pytest.raises(UsageError, match="it has none by number"):
        Blocks(dataset, Sampling(runs=[1]))
