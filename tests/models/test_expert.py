"""The action expert: who sees whom, its flow time, its dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.models.calling import call
from vla_jax.models.expert import ActionExpert, Condition, ExpertConfig, drop

EXPERT = ExpertConfig(width=16, depth=2, heads=2, hidden=24, head=16, future_tokens=2)


def velocity(expert, actions, time, condition, key=None):
    return expert(actions, time, expert.read(condition), key)


def expert_and_inputs(**changes):
    config = dataclasses.replace(EXPERT, **changes)
    options = dict(context_width=6, chunk=4, action_width=3, state_width=2, dtype="float32")
    expert = ActionExpert(config, **options, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    condition = Condition(
        random.normal(size=(2, 5, 6)).astype(np.float32),
        random.random((2, 5)) < 0.7,
        random.normal(size=(2, 2)).astype(np.float32),
    )
    actions = random.normal(size=(2, 3, 4, 3)).astype(np.float32)
    return expert, condition, actions, random.random((2, 3)).astype(np.float32)


def test_draws_do_not_see_each_other():
    expert, condition, actions, time = expert_and_inputs()
    together = call(expert, velocity, actions, time, condition)
    for r in range(3):
        alone = call(expert, velocity, actions[:, [r]], time[:, [r]], condition)
        np.testing.assert_allclose(together[:, [r]], alone, atol=1e-5)


def test_the_expert_looks_at_the_condition_first_and_at_itself_second():
    """One pair: an action sees the others only through the second block, the context only through the first."""
    expert, condition, actions, time = expert_and_inputs()
    base = np.asarray(call(expert, velocity, actions, time, condition))
    moved = actions.copy()
    moved[:, :, 0] += 1.0
    assert (np.abs(np.asarray(call(expert, velocity, moved, time, condition)) - base).max((0, 1, 3)) > 1e-6).all()
    expert.pairs.layers.own.attention.output.kernel[...] *= 0
    base = np.asarray(call(expert, velocity, actions, time, condition))
    change = np.abs(np.asarray(call(expert, velocity, moved, time, condition)) - base).max((0, 1, 3))
    assert change[0] > 1e-6 and (change[1:] == 0).all()
    other = condition._replace(context=condition.context + 1)
    assert np.abs(np.asarray(call(expert, velocity, actions, time, other)) - base).max() > 1e-6
    expert.pairs.layers.cross.attention.output.kernel[...] *= 0
    base = np.asarray(call(expert, velocity, actions, time, condition))
    assert np.abs(np.asarray(call(expert, velocity, actions, time, other)) - base).max() == 0


def test_masked_context_is_not_seen():
    expert, condition, actions, time = expert_and_inputs()
    hidden = (condition.context + 5 * ~condition.valid[..., None]).astype(np.float32)
    np.testing.assert_allclose(
        call(expert, velocity, actions, time, condition._replace(context=hidden)),
        call(expert, velocity, actions, time, condition),
        atol=1e-5,
    )


def test_flow_time_counts_in_thousandths():
    expert, condition, actions, time = expert_and_inputs()
    values = [
        np.asarray(call(expert, velocity, actions, np.full_like(time, t), condition)) for t in (0.1231, 0.1239, 0.2239)
    ]
    assert (values[0] == values[1]).all() and np.abs(values[0] - values[2]).max() > 1e-5


def test_the_state_token_can_be_left_out():
    for token, changes in ((True, True), (False, False)):
        expert, condition, actions, time = expert_and_inputs(state_token=token)
        base = np.asarray(call(expert, velocity, actions, time, condition))
        other = np.asarray(call(expert, velocity, actions, time, condition._replace(state=condition.state + 1)))
        assert (np.abs(other - base).max() > 1e-6) == changes


def test_dropout_needs_a_key():
    expert, condition, actions, time = expert_and_inputs(dropout=0.3)
    keys = jax.random.split(jax.random.key(0), 2)
    plain = call(expert, velocity, actions, time, condition)
    one, same, two = (call(expert, velocity, actions, time, condition, k) for k in (keys, keys, keys[::-1]))
    assert (one == same).all() and np.abs(one - plain).max() > 1e-4
    assert (np.abs(one - two).max((1, 2, 3)) > 1e-4).all()  # a sample has the noise of its own key


def test_dropout_keeps_the_mean():
    dropped = np.asarray(drop(jnp.ones((2, 50_000)), 0.3, jax.random.split(jax.random.key(0), 2)))
    assert (dropped[0] != dropped[1]).any()
    assert abs((dropped == 0).mean() - 0.3) < 0.01 and abs(dropped.mean() - 1) < 0.01
