"""Factored actions, other values, sequences: updates against plain NumPy."""

import dataclasses
import itertools
import math

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import TwoStep

import eqx_q
from eqx_q.nets import Inputs
from eqx_q.types import Episode, Rollout, TimeStep

spaces = gymnasium.spaces
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
MULTI = spaces.MultiDiscrete([2, 3], start=[1, 0])
BOX = spaces.Box(np.float32([-1, 0]), np.float32([1, 3]))
CHOICES, T, N = (2, 3), 5, 3  # of both, with BINS
BINS = [2, 3]

update = eqx.filter_jit(lambda agent, batch, key: agent.update(batch, key=key))


def sample_actions(space, rng, *shape):
    """Legal or not, and no end of the range of a `Box` only."""
    if isinstance(space, spaces.Box):
        size = (*shape, *space.shape)
        return rng.uniform(space.low, space.high, size).astype(np.float32)
    if isinstance(space, spaces.Discrete):
        return rng.integers(space.start, space.start + space.n, shape).astype(np.int32)
    size = (*shape, *space.shape)
    return rng.integers(space.start, space.start + space.nvec, size).astype(np.int32)


def choice_of(space, action):
    """The index of each factor's choice, of one action."""
    if isinstance(space, spaces.Box):
        grids = [
            np.linspace(*ends, n) for *ends, n in zip(space.low, space.high, BINS, strict=True)
        ]
        return [abs(grid - x).argmin() for grid, x in zip(grids, action, strict=True)]
    return list(np.atleast_1d(action) - np.atleast_1d(space.start))


def make_rollout(act_space, num_choices, *, seed=0, steps=T, lanes=N, team=(), masked=False, **own):
    """Random numbers; episodes are truncated and terminated inside, each with its reset step."""
    rng = np.random.default_rng(seed)
    shape = (steps + 1, lanes)
    terminated, truncated, first = (np.zeros(shape, bool) for _ in range(3))
    truncated[2, 0] = first[3, 0] = True
    terminated[3, 1] = first[4, 1] = True
    reward = rng.normal(size=shape).astype(np.float32)
    reward[first] = 100.0  # a learner that does not mask the reset step would see these
    mask = rng.random((*shape, *team, num_choices)) < 0.7
    timesteps = TimeStep(
        obs=rng.normal(size=(*shape, *team, 3)).astype(np.float32),
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        first=first,
        episode=Episode(terminated | truncated, reward, np.zeros(shape, np.int32)),
        action_mask=mask if masked else None,
        **own,
    )
    return Rollout(timesteps, sample_actions(act_space, rng, steps, lanes, *team))


def linear(num_outputs, key):
    return eqx.nn.Linear(3, num_outputs, key=jax.random.key(key))


def parameters(network):
    return [np.asarray(x, np.float64) for x in (network.module.weight, network.module.bias)]


def raw_values(parameters, obs, num_values):
    """`[..., A, K]` of a linear network."""
    weight, bias = parameters
    raw = obs @ weight.T + bias
    return raw.reshape(*obs.shape[:-1], -1, num_values)


def factors(row):
    """What belongs to choices, apart by the two factors."""
    return row[: CHOICES[0]], row[CHOICES[0] :]


def best(expected, mask):
    """The best legal choice of each factor; where nothing is legal everything is."""
    index = []
    for q, legal in zip(factors(expected), factors(mask), strict=True):
        legal = legal if legal.any() else np.ones_like(legal)
        index.append(np.where(legal, q, -np.inf).argmax())
    return index


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


# What a value part means, by hand: the expected return of `[K]`, the joint action's raw values or
# probabilities of `[F, K]`, samples, and the loss.

EDGES = np.linspace(-12, 12, 13)
erf = np.vectorize(math.erf)


class SlowScalar:
    part, K = "scalar", 1
    expected = staticmethod(lambda raw: raw[..., 0])
    join = staticmethod(lambda raw: raw.mean(0))
    samples = staticmethod(lambda joint: joint)
    loss = staticmethod(lambda joint, targets: 0.5 * (targets[0] - joint[0]) ** 2)


