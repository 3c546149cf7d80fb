"""DQN, CQL and behaviour cloning against plain NumPy, and their acting."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_q
from eqx_q.agents import Batches
from eqx_q.errors import UsageError
from eqx_q.nets import Inputs, Network
from eqx_q.nets.heads import LinearHead
from eqx_q.nets.layers import Activation, Linear, Sequential

OBS = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = gymnasium.spaces.Discrete(4)
B = 6

# Compiled: in eager mode every operation is compiled for itself.
update = eqx.filter_jit(lambda agent, batch: agent.update(batch, key=jax.random.key(0)))


def make_batch(seed=0, n=1, weighted=False):
    """Random transitions: two terminated, one truncated, and of more steps some cut."""
    rng = np.random.default_rng(seed)
    length = np.full(B, n) if n == 1 else rng.permutation(np.arange(B) % n + 1)
    reward = rng.normal(scale=2, size=(B, n)) * (np.arange(n) < length[:, None])
    return eqx_q.Transitions(
        obs=rng.normal(size=(B, 3)).astype(np.float32),
        action=rng.integers(0, 4, B).astype(np.int32),
        reward=reward.astype(np.float32),
        length=length.astype(np.int32),
        terminated=rng.permutation(B) < 2,
        next_obs=rng.normal(size=(B, 3)).astype(np.float32),
        weight=rng.uniform(0.1, 1, B).astype(np.float32) if weighted else None,
    )


def linear(key):
    return eqx.nn.Linear(3, 4, key=jax.random.key(key))


def make_agent(key=0, create=eqx_q.DQN.create, **options):
    defaults = {"network": linear(key), "discount": 0.9, "learning_rate": 0.01, "batch_size": B}
    return create(OBS, ACT, key=jax.random.key(key), **(defaults | options))


def with_target(agent, key=9):
    """Its target network another one than its network."""
    of_linear = lambda a: a.target_network.module  # noqa: E731
    return eqx.tree_at(of_linear, agent, linear(key))


def parameters(network):
    return tuple(np.asarray(x, np.float64) for x in (network.module.weight, network.module.bias))


def targets_of(agent, batch):
    """What `update` regresses on: the mean where there are several samples."""
    batch = jax.tree.map(jnp.asarray, batch)
    return np.asarray(agent._items(batch).target)[:, 0].mean(-1)


def slow_targets(agent, batch):
    """One at a time."""
    weight, bias = parameters(agent.target_network)
    own_weight, own_bias = parameters(agent.network)
    targets = []
    for i in range(B):
        values = weight @ batch.next_obs[i] + bias
        choice = own_weight @ batch.next_obs[i] + own_bias if agent.double else values
        target, power = 0.0, 1.0
        for step in range(batch.length[i]):
            target += power * float(agent.reward_scale) * batch.reward[i, step]
            power *= float(agent.discount)
        if not batch.terminated[i]:
            target += power * values[np.argmax(choice)]
        targets.append(target)
    return np.array(targets)


def slow_loss(agent, batch, weight, bias):
    """The loss, its gradient (by the chain rule) and each TD error."""
    targets = slow_targets(agent, batch)
    loss, errors = 0.0, []
    d_weight, d_bias = np.zeros_like(weight), np.zeros_like(bias)
    for i in range(B):
        q = weight @ batch.obs[i] + bias
        a = batch.action[i]
        error = q[a] - targets[i]
        errors.append(abs(error))
        if agent.value.td_loss == "squared":
            td, d_td = error**2, 2 * error
        elif abs(error) <= 1:
            td, d_td = 0.5 * error**2, error
        else:
            td, d_td = abs(error) - 0.5, np.sign(error)
        softmax = np.exp(q) / np.exp(q).sum()
        one_hot = np.arange(4) == a
        share = (1.0 if batch.weight is None else batch.weight[i]) / B
        gap = np.log(np.exp(q).sum()) - q[a]
        loss += share * (float(agent.td_weight) * td + float(agent.alpha) * gap)
        d_q = share * (
            float(agent.td_weight) * d_td * one_hot + float(agent.alpha) * (softmax - one_hot)
        )
        d_weight += np.outer(d_q, batch.obs[i])
        d_bias += d_q
    return loss, (d_weight, d_bias), np.array(errors)


class SlowAdam:
    """Kingma & Ba 2015, Algorithm 1."""

    def __init__(self, epsilon):
        self.epsilon, self.t = epsilon, 0
        self.first, self.second = {}, {}

    def step(self, parameters, gradients, learning_rate):
        self.t += 1
        new = []
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            self.first[i] = 0.9 * self.first.get(i, 0) + 0.1 * g
            self.second[i] = 0.999 * self.second.get(i, 0) + 0.001 * g**2
            first = self.first[i] / (1 - 0.9**self.t)
            second = self.second[i] / (1 - 0.999**self.t)
            new.append(p - learning_rate * first / (np.sqrt(second) + self.epsilon))
        return tuple(new)


SQUARED, HUBER = ({"name": "scalar", "td_loss": name} for name in ("squared", "huber"))
CASES = [
    {},
    {"value": SQUARED},
    {"value": SQUARED, "double": True},
    {"double": True, "n": 3, "reward_scale": 0.3},
    {"n": 2, "weighted": True},
    {"create": eqx_q.CQL.create, "alpha": 0.7},
    {"create": eqx_q.CQL.create, "alpha": 4.0, "value": HUBER, "n": 5, "weighted": True},
    {"create": eqx_q.BC.create},
    {"max_grad_norm": 0.05, "value": SQUARED},
]


@pytest.mark.parametrize("options", CASES)
def test_update_equals_a_slow_computation(options):
    options = dict(options)
    n, weighted = options.pop("n", 1), options.pop("weighted", False)
    agent = make_agent(n_step=n, optimizer={"name": "adam", "eps": 0.01}, **options)
    agent = with_target(agent)
    adam = SlowAdam(0.01)
    for i in range(4):
        batch = make_batch(i, n, weighted)
        loss, gradients, errors = slow_loss(agent, batch, *parameters(agent.network))
        np.testing.assert_allclose(targets_of(agent, batch), slow_targets(agent, batch), rtol=1e-4)
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        scale = min(1.0, float(agent.max_grad_norm) / norm)
        expected = adam.step(parameters(agent.network), [scale * g for g in gradients], 0.01)
        agent, metrics = update(agent, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(metrics["priority"], errors, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(parameters(agent.network), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert int(agent.num_updates) == int(agent.learnt) == 4


def test_what_is_told():
    agent, batch = with_target(make_agent(alpha=0.5)), make_batch()
    weight, bias = parameters(agent.network)
    q = batch.obs @ weight.T + bias
    chosen = q[np.arange(B), batch.action]
    _, metrics = update(agent, batch)
    expected = {
        "td_error": np.abs(slow_targets(agent, batch) - chosen).mean(),
        "q_value": chosen.mean(),
        "q_max": q.max(-1).mean(),
        "conservative_gap": (np.log(np.exp(q).sum(-1)) - chosen).mean(),
        "agreement": (q.argmax(-1) == batch.action).mean(),
        "target": slow_targets(agent, batch).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_dead_units_are_those_that_are_zero_for_all_of_the_batch():
    keys = jax.random.split(jax.random.key(0))
    hidden, head = Linear(OBS.shape[0], 16, key=keys[0]), Linear(16, int(ACT.n), key=keys[1])
    hidden = eqx.tree_at(lambda x: x.bias, hidden, hidden.bias.at[:5].set(-100.0))
    encoder = Sequential((hidden, Activation("relu")))
    network = Network(encoder, (), LinearHead(head, 1), (int(ACT.n),))
    agent, batch = make_agent(network=network), make_batch()
    dead = np.all(batch.obs @ hidden.weight + hidden.bias <= 0, axis=0)
    _, metrics = update(agent, batch)
    assert dead[:5].all() and not dead.all()
    np.testing.assert_allclose(metrics["dead_units"], dead.mean())


def test_the_loss_of_behaviour_cloning_is_the_cross_entropy():
    agent, batch = make_agent(create=eqx_q.BC.create), make_batch()
    weight, bias = parameters(agent.network)
    logits = batch.obs @ weight.T + bias
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(probabilities[np.arange(B), batch.action]).mean()
    _, metrics = update(agent, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["conservative_gap"], expected, rtol=1e-5)


def test_presets():
    key = jax.random.key(0)
    dqn, cql, bc = (x.create(OBS, ACT, key=key) for x in (eqx_q.DQN, eqx_q.CQL, eqx_q.BC))
    for agent, kind in ((dqn, eqx_q.DQN), (cql, eqx_q.CQL), (bc, eqx_q.BC)):
        assert type(agent) is kind
        assert agent.learns_from == Batches(32) and int(agent.learnt) == 0
        assert (agent.batch_size, agent.target_update_period, agent.n_step) == (32, 2000, 1)
        assert float(agent.learning_rate) == np.float32(5e-5) and not agent.double
    assert (dqn.value.td_loss, float(dqn.alpha), float(dqn.td_weight)) == ("huber", 0, 1)
    assert float(dqn.optimizer.options["eps"]) == np.float32(1.5e-4)
    assert (cql.value.td_loss, float(cql.td_weight)) == ("squared", 1)
    assert float(cql.alpha) == np.float32(0.1)
    assert float(cql.optimizer.options["eps"]) == np.float32(3.125e-4)
    assert (float(bc.alpha), float(bc.td_weight)) == (1, 0)
    options = {"alpha": 0.0, "value": HUBER, "optimizer": {"name": "adam", "eps": 1.5e-4}}
    like_dqn = eqx_q.CQL.create(OBS, ACT, key=key, **options)
    assert eqx.tree_equal(jax.tree.leaves(like_dqn), jax.tree.leaves(dqn))


def quantile_agent(key=0, **options):
    options = {"network": "mlp", "discount": 0.9, "batch_size": B} | options
    options["network_options"] = {"hidden_sizes": [8]}
    options["value"] = {"name": "quantile", "num_quantiles": 5}
    return eqx_q.DQN.create(OBS, ACT, key=jax.random.key(key), **options)


def raw_values(network, obs):
    output = network(Inputs(jnp.asarray(obs)[None]), network.initial_statistics(), ())
    return np.asarray(output.values[0])


def slow_quantile_loss(quantiles, targets):
    """Of one transition: equation 10 of Dabney et al. 2018, over all pairs."""
    num, loss = len(quantiles), 0.0
    for i, theta in enumerate(quantiles):
        fraction = (2 * i + 1) / (2 * num)
        for target in targets:
            u = target - theta
            huber = 0.5 * u * u if abs(u) <= 1 else abs(u) - 0.5
            loss += abs(fraction - (u < 0)) * huber / len(targets)
    return loss


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("n", "alpha"), [(1, 0.0), (3, 4.0)])
def test_quantile_loss_equals_a_double_loop(double, n, alpha):
    agent = quantile_agent(double=double, n_step=n, alpha=alpha, reward_scale=0.5)
    agent = eqx.tree_at(lambda a: a.target_network, agent, quantile_agent(1).network)
    batch = make_batch(3, n)
    quantiles = raw_values(agent.network, batch.obs)
    following = raw_values(agent.target_network, batch.next_obs)
    own = raw_values(agent.network, batch.next_obs)
    assert quantiles.shape == (B, 4, 5)
    loss, errors, means = 0.0, [], []
    for i in range(B):
        best = np.argmax((own if double else following)[i].mean(-1))
        targets = np.full(5, sum(0.5 * 0.9**t * batch.reward[i, t] for t in range(n)))
        if not batch.terminated[i]:
            targets += 0.9 ** batch.length[i] * following[i, best]
        q, a = quantiles[i].mean(-1), batch.action[i]
        gap = np.log(np.exp(q).sum()) - q[a]
        loss += (slow_quantile_loss(quantiles[i, a], targets) + alpha * gap) / B
        errors.append(abs(targets.mean() - q[a]))
        means.append(targets.mean())
    np.testing.assert_allclose(targets_of(agent, batch), means, rtol=1e-4, atol=1e-5)
    _, metrics = update(agent, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["priority"], errors, rtol=1e-4, atol=1e-5)


def test_quantiles_act_by_their_means():
    agent = quantile_agent()
    obs = make_batch().obs
    q = raw_values(agent.network, obs).mean(-1)
    decision = agent.act(obs)
    np.testing.assert_array_equal(decision.action, q.argmax(-1))
    np.testing.assert_allclose(decision.value, q.max(-1), rtol=1e-5)


def test_targets_come_from_the_target_network_alone():
    agent, batch = with_target(make_agent()), make_batch()
    other = eqx.tree_at(lambda a: a.network.module, agent, linear(5))
    np.testing.assert_array_equal(targets_of(agent, batch), targets_of(other, batch))
    other = with_target(agent, 5)
    assert not np.allclose(targets_of(agent, batch), targets_of(other, batch))


@pytest.mark.parametrize("period", [1, 3])
def test_target_network_is_copied_exactly_and_only_when_due(period):
    agent = make_agent(target_update_period=period)
    target = agent.network
    assert eqx.tree_equal(agent.target_network, agent.network)
    for i in range(1, 8):
        agent, _ = update(agent, make_batch(i))
        if i % period == 0:
            target = agent.network
        assert eqx.tree_equal(agent.target_network, target)
        assert bool(eqx.tree_equal(agent.target_network, agent.network)) == (i % period == 0)


def test_values_of_terminal_observations_are_never_looked_at():
    agent, batch = make_agent(), make_batch()
    assert batch.terminated.any()
    spoilt = np.where(batch.terminated[:, None], np.nan, batch.next_obs).astype(np.float32)
    spoilt = eqx.tree_at(lambda b: b.next_obs, batch, spoilt)
    a, _ = update(agent, batch)
    b, _ = update(agent, spoilt)
    assert eqx.tree_equal(a, b)


def test_statistics_of_batch_norm_move():
    options = {"hidden_sizes": [8], "norm": "batch_norm", "normalize_input": True}
    agent = make_agent(network="mlp", network_options=options)
    batch = make_batch()
    batch = eqx.tree_at(lambda b: b.obs, batch, batch.obs + 5)
    before, first = agent.statistics, agent
    for _ in range(200):
        agent, _ = update(agent, batch)
    changed = jax.tree.map(lambda a, b: not np.allclose(a, b), before, agent.statistics)
    assert all(jax.tree.leaves(changed))
    # Acting and targets use them: with those of the beginning they are others.
    stale = eqx.tree_at(lambda a: a.statistics, agent, before)
    assert not np.allclose(agent.act(batch.obs).value, stale.act(batch.obs).value)
    assert not np.allclose(targets_of(agent, batch), targets_of(stale, batch))
    assert eqx.tree_equal(first.statistics, before)  # the old agent is as it was


def stacked(batches):
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def assert_close(a, b):
    pairs = zip(*(jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (a, b)), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_members_of_a_population_learn_as_they_would_alone():
    """Over seeds and α at once: one compiled program, other values."""
    alphas = [0.0, 0.1, 1.0, 4.0]
    keys = jax.random.split(jax.random.key(0), 4)

    def create(key, alpha):
        network = eqx.nn.Linear(3, 4, key=key)
        return make_agent(network=network, alpha=alpha, n_step=2, target_update_period=2)

    population = eqx_q.Population(eqx.filter_vmap(create)(keys, jnp.array(alphas)))
    assert population.learns_from == Batches(B, 2) and population.num_members == 4
    alone = [create(key, alpha) for key, alpha in zip(keys, alphas, strict=True)]
    for i in range(3):
        batches = [make_batch(10 * i + s, 2, weighted=True) for s in range(4)]
        population, metrics = update(population, stacked(batches))
        for s in range(4):
            alone[s], own = update(alone[s], batches[s])
            for name, rtol in (("loss", 1e-4), ("priority", 1e-3)):
                np.testing.assert_allclose(metrics[name][s], own[name], rtol=rtol, atol=1e-4)
    for s in range(4):
        assert_close(population.member(s), alone[s])
    np.testing.assert_array_equal(population.learnt, [3, 3, 3, 3])


def test_other_hyperparameters_compile_nothing():
    traces = []

    @eqx.filter_jit
    def update(agent, batch):
        traces.append(1)
        return agent.update(batch, key=jax.random.key(0))

    for alpha, discount, rate in ((0.1, 0.9, 0.01), (4.0, 0.99, 1e-3)):
        agent = make_agent(network="mlp", alpha=alpha, discount=discount, learning_rate=rate)
        update(agent, make_batch())
    assert len(traces) == 1


def test_acts_greedily_without_a_key():
    agent, obs = make_agent(), make_batch().obs
    weight, bias = parameters(agent.network)
    q = obs @ weight.T + bias
    decision = agent.act(obs)
    np.testing.assert_array_equal(decision.action, q.argmax(-1))
    np.testing.assert_allclose(decision.value, q.max(-1), rtol=1e-5)
    assert decision.memory is None and agent.initial_memory(3) is None
    one = agent.act(obs[0].astype(np.float64))
    assert one.action.shape == one.value.shape == () and int(one.action) == q[0].argmax()
    mask = np.ones((B, 4), bool)
    mask[np.arange(B), q.argmax(-1)] = False
    masked = agent.act(obs, action_mask=mask)
    np.testing.assert_array_equal(masked.action, np.where(mask, q, -np.inf).argmax(-1))
    np.testing.assert_allclose(masked.value, np.where(mask, q, -np.inf).max(-1), rtol=1e-5)


def test_explores_with_a_key():
    agent = make_agent(epsilon=0.0)
    obs = np.tile(make_batch().obs[:1], (4000, 1))
    greedy = int(agent.act(obs[0]).action)
    key = jax.random.key(0)
    assert np.all(agent.act(obs, key=key).action == greedy)
    actions = np.asarray(agent.act(obs, key=key, epsilon=0.4).action)
    np.testing.assert_allclose(np.mean(actions == greedy), 0.6 + 0.1, atol=0.03)
    mask = np.tile([True, True, False, True], (4000, 1))
    mask[:, greedy] = True
    actions = np.asarray(agent.act(obs, key=key, epsilon=1.0, action_mask=mask).action)
    assert set(np.unique(actions)) == set(np.flatnonzero(mask[0]))
    own = make_agent(epsilon=1.0)
    assert len(np.unique(own.act(obs, key=key).action)) == 4


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4,), r"obs has shape \(4,\): it must end with its space's shape \(3,\)"),
        ((2, 4), r"obs has shape \(2, 4\): it must end with its space's shape \(3,\)"),
        ((), r"obs has shape \(\): it must end with its space's shape \(3,\)"),
        ((2, 2, 3), r"leading axes \(2, 2\) .*: the agent expects \(lanes\), or \(\) for one"),
    ],
)
def test_observations_of_another_shape_are_refused(shape, message):
    with pytest.raises(UsageError, match=message):
        make_agent().act(np.zeros(shape, np.float32))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(UsageError, match=r"action_mask has shape \(4,\), not \(2, 4\)"):
        make_agent().act(np.zeros((2, 3), np.float32), action_mask=np.ones(4, bool))


@pytest.mark.parametrize("quantiles", [False, True])
def test_saved_and_loaded_it_is_the_same(tmp_path, quantiles):
    options = {"network": "mlp", "alpha": 0.3, "create": eqx_q.CQL.create}
    agent = quantile_agent() if quantiles else make_agent(**options)
    agent, _ = update(agent, make_batch())
    eqx_q.save(tmp_path / "agent.eqx", agent)
    loaded = eqx_q.load(tmp_path / "agent.eqx")
    assert eqx.tree_equal(loaded, agent)
    assert type(loaded) is (eqx_q.DQN if quantiles else eqx_q.CQL)
    a, b = (update(x, make_batch(1)) for x in (agent, loaded))
    assert eqx.tree_equal(a, b)


def test_the_network_of_an_online_agent_learns_offline():
    online = eqx_q.PQN.create(
        OBS, ACT, key=jax.random.key(0), network="mlp", network_options={"hidden_sizes": [8]}
    )
    agent = make_agent(network=online.network)
    assert eqx.tree_equal(agent.network, online.network)
    obs = make_batch().obs
    np.testing.assert_array_equal(agent.act(obs).action, online.act(obs).action)
    update(agent, make_batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "mlq"}, "unknown network 'mlq': the nearest are .*mlp"),
        ({"network": "mlp", "network_options": {"hidden": [3]}}, "unknown option .*hidden_sizes"),
        ({"network_options": {"hidden_sizes": [3]}}, "network_options are for named networks"),
        (
            {"network": eqx.nn.Linear(3, 5, key=jax.random.key(0))},
            "there are 4 choices of action with 1 values each",
        ),
        ({"network": eqx.nn.Linear(2, 4, key=jax.random.key(0))}, "cannot take observations"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True"),
        ({"n_step": 0}, "n_step must be a whole number"),
        ({"target_update_period": 0}, "target_update_period must be a whole number"),
        ({"discount": 1.1}, "discount=1.1 is out of range"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is out of range"),
        ({"optimizer": {"name": "adam", "eps": -1.0}}, r"optimizer\.eps=-1.0 is out of range"),
        ({"value": {"name": "scalar", "td_loss": "hube"}}, "unknown td_loss 'hube': .* huber"),
        ({"alpha": -0.1}, "alpha=-0.1 is out of range"),
        ({"td_weight": -0.1}, "td_weight=-0.1 is out of range"),
        ({"epsilon": 2.0}, "epsilon=2.0 is out of range"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is out of range"),
        (
            {"network": "mlp", "network_options": {"num_quantiles": 5}},
            "num_quantiles is an option of the value",
        ),
        ({"value": {"name": "quantile", "num_quantiles": 0}}, "num_quantiles must be a"),
        ({"value": "quantile"}, "must return 200 for each choice"),
        ({"burn_in": 2}, "burn_in=2 warms up memory, but this network has none"),
        (
            {"network": "mlp", "network_options": {"memory": "gru"}, "burn_in": -1},
            "burn_in must be a whole number of at least 0, got -1",
        ),
        ({"sequence_length": 0}, "sequence_length must be a whole number"),
        (
            {"network": "mlp", "value": "quantile", "num_agents": 2, "mixer": "qmix"},
            "QMIX mixes expected values, so it cannot learn quantiles",
        ),
    ],
)
def test_what_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        make_agent(**options)


def test_spaces_that_cannot_work():
    key = jax.random.key(0)
    with pytest.raises(UsageError, match="a space of kind Text is not supported"):
        eqx_q.DQN.create(gymnasium.spaces.Text(3), ACT, key=key)
    with pytest.raises(UsageError, match=r"divided into bins, but .* has no bounds"):
        eqx_q.DQN.create(OBS, OBS, key=key)


def test_who_learns_from_sequences_refuses_transitions():
    agent = make_agent(network="mlp", network_options={"memory": "gru", "hidden_sizes": [4]})
    with pytest.raises(UsageError, match="learns from sequences, not from single transitions"):
        update(agent, make_batch())
    assert agent.learns_from == Batches(B, 1, 32)
    team = make_agent(num_agents=2, n_step=3)
    assert team.learns_from == Batches(B, 3, 3)
