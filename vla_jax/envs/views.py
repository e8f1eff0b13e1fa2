"""What the robot's cameras see: the model, where everything is, and the look of the scene, made into pictures.

The physics model knows shapes and places of the robot, the table and the slots; the `Scene` says how the table looks.
Here they meet: objects take their colour and shape, zones become a light flat plate and a darker, higher bowl, fixtures
are drawn dark, absent things vanish, and the table takes the colours of its background.

Axis legend: B scenes, G geoms, V views, H image rows, W image columns.
"""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, UInt8

from vla_jax.envs.camera import Camera, Geoms, Light, Picture, render_batch
from vla_jax.envs.kinematics import constant_rotation
from vla_jax.envs.physics import Bodies
from vla_jax.envs.scene import COLORS, NUM_BACKGROUNDS, NUM_SLOTS, NUM_ZONES, VIEWS, Scene

# How a scene is drawn, as a number: raise it with every change after which the same scene gives another picture
# (cameras, colours, light), so that no policy is judged on pictures that look unlike those that it learned from.
LOOK = 1

# (first colour, second colour, fields per metre along x and y): one colour, stripes or a chequerboard. Muted, so that
# the objects stand out; the first NUM_TRAIN_BACKGROUNDS occur in demonstrations.
BACKGROUNDS = (
    ((0.78, 0.78, 0.76), (0.78, 0.78, 0.76), (0, 0)),
    ((0.62, 0.46, 0.30), (0.62, 0.46, 0.30), (0, 0)),
    ((0.24, 0.26, 0.30), (0.24, 0.26, 0.30), (0, 0)),
    ((0.86, 0.66, 0.62), (0.86, 0.66, 0.62), (0, 0)),
    ((0.52, 0.55, 0.36), (0.52, 0.55, 0.36), (0, 0)),
    ((0.50, 0.60, 0.70), (0.50, 0.60, 0.70), (0, 0)),
    ((0.80, 0.80, 0.78), (0.50, 0.50, 0.50), (10, 10)),
    ((0.70, 0.56, 0.40), (0.45, 0.33, 0.22), (0, 12)),
    ((0.72, 0.68, 0.82), (0.72, 0.68, 0.82), (0, 0)),
    ((0.30, 0.42, 0.36), (0.42, 0.54, 0.46), (10, 10)),
    ((0.60, 0.44, 0.46), (0.40, 0.30, 0.32), (12, 0)),
    ((0.88, 0.80, 0.60), (0.88, 0.80, 0.60), (0, 0)),
)
assert len(BACKGROUNDS) == NUM_BACKGROUNDS

ZONE_RGB = ((0.94, 0.94, 0.90), (0.36, 0.25, 0.18))  # plate, bowl
ZONE_HALF_HEIGHT = (0.002, 0.006)  # metres
FIXTURE_SHADE = 0.25  # fixtures keep this share of their colour
DIFFUSE, AMBIENT, HEADLIGHT = 0.55, 0.27, 0.18  # together 1, so that a lit surface shows its own colour
SKY = (0.70, 0.78, 0.86)

KINDS = {
    int(getattr(mujoco.mjtGeom, f"mjGEOM_{kind.upper()}")): kind
    for kind in ("plane", "box", "sphere", "cylinder", "capsule")
}