class SlowHLGauss:
    """§3.1 of Farebrother et al. 2024; in the middle of the range that is what we do, too."""

    part, K = {"name": "hl_gauss", "num_bins": 12, "v_min": -12.0, "v_max": 12.0}, 12
    expected = staticmethod(lambda raw: softmax(raw) @ ((EDGES[1:] + EDGES[:-1]) / 2))
    join = staticmethod(lambda raw: softmax(raw).mean(0))
    samples = staticmethod(lambda joint: np.array([joint @ ((EDGES[1:] + EDGES[:-1]) / 2)]))

    @staticmethod
    def loss(joint, targets):
        mass = np.diff(erf((EDGES - targets[0]) / (0.75 * 2 * math.sqrt(2))) / 2)
        return -(mass / mass.sum()) @ np.log(joint)


class SlowQuantile:
    part, K = {"name": "quantile", "num_quantiles": 4}, 4
    expected = staticmethod(lambda raw: raw.mean(-1))
    join = staticmethod(lambda raw: raw.mean(0))
    samples = staticmethod(lambda joint: joint)

    @staticmethod
    def loss(joint, targets):
        loss = 0.0
        for (i, theta), target in itertools.product(enumerate(joint), targets):
            error = target - theta
            huber = 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
            loss += abs((i + 0.5) / 4 - (error < 0)) * huber / 4
        return loss


SLOW = [SlowScalar, SlowHLGauss, SlowQuantile]


def slow_targets(slow, network, rollout):
    """Q(λ), for each sample of the best joint action's return."""
    steps = rollout.timesteps
    raw = raw_values(network, steps.obs, slow.K)
    expected = slow.expected(raw)
    mask = steps.action_mask
    mask = np.ones(expected.shape, bool) if mask is None else mask
    targets = np.zeros((T, N), object)
    for n in range(N):
        for t in reversed(range(T)):
            chosen = best(expected[t + 1, n], mask[t + 1, n])
            chosen_raw = [x[i] for x, i in zip(factors(raw[t + 1, n]), chosen, strict=True)]
            value = slow.samples(slow.join(np.array(chosen_raw)))
            ended = steps.terminated[t + 1, n] or steps.truncated[t + 1, n]
            trace = 0.0 if ended or t == T - 1 else 0.7
            later = (1 - trace) * value + (trace * targets[t + 1, n] if trace else 0.0)
            alive = 1.0 - steps.terminated[t + 1, n]
            targets[t, n] = 0.5 * steps.reward[t + 1, n] + 0.9 * alive * later
    return targets


def slow_loss(slow, network, rollout, space, targets):
    """The mean over what happened, and the mean distance of expected values from targets."""
    raw = raw_values(network, rollout.timesteps.obs, slow.K)
    losses, errors = [], []
    for t, n in np.ndindex(T, N):
        if not rollout.timesteps.first[t + 1, n]:
            index = choice_of(space, rollout.actions[t, n])
            chosen = [x[i] for x, i in zip(factors(raw[t, n]), index, strict=True)]
            losses.append(slow.loss(slow.join(np.array(chosen)), targets[t, n]))
            value = np.mean([slow.expected(x) for x in chosen])
            errors.append(abs(value - targets[t, n].mean()))
    assert len(losses) == T * N - 2
    return np.mean(losses), np.mean(errors)


@pytest.mark.parametrize(
    ("slow", "space", "masked"),
    [*itertools.product(SLOW, [MULTI], [False, True]), (SlowScalar, BOX, False)],
)
def test_pqn_of_factors_equals_a_slow_computation(slow, space, masked):
    """Targets, loss, and the gradient by finite differences, with constant targets."""
    agent = eqx_q.PQN.create(
        OBS, space, key=jax.random.key(0), network=linear(5 * slow.K, 1), value=slow.part,
        bins=BINS, optimizer="sgd", learning_rate=0.1, rollout_length=T, num_epochs=1,
        num_minibatches=1, lambda_=0.7, discount=0.9, reward_scale=0.5, max_grad_norm=1e9,
    )  # fmt: skip
    rollout = make_rollout(space, 5, masked=masked)
    before = parameters(agent.network)
    targets = slow_targets(slow, before, rollout)
    loss, error = slow_loss(slow, before, rollout, space, targets)
    learnt, metrics = update(agent, rollout, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["td_error"], error, rtol=1e-4)
    steps = [new - old for new, old in zip(parameters(learnt.network), before, strict=True)]
    for step, name in zip(steps, (0, 1), strict=True):
        for place in np.random.default_rng(2).permutation(step.size)[:8]:
            place = np.unravel_index(place, step.shape)
            losses = []
            for change in (1e-4, -1e-4):
                moved = [x.copy() for x in before]
                moved[name][place] += change
                losses.append(slow_loss(slow, moved, rollout, space, targets)[0])
            slope = (losses[0] - losses[1]) / 2e-4
            np.testing.assert_allclose(step[place], -0.1 * slope, rtol=2e-3, atol=2e-6)


