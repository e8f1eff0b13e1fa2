"""The steered act: nothing when its arm is zero, the reward's way when it is not, and errors where it cannot be."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.envs.scene import NUM_SLOTS, NUM_ZONES
from vla_jax.errors import UserError
from vla_jax.flow.solve import solve
from vla_jax.flow.transforms import extrapolate
from vla_jax.steering.perceive import Attached
from vla_jax.steering.program import parse, stack
from vla_jax.steering.steer import Arm, Decoder, SteerConfig, _steering, act, remember_nothing

BODIES = NUM_SLOTS + NUM_ZONES
TCP = np.array([0.45, 0.0, 0.2], np.float32)
GOAL = np.array([0.55, 0.1, 0.1], np.float32)
KEY = jax.random.key(3)
TEXT = json.dumps({"stages": [{"name": "reach", "terms": [{"term": "distance", "keypoint": 0}]}]})


def observation():
    """The hand at TCP, the first keypoint at GOAL."""
    picture = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3), np.uint8)
    origin = np.zeros((1, BODIES, 3), np.float32)
    origin[0, 0] = GOAL
    rotation = np.broadcast_to(np.eye(3, dtype=np.float32), (1, BODIES, 3, 3))
    state = np.concatenate([TCP, [0.0, 1.0, 0.08]]).astype(np.float32)[None]
    return {"images": {"front": picture}, "state": state, "frames": (origin, rotation)}


@pytest.fixture(scope="module")
def memory(policy):
    program = stack([parse(TEXT, ("cube",))])
    return remember_nothing(program, Attached(np.zeros((1, 1), int), np.zeros((1, 1, 3), np.float32)), policy)


@pytest.fixture(scope="module")
def words(contract):
    return contract.encode(["reach the red cube"])


@pytest.fixture(scope="module")
def steered(policy, contract, words):
    """(config, memory, arm) -> chunk and memory, compiled once for each config."""
    graph, weights = nnx.split(policy)

    @functools.partial(jax.jit, static_argnums=0)
    def run(config, weights, memory, arm, key, frames):
        inputs = ({**observation(), "frames": frames}, *words, key)
        return act(nnx.merge(graph, weights), Decoder.of(contract), config, *inputs, memory, arm, execute=2)

    def call(config, memory, arm, key=KEY, frames=None):
        arm = jax.tree.map(np.float32, arm)
        return run(config, weights, memory, arm, key, observation()["frames"] if frames is None else frames)

    return call


ONE, MANY = SteerConfig(particles=1, steps=5), SteerConfig(particles=4, steps=5)


def test_an_arm_of_zeros_is_the_policy_itself(policy, steered, memory, words):
    graph, weights = nnx.split(policy)
    plain = jax.jit(lambda weights: nnx.merge(graph, weights).act(observation(), *words, KEY, 5))(weights)
    np.testing.assert_array_equal(steered(ONE, memory, Arm())[0], plain)
    np.testing.assert_allclose(steered(MANY, memory, Arm())[0], plain, atol=1e-6)


def test_a_chosen_noise_is_where_the_first_particle_starts(policy, contract, memory, words):
    chosen = jax.random.normal(jax.random.key(9), (1, 4, len(contract.action_names)))
    graph, weights = nnx.split(policy)

    @jax.jit
    def both(weights):
        policy, arm = nnx.merge(graph, weights), jax.tree.map(np.float32, Arm())
        inputs = policy, Decoder.of(contract), ONE, observation(), *words, KEY, memory, arm
        chunk, _ = act(*inputs, execute=2, source=lambda condition, key: chosen + 0 * condition.context.mean())
        reading = policy.encode(observation()["images"], *words)["posterior"]
        plain = policy.sample(policy.condition(reading, observation()["state"]), chosen, steps=ONE.steps)
        return chunk, policy.normalizer.denormalize_action(plain)

    np.testing.assert_allclose(*both(weights), atol=1e-6)


def end(chunk):
    """Where a chunk leads."""
    return TCP + np.asarray(chunk)[0, :, :3].sum(0)


def test_the_gradient_leads_to_the_keypoint_and_moves_nothing_else(steered, memory):
    plain, pushed = (steered(ONE, memory, Arm(guide=weight))[0] for weight in (0.0, 8.0))
    assert np.linalg.norm(end(pushed) - GOAL) < 0.7 * np.linalg.norm(end(plain) - GOAL)
    away = steered(ONE, memory, Arm(guide=-8.0))[0]
    assert np.linalg.norm(end(away) - GOAL) > 1.2 * np.linalg.norm(end(plain) - GOAL)


def test_a_random_direction_is_no_help_but_as_strong(steered, memory):
    """Over several keys: as far from the plain chunk, and no nearer to the goal."""
    keys = jax.random.split(KEY, 8)
    moved, gain = {}, {}
    for random in (0.0, 1.0):
        pairs = [
            [np.asarray(steered(ONE, memory, Arm(guide=weight, random=random), key)[0]) for weight in (0.0, 8.0)]
            for key in keys
        ]
        moved[random] = np.mean([np.linalg.norm((after - before)[..., :3]) for before, after in pairs])
        gaps = [[np.linalg.norm(end(chunk) - GOAL) for chunk in pair] for pair in pairs]
        gain[random] = np.mean([before - after for before, after in gaps])
    assert 0.4 < moved[1.0] / moved[0.0] < 2.0
    assert gain[0.0] > 0.04 and gain[1.0] < 0.3 * gain[0.0]


def test_without_the_policy_the_gradient_alone_moves_an_open_hand(policy, steered, memory):
    still = steered(ONE, memory, Arm(alone=1.0))[0]
    np.testing.assert_allclose(still, np.broadcast_to([0, 0, 0, 0, 0.08], still.shape), atol=1e-6)
    alone, other = (steered(ONE, memory, Arm(guide=8.0, alone=1.0), key)[0] for key in (KEY, jax.random.key(9)))
    np.testing.assert_array_equal(alone, other, "nothing is left to chance")
    np.testing.assert_allclose(alone[..., 3:], still[..., 3:], atol=1e-6)
    start = np.linalg.norm(TCP - GOAL)
    assert np.linalg.norm(end(alone) - GOAL) < 0.5 * start
    guided = steered(ONE, memory, Arm(guide=8.0))[0]
    assert np.abs(alone - guided).max() > 0.01, "the policy's part"
    far = steered(ONE, memory, Arm(guide=1e3, alone=1.0))[0]
    assert np.abs(policy.normalizer.normalize_action(far)).max() < 1 + 1e-5


def test_the_best_particle_is_executed(steered, memory):
    """Of the policy's own samples: particle 0 is that of one particle, and selection only improves on it."""
    first, best = (steered(MANY, memory, Arm(select=select)) for select in (0.0, 1.0))
    reward = [float(after.loop.predicted[0]) for _, after in (first, best)]
    assert reward[1] > reward[0]
    full = steered(MANY, memory, Arm(guide=8.0, repel=2.0, select=1.0, resample=1.0))[1]
    assert float(full.loop.predicted[0]) > reward[1]


