"""The solids that the ray caster draws: for each kind where rays enter it, whom it shadows and which way it faces.

Shapes and sizes are MuJoCo's: half lengths, the axis along local z; a plane of size 0 is infinite; a sphere has its
radius in size[0], a cylinder and a capsule have their radius in size[0] and their half length in size[1]. A "slot" is a
solid whose shape is itself an array: 0 box, 1 cylinder, 2 sphere (radius size[0], half height size[2]).

Written for a CPU: a solid is a handful of numbers, and every operation runs over contiguous pixels. The surface normal
n is never formed, only its products with given directions.

Axis legend: G solids, P pixels.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TINY = 1e-9


class Vector(NamedTuple):
    """Three arrays that broadcast against each other: numbers of one solid, or one number per pixel."""

    x: Array
    y: Array
    z: Array


class Rays(NamedTuple):
    """Rays from one camera. `d` is scaled so that the ray's parameter t is the depth along the optical axis."""

    d: Vector  # [P] each
    dd: Array  # [P] d.d
    inverse_dd: Array  # [P]


class Solid(NamedTuple):
    """One solid, or all of them with a leading axis G, relative to some origin and in some frame."""

    number: Int[Array, "*G"]
    o: Float[Array, "*G 3"]  # the origin relative to the solid's centre
    axes: Float[Array, "*G 3 3"]  # rows are the solid's axes
    local: Float[Array, "*G 3"]  # axes @ o
    oo: Float[Array, "*G"]  # o.o
    size: Float[Array, "*G 3"]
    visible: Bool[Array, "*G"]
    shape: Int[Array, "*G"]  # of a slot


def vector(a: Float[Array, "*n 3"]) -> Vector:
    """Splits the last axis."""
    return Vector(a[..., 0], a[..., 1], a[..., 2])


def dot(a: Vector, b: Vector) -> Array:
    """Inner product."""
    return a.x * b.x + a.y * b.y + a.z * b.z


def away_from_zero(x: Array) -> Array:
    """`x`, or a tiny number where that would be zero."""
    return jnp.where(jnp.abs(x) < TINY, TINY, x)


# Hits. Each function takes the rays and a solid relative to the camera; it returns the depth at which the rays enter
# the solid and whether they meet it at all, [P] each.


def _plane_hit(rays: Rays, solid: Solid):
    x, y, n = (vector(axis) for axis in solid.axes)
    dn = dot(rays.d, n)
    t = -solid.local[2] / away_from_zero(dn)
    inside_x = (jnp.abs(solid.local[0] + t * dot(rays.d, x)) <= solid.size[0]) | (solid.size[0] <= 0)
    inside_y = (jnp.abs(solid.local[1] + t * dot(rays.d, y)) <= solid.size[1]) | (solid.size[1] <= 0)
    return t, (dn < 0) & inside_x & inside_y


def _box_hit(rays: Rays, solid: Solid):
    inverse = [1 / away_from_zero(dot(rays.d, vector(axis))) for axis in solid.axes]
    middle = [-solid.local[i] * inverse[i] for i in range(3)]
    reach = [solid.size[i] * jnp.abs(inverse[i]) for i in range(3)]
    enter = functools.reduce(jnp.maximum, [m - r for m, r in zip(middle, reach, strict=True)])
    leave = functools.reduce(jnp.minimum, [m + r for m, r in zip(middle, reach, strict=True)])
    return enter, enter < leave


def _sphere_hit(rays: Rays, solid: Solid):
    b = dot(vector(solid.o), rays.d)
    discriminant = b * b - rays.dd * (solid.oo - solid.size[0] ** 2)
    return (-b - jnp.sqrt(jnp.maximum(discriminant, 0))) * rays.inverse_dd, discriminant > 0


def _tube(rays: Rays, solid: Solid):
    """Infinite cylinder, where a t^2 + 2 b t + c = 0. Returns 1 / a, b, root of the discriminant, validity, d.axis."""
    da = dot(rays.d, vector(solid.axes[2]))
    a = jnp.maximum(rays.dd - da * da, TINY)
    b = dot(vector(solid.o), rays.d) - solid.local[2] * da
    discriminant = b * b - a * (solid.oo - solid.local[2] ** 2 - solid.size[0] ** 2)
    return 1 / a, b, jnp.sqrt(jnp.maximum(discriminant, 0)), discriminant > 0, da


def _cylinder_hit(rays: Rays, solid: Solid):
    inverse_a, b, root, valid, da = _tube(rays, solid)
    inverse_da = 1 / away_from_zero(da)
    middle, reach = -solid.local[2] * inverse_da, solid.size[1] * jnp.abs(inverse_da)
    t = jnp.maximum((-b - root) * inverse_a, middle - reach)
    return t, valid & (t < jnp.minimum((-b + root) * inverse_a, middle + reach))


def _capsule_hit(rays: Rays, solid: Solid):
    inverse_a, b, root, valid, da = _tube(rays, solid)
    side, radius, half = (-b - root) * inverse_a, solid.size[0], solid.size[1]
    # A ray that meets the tube beyond the segment can only enter through the cap at that end.
    z = jnp.clip(solid.local[2] + side * da, -half, half)
    cap_b = dot(vector(solid.o), rays.d) - z * da
    cap = cap_b * cap_b - rays.dd * (solid.oo - 2 * z * solid.local[2] + z * z - radius * radius)
    on_cap = jnp.abs(z) >= half
    t = jnp.where(on_cap, (-cap_b - jnp.sqrt(jnp.maximum(cap, 0))) * rays.inverse_dd, side)
    return t, valid & ((cap > 0) | ~on_cap)