# Offline ---------------------------------------------------------------------------------------


def make_offline(create, space, key=0, target=9, **options):
    """With a linear network of 5 choices and another target network."""
    options = {
        "network": linear(5, key), "optimizer": "sgd", "learning_rate": 0.1, "discount": 0.9,
        "reward_scale": 0.5, "bins": BINS, "batch_size": N,
    } | options  # fmt: skip
    agent = create(OBS, space, key=jax.random.key(0), **options)
    if not isinstance(options["network"], str):
        other = linear(len(agent.network.module.bias), target)
        agent = eqx.tree_at(lambda a: a.target_network.module, agent, other)
    return agent


def transitions_of(rollout, n):
    """Every `n`-step transition of sequences that happened, and which sequence it is of."""
    steps, (num_steps, lanes) = rollout.timesteps, rollout.actions.shape[:2]
    ended, rows, lane_of = steps.terminated | steps.truncated, [], []
    for t, lane in itertools.product(range(num_steps - n + 1), range(lanes)):
        if steps.first[t + 1, lane]:
            continue
        reward, length = np.zeros(n, np.float32), 0
        while length < n and not (length and ended[t + length, lane]):
            reward[length] = steps.reward[t + length + 1, lane]
            length += 1
        there = t + length, lane
        row = {
            "obs": steps.obs[t, lane],
            "action": rollout.actions[t, lane],
            "reward": reward,
            "length": np.int32(length),
            "terminated": steps.terminated[there],
            "next_obs": steps.obs[there],
        }
        if steps.action_mask is not None:
            row["action_mask"] = steps.action_mask[t, lane]
            row["next_action_mask"] = steps.action_mask[there]
        rows.append(row)
        lane_of.append(lane)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return eqx_q.Transitions(**batch), np.array(lane_of)


OFFLINE = [
    (eqx_q.DQN, {}),
    (eqx_q.DQN, {"double": True, "n_step": 3}),
    (eqx_q.CQL, {"alpha": 0.7, "n_step": 2}),
    (eqx_q.BC, {}),
]


def slow_offline(agent, batch, space):
    """The loss of transitions of factored actions, one at a time, and their errors."""
    own, target = parameters(agent.network), parameters(agent.target_network)
    losses, errors, gaps = [], [], []
    for i in range(len(batch.action)):
        following = raw_values(target, batch.next_obs[i], 1)[:, 0]
        chooser = raw_values(own, batch.next_obs[i], 1)[:, 0] if agent.double else following
        mask = np.ones(5, bool) if batch.next_action_mask is None else batch.next_action_mask[i]
        goal = sum(0.9**k * 0.5 * batch.reward[i, k] for k in range(batch.length[i]))
        if not batch.terminated[i]:
            index = best(chooser, mask)
            value = np.mean([q[a] for q, a in zip(factors(following), index, strict=True)])
            goal += 0.9 ** batch.length[i] * value
        q = factors(raw_values(own, batch.obs[i], 1)[:, 0])
        index = choice_of(space, batch.action[i])
        chosen = [row[a] for row, a in zip(q, index, strict=True)]
        error = np.mean(chosen) - goal
        legal = factors(
            np.ones(5, bool) if batch.action_mask is None else np.array(batch.action_mask[i])
        )
        gap = 0.0
        for row, mask, a in zip(q, legal, index, strict=True):
            mask[a if mask.any() else slice(None)] = True  # what was done could be done
            gap += (np.log(np.exp(row[mask]).sum()) - row[a]) / len(q)
        gaps.append(gap)
        huber = 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
        td = error**2 if agent.value.td_loss == "squared" else huber
        losses.append(float(agent.td_weight) * td + float(agent.alpha) * gaps[-1])
        errors.append(abs(error))
    return np.mean(losses), np.array(errors), np.mean(gaps)


