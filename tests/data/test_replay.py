"""Drawing transitions against a loop over raw episodes; priorities against a dense sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import ACTIONS, STACK, VECTOR, describe, observation, random_episodes, write

from eqx_q.data import Blocks, Priorities, Replay, Sampling
from eqx_q.data.replay import _SPAN
from eqx_q.spaces import of_actions, of_observations


def naive(episodes, n_step, stack=None, stack_start="zeros", clip=False):
    """All transitions, in order, as dictionaries; of whole episodes."""
    for episode in episodes:
        length = len(episode.action) - 1
        ended = "terminated" if episode.terminated[-2] else "truncated"
        for t in range(length):
            steps = min(n_step, length - t)
            reward = np.zeros(n_step, np.float32)
            for i in range(steps):
                r = episode.reward[t + i]
                reward[i] = min(max(r, -1.0), 1.0) if clip else r
            yield {
                "obs": observation(episode, t, stack, stack_start),
                "action": episode.action[t],
                "reward": reward,
                "length": steps,
                "terminated": t + steps == length and ended == "terminated",
                "next_obs": observation(episode, t + steps, stack, stack_start),
            }


def assert_transitions(ours, expected):
    expected = list(expected)
    for name in expected[0]:
        values = np.asarray(getattr(ours, name))
        np.testing.assert_array_equal(values, np.stack([x[name] for x in expected]), err_msg=name)


def load(path, episodes, n_step, stack=None, stack_start="zeros", **sampling):
    """All transitions of a data set of these episodes, as they are drawn."""
    space = VECTOR if stack is None else STACK
    half = len(episodes) // 2
    shards = [episodes[:half], episodes[half:]]
    dataset = write(path, shards, describe(space, stack, stack_start=stack_start))
    replay = Blocks(dataset, Sampling(**sampling)).load(0)
    places = jnp.arange(int(replay.num_drawable))
    return replay, jax.jit(Replay.transitions, static_argnums=2)(replay, places, n_step)


@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
@pytest.mark.parametrize(("stack", "stack_start"), [(None, "zeros"), (4, "zeros"), (4, "repeat")])
def test_transitions_equal_those_of_a_loop_over_raw_episodes(tmp_path, n_step, stack, stack_start):
    episodes = random_episodes(n_step, num=12, stack=stack)
    assert {len(x.action) for x in episodes} == set(range(2, 10))
    _, ours = load(tmp_path / "data", episodes, n_step, stack, stack_start)
    assert_transitions(ours, naive(episodes, n_step, stack, stack_start))
    assert ours.obs.dtype == (np.float32 if stack is None else np.uint8)


@pytest.mark.parametrize("n_step", [1, 3])
def test_rewards_are_clipped_where_asked(tmp_path, n_step):
    episodes = random_episodes(0)
    _, ours = load(tmp_path / "data", episodes, n_step, reward_clip=True)
    assert_transitions(ours, naive(episodes, n_step, clip=True))
    assert np.abs(ours.reward).max() == 1 < max(np.abs(x.reward).max() for x in episodes)


@pytest.mark.parametrize("n_step", [1, 3])
def test_what_is_cut_off_is_not_drawn_but_led_to(tmp_path, n_step):
    """Of each shard the first rows: the last transitions among those lead to rows beyond."""
    episodes = random_episodes(3, num=10, stack=4)
    replay, ours = load(tmp_path / "data", episodes, n_step, stack=4, fraction=0.3)
    rows, expected, start = 0, [], 0
    transitions = list(naive(episodes, n_step, stack=4))
    for shard in (episodes[:5], episodes[5:]):
        size = sum(len(x.action) for x in shard)
        actions = np.concatenate([x.action for x in shard])
        rows = int(np.sum(actions[: round(0.3 * size)] >= 0))
        expected += transitions[start : start + rows]
        start += int(np.sum(actions >= 0))
    assert 0 < len(expected) < 0.4 * len(transitions)
    assert_transitions(ours, expected)
    assert np.all(np.asarray(replay.action)[replay.drawable[: replay.num_drawable]] >= 0)


def test_a_stack_never_crosses_an_episodes_start(tmp_path):
    """Frames are marked by their episode; zeros pad."""
    episodes = []
    for i, episode in enumerate(random_episodes(0, stack=4)):
        episodes.append(episode._replace(obs=np.full_like(episode.obs, i + 1)))
    _, ours = load(tmp_path / "data", episodes, n_step=2, stack=4)
    marks = [i + 1 for i, x in enumerate(episodes) for _ in range(len(x.action) - 1)]
    for obs in (ours.obs, ours.next_obs):
        for stack, mark in zip(np.asarray(obs), marks, strict=True):
            assert set(np.unique(stack)) <= {0, mark} and np.all(stack[-1] == mark)


def test_the_final_step_of_a_truncated_episode_is_bootstrapped_from_what_was_seen_last(tmp_path):
    episodes = random_episodes(0)
    truncated = [x for x in episodes if x.truncated.any()]
    _, ours = load(tmp_path / "data", truncated, n_step=3)
    ends = np.cumsum([len(x.action) - 1 for x in truncated]) - 1
    assert not np.any(ours.terminated)
    assert np.all(ours.length[ends] == 1)
    np.testing.assert_array_equal(ours.next_obs[ends], np.stack([x.obs[-1] for x in truncated]))


@pytest.mark.parametrize("stack", [None, 4])
def test_observations_come_as_the_environment_gives_them(tmp_path, stack):
    """However they are stored."""
    space = VECTOR if stack is None else STACK
    space = type(space)(-1000, 1000, space.shape, np.float32)
    episodes = random_episodes(0, stack=stack)
    episodes = [x._replace(obs=(x.obs / 100).astype(np.int8)) for x in episodes]
    dataset = write(tmp_path / "data", [episodes], describe(space, stack), dtype=np.int8)
    ours = Blocks(dataset, Sampling()).load(0).transitions(jnp.arange(5), 1)
    assert ours.obs.dtype == ours.next_obs.dtype == np.float32
    expected = list(naive(episodes, 1, stack))[:5]
    np.testing.assert_array_equal(ours.obs, np.stack([x["obs"] for x in expected]))


def test_draws_are_uniform_over_places(tmp_path):
    episodes = random_episodes(0)
    replay, _ = load(tmp_path / "data", episodes, 1)
    num = int(replay.num_drawable)
    places = np.asarray(replay.draw(jax.random.key(0), (50, 400)))
    assert places.shape == (50, 400)
    counts = np.bincount(places.ravel(), minlength=num)
    assert len(counts) == num
    expected = places.size / num
    assert np.sum((counts - expected) ** 2 / expected) < num + 4 * np.sqrt(2 * num)  # χ²


def a_replay(num_drawable, num_places):
    """Of which only the number of places counts."""
    none = jnp.zeros(1, jnp.int32)
    return Replay(
        obs=none,
        action=none,
        reward=jnp.zeros(1),
        terminated=none > 0,
        truncated=none > 0,
        start=none,
        num_rows=jnp.asarray(1, jnp.int32),
        drawable=jnp.zeros(num_places, jnp.int32),
        num_drawable=jnp.asarray(num_drawable, jnp.int32),
        action_mask=None,
        agent_mask=None,
        agent_reward=None,
        global_state=None,
        observation_space=of_observations(VECTOR),
        action_space=of_actions(ACTIONS),
        stack=None,
        stack_start="zeros",
        reward_clip=False,
    )


def with_errors(priorities, errors):
    return priorities.updated(jnp.arange(len(errors)), jnp.asarray(errors, jnp.float32))


SIZES = [(7, 7), (7, 2 * _SPAN), (_SPAN, _SPAN + 1), (2 * _SPAN + 300, 5 * _SPAN)]


@pytest.mark.parametrize(("num", "padded"), SIZES)
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_frequencies_of_prioritised_draws(num, padded, exponent):
    errors = np.random.default_rng(0).exponential(size=num)
    priorities = with_errors(Priorities.create(a_replay(num, padded), exponent, 0.5), errors)
    exact = (errors + 1e-6) ** exponent
    exact /= exact.sum()
    keys = jax.random.split(jax.random.key(1), 100)
    places, _ = jax.jit(jax.vmap(lambda key: priorities.draw(key, 64)))(keys)
    counts = np.bincount(np.ravel(places), minlength=num)
    assert len(counts) == num  # and no padded place
    expected = exact * counts.sum()
    # Stratified draws are at least as regular as independent ones.
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected) + 3)
    # Each draw of a batch is from the span of its own part of the total.
    ends = np.append(np.arange(_SPAN, num, _SPAN), num)
    bounds = np.concatenate([[0.0], np.cumsum(exact)[ends - 1]])
    for batch in np.asarray(places)[:20]:
        low, high = bounds[batch // _SPAN], bounds[batch // _SPAN + 1]
        part = np.arange(64) / 64
        assert np.all(high > part - 1e-5) and np.all(low < part + 1 / 64 + 1e-5)


def test_draws_are_as_fine_as_there_are_places():
    """float32 knows no odd number beyond 2**24: places there must come from finer numbers."""
    num = 2**25
    priorities = Priorities(
        values=jnp.ones(num, jnp.float32),
        sums=jnp.full(num // _SPAN, float(_SPAN), jnp.float32),
        count=jnp.asarray(num, jnp.int32),
        exponent=jnp.ones(()),
        correction=jnp.zeros(()),
    )
    places = np.asarray(priorities.draw(jax.random.key(0), 4096)[0])
    odd = places[places > 2**24] % 2
    assert len(odd) == 2048
    assert abs(odd.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(odd))


@pytest.mark.parametrize("correction", [0.0, 0.4, 1.0])
def test_weights_are_those_of_the_paper(correction):
    errors = np.random.default_rng(0).exponential(size=1500)
    priorities = with_errors(Priorities.create(a_replay(1500, 1500), 0.7, correction), errors)
    place, weight = priorities.draw(jax.random.key(0), 32)
    p = (errors + 1e-6) ** 0.7
    expected = (1500 * p / p.sum())[np.asarray(place)] ** -correction
    np.testing.assert_allclose(weight, expected / expected.max(), rtol=1e-4)
    assert np.max(weight) == 1


def test_fresh_priorities_are_alike():
    priorities = Priorities.create(a_replay(1300, 3000), 0.6, 0.5)
    place, weight = priorities.draw(jax.random.key(0), 1300)
    spans = np.asarray(place) // _SPAN
    assert np.all(np.diff(spans) >= 0) and np.sum(spans == 0) == _SPAN
    np.testing.assert_array_equal(weight, np.ones(1300))


@pytest.mark.parametrize(("num", "padded"), SIZES)
def test_updates_equal_a_dense_computation(num, padded):
    rng = np.random.default_rng(2)
    priorities = Priorities.create(a_replay(num, padded), 0.6, 0.5)
    dense = np.ones(num)
    update = jax.jit(Priorities.updated)
    for _ in range(50):
        place = rng.integers(0, num, 32)
        place[1] = place[0]  # drawn twice: the same transition, so the same error
        errors = rng.exponential(size=num).astype(np.float32)
        priorities = update(priorities, jnp.asarray(place), jnp.asarray(errors[place]))
        dense[place] = (errors[place] + 1e-6) ** 0.6
    np.testing.assert_allclose(priorities.values[:num], dense, rtol=1e-5)
    assert not np.any(priorities.values[num:])
    spans = np.pad(dense, (0, len(priorities.values) - num)).reshape(-1, _SPAN).sum(-1)
    np.testing.assert_allclose(priorities.sums, spans, rtol=1e-5)
    assert int(priorities.count) == num


@pytest.mark.parametrize(("num", "padded"), SIZES)
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_rounding_leads_to_no_padded_place(monkeypatch, num, padded, uniform):
    errors = np.random.default_rng(0).exponential(size=num)
    priorities = with_errors(Priorities.create(a_replay(num, padded), 0.9, 0.5), errors)
    draw = lambda key, shape: jnp.full(shape, uniform, jnp.float32)  # noqa: E731
    monkeypatch.setattr(jax.random, "uniform", draw)
    place, weight = priorities.draw(jax.random.key(0), 32)
    assert np.all(np.asarray(place) < num)
    assert np.all(np.isfinite(weight))
    assert int(place[0 if uniform == 0 else -1]) in ([0] if uniform == 0 else [num - 1])