# Shadows. Solids are given in the light's frame: axes u, v across and w towards the light. A point (u, v, w) relative
# to a convex solid's centre is in its shadow when the line through (u, v) meets the solid at a larger w.


def _box_shadow(u, v, w, solid: Solid):
    inverse = [1 / away_from_zero(axis[2]) for axis in solid.axes]
    middle = [-(axis[0] * i) * u - (axis[1] * i) * v for axis, i in zip(solid.axes, inverse, strict=True)]
    reach = [solid.size[i] * jnp.abs(inverse[i]) for i in range(3)]
    enter = functools.reduce(jnp.maximum, [m - r for m, r in zip(middle, reach, strict=True)])
    leave = functools.reduce(jnp.minimum, [m + r for m, r in zip(middle, reach, strict=True)])
    return (enter < leave) & (leave > w)


def _sphere_shadow(u, v, w, solid: Solid):
    return (u * u + v * v < solid.size[0] ** 2) & (w < 0)


def _cylinder_shadow(u, v, w, solid: Solid):
    axis = vector(solid.axes[2])
    along = u * axis.x + v * axis.y
    inverse_a, inverse_z = 1 / jnp.maximum(1 - axis.z * axis.z, TINY), 1 / away_from_zero(axis.z)
    centre = along * (axis.z * inverse_a)
    discriminant = centre * centre - (u * u + v * v - along * along - solid.size[0] ** 2) * inverse_a
    root = jnp.sqrt(jnp.maximum(discriminant, 0))
    middle, reach = -along * inverse_z, solid.size[1] * jnp.abs(inverse_z)
    leave = jnp.minimum(centre + root, middle + reach)
    return (discriminant > 0) & (jnp.maximum(centre - root, middle - reach) < leave) & (leave > w)


def _capsule_shadow(u, v, w, solid: Solid):
    # Distance in (u, v) to the projected segment; the nearest axis point lies inside the capsule, and so decides w.
    axis, half = vector(solid.axes[2]), solid.size[1]
    inverse = 1 / jnp.maximum(axis.x * axis.x + axis.y * axis.y, TINY)
    s = jnp.clip((axis.x * inverse) * u + (axis.y * inverse) * v, -half, half)
    du, dv = u - s * axis.x, v - s * axis.y
    return (du * du + dv * dv < solid.size[0] ** 2) & (s * axis.z > w)


# Shading. Each function takes surface points q in the solid's own axes and returns n.a for every direction a, which is
# given in the same axes. The nearest face decides.


def _plane_facing(q: Vector, solid: Solid, directions):
    return [jnp.broadcast_to(a.z, q.x.shape) for a in directions]


def _box_facing(q: Vector, solid: Solid, directions):
    x, y, z = (jnp.abs(value) - solid.size[i] for i, value in enumerate(q))
    sign = [jnp.sign(value) for value in q]
    first, second = (x >= y) & (x >= z), y >= z
    return [jnp.where(first, sign[0] * a.x, jnp.where(second, sign[1] * a.y, sign[2] * a.z)) for a in directions]


def _sphere_facing(q: Vector, solid: Solid, directions):
    return [dot(q, a) / solid.size[0] for a in directions]


def _cylinder_facing(q: Vector, solid: Solid, directions):
    lid = jnp.abs(q.z) - solid.size[1] > (q.x * q.x + q.y * q.y - solid.size[0] ** 2) / (2 * solid.size[0])
    return [jnp.where(lid, jnp.sign(q.z) * a.z, (q.x * a.x + q.y * a.y) / solid.size[0]) for a in directions]


def _capsule_facing(q: Vector, solid: Solid, directions):
    z = q.z - jnp.clip(q.z, -solid.size[1], solid.size[1])
    return [(q.x * a.x + q.y * a.y + z * a.z) / solid.size[0] for a in directions]


def _shapes(solid: Solid) -> tuple[Solid, Solid, Solid]:
    """A slot as box, cylinder and sphere."""
    return solid, solid._replace(size=solid.size[jnp.array([0, 2, 2])]), solid


def _by_shape(shape, box, cylinder, sphere):
    choices = zip(box, cylinder, sphere, strict=True)
    return [jnp.where(shape == 0, a, jnp.where(shape == 1, b, c)) for a, b, c in choices]


def _slot_hit(rays: Rays, solid: Solid):
    box, cylinder, sphere = _shapes(solid)
    return _by_shape(solid.shape, _box_hit(rays, box), _cylinder_hit(rays, cylinder), _sphere_hit(rays, sphere))


def _slot_shadow(u, v, w, solid: Solid):
    pairs = zip((_box_shadow, _cylinder_shadow, _sphere_shadow), _shapes(solid), strict=True)
    return _by_shape(solid.shape, *([shadow(u, v, w, own)] for shadow, own in pairs))[0]


def _slot_facing(q: Vector, solid: Solid, directions):
    box, cylinder, sphere = _shapes(solid)
    box, cylinder = _box_facing(q, box, directions), _cylinder_facing(q, cylinder, directions)
    return _by_shape(solid.shape, box, cylinder, _sphere_facing(q, sphere, directions))


HITS = {
    "plane": _plane_hit,
    "box": _box_hit,
    "sphere": _sphere_hit,
    "cylinder": _cylinder_hit,
    "capsule": _capsule_hit,
    "slot": _slot_hit,
}
SHADOWS = {  # a plane casts none
    "box": _box_shadow,
    "sphere": _sphere_shadow,
    "cylinder": _cylinder_shadow,
    "capsule": _capsule_shadow,
    "slot": _slot_shadow,
}
FACINGS = {
    "plane": _plane_facing,
    "box": _box_facing,
    "sphere": _sphere_facing,
    "cylinder": _cylinder_facing,
    "capsule": _capsule_facing,
    "slot": _slot_facing,
}