@pytest.mark.parametrize(("kind", "options"), OFFLINE)
@pytest.mark.parametrize("space", [MULTI, BOX])
def test_offline_losses_of_factors_equal_slow_ones(kind, options, space):
    """Also: sequences without memory teach the same as the transitions in them."""
    masked = kind is eqx_q.DQN and space is MULTI
    agent = make_offline(kind.create, space, **options)
    rollout = make_rollout(space, 5, masked=masked)
    batch, lane_of = transitions_of(rollout, agent.n_step)
    loss, errors, gap = slow_offline(agent, batch, space)
    learnt, metrics = update(agent, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["priority"], errors, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["conservative_gap"], gap, rtol=1e-4)
    assert ("action_rounding" in metrics) == isinstance(space, spaces.Box)
    from_sequences, told = update(agent, rollout, jax.random.key(0))
    np.testing.assert_allclose(told["loss"], loss, rtol=1e-4)
    by_lane = [errors[lane_of == lane].mean() for lane in range(N)]
    np.testing.assert_allclose(told["priority"], by_lane, rtol=1e-4, atol=1e-5)
    for name in set(told) - {"priority", "loss"}:
        np.testing.assert_allclose(told[name], metrics[name], rtol=1e-4, err_msg=name)
    for ours, theirs in zip(
        parameters(from_sequences.network), parameters(learnt.network), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_illegal_choices_are_no_alternatives_of_the_conservative_term():
    agent = make_offline(eqx_q.CQL.create, MULTI, td_weight=0.0, alpha=1.0)
    rollout = make_rollout(MULTI, 5, masked=True)
    steps, gaps = rollout.timesteps, []
    for t, n in np.ndindex(T, N):  # what was done was legal, and not in a reset step
        for done, legal in zip(
            choice_of(MULTI, rollout.actions[t, n]), factors(steps.action_mask[t, n]), strict=True
        ):
            legal[done] = not steps.first[t + 1, n]
    for t, n in np.ndindex(T, N):
        if not steps.first[t + 1, n]:
            q = raw_values(parameters(agent.network), steps.obs[t, n], 1)[:, 0]
            index = choice_of(MULTI, rollout.actions[t, n])
            gaps.append(0.0)
            for row, legal, done in zip(
                factors(q), factors(steps.action_mask[t, n]), index, strict=True
            ):
                gaps[-1] += (np.log(np.exp(row[legal]).sum()) - row[done]) / 2
    learnt, metrics = update(agent, rollout, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], np.mean(gaps), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in parameters(learnt.network))