def test_the_memory_keeps_the_first_look_and_the_last_chunk(policy, steered, memory):
    chunk, after = steered(ONE, memory, Arm())
    np.testing.assert_allclose(after.origin[0, 0], GOAL, rtol=1e-6)
    assert int(after.chunks[0]) == 1
    np.testing.assert_allclose(policy.normalizer.denormalize_action(after.previous), chunk, rtol=1e-5)
    origin, rotation = observation()["frames"]
    moved = steered(ONE, after, Arm(), frames=(origin + 0.05, rotation))[1]
    np.testing.assert_allclose(moved.origin[0, 0], GOAL, rtol=1e-6)
    assert int(moved.chunks[0]) == 2


def test_transforms_are_composed_by_settings(policy, steered, memory):
    """Prior/posterior extrapolation and real-time chunking: the second chunk continues the first."""
    apart = dataclasses.replace(ONE, steps=8)
    joined = dataclasses.replace(apart, extrapolate=2.0, continued=True, frozen=1)
    gaps = []
    for config in (apart, joined):
        first = steered(config, memory, Arm())[1]
        second = steered(config, first, Arm(), jax.random.key(9))[1]
        gaps.append(float(jnp.abs(second.previous[0, 0] - first.previous[0, 2]).mean()))
    assert gaps[1] < 0.3 * gaps[0]
    guided = steered(joined, first, Arm(guide=4.0))
    assert np.isfinite(guided[0]).all()
    with pytest.raises(UserError, match="2 executed and 3 frozen ones leave nothing"):
        steered(dataclasses.replace(joined, frozen=3), memory, Arm())


