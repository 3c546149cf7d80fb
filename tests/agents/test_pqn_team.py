"""PQN in teams: targets and losses against sums by hand, with masks and dead agents."""

from typing import ClassVar

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_q
from eqx_q.agents.mixers import QMIX, VDN, AbstractMixer, Independent
from eqx_q.errors import UsageError
from eqx_q.types import Episode, Rollout, TimeStep

OBS = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = gymnasium.spaces.Discrete(4)
T, N, M = 6, 2, 3


def make_agent(mixer, **options):
    defaults = {
        "rollout_length": T,
        "num_epochs": 1,
        "num_minibatches": 1,
        "learning_rate": 0.03,
        "schedule_steps": 1000.0,
        "lambda_": 0.7,
        "discount": 0.9,
        "reward_scale": 0.5,
        "state_size": 4,
    }
    network = eqx.nn.Linear(3, 4, key=jax.random.key(1))
    return eqx_q.PQN.create(
        OBS, ACT, key=jax.random.key(0), num_agents=M, network=network, mixer=mixer,
        **(defaults | options)
    )  # fmt: skip


def make_rollout(own_rewards=True, seed=0):
    """Random numbers; agents die and stay dead until the episode's end; actions are legal."""
    rng = np.random.default_rng(seed)
    shape = (T + 1, N)
    terminated, truncated, first = (np.zeros(shape, bool) for _ in range(3))
    truncated[2, 0] = first[3, 0] = True
    terminated[4, 1] = first[5, 1] = True
    alive = np.ones((*shape, M), bool)
    alive[1:3, 0, 1] = alive[3:5, 1, 0] = alive[6, 0, 2] = False
    action_mask = rng.random((*shape, M, 4)) < 0.6
    action_mask[..., 0] |= ~action_mask.any(-1)
    reward = rng.normal(size=shape).astype(np.float32)
    reward[first] = 100.0  # a learner that does not mask the reset step would see these
    timesteps = TimeStep(
        obs=rng.normal(size=(*shape, M, 3)).astype(np.float32),
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        first=first,
        episode=Episode(terminated | truncated, reward, np.zeros(shape, np.int32)),
        action_mask=action_mask,
        agent_mask=alive,
        agent_reward=rng.normal(size=(*shape, M)).astype(np.float32) if own_rewards else None,
        global_state=rng.normal(size=(*shape, 4)).astype(np.float32),
    )
    actions = np.argmax(rng.random((T, N, M, 4)) * action_mask[:-1], -1).astype(np.int32)
    return jax.tree.map(jnp.asarray, Rollout(timesteps, actions))


def best_legal(agent, steps):
    """`[T+1, N, M]`, by hand; of the dead nothing is to be expected."""
    q_values = np.asarray(steps.obs) @ np.asarray(agent.network.module.weight).T
    q_values = q_values + np.asarray(agent.network.module.bias)
    values = np.where(steps.action_mask, q_values, -np.inf).max(-1)
    return q_values, np.where(steps.agent_mask, values, 0.0)


def slow_targets(rewards, values, steps):
    """`[T, N, K]` from the definition, K values a lane: one of the team, or one of each agent."""
    targets = np.zeros_like(values[1:])
    for t in reversed(range(T)):
        for n in range(N):
            for k in range(values.shape[-1]):
                dead = values.shape[-1] == M and not steps.agent_mask[t + 1, n, k]
                terminated = steps.terminated[t + 1, n] or dead
                trace = 0.0 if terminated or steps.truncated[t + 1, n] or t == T - 1 else 0.7
                later = targets[t + 1, n, k] if t < T - 1 else 0.0
                ahead = (1 - trace) * values[t + 1, n, k] + trace * later
                reward = 0.5 * rewards[t + 1, n, k]
                targets[t, n, k] = reward + (0.0 if terminated else 0.9 * ahead)
    return targets


