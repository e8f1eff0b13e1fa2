"""Rollouts on a point that is pushed about: every outcome can be worked out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.envs.scene import NUM_SLOTS, NUM_ZONES, Command, Scene
from vla_jax.errors import UserError
from vla_jax.evaluation.rollout import Trials, concatenate, in_batches, make_rollout, take_rows

CHUNK = 4
SPEED = 0.05


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PointBodies:
    tcp_position: jax.Array
    object_position: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PointState:
    scene: Scene
    command: Command
    cue: Command
    bodies: PointBodies
    start: jax.Array
    success: jax.Array
    cue_success: jax.Array


class PointEnv:
    """The tool point moves by the action; an object is reached within 1 cm. The picture's red channel is x in cm."""

    def reset(self, scene, command, cue):
        no = jnp.zeros(len(scene.tcp), bool)
        objects = jnp.concatenate([scene.position, jnp.zeros((*scene.position.shape[:2], 1))], -1)
        return PointState(scene, command, cue, PointBodies(scene.tcp, objects), objects, no, no)

    def observe(self, state):
        level = jnp.round(100 * state.bodies.tcp_position[:, 0]).astype(jnp.uint8)
        front = jnp.broadcast_to(level[:, None, None, None], (len(level), 8, 8, 3))
        return {"images": {"front": front}, "state": state.bodies.tcp_position}

    def step(self, state, action):
        tcp = state.bodies.tcp_position + action[:, :3]

        def reached(target):
            gap = jnp.take_along_axis(state.bodies.object_position, target[:, None, None], 1)[:, 0] - tcp
            return jnp.linalg.norm(gap, axis=-1) < 0.01

        return dataclasses.replace(
            state,
            bodies=dataclasses.replace(state.bodies, tcp_position=tcp),
            success=state.success | reached(state.command.target),
            cue_success=state.cue_success | reached(state.cue.target),
        )


class PointPolicy(nnx.Module):
    """Moves along x: by `speed` (times the guidance, if there is any) times the first word's number, plus noise."""

    def __init__(self, speed, noise=0.0):
        self.speed, self.noise = nnx.Param(jnp.float32(speed)), nnx.Param(jnp.float32(noise))

    def act(self, observation, tokens, token_mask, key, steps, guidance):
        batch, speed = len(tokens), self.speed[...] * (1.0 if guidance is None else guidance)
        along = speed * tokens[:, :1] + self.noise[...] * jax.random.normal(key, (batch, CHUNK))
        return jnp.zeros((batch, CHUNK, 5)).at[..., 0].set(along)


def make_trials(count, target=0, word=1):
    """Object 0 at x = 0.2 m, object 1 at x = -0.1 m, the point at 0; the cue is always object 1."""
    positions = np.full((count, NUM_SLOTS, 2), 9.0, np.float32)
    positions[:, 0], positions[:, 1] = (0.2, 0.0), (-0.1, 0.0)
    present = np.zeros((count, NUM_SLOTS), bool)
    present[:, :2] = True

    def zeros(*shape, dtype=np.float32):
        return np.zeros((count, *shape), dtype)

    scene = Scene(
        color=zeros(NUM_SLOTS, dtype=np.int32),
        shape=zeros(NUM_SLOTS, dtype=np.int32),
        present=present,
        movable=present,
        position=positions,
        yaw=zeros(NUM_SLOTS),
        zone_present=zeros(NUM_ZONES, dtype=bool),
        zone_position=zeros(NUM_ZONES, 2),
        tcp=zeros(3),
        tcp_yaw=zeros(),
        background=zeros(dtype=np.int32),
        light=zeros(3),
        brightness=zeros() + 1,
        camera_shift=zeros(2, 3),
    )

    def command(slot):
        zeros = np.zeros(count, np.int32)
        return Command(zeros + slot, zeros, zeros, zeros, zeros)

    tokens = np.full((count, 3), word, np.int32)
    return Trials(scene, command(target), command(1), tokens, np.ones((count, 3), bool), np.arange(count))


@functools.cache
def compiled(execute, ticks, record):
    return make_rollout(PointEnv(), execute=execute, ticks=ticks, sampler_steps=1, record=record)


def run_policy(policy, trials, batch=None, ticks=10, execute=2, seed=0, record=False, runner=None):
    graphdef, weights = nnx.split(policy)
    run = runner or compiled(execute, ticks, record)
    batches = in_batches(run, graphdef, weights, trials, jax.random.key(seed), batch or len(trials.index))
    return concatenate(list(batches))


def test_success_is_counted_and_latched_at_its_tick():
    outcome, recording = run_policy(PointPolicy(SPEED), make_trials(3))
    assert recording is None
    # 0.05 m a tick: the object at 0.2 m is reached in tick 4, and flying past it changes nothing.
    assert outcome.success.all() and not outcome.cue_success.any()
    np.testing.assert_array_equal(outcome.ticks, 4)
    np.testing.assert_allclose(outcome.distance, 0.0, atol=1e-6)
    np.testing.assert_array_equal(outcome.nearest, 0)