def test_sequences_of_a_network_with_memory_equal_a_loop_over_steps():
    """Burn-in with each network's own parameters and no gradient, then 2-step double targets."""
    burn_in, n, length = 2, 2, T + 2
    agent = make_offline(
        eqx_q.DQN.create, MULTI, network="mlp", double=True, n_step=n, burn_in=burn_in,
        sequence_length=length - burn_in - 1, value={"name": "scalar", "td_loss": "half_squared"},
        network_options={
            "hidden_sizes": [4], "memory": "gru", "memory_size": 3, "last_reward": True,
        },
    )  # fmt: skip
    assert agent.learns_from == eqx_q.agents.Batches(N, n, length, burn_in)
    other = jax.tree.map(lambda x: -0.7 * x if eqx.is_inexact_array(x) else x, agent.network)
    agent = eqx.tree_at(lambda a: a.target_network, agent, other)
    rollout = jax.tree.map(jnp.asarray, make_rollout(MULTI, 5, steps=length, masked=True))
    steps, index = rollout.timesteps, np.asarray(rollout.actions) - MULTI.start

    def unrolled(network):
        memory, q_values = network.initial_memory(N), []
        last_action, statistics = jnp.full((N, 2), -1), network.initial_statistics()
        for t in range(length + 1):
            first = steps.first[t]
            inputs = Inputs(
                steps.obs[t : t + 1],
                first[None],
                jnp.where(first[:, None], -1, last_action)[None],
                jnp.where(first, 0.0, steps.reward[t])[None],
            )
            output = network(inputs, statistics, memory)
            memory = output.memory
            memory = jax.lax.stop_gradient(memory) if t < burn_in else memory
            last_action = index[min(t, length - 1)]
            q_values.append(output.values[0, ..., 0])
        return jnp.stack(q_values)

    @eqx.filter_jit
    def both(network, target_network):
        return unrolled(network), unrolled(target_network)

    own, following = map(np.asarray, both(agent.network, agent.target_network))
    numbers = jax.tree.map(np.asarray, steps)
    targets, places = {}, []
    for t, lane in itertools.product(range(burn_in, length - n + 1), range(N)):
        if numbers.first[t + 1, lane]:
            continue
        goal, power, there = 0.0, 1.0, t
        while there < t + n and not (
            there > t and (numbers.terminated | numbers.truncated)[there, lane]
        ):
            there += 1
            goal += power * 0.5 * numbers.reward[there, lane]
            power *= 0.9
        if not numbers.terminated[there, lane]:
            chosen = best(own[there, lane], numbers.action_mask[there, lane])
            goal += power * np.mean(
                [q[a] for q, a in zip(factors(following[there, lane]), chosen, strict=True)]
            )
        targets[t, lane] = goal
        places.append((t, lane))
    assert len(places) == N * (length - n + 1 - burn_in) - 2

    def loss_of(network):
        q_values, errors = unrolled(network), []
        for t, lane in places:
            a, b = index[t, lane]
            value = (q_values[t, lane, a] + q_values[t, lane, 2 + b]) / 2
            errors.append(value - targets[t, lane])
        return 0.5 * jnp.mean(jnp.array(errors) ** 2), jnp.array(errors)

    (loss, errors), slope = eqx.filter_jit(eqx.filter_value_and_grad(loss_of, has_aux=True))(
        agent.network
    )
    errors = np.asarray(errors)
    learnt, metrics = update(agent, rollout, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    by_lane = [
        np.mean([abs(e) for e, (_, there) in zip(errors, places, strict=True) if there == lane])
        for lane in range(N)
    ]
    np.testing.assert_allclose(metrics["priority"], by_lane, rtol=1e-4)
    expected = eqx.apply_updates(agent.network, jax.tree.map(lambda g: -0.1 * g, slope))
    for ours, theirs in zip(
        jax.tree.leaves(learnt.network), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def mix(mixer, values, state):
    """The team's value, by a mixer that has tests of its own."""
    return float(mixer.mix(jnp.asarray(values, jnp.float32), jnp.asarray(state))[0])


@pytest.mark.parametrize("mixer", ["vdn", "qmix", "independent"])
def test_teams_learn_offline_what_sums_by_hand_say(mixer):
    """Of a team of two, of whom one is dead for some time; with CQL's term of those who act."""
    rng, M = np.random.default_rng(3), 2
    alive = np.ones((T + 1, N, M), bool)
    alive[1:3, 0, 1] = alive[4:, 2, 0] = False
    own_reward = rng.normal(size=(T + 1, N, M)).astype(np.float32)
    rollout = make_rollout(
        MULTI, 5, team=(M,), agent_mask=alive,
        agent_reward=own_reward if mixer == "independent" else None,
        global_state=rng.normal(size=(T + 1, N, 4)).astype(np.float32),
    )  # fmt: skip
    agent = make_offline(
        eqx_q.CQL.create, MULTI, num_agents=M, mixer=mixer, alpha=0.3, state_size=4
    )
    agent = dataclasses.replace(
        agent, target_mixer=jax.tree.map(lambda x: 1.5 * x, agent.target_mixer)
    )
    assert agent.learns_from == eqx_q.agents.Batches(N, 1, 1)
    steps = rollout.timesteps
    own, target = (raw_values(parameters(x), steps.obs, 1)[..., 0]
                   for x in (agent.network, agent.target_network))  # fmt: skip
    everything = np.ones(5, bool)
    losses, gaps, errors = [], [], [[] for _ in range(N)]
    for t, n in np.ndindex(T, N):
        if steps.first[t + 1, n]:
            continue
        chosen, following = np.zeros(M), np.zeros(M)
        for m in range(M):
            q, ahead = factors(own[t, n, m]), factors(target[t + 1, n, m])
            index = choice_of(MULTI, rollout.actions[t, n, m])
            done = [row[a] for row, a in zip(q, index, strict=True)]
            if alive[t, n, m]:
                chosen[m] = np.mean(done)
                gaps.append(
                    np.mean([np.log(np.exp(r).sum()) - d for r, d in zip(q, done, strict=True)])
                )
            if alive[t + 1, n, m]:
                index = best(target[t + 1, n, m], everything)
                following[m] = np.mean([row[a] for row, a in zip(ahead, index, strict=True)])
        on = 0.9 * (1 - steps.terminated[t + 1, n])
        if mixer != "independent":
            state = steps.global_state[:, n]
            goal = 0.5 * steps.reward[t + 1, n] + on * mix(
                agent.target_mixer, following, state[t + 1]
            )
            found = [mix(agent.mixer, chosen, state[t]) - goal]
        else:
            goal = 0.5 * own_reward[t + 1, n] + on * following
            found = list((chosen - goal)[alive[t, n]])
        errors[n] += found
        losses += [error**2 for error in found]
    learnt, metrics = update(agent, rollout, jax.random.key(0))
    np.testing.assert_allclose(metrics["conservative_gap"], np.mean(gaps), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses) + 0.3 * np.mean(gaps), rtol=1e-4)
    by_lane = [np.abs(error).mean() for error in errors]
    np.testing.assert_allclose(metrics["priority"], by_lane, rtol=1e-4)
    assert int(learnt.learnt) == 1


def test_a_population_learns_from_sequences_as_its_members_would_alone():
    """Each from its own lanes, with their weights."""

    def create(key):
        return eqx_q.DQN.create(
            OBS, MULTI, key=key, network=eqx.nn.Linear(3, 5, key=key), batch_size=N, n_step=2
        )

    keys = jax.random.split(jax.random.key(0), 2)
    population = eqx_q.Population(eqx.filter_vmap(create)(keys))
    rollout = make_rollout(MULTI, 5, lanes=2 * N)
    weight = np.random.default_rng(0).uniform(0.1, 1, 2 * N).astype(np.float32)
    rollout = eqx.tree_at(lambda r: r.weight, rollout, weight, is_leaf=lambda x: x is None)
    _, metrics = update(population, rollout, jax.random.key(0))
    for s in range(2):
        lanes = slice(s * N, (s + 1) * N)
        own = jax.tree.map(lambda x, lanes=lanes: x[:, lanes],
                           eqx.tree_at(lambda r: r.weight, rollout, None))  # fmt: skip
        own = eqx.tree_at(lambda r: r.weight, own, weight[lanes], is_leaf=lambda x: x is None)
        _, expected = update(population.member(s), own, jax.random.key(0))
        for name in ("loss", "priority"):
            np.testing.assert_allclose(metrics[name][s], expected[name], rtol=1e-5)


@pytest.mark.parametrize("space", [MULTI, BOX])
def test_every_lane_explores_by_itself(space):
    """Each factor uniformly over its own choices, though one has fewer than the other."""
    agent = eqx_q.PQN.create(OBS, space, key=jax.random.key(0), network=linear(5, 0), bins=BINS)
    obs = np.zeros((6000, 3), np.float32)
    actions = np.asarray(agent.act(obs, epsilon=1.0, key=jax.random.key(1)).action)
    index = np.array([choice_of(space, action) for action in actions])
    together = np.bincount(index[:, 0] * 3 + index[:, 1], minlength=6) / 6000
    np.testing.assert_allclose(together, 1 / 6, atol=0.02)
    greedy = np.asarray(agent.act(obs, epsilon=0.0, key=jax.random.key(1)).action)
    assert len(np.unique(greedy, axis=0)) == 1


# Observations ----------------------------------------------------------------------------------


def test_a_dict_is_worth_what_its_entries_side_by_side_are():
    """With equal parameters: values, and what is learnt; whole numbers count as one-hot."""
    rng = np.random.default_rng(0)
    rollout = make_rollout(MULTI, 5)
    own = {
        "number": rng.integers(2, 5, (T + 1, N)).astype(np.int32),
        "arm": {"speed": rng.normal(size=(T + 1, N, 1, 2)).astype(np.float32)},
    }
    flat = np.concatenate([own["arm"]["speed"][:, :, 0], np.eye(3)[own["number"] - 2]], -1)
    of_dict = spaces.Dict(
        number=spaces.Discrete(3, start=2),
        arm=spaces.Dict(speed=spaces.Box(-np.inf, np.inf, (1, 2), np.float32)),
    )
    of_box = spaces.Box(-np.inf, np.inf, (5,), np.float32)

    def create(space, key):
        return eqx_q.PQN.create(
            space, MULTI, key=jax.random.key(key), network="mlp", rollout_length=T,
            num_minibatches=1, network_options={"hidden_sizes": [6], "head": "dueling"},
        )  # fmt: skip

    agents, learnt = [create(of_dict, 0), create(of_box, 1)], []
    leaves = jax.tree.leaves(agents[0].network)
    assert [x.shape for x in jax.tree.leaves(agents[1].network)] == [x.shape for x in leaves]
    network = jax.tree.unflatten(jax.tree.structure(agents[1].network), leaves)
    agents[1] = eqx.tree_at(lambda a: a.network, agents[1], network)
    for agent, obs in zip(agents, (own, flat.astype(np.float32)), strict=True):
        steps = eqx.tree_at(lambda s: s.obs, rollout.timesteps, obs)
        decision = agent.act(jax.tree.map(lambda x: x[0], obs))
        agent, metrics = update(agent, Rollout(steps, rollout.actions), jax.random.key(0))
        learnt.append((decision, metrics, jax.tree.leaves(agent.network)))
    for ours, theirs in zip(*map(jax.tree.leaves, learnt), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# A game that tells mixers apart ------------------------------------------------------------------


@pytest.mark.parametrize(("mixer", "reward"), [("qmix", 8.0), ("vdn", 7.0)])
def test_the_two_step_game_is_solved_by_a_monotone_mix_and_not_by_a_sum(mixer, reward):
    """Rashid et al. 2018, §6.1: exploration is uniform, so one rollout of it has everything."""
    env, length = TwoStep(64), 6
    agent = eqx_q.PQN.create(
        env.observation_space, env.action_space, key=jax.random.key(0), num_agents=2,
        state_size=env.state_size, network=linear(2, 0), mixer=mixer, optimizer="adam",
        learning_rate=0.02, rollout_length=length, num_epochs=1, num_minibatches=1, lambda_=0.0,
    )  # fmt: skip

    def step(state, key):
        state, _ = state
        action = jax.random.randint(key, (64, 2), 0, 2)
        state, timestep = env.step(state, action, key)
        return (state, timestep), (timestep, action)

    @eqx.filter_jit
    def learn(agent):
        keys = jax.random.split(jax.random.key(1), length)
        start = env.reset(keys[0])
        _, (timesteps, actions) = jax.lax.scan(step, start, keys)
        timesteps = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), start[1], timesteps)
        arrays, static = eqx.partition(agent, eqx.is_array)

        def again(arrays, key):
            agent, metrics = eqx.combine(arrays, static).update(
                Rollout(timesteps, actions), key=key
            )
            return eqx.filter(agent, eqx.is_array), metrics["loss"]

        arrays, losses = jax.lax.scan(again, arrays, jax.random.split(jax.random.key(2), 600))
        return eqx.combine(arrays, static), losses[-1]

    agent, loss = learn(agent)
    state, timestep = env.reset(jax.random.key(0))
    earned = timestep.reward
    for _ in range(2):
        state, timestep = env.step(state, agent.act(timestep.obs).action, jax.random.key(0))
        earned = earned + timestep.reward
    np.testing.assert_array_equal(earned, reward)
    assert timestep.terminated.all()
    assert (loss < 0.05) == (mixer == "qmix")
