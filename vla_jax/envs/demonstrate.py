"""Demonstrations: the scripted expert drives the robot, and everything that a dataset needs is kept.

The executed action is the expert's with noise on top, the recorded one the expert's own, so that the data show how to
recover (noise injection as in DART, arXiv 1703.09327). Pictures are drawn later from the recorded poses.

Axis legend: T control ticks, B scenes, A action width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.envs.control import MAX_STEP, MAX_TURN, clip_action, proprioception
from vla_jax.envs.env import Tabletop
from vla_jax.envs.physics import Bodies
from vla_jax.envs.scene import Command, Scene

AFTERMATH = 2  # ticks kept after success, so that the data also show staying there


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """B episodes, NumPy. Row t holds what was seen before action t; rows from `length[b]` on are padding."""

    actions: Float[Array, "T B 5"]  # the expert's clean actions, SI units
    state: Float[Array, "T B 6"]  # proprioception (control.STATE_NAMES)
    bodies: Bodies  # leaves [T, B, ...]: draw with views.observe_images
    phase: Int[Array, "T B"]  # index into the family's `stages`
    success: Bool[Array, "B"]
    length: Int[Array, "B"]  # ticks


def demonstrate(
    env: Tabletop, scene: Scene, command: Command, cue: Command, key: PRNGKeyArray, noise: float = 0.005
) -> Demonstrations:
    """Runs the expert for `env.max_ticks` ticks on B scenes.

    Args:
        key: of the executed noise; the same key gives the same episodes.
        noise: standard deviation of the noise on each translation, metres per tick; that on the turn is the same share
            of the controller's limit.
    """
    trace, success, end = jax.device_get(_run(env, scene, command, cue, key, noise))
    actions, state, bodies, phase = trace
    length = np.minimum(end + AFTERMATH, env.max_ticks).astype(np.int32)
    return Demonstrations(actions=actions, state=state, bodies=bodies, phase=phase, success=success, length=length)


@functools.partial(jax.jit, static_argnames=("env",))
def _run(env, scene, command, cue, key, noise):
    scale = noise * jnp.array([1.0, 1.0, 1.0, MAX_TURN / MAX_STEP, 0.0])

    def tick(state, tick_key):
        action, state = env.expert(state)
        before = (action, proprioception(state.bodies), state.bodies, state.phase)
        executed = clip_action(action + scale * jax.random.normal(tick_key, action.shape))
        state = env.step(state, executed)
        return state, (*before, state.success)

    state, (*trace, success) = jax.lax.scan(tick, env.reset(scene, command, cue), jax.random.split(key, env.max_ticks))
    # Ticks until success, all of them where there was none.
    return trace, state.success, jnp.sum(~success, axis=0) + state.success
