"""A batched ray caster in plain JAX: what a camera sees of planes, boxes, spheres, cylinders and capsules.

One ray goes through every pixel, the nearest surface wins, and it is shaded by ambient light, a headlight (a lamp that
shines along the camera's axis, as in MuJoCo) and one directional light that casts hard shadows:

    rgb = surface * (ambient + headlight * max(0, n.b) + diffuse * max(0, n.l) * (0 in shadow, else 1))

with n the surface normal, b the camera's backward axis and l the direction towards the light.

Conventions: world frame in metres; cameras as in MuJoCo (x right, y up, looking along -z). Rays are scaled so that
their parameter t *is* the depth along the optical axis.

How it is fast on a CPU: three passes (hits, shadows, shading; the geometry is in solids.py) scan over the geoms of one
kind, with the pixels as the last axis of every operation. A pass carries one array only, because XLA computes a loop's
body anew for each array that it carries; that is why a hit's depth and geom share one integer. (Unrolled over the
geoms instead, the CPU compiler fuses everything and recomputes each hit in every use: a hundred times slower.)

Axis legend: B scenes, V camera views, G geoms, H image rows, W image columns, P = H W pixels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from vla_jax.envs.solids import FACINGS, HITS, SHADOWS, Rays, Solid, Vector, away_from_zero, dot, vector

MAX_GEOMS = 64  # a power of two
NEAR = 0.01  # metres; nearer surfaces are not drawn, so a camera may sit inside its own mount
FAR = 1024.0  # metres; depth of the sky, and nothing is drawn beyond
SKY = int(np.float32(FAR).view(np.int32))  # its low bits are zero, as a power of two has no mantissa
SHADOW_BIAS = 5e-4  # metres a shadow caster must stand above a surface; hides rounding on lit faces
RAYS_PER_CHUNK = 2**18  # on a CPU more rays at a time fall out of the cache (see benchmarks/camera.py)


@functools.partial(
    jax.tree_util.register_dataclass,
    meta_fields=["kinds", "checkered"],
    data_fields=["position", "rotation", "size", "rgb", "visible", "shape", "second_rgb", "frequency"],
)
@dataclasses.dataclass(frozen=True)
class Geoms:
    """The solids of a scene. `kinds` is static: it shapes the compiled program; the rest are arrays.

    Kinds and sizes are those of solids.py. Geom number `checkered` (None: no geom) alternates between `rgb` and
    `second_rgb` along world x and y, `frequency` fields a metre; a frequency of zero does not alternate.
    """

    kinds: tuple[str, ...]
    position: Float[Array, "*B G 3"]
    rotation: Float[Array, "*B G 3 3"]  # columns are the geom's axes in the world
    size: Float[Array, "*B G 3"]  # metres, as in MuJoCo
    rgb: Float[Array, "*B G 3"]  # 0..1
    visible: Bool[Array, "*B G"]
    shape: Int[Array, "*B G"]  # read for slots only
    checkered: int | None
    second_rgb: Float[Array, "*B 3"]
    frequency: Float[Array, "*B 2"]  # fields per metre along x and y


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Camera:
    """Pinhole camera with square pixels."""

    position: Float[Array, "*B 3"]
    rotation: Float[Array, "*B 3 3"]  # columns: right, up, backwards
    fovy: Float[Array, "*B"]  # radians, vertical


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Light:
    """Light of a scene; intensities multiply surface colours."""

    direction: Float[Array, "*B 3"]  # towards the light, unit length
    diffuse: Float[Array, "*B"]
    ambient: Float[Array, "*B"]
    headlight: Float[Array, "*B"]
    sky: Float[Array, "*B 3"]  # colour of rays that hit nothing, 0..1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Picture:
    """What a camera sees."""

    rgb: UInt8[Array, "*B H W 3"]
    depth: Float[Array, "*B H W"]  # metres along the optical axis; FAR for sky
    segment: Int[Array, "*B H W"]  # geom number; -1 for sky


# Accelerators round the inputs of matrix products unless they are told not to.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _solids(geoms: Geoms, origin: Float[Array, "3"], frame: Float[Array, "3 3"]) -> Solid:
    """All geoms relative to `origin`, in the frame whose rows are given. Leaves have a leading axis G."""
    o = _matmul(origin - geoms.position, frame.T)
    axes = _matmul(jnp.swapaxes(geoms.rotation, -1, -2), frame.T)
    local = (axes * o[:, None]).sum(-1)
    return Solid(jnp.arange(len(geoms.kinds)), o, axes, local, (o * o).sum(-1), geoms.size, geoms.visible, geoms.shape)


def _scan(functions: dict, geoms: Geoms, solids: Solid, carry: Array) -> Array:
    """Folds every geom into `carry` [P] by `functions[kind](carry, solid)`; kinds without a function are left out."""
    for kind, function in functions.items():
        index = np.flatnonzero([own == kind for own in geoms.kinds])
        if index.size:
            own = Solid(*(leaf[index] for leaf in solids))
            carry, _ = jax.lax.scan(lambda *args, function=function: (function(*args), None), carry, own)
    return carry


def _rays(camera: Camera, height: int, width: int) -> Rays:
    right, up, back = (vector(camera.rotation[:, i]) for i in range(3))
    scale = 2 * jnp.tan(camera.fovy / 2) / height
    row, column = jnp.divmod(jnp.arange(height * width), width)
    x, y = scale * (column + 0.5 - width / 2), scale * (height / 2 - row - 0.5)
    d = Vector(*(x * r + y * u - b for r, u, b in zip(right, up, back, strict=True)))
    dd = dot(d, d)
    return Rays(d, dd, 1 / dd)


def _nearest(geoms: Geoms, camera: Camera, rays: Rays):
    """First surface along each ray: depth [P] (FAR for sky) and geom number [P] (-1 for sky).

    Positive floats order like their bits, so depth and number share one integer, the number in the lowest bits:
    depth is cut to 17 bits, which is 8 micrometres at a metre.
    """
    solids = _solids(geoms, camera.position, jnp.eye(3))

    def fold(hit, nearest, solid):
        t, valid = hit(rays, solid)
        valid &= t > jnp.where(solid.visible, NEAR, jnp.inf)
        bits = jax.lax.bitcast_convert_type(t, jnp.int32)
        return jnp.minimum(nearest, jnp.where(valid, (bits & -MAX_GEOMS) | solid.number, SKY))

    nearest = jnp.full(rays.dd.shape, SKY, jnp.int32)
    nearest = _scan({kind: functools.partial(fold, hit) for kind, hit in HITS.items()}, geoms, solids, nearest)
    depth = jax.lax.bitcast_convert_type(nearest & -MAX_GEOMS, jnp.float32)
    return depth, jnp.where(nearest == SKY, -1, nearest & (MAX_GEOMS - 1))


def _lit(geoms: Geoms, light: Light, points: Vector) -> Float[Array, "P"]:
    """1 where the light reaches a point, 0 in shadow."""
    frame = _light_frame(light.direction)
    u, v, w = (dot(points, vector(axis)) for axis in frame)

    def fold(shadow, lit, solid):
        above = jnp.where(solid.visible, w + SHADOW_BIAS, jnp.inf)
        return jnp.where(shadow(u + solid.o[0], v + solid.o[1], above + solid.o[2], solid), 0, lit)

    functions = {kind: functools.partial(fold, shadow) for kind, shadow in SHADOWS.items()}
    return _scan(functions, geoms, _solids(geoms, jnp.zeros(3), frame), jnp.ones(u.shape))


def _light_frame(w: Float[Array, "3"]) -> Float[Array, "3 3"]:
    """Rows u, v, w of an orthonormal frame."""
    other = jnp.where(jnp.abs(w[0]) < 0.5, jnp.array([1.0, 0, 0]), jnp.array([0, 1.0, 0]))
    u = jnp.cross(other, w)
    u /= jnp.linalg.norm(u)
    return jnp.stack([u, jnp.cross(w, u), w])


def _shade(geoms: Geoms, camera: Camera, light: Light, segment, points: Vector, lit) -> Float[Array, "P"]:
    """What surface colours are multiplied with."""
    solids = _solids(geoms, jnp.zeros(3), jnp.eye(3))

    def fold(facing, shade, solid):
        q = Vector(*(dot(points, vector(axis)) + solid.local[i] for i, axis in enumerate(solid.axes)))
        directions = [vector(_matmul(solid.axes, a)) for a in (light.direction, camera.rotation[:, 2])]
        nl, nb = facing(q, solid, directions)
        own = light.ambient + light.headlight * jnp.maximum(nb, 0) + light.diffuse * lit * jnp.maximum(nl, 0)
        return jnp.where(segment == solid.number, own, shade)

    functions = {kind: functools.partial(fold, facing) for kind, facing in FACINGS.items()}
    return _scan(functions, geoms, solids, jnp.ones(segment.shape))


def _surface(geoms: Geoms, light: Light, segment, points: Vector) -> Float[Array, "P 3"]:
    """Colour of what each pixel shows."""
    sky = len(geoms.kinds)
    table = jnp.concatenate([geoms.rgb, light.sky[None], geoms.second_rgb[None]])
    row = jnp.where(segment < 0, sky, segment)
    if geoms.checkered is not None:
        field = jnp.floor(points.x * geoms.frequency[0]) + jnp.floor(points.y * geoms.frequency[1])
        row = jnp.where((segment == geoms.checkered) & (jnp.mod(field, 2) > 0.5), sky + 1, row)
    return table[row]


def render(geoms: Geoms, camera: Camera, light: Light, *, height: int, width: int, supersample: int = 1) -> Picture:
    """Renders one picture of one scene (no batch axes; see `render_batch`).

    With `supersample` s, colour is the mean over s x s rays a pixel; depth and segment are those of the ray at
    sub-row and sub-column s // 2.
    """
    unknown = set(geoms.kinds) - set(HITS)
    if unknown or len(geoms.kinds) >= MAX_GEOMS:
        raise ValueError(f"the camera draws fewer than {MAX_GEOMS} geoms of {', '.join(HITS)}, not {geoms.kinds}")
    rows, columns = height * supersample, width * supersample
    rays = _rays(camera, rows, columns)
    depth, segment = _nearest(geoms, camera, rays)
    points = Vector(*(camera.position[i] + depth * rays.d[i] for i in range(3)))
    lit = _lit(geoms, light, points)
    shade = _shade(geoms, camera, light, segment, points, lit)
    rgb = jnp.clip(_surface(geoms, light, segment, points) * shade[:, None], 0, 1)
    rgb = 255 * rgb.reshape(height, supersample, width, supersample, 3).mean((1, 3))
    middle = (slice(supersample // 2, None, supersample),) * 2
    return Picture(
        (rgb + 0.5).astype(jnp.uint8), depth.reshape(rows, columns)[middle], segment.reshape(rows, columns)[middle]
    )


def render_batch(
    geoms: Geoms, cameras: Camera, light: Light, *, height: int, width: int, supersample: int = 1
) -> Picture:
    """Renders V views of each of B scenes.

    Args:
        geoms, light: leaves with one leading axis B.
        cameras: leaves with leading axes B, V.

    Returns:
        Picture with leading axes B, V.
    """
    one = functools.partial(render, height=height, width=width, supersample=supersample)
    scene = jax.vmap(one, in_axes=(None, 0, None))
    batch, views = cameras.fovy.shape
    chunk = max(1, RAYS_PER_CHUNK // (views * height * width * supersample**2))
    if batch <= chunk or jax.default_backend() != "cpu":
        return jax.vmap(scene)(geoms, cameras, light)
    return jax.lax.map(lambda arguments: scene(*arguments), (geoms, cameras, light), batch_size=chunk)


def project(
    camera: Camera, points: Float[Array, "*N 3"], *, height: int, width: int
) -> tuple[Float[Array, "*N 2"], Float[Array, "*N"]]:
    """Where world points appear in one camera's picture.

    Returns:
        pixels: (column, row) in pixels; the centre of the top-left pixel is (0.5, 0.5). Meaningless behind the camera.
        depth: metres along the optical axis, negative behind the camera.
    """
    local = _matmul(points - camera.position, camera.rotation)
    depth = -local[..., 2]
    scale = height / (2 * jnp.tan(camera.fovy / 2)) / away_from_zero(depth)
    pixels = jnp.stack([width / 2 + local[..., 0] * scale, height / 2 - local[..., 1] * scale], axis=-1)
    return pixels, depth