def case(mixer, agent, rollout):
    """Targets `[T, N, K]`, chosen values, and which of them happened, by hand."""
    steps = jax.tree.map(np.asarray, rollout.timesteps)
    q_values, values = best_legal(agent, steps)
    actions = np.asarray(rollout.actions)
    chosen = np.take_along_axis(q_values[:-1], actions[..., None], -1)[..., 0]
    chosen = np.where(steps.agent_mask[:-1], chosen, 0.0)
    happened = ~steps.first[1:]
    if mixer != "independent":

        def mix(values, state):
            return np.asarray(agent.mixer.mix(jnp.asarray(values), jnp.asarray(state)))

        rewards, values = steps.reward[..., None], mix(values, steps.global_state)
        chosen, happened = mix(chosen, steps.global_state[:-1]), happened[..., None]
    else:
        rewards = steps.agent_reward if steps.agent_reward is not None else steps.reward[..., None]
        rewards = np.broadcast_to(rewards, values.shape)
        happened = happened[..., None] & steps.agent_mask[:-1]
    return slow_targets(rewards, values, steps), chosen, happened


@pytest.mark.parametrize("own_rewards", [True, False])
@pytest.mark.parametrize("mixer", ["vdn", "qmix", "independent"])
def test_targets_and_loss_are_those_by_hand(mixer, own_rewards):
    agent, rollout = make_agent(mixer), make_rollout(own_rewards)
    targets, chosen, happened = case(mixer, agent, rollout)
    ours = np.asarray(agent._targets(rollout))[..., 0]
    np.testing.assert_allclose(ours[happened], targets[happened], rtol=1e-4, atol=1e-5)
    _, metrics = agent.update(rollout, key=jax.random.key(0))
    expected = 0.5 * np.mean((targets - chosen)[happened] ** 2)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


def test_values_from_acting_make_the_same_targets():
    agent, rollout = make_agent("vdn"), make_rollout()
    steps = rollout.timesteps
    values = jnp.stack(
        [agent.act(steps.obs[t], action_mask=steps.action_mask[t]).value for t in range(T)]
    )
    given = eqx.tree_at(lambda r: r.values, rollout, values, is_leaf=lambda x: x is None)
    np.testing.assert_allclose(agent._targets(given), agent._targets(rollout), rtol=1e-5)


def test_the_dead_and_the_phantoms_teach_nothing():
    agent, rollout = make_agent("vdn"), make_rollout()
    steps = rollout.timesteps
    dead, reset = ~steps.agent_mask, steps.first
    obs = jnp.where(dead[..., None], 50.0, steps.obs)
    # The final observation before a reset is looked at, what the reset's action does is not.
    actions = jnp.where(reset[1:][..., None] | dead[:-1], 3 - rollout.actions, rollout.actions)
    changed = Rollout(eqx.tree_at(lambda s: s.obs, steps, obs), actions)
    one, _ = agent.update(rollout, key=jax.random.key(0))
    other, _ = agent.update(changed, key=jax.random.key(0))
    np.testing.assert_allclose(
        one.network.module.weight, other.network.module.weight, rtol=1e-5, atol=1e-7
    )


def test_to_an_independent_agent_death_is_an_end():
    """It dies after the second step; what the team is paid in the fourth is none of its own."""
    agent, rollout = make_agent("independent", discount=1.0, lambda_=1.0), make_rollout(False)
    no = jnp.zeros((T + 1, N), bool)
    reward = jnp.zeros((T + 1, N)).at[2].set(4.0).at[4].set(100.0)
    alive = jnp.ones((T + 1, N, M), bool).at[2:, :, 0].set(False)
    steps = eqx.tree_at(
        lambda s: (s.reward, s.terminated, s.truncated, s.first, s.agent_mask),
        rollout.timesteps,
        (reward, no.at[-1].set(True), no, no, alive),
    )
    targets = agent._targets(Rollout(steps, rollout.actions))[..., 0]
    np.testing.assert_allclose(targets[:2, :, 0], 0.5 * 4.0)
    np.testing.assert_allclose(targets[:2, :, 1], 0.5 * 104.0)