def geoms_of(model: mujoco.MjModel, bodies: Bodies, scene: Scene) -> Geoms:
    """The solids to draw, leaves [B, G, ...] in the order of the model's geoms.

    Raises:
        ValueError: the model has a geom of a kind that the ray caster does not draw.
    """
    kinds = [KINDS.get(int(kind)) for kind in model.geom_type]
    if None in kinds:
        raise ValueError(f"geom {model.geom(kinds.index(None)).name!r} is not one of {', '.join(KINDS.values())}")
    batch = scene.background.shape
    objects = np.array([model.geom(f"object{n}").id for n in range(NUM_SLOTS)])
    zones = np.array([model.geom(f"zone{z}").id for z in range(NUM_ZONES)])
    table = model.geom("table").id
    for n in objects:
        kinds[n] = "slot"

    colors = jnp.array(list(COLORS.values()))[scene.color]
    colors *= jnp.where(scene.movable, 1.0, FIXTURE_SHADE)[..., None]
    first, second, frequency = (
        jnp.array(column, jnp.float32)[scene.background] for column in zip(*BACKGROUNDS, strict=True)
    )
    rgb = jnp.broadcast_to(jnp.asarray(model.geom_rgba[:, :3], jnp.float32), (*batch, model.ngeom, 3))
    rgb = rgb.at[..., objects, :].set(colors).at[..., zones, :].set(jnp.array(ZONE_RGB)).at[..., table, :].set(first)
    visible = jnp.broadcast_to(jnp.asarray(model.geom_rgba[:, 3] > 0), (*batch, model.ngeom))
    visible = visible.at[..., objects].set(scene.present).at[..., zones].set(scene.zone_present)
    size = jnp.asarray(model.geom_size, jnp.float32).at[zones, 1].set(jnp.array(ZONE_HALF_HEIGHT))
    return Geoms(
        kinds=tuple(kinds),
        position=bodies.geom_position,
        rotation=bodies.geom_rotation,
        size=jnp.broadcast_to(size, (*batch, model.ngeom, 3)),
        rgb=rgb,
        visible=visible,
        shape=jnp.zeros((*batch, model.ngeom), jnp.int32).at[..., objects].set(scene.shape),
        checkered=table,
        second_rgb=second,
        frequency=frequency,
    )


def cameras_of(model: mujoco.MjModel, bodies: Bodies, scene: Scene) -> Camera:
    """The cameras of VIEWS, leaves [B, V, ...]: "front" stands still, "wrist" rides on the hand.

    `scene.camera_shift` is added in the axes of the body that carries the camera: the world's or the hand's.
    """
    front, wrist = (model.camera(name) for name in VIEWS)
    hand, batch = model.geom("hand"), scene.background.shape
    # From the geom that the hand body carries back to the body's own frame.
    turn = _matmul(bodies.geom_rotation[..., hand.id, :, :], constant_rotation(hand.quat).T)
    origin = bodies.geom_position[..., hand.id, :] - _turn(turn, hand.pos)
    shift = scene.camera_shift
    positions = (front.pos + shift[..., 0, :], origin + _turn(turn, wrist.pos + shift[..., 1, :]))
    rotations = (
        jnp.broadcast_to(constant_rotation(front.quat), (*batch, 3, 3)),
        _matmul(turn, constant_rotation(wrist.quat)),
    )
    return Camera(
        position=jnp.stack(positions, -2).astype(jnp.float32),
        rotation=jnp.stack(rotations, -3).astype(jnp.float32),
        fovy=jnp.broadcast_to(jnp.radians(jnp.concatenate([front.fovy, wrist.fovy])), (*batch, len(VIEWS))),
    )


def light_of(scene: Scene) -> Light:
    """The scene's light, leaves [B, ...]; `scene.brightness` scales all of it but the sky."""
    return Light(
        direction=scene.light,
        diffuse=DIFFUSE * scene.brightness,
        ambient=AMBIENT * scene.brightness,
        headlight=HEADLIGHT * scene.brightness,
        sky=jnp.broadcast_to(jnp.array(SKY), (*scene.brightness.shape, 3)),
    )


def observe_pictures(
    model: mujoco.MjModel,
    bodies: Bodies,
    scene: Scene,
    image_size: int,
    supersample: int = 1,
    views: tuple[str, ...] = VIEWS,
) -> dict[str, Picture]:
    """What some cameras see, with depth and segmentation (numbers of the model's geoms); leaves [B, H, W, ...]."""
    geoms, cameras, light = geoms_of(model, bodies, scene), cameras_of(model, bodies, scene), light_of(scene)
    chosen = np.array([VIEWS.index(name) for name in views])
    cameras = jax.tree.map(lambda leaf: leaf[:, chosen], cameras)
    pictures = render_batch(geoms, cameras, light, height=image_size, width=image_size, supersample=supersample)
    return {name: jax.tree.map(lambda leaf, v=v: leaf[:, v], pictures) for v, name in enumerate(views)}


def observe_images(
    model: mujoco.MjModel, bodies: Bodies, scene: Scene, image_size: int, views: tuple[str, ...] = VIEWS
) -> dict[str, UInt8[Array, "B H W 3"]]:
    """What some cameras see, colours only."""
    pictures = observe_pictures(model, bodies, scene, image_size, views=views)
    return {name: picture.rgb for name, picture in pictures.items()}


def _matmul(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # accelerators round the inputs otherwise


def _turn(rotation, vectors):
    return (rotation * vectors[..., None, :]).sum(-1)