def steered_flow(config, arm):
    """Many chunks of one action by a posterior field of 1 and a prior of -1, extrapolated at w = 3: they move by 5. The
    reward is that of coming to 2."""

    def field(x, t):
        return jnp.ones_like(x)

    def reward(x, t):
        return -jnp.square(x - 2.0).sum((-2, -1))

    start = jax.random.normal(KEY, (2000, 1, 1, 3))
    paths = lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))  # noqa: E731
    bend = extrapolate(lambda x, t: -jnp.ones_like(x), 3.0)
    steer = _steering(config, arm, field, bend, reward, paths, jnp.ones_like, start.shape, KEY)
    return jax.jit(lambda start: solve(field, start, steps=config.steps, transform=steer))(start)


def test_inner_steps_keep_what_bends_the_field():
    for inner in (0, 1, 2):
        mean = steered_flow(SteerConfig(inner=inner), Arm()).mean()
        np.testing.assert_allclose(mean, 5.0, atol=0.1, err_msg=f"{inner} inner steps")


def test_the_way_through_the_network_sees_what_bends_the_field():
    """Of a constant field the estimate has the same derivative with the way through the field and without."""
    config, arm = SteerConfig(norm="none"), Arm(guide=0.3)
    clean, jacobian = (steered_flow(dataclasses.replace(config, point=point), arm) for point in ("clean", "jacobian"))
    np.testing.assert_allclose(clean, jacobian, atol=1e-5)
    assert abs(float(clean.mean()) - 5.0) > 0.1


def test_a_lost_keypoint_is_noted_in_the_run(steered, memory):
    origin, rotation = observation()["frames"]
    assert bool(steered(ONE, memory, Arm(guide=8.0))[1].loop.finite[0])
    lost = steered(ONE, memory, Arm(guide=8.0), frames=(origin * np.nan, rotation))[1]
    assert not bool(lost.loop.finite[0])


def test_what_cannot_be_steered_is_named(contract):
    joints = dataclasses.replace(contract, action_names=("j0", "j1", "j2", "j3", "opening"))
    with pytest.raises(UserError, match="actions .j0, j1, j2, j3, opening. lack dx, dy, dz"):
        Decoder.of(joints)
    blind = dataclasses.replace(contract, state_names=("x", "y", "height", "sin_yaw", "cos_yaw", "opening"))
    with pytest.raises(UserError, match="states .* lack z"):
        Decoder.of(blind)
    for wrong, message in (
        ({"particles": 0}, "steer.particles is 0"),
        ({"inner": -1}, "steer.inner is -1"),
        ({"frozen": -1}, "steer.frozen is -1"),
        ({"method": "eular"}, "steer.method must be one of euler, heun, got 'eular'"),
        ({"point": "clear"}, "steer.point must be one of noisy, clean, jacobian"),
        ({"norm": "particles"}, "steer.norm must be one of none, clip, particle, batch"),
        ({"kernel": "gauss"}, "steer.kernel must be one of inverse, rbf"),
        ({"window": (0.8, 0.2)}, "steer.window is 0.8 to 0.2: it must end after it begins"),
        ({"repel_window": (0.2, 0.2)}, "steer.repel_window is 0.2 to 0.2"),
    ):
        with pytest.raises(UserError, match=message):
            SteerConfig(**wrong)


def test_paths_are_sums_of_moves(contract):
    decoder = Decoder.of(contract)
    actions = np.zeros((2, 3, 5), np.float32)
    actions[0, :, 1] = [0.01, 0.02, -0.03]
    path = decoder.path(jnp.asarray(actions), jnp.asarray(TCP))
    np.testing.assert_allclose(path[0, :, 1], [0, 0.01, 0.03, 0.0], atol=1e-7)
    np.testing.assert_allclose(path[1], np.broadcast_to(TCP, (4, 3)))
    assert decoder.opening == 4
    assert bool(decoder.closed(jnp.array([[0, 0, 0, 0, 0.03]]), jnp.array([0, 0, 0, 0, 0.08])))
    assert not bool(dataclasses.replace(decoder, opening=None).closed(jnp.zeros((1, 5)), jnp.ones(5)))