def test_agents_act_by_themselves():
    agent, rollout = make_agent("vdn"), make_rollout()
    obs, mask = rollout.timesteps.obs[0], rollout.timesteps.action_mask[0]
    team = agent.act(obs, action_mask=mask)
    assert team.action.shape == team.value.shape == (N, M)
    q_values, _ = best_legal(agent, jax.tree.map(np.asarray, rollout.timesteps))
    expected = np.where(mask, q_values[0], -np.inf)
    np.testing.assert_array_equal(team.action, expected.argmax(-1))
    np.testing.assert_allclose(team.value, expected.max(-1), rtol=1e-5)
    one = agent.act(obs[1], action_mask=mask[1])
    np.testing.assert_array_equal(one.action, team.action[1])
    random = agent.act(obs, action_mask=mask, epsilon=1.0, key=jax.random.key(0)).action
    assert np.take_along_axis(np.asarray(mask), np.asarray(random)[..., None], -1).all()


def test_what_does_not_fit_is_refused():
    agent = make_agent("vdn")
    with pytest.raises(UsageError, match=r"the agent expects \(lanes, 3\), or \(3,\) for one lane"):
        agent.act(np.zeros((N, M + 1, 3), np.float32))
    first = agent.act(np.ones((M, 3), np.float32), first=np.array(True), reward=np.array(1.0))
    assert first.action.shape == (M,)
    alone = make_rollout()
    with pytest.raises(UsageError, match=r"have shape \(6, 2\), not \(steps, lanes, 3\)"):
        agent.update(Rollout(alone.timesteps, alone.actions[..., 0]), key=jax.random.key(0))
    with pytest.raises(UsageError, match="num_agents must be a whole number of at least 1"):
        eqx_q.PQN.create(OBS, ACT, key=jax.random.key(0), num_agents=0)
    with pytest.raises(UsageError, match="unknown mixer 'vnd': the nearest are vdn"):
        make_agent("vnd")
    for sizes in ((M + 1, 3 * M), (M, 3 * M + 1)):
        with pytest.raises(UsageError, match=f"QMIX does not mix the values of {M} agents with a "):
            make_agent(QMIX(*sizes, key=jax.random.key(0)), state_size=3 * M)
    with pytest.raises(UsageError, match=r"does not fit a global state of 4 .*state_size=4"):
        make_agent("qmix", state_size=9).update(alone, key=jax.random.key(0))
    one_each = type("OneEach", (VDN,), {"mix": Independent.mix})()
    with pytest.raises(UsageError, match=rf"OneEach .* into shape \({M},\): return shape \(1,\)"):
        make_agent(one_each)
    with pytest.raises(UsageError, match="num_agents is not an option of the network"):
        eqx_q.PQN.create(OBS, ACT, key=jax.random.key(0), network_options={"num_agents": 3})


def test_a_mixer_of_ones_own():
    """Targets and loss are of the weighted sum; its weights are trained like the network's."""

    class Weighted(AbstractMixer):
        is_joint: ClassVar[bool] = True
        weight: jax.Array

        def mix(self, values, global_state=None):
            return jnp.sum(self.weight * values, axis=-1, keepdims=True)

    weight = np.array([0.5, 2.0, -1.0], np.float32)
    agent, rollout = make_agent(Weighted(jnp.asarray(weight)), optimizer="sgd"), make_rollout()
    steps = jax.tree.map(np.asarray, rollout.timesteps)
    q_values, values = best_legal(agent, steps)
    chosen = np.take_along_axis(q_values[:-1], np.asarray(rollout.actions)[..., None], -1)[..., 0]
    chosen, happened = np.where(steps.agent_mask[:-1], chosen, 0.0), ~steps.first[1:]
    targets = slow_targets(steps.reward[..., None], (values @ weight)[..., None], steps)
    np.testing.assert_allclose(
        np.asarray(agent._targets(rollout))[happened, :, 0], targets[happened], rtol=1e-4, atol=1e-5
    )
    error = chosen @ weight - targets[..., 0]
    learnt, metrics = agent.update(rollout, key=jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], 0.5 * np.mean(error[happened] ** 2), rtol=1e-4)
    slope = (error[..., None] * chosen)[happened].mean(0)
    scale = min(1.0, float(agent.max_grad_norm) / float(metrics["grad_norm"]))
    np.testing.assert_allclose(learnt.mixer.weight, weight - 0.03 * scale * slope, rtol=1e-4)
