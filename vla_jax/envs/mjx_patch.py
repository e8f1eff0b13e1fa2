"""Keeps XLA's CPU compiler from recomputing a kinematic chain once per descendant.

On jaxlib before 0.11 the CPU's fusion pass duplicates a body's whole chain of parents into every child: the Panda's
kinematics then take exponentially long in its depth (a step of 64 scenes: 2 s instead of 20 ms). A barrier at each
level of the body tree stops the fusion there. MJX offers no hook, so its private tree scan is wrapped; the version of
MJX is pinned and a test times the result.
"""

import functools

import jax
from mujoco.mjx._src import scan


def _versions(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def apply() -> None:
    """Wraps MJX's tree scan, once, where the fault exists (CPU backend, jax before 0.11)."""
    if jax.default_backend() != "cpu" or _versions(jax.__version__) >= (0, 11):
        return
    original = scan.body_tree
    if getattr(original, "has_barrier", False):
        return

    @functools.wraps(original)
    def body_tree(model, function, in_types, out_types, *args, **kwargs):
        def with_barrier(*values):
            return function(*jax.tree.map(_barrier, values))

        return original(model, with_barrier, in_types, out_types, *args, **kwargs)

    body_tree.has_barrier = True
    scan.body_tree = body_tree


def _barrier(value):
    return jax.lax.optimization_barrier(value) if isinstance(value, jax.Array) else value