def test_failure_lasts_all_ticks_and_tells_where_it_ended():
    outcome, _ = run_policy(PointPolicy(-SPEED / 10), make_trials(2), ticks=10)
    assert not outcome.success.any() and not outcome.cue_success.any()
    np.testing.assert_array_equal(outcome.ticks, 10)
    np.testing.assert_allclose(outcome.distance, 0.25, atol=1e-6)
    np.testing.assert_array_equal(outcome.nearest, 1)  # absent slots lie nowhere


def test_an_episode_ends_between_two_replans():
    # 7 ticks at 2 a replan: the eighth step must not count.
    outcome, _ = run_policy(PointPolicy(0.2 / 8), make_trials(1), ticks=7)
    assert not outcome.success.any() and outcome.ticks[0] == 7
    outcome, _ = run_policy(PointPolicy(0.2 / 8), make_trials(1), ticks=8)
    assert outcome.success.all() and outcome.ticks[0] == 8


def test_going_to_the_cue_is_seen():
    outcome, _ = run_policy(PointPolicy(-SPEED), make_trials(2))
    assert outcome.cue_success.all() and not outcome.success.any()


@pytest.mark.parametrize(("slot", "pushed"), [(1, 0.07), (0, 0.0), (2, 0.0)])
def test_what_else_was_moved_is_seen(slot, pushed):
    """A wind blows an object: the cue's, the commanded one, an absent one."""

    class Windy(PointEnv):
        def step(self, state, action):
            state = super().step(state, action)
            blown = state.bodies.object_position.at[:, slot, 1].add(0.01)
            return dataclasses.replace(state, bodies=dataclasses.replace(state.bodies, object_position=blown))

    run = make_rollout(Windy(), execute=2, ticks=7, sampler_steps=1)
    outcome, _ = run_policy(PointPolicy(0.0), make_trials(2), runner=run)
    np.testing.assert_allclose(outcome.pushed, pushed, atol=1e-6)


def test_words_reach_the_policy():
    trials = make_trials(2)
    tokens = trials.tokens.copy()
    tokens[1] = 0
    outcome, _ = run_policy(PointPolicy(SPEED), dataclasses.replace(trials, tokens=tokens))
    assert outcome.success.tolist() == [True, False]


def test_guidance_reaches_the_policy_and_changes_without_compiling():
    run, trials = compiled(2, 10, False), make_trials(1)
    graphdef, weights = nnx.split(PointPolicy(0.02))
    ticks = {}
    for guidance in (None, 1.0, 2.0):
        ((outcome, _),) = in_batches(run, graphdef, weights, trials, jax.random.key(0), 1, guidance)
        ticks[guidance] = int(outcome.ticks[0])
        if guidance == 1.0:
            before = run._cache_size()
    assert ticks[None] == ticks[1.0] == 10 and ticks[2.0] == 5
    assert run._cache_size() == before


def test_noise_belongs_to_the_scene_whatever_the_batch():
    trials, policy = make_trials(7), PointPolicy(0.0, noise=0.01)
    whole, _ = run_policy(policy, trials)
    parts, _ = run_policy(policy, trials, batch=3)
    np.testing.assert_allclose(whole.distance, parts.distance, atol=1e-6)
    order = np.array([4, 1])
    some, _ = run_policy(policy, take_rows(trials, order))
    np.testing.assert_allclose(some.distance, whole.distance[order], atol=1e-6)
    assert len(np.unique(whole.distance)) == 7
    other, _ = run_policy(policy, trials, seed=1)
    assert not np.isclose(other.distance, whole.distance).any()


def test_every_replan_draws_new_noise():
    trials, policy = make_trials(1), PointPolicy(0.0, noise=0.01)
    moved = {ticks: 0.2 - float(run_policy(policy, trials, ticks=ticks)[0].distance[0]) for ticks in (2, 4)}
    # Were the noise of the second replan that of the first, the second pair of steps would repeat the first pair.
    assert abs(moved[4] - 2 * moved[2]) > 1e-3


def test_another_checkpoint_runs_through_the_same_program():
    run = make_rollout(PointEnv(), execute=2, ticks=10, sampler_steps=1)
    slow, _ = run_policy(PointPolicy(SPEED / 2), make_trials(4), runner=run)
    fast, _ = run_policy(PointPolicy(SPEED), make_trials(4), runner=run)
    assert run._cache_size() == 1
    assert slow.ticks[0] == 8 and fast.ticks[0] == 4


def test_recording_shows_every_tick_from_the_first():
    outcome, recording = run_policy(PointPolicy(SPEED), make_trials(3), ticks=5, record=True, batch=2)
    assert recording.pictures.shape == (3, 5, 8, 8, 3) and recording.pictures.dtype == np.uint8
    np.testing.assert_array_equal(recording.pictures[2, :, 0, 0, 0], [0, 5, 10, 15, 20])
    np.testing.assert_allclose(recording.path[2, :, 0], [0, 0.05, 0.1, 0.15, 0.2], atol=1e-6)
    assert outcome.success.all()


@pytest.mark.parametrize("execute", [0, CHUNK + 1])
def test_executing_more_than_a_chunk_is_refused(execute):
    with pytest.raises(UserError, match=f"execute={execute}.*{CHUNK} actions"):
        run_policy(PointPolicy(SPEED), make_trials(1), execute=execute)
