"""The physics of the table on two engines behind one function: `engine.step(physics, controls)`.

* `MjxEngine`: MJX, `vmap` over scenes, compiled with everything around it; for accelerators.
* `CEngine`: MuJoCo's C engine, all scenes on all cores by a callback; many times faster on a CPU.

Both step the same compiled MJCF model from the same state, so that each checks the other. The state carried between
control ticks is the least that reproduces an episode: positions, velocities and the solver's warm start.

Axis legend: B scenes, T physics steps of one control tick, G geoms, N object slots.
"""

import dataclasses
import os
import threading

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float
from mujoco.batch import Batch

from vla_jax.errors import UserError

ENGINES = ("auto", "mjx", "c")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhysicsState:
    """What an engine needs to go on: generalised positions and velocities, and the last accelerations (warm start)."""

    qpos: Float[Array, "B nq"]
    qvel: Float[Array, "B nv"]
    warmstart: Float[Array, "B nv"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bodies:
    """Where everything is, world frame, metres; rotations map local to world axes. G follows the model's geoms."""

    geom_position: Float[Array, "*B G 3"]
    geom_rotation: Float[Array, "*B G 3 3"]
    tcp_position: Float[Array, "*B 3"]  # midway between the fingertips
    tcp_rotation: Float[Array, "*B 3 3"]  # x: the hand's front, y: along which the fingers open, z: out of the hand
    object_position: Float[Array, "*B N 3"]
    object_rotation: Float[Array, "*B N 3 3"]
    opening: Float[Array, "*B"]  # distance between the fingers


class MjxEngine:
    """Steps scenes with MJX inside the compiled program."""

    def __init__(self, model: mujoco.MjModel):
        from mujoco import mjx  # takes half a second and is not needed by the C engine

        from vla_jax.envs import mjx_patch

        mjx_patch.apply()
        self._mjx = mjx
        self._model = mjx.put_model(model, impl="jax")
        self._data = mjx.make_data(model, impl="jax")

    def step(self, physics: PhysicsState, controls: Float[Array, "B T nu"]) -> PhysicsState:
        """Advances every scene by T physics steps, with one row of controls a step."""

        def substep(data, ctrl):
            return self._mjx.step(self._model, data.replace(ctrl=ctrl)), None

        def one_scene(physics, controls):
            data = self._data.replace(qpos=physics.qpos, qvel=physics.qvel, qacc_warmstart=physics.warmstart)
            data, _ = jax.lax.scan(substep, data, controls)
            return PhysicsState(data.qpos, data.qvel, data.qacc_warmstart)

        return jax.vmap(one_scene)(physics, controls)


class CEngine:
    """Steps scenes with MuJoCo's C engine, all at once and on all cores, from a host callback.

    The callback is a pure function of its inputs: every call writes the whole state of every simulation first.
    """

    def __init__(self, model: mujoco.MjModel, threads: int = 0):
        self._model = model
        self._threads = threads or len(os.sched_getaffinity(0))
        self._batches: dict[int, Batch] = {}
        self._lock = threading.Lock()  # XLA may run two programs, and so two callbacks, at the same time

    def step(self, physics: PhysicsState, controls: Float[Array, "B T nu"]) -> PhysicsState:
        """Advances every scene by T physics steps, with one row of controls a step."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), physics)
        return jax.pure_callback(self._advance, shapes, physics, controls)

    def _advance(self, physics: PhysicsState, controls) -> PhysicsState:
        # Only NumPy in here: work on JAX arrays would need the very threads that wait for this call.
        controls = np.asarray(controls, np.float64)
        scenes, substeps, _ = controls.shape
        with self._lock:
            if scenes not in self._batches:
                self._batches[scenes] = Batch(self._model, scenes, nthread=self._threads)
            batch = self._batches[scenes]
            batch.bind("time")[...] = 0.0
            batch.bind("qpos")[...] = np.asarray(physics.qpos)
            batch.bind("qvel")[...] = np.asarray(physics.qvel)
            batch.bind("qacc_warmstart")[...] = np.asarray(physics.warmstart)
            batch.rollout(substeps, control=controls, control_spec=mujoco.mjtState.mjSTATE_CTRL, record=())
            names = ("qpos", "qvel", "qacc_warmstart")
            return PhysicsState(*(np.array(batch.bind(name), np.float32) for name in names))


def make_engine(name: str, model: mujoco.MjModel) -> MjxEngine | CEngine:
    """The engine of that name; "auto" is the C engine on a CPU and MJX elsewhere. UserError for an unknown name."""
    if name == "auto":
        name = "c" if jax.default_backend() == "cpu" else "mjx"
    if name == "c":
        return CEngine(model)
    if name == "mjx":
        return MjxEngine(model)
    raise UserError(f"unknown physics engine {name!r}: choose one of {', '.join(ENGINES)}")
