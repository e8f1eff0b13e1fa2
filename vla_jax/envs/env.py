"""The table as an environment: reset, step, observe and expert, all pure, batched and jittable.

Axis legend: B scenes, N object slots, Z zones, V views, A action width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.envs import control, mjcf
from vla_jax.envs.kinematics import Kinematics
from vla_jax.envs.physics import Bodies, PhysicsState, make_engine
from vla_jax.envs.scene import NUM_SLOTS, PARKED_X, Command, Scene
from vla_jax.envs.tasks import get_task
from vla_jax.envs.views import observe_images

STREAK = 3  # consecutive ticks for which a command must stay fulfilled


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """Which robot, which task family, on which engine and how large a picture."""

    embodiment: str = "floating"  # "floating" or "panda"
    task: str = "reach"  # a name in tasks.TASKS
    engine: str = "auto"  # "mjx", "c", or "auto": C on a CPU, MJX elsewhere
    image_size: int = 64  # pixels
    max_ticks: int = 0  # control ticks in an episode; 0 takes the family's own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnvState:
    """Everything there is to know of a batch of episodes."""

    scene: Scene
    command: Command
    cue: Command  # the command that the look of the scene suggests
    physics: PhysicsState
    bodies: Bodies
    target_pose: control.Pose  # the controller's set point
    start: Float[Array, "B N 3"]  # the objects' first positions
    tick: Int[Array, "B"]
    streak: Int[Array, "B"]  # consecutive ticks for which the command has been fulfilled
    cue_streak: Int[Array, "B"]
    success: Bool[Array, "B"]  # the command has been fulfilled for STREAK ticks, at any time so far
    cue_success: Bool[Array, "B"]  # so has the cue's
    phase: Int[Array, "B"]  # of the expert


class Tabletop:
    """A robot at a table, a task family and a physics engine.

    post: the last object slot holds a tall post (see `mjcf`), as no demonstration has it.
    """

    def __init__(self, config: EnvConfig = EnvConfig(), post: bool = False):
        self.config = config
        self.task = get_task(config.task)
        self.model = mjcf.build_model(config.embodiment, post)
        self.max_ticks = config.max_ticks or self.task.max_ticks
        self.kinematics = Kinematics(self.model)
        self.controller = control.Controller(config.embodiment, self.model, self.kinematics)
        self.engine = make_engine(config.engine, self.model)

    def reset(self, scene: Scene, command: Command, cue: Command) -> EnvState:
        """The episodes' first state: objects where the scene puts them, the hand open at `scene.tcp`. No randomness."""
        batch = scene.tcp.shape[0]
        pose = self.controller.start(scene.tcp, scene.tcp_yaw)
        physics = self._initial_physics(scene, pose)
        bodies = self.kinematics.bodies(physics.qpos, _zones(scene))
        zeros, no = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
        return EnvState(
            scene=scene,
            command=command,
            cue=cue,
            physics=physics,
            bodies=bodies,
            target_pose=pose,
            start=bodies.object_position,
            tick=zeros,
            streak=zeros,
            cue_streak=zeros,
            success=no,
            cue_success=no,
            phase=zeros,
        )

    def step(self, state: EnvState, action: Float[Array, "B 5"]) -> EnvState:
        """One control tick (0.1 s): moves the set point by the action, steps physics and judges the task."""
        pose, commands = self.controller.advance(state.target_pose, action, state.bodies)
        physics = self.engine.step(state.physics, commands)
        bodies = self.kinematics.bodies(physics.qpos, _zones(state.scene))
        fulfilled = self.task.success(state.scene, state.command, bodies, state.start)
        cue_fulfilled = self.task.success(state.scene, state.cue, bodies, state.start)
        streak = jnp.where(fulfilled, state.streak + 1, 0)
        cue_streak = jnp.where(cue_fulfilled, state.cue_streak + 1, 0)
        return dataclasses.replace(
            state,
            physics=physics,
            bodies=bodies,
            target_pose=pose,
            tick=state.tick + 1,
            streak=streak,
            cue_streak=cue_streak,
            success=state.success | (streak >= STREAK),
            cue_success=state.cue_success | (cue_streak >= STREAK),
        )

    def expert(self, state: EnvState) -> tuple[Float[Array, "B 5"], EnvState]:
        """What the scripted expert does now, and the state with the expert's new phase."""
        action, phase = self.task.expert(state.scene, state.command, state.bodies, state.start, state.phase)
        return action, dataclasses.replace(state, phase=phase)

    def observe(self, state: EnvState) -> dict:
        """{"images": {view: uint8[B,H,W,3]}, "state": f32[B,6]} (see control.STATE_NAMES)."""
        images = observe_images(self.model, state.bodies, state.scene, self.config.image_size)
        return {"images": images, "state": control.proprioception(state.bodies)}

    def _initial_physics(self, scene: Scene, pose: control.Pose) -> PhysicsState:
        batch = scene.tcp.shape[0]
        fingers = jnp.broadcast_to(pose.opening[:, None] / 2, (batch, 2))
        position = _parked(scene.position, scene.present, 0.0)
        half = scene.yaw / 2
        geoms = [self.model.geom(f"object{n}").id for n in range(NUM_SLOTS)]
        height = jnp.asarray(self.model.geom_size[geoms, 2:], jnp.float32)  # half of it: everything stands on the table
        zero = jnp.zeros_like(half)
        objects = jnp.concatenate(
            [
                position,
                jnp.broadcast_to(height, (*half.shape, 1)),
                jnp.stack([jnp.cos(half), zero, zero, jnp.sin(half)], -1),
            ],
            -1,
        )
        still = jnp.zeros((batch, self.model.nv))
        qpos = jnp.concatenate([pose.joints, fingers, objects.reshape(batch, NUM_SLOTS * 7)], -1)
        return PhysicsState(qpos=qpos, qvel=still, warmstart=still)


def _parked(position: Float[Array, "B M 2"], present: Bool[Array, "B M"], first: float) -> Float[Array, "B M 2"]:
    """Positions with those of absent things replaced by places off the table, 20 cm apart."""
    count = position.shape[1]
    row = jnp.stack([jnp.full(count, PARKED_X), first + 0.2 * jnp.arange(count)], -1)
    return jnp.where(present[..., None], position, row)


def _zones(scene: Scene) -> Float[Array, "B Z 2"]:
    return _parked(scene.zone_position, scene.zone_present, -0.5)
