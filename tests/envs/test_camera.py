"""The ray caster against geometry done by hand and against sphere tracing of signed distance functions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs import camera as caster
from vla_jax.envs.camera import FAR, Camera, Geoms, Light, project, render, render_batch

UP = np.array([0.0, 0.0, 1.0])
RED, GREY = (0.8, 0.1, 0.1), (0.5, 0.5, 0.5)
FLOOR = ("plane", (0, 0, 0), np.eye(3), (0, 0, 0), GREY)


def make_geoms(*solids, shape=0, checkered=None, second_rgb=GREY, frequency=(0, 0)):
    kinds, position, rotation, size, rgb = zip(*solids, strict=True)
    return Geoms(
        kinds=kinds,
        position=jnp.array(position, jnp.float32),
        rotation=jnp.array(np.stack(rotation), jnp.float32),
        size=jnp.array(size, jnp.float32),
        rgb=jnp.array(rgb, jnp.float32),
        visible=jnp.ones(len(kinds), bool),
        shape=jnp.full(len(kinds), shape),
        checkered=checkered,
        second_rgb=jnp.array(second_rgb, jnp.float32),
        frequency=jnp.array(frequency, jnp.float32),
    )


def look(position, target, up=UP, fovy=40.0):
    back = np.subtract(position, target).astype(float)
    back /= np.linalg.norm(back)
    right = np.cross(up, back)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(back, right), back], axis=1)
    return Camera(jnp.array(position, jnp.float32), jnp.array(rotation, jnp.float32), jnp.radians(fovy))


def make_light(direction=(0.0, 0.0, 1.0), diffuse=0.6, ambient=0.2, headlight=0.2):
    direction = np.array(direction) / np.linalg.norm(direction)
    return Light(jnp.array(direction, jnp.float32), diffuse, ambient, headlight, jnp.array([0.6, 0.7, 0.8]))


def turned(seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


draw = jax.jit(render, static_argnames=("height", "width", "supersample"))
DOWN = look((0, 0, 1), (0, 0, 0), up=(0, 1, 0))


def assert_same_picture(a, b):
    """Equal but for rounding, which may move an edge by a pixel."""
    same = np.asarray(a.segment) == np.asarray(b.segment)
    assert same.mean() > 0.995
    np.testing.assert_allclose(np.asarray(a.depth)[same], np.asarray(b.depth)[same], atol=1e-4)
    assert (np.abs(np.asarray(a.rgb, int) - np.asarray(b.rgb, int)).max(-1) <= 1).mean() > 0.99


def centroid(segment, number):
    rows, columns = np.nonzero(np.asarray(segment) == number)
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5])


def test_sphere_is_where_it_should_be():
    centre, radius = np.array([0.10, -0.06, 0.15]), 0.03
    eye = look((0.9, 0.2, 0.7), (0, 0, 0.1))
    picture = draw(make_geoms(FLOOR, ("sphere", centre, np.eye(3), (radius, 0, 0), RED)), eye, make_light(), **SIZE)
    pixel, depth = project(eye, jnp.array(centre), height=96, width=96)
    np.testing.assert_allclose(centroid(picture.segment, 1), pixel, atol=0.3)
    column, row = np.floor(pixel).astype(int)
    # The nearest point lies one radius towards the camera, on the ray and so (nearly) along the optical axis.
    ray = centre - np.asarray(eye.position)
    expected = depth * (1 - radius / np.linalg.norm(ray))
    np.testing.assert_allclose(picture.depth[row, column], expected, atol=1e-4)


SIZE = {"height": 96, "width": 96}


def test_box_has_its_depth_and_its_area():
    geoms = make_geoms(FLOOR, ("box", (0, 0, 0.1), np.eye(3), (0.15, 0.05, 0.1), RED))
    picture = draw(geoms, DOWN, make_light(), **SIZE)
    top = np.asarray(picture.segment) == 1
    np.testing.assert_allclose(np.asarray(picture.depth)[top], 0.8, atol=1e-5)
    np.testing.assert_allclose(np.asarray(picture.depth)[~top], 1.0, atol=1e-5)
    focal = 96 / (2 * np.tan(np.radians(20)))
    np.testing.assert_allclose(top.sum(), 0.3 * 0.1 * (focal / 0.8) ** 2, rtol=0.03)
    rows, columns = np.nonzero(top)
    assert np.ptp(columns) > 2.5 * np.ptp(rows)  # x runs to the right of the picture


def test_sky_where_nothing_is():
    picture = draw(make_geoms(("sphere", (0, 0, 0), np.eye(3), (0.1, 0, 0), RED)), DOWN, make_light(), **SIZE)
    assert picture.segment[0, 0] == -1 and picture.depth[0, 0] == FAR
    np.testing.assert_allclose(picture.rgb[0, 0], [153, 178.5, 204], atol=1)


def test_shadow_falls_where_the_light_is_blocked():
    light, height = np.array([0.5, 0.2, 1.0]), 0.3
    eye = look((0.6, -0.9, 0.9), (0, 0, 0))
    geoms = make_geoms(FLOOR, ("sphere", (0, 0, height), np.eye(3), (0.04, 0, 0), RED))
    picture = draw(geoms, eye, make_light(light), **SIZE)
    points = jnp.array([[-0.5 * height, -0.2 * height, 0], [0.5 * height, 0.2 * height, 0]])
    pixels, _ = project(eye, points, **SIZE)
    (column, row), (far_column, far_row) = np.floor(pixels).astype(int)
    assert picture.segment[row, column] == picture.segment[far_row, far_column] == 0
    dark, lit = picture.rgb[row, column, 0] / 255, picture.rgb[far_row, far_column, 0] / 255
    headlight = 0.2 * float(eye.rotation[2, 2])
    np.testing.assert_allclose(dark, 0.5 * (0.2 + headlight), atol=0.003)
    np.testing.assert_allclose(lit, 0.5 * (0.2 + headlight + 0.6 / np.linalg.norm(light)), atol=0.003)


def test_hidden_and_invisible_solids_are_not_drawn():
    solids = [
        FLOOR,
        ("box", (0, 0, 0.3), np.eye(3), (0.1, 0.1, 0.01), RED),
        ("sphere", (0, 0, 0.1), np.eye(3), (0.03, 0, 0), RED),
    ]
    hidden = draw(make_geoms(*solids), DOWN, make_light(), **SIZE)
    assert set(np.unique(hidden.segment)) == {0, 1}
    geoms = dataclasses.replace(make_geoms(*solids), visible=jnp.array([True, False, True]))
    seen = draw(geoms, DOWN, make_light(), **SIZE)
    assert set(np.unique(seen.segment)) == {0, 2}
    # What is not there casts no shadow either: the floor is evenly lit but for the sphere's own shadow, under it.
    floor = np.asarray(seen.rgb)[np.asarray(seen.segment) == 0]
    assert np.ptp(floor[:, 0]) <= 1


# Signed distances (metres) of points [P, 3] in the solid's own frame, for sphere tracing.
def _sdf_box(p, size):
    q = np.abs(p) - size
    return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)


def _sdf_cylinder(p, size):
    q = np.stack([np.hypot(p[..., 0], p[..., 1]) - size[0], np.abs(p[..., 2]) - size[1]], -1)
    return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)


def _sdf_capsule(p, size):
    foot = np.clip(p[..., 2], -size[1], size[1])
    return np.linalg.norm(p - np.stack([0 * foot, 0 * foot, foot], -1), axis=-1) - size[0]


SDFS = {
    "box": _sdf_box,
    "sphere": lambda p, size: np.linalg.norm(p, axis=-1) - size[0],
    "cylinder": _sdf_cylinder,
    "capsule": _sdf_capsule,
}


def traced(kind, position, rotation, size, eye, light, pixels):
    """The picture of FLOOR and one red solid by sphere tracing: rgb in 0..1, depth, segment."""

    def distances(p):
        solid = SDFS[kind]((p - position) @ rotation, np.array(size))
        return np.stack([p[..., 2], solid], -1)

    def march(origin, direction, steps=400):
        t = np.full(origin.shape[:-1], 2e-3)
        for _ in range(steps):
            t = np.minimum(t + distances(origin + t[..., None] * direction).min(-1), 20.0)
        return t

    turn, scale = np.asarray(eye.rotation, float), 2 * np.tan(float(eye.fovy) / 2) / pixels
    row, column = np.mgrid[:pixels, :pixels] + 0.5 - pixels / 2
    ray = np.stack([column * scale, -row * scale, -np.ones_like(row)], -1) @ turn.T
    length = np.linalg.norm(ray, axis=-1)
    t = march(np.asarray(eye.position, float) + 0 * ray, ray / length[..., None])
    points = np.asarray(eye.position, float) + (t / length)[..., None] * ray
    segment = np.where(t < 19, distances(points).argmin(-1), -1)
    h = 1e-5
    normal = np.stack([distances(points + h * e).min(-1) - distances(points - h * e).min(-1) for e in np.eye(3)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    sun = np.asarray(light.direction, float)
    lit = march(points + 1e-3 * normal, sun + 0 * ray) >= 19
    shade = light.ambient + light.headlight * np.maximum(normal @ turn[:, 2], 0)
    shade = shade + light.diffuse * lit * np.maximum(normal @ sun, 0)
    rgb = np.array([GREY, RED])[segment] * shade[..., None]
    return np.where(segment[..., None] < 0, light.sky, rgb), t / length, segment


CASES = [
    ("box", "box", 0, (0.10, 0.06, 0.04)),
    ("sphere", "sphere", 0, (0.08, 0, 0)),
    ("cylinder", "cylinder", 0, (0.07, 0.09, 0)),
    ("capsule", "capsule", 0, (0.05, 0.08, 0)),
    ("slot", "box", 0, (0.07, 0.07, 0.07)),
    ("slot", "cylinder", 1, (0.07, 0.07, 0.07)),
    ("slot", "sphere", 2, (0.07, 0.07, 0.07)),
]


@pytest.mark.parametrize("kind, solid, shape, size", CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_every_solid_agrees_with_sphere_tracing(kind, solid, shape, size):
    eye, light, pixels = look((0.7, -0.3, 0.6), (0, 0, 0.12)), make_light((0.4, 0.3, 0.9)), 48
    for seed in (1, 2):
        position, rotation = (0.02, 0.03, 0.2), turned(seed)
        geoms = make_geoms(FLOOR, (kind, position, rotation, size, RED), shape=shape)
        picture = draw(geoms, eye, light, height=pixels, width=pixels)
        rgb, depth, segment = traced(solid, np.array(position), rotation, size, eye, light, pixels)
        assert (np.asarray(picture.segment) == 1).mean() > 0.02
        assert (np.asarray(picture.segment) != segment).mean() < 0.005
        same = np.asarray(picture.segment) == segment
        assert np.abs(np.asarray(picture.depth) - depth)[same].max() < 2e-3
        differs = np.abs(np.asarray(picture.rgb) / 255 - rgb).max(-1) > 0.01
        assert differs.mean() < 0.01  # shadow edges


def test_batch_equals_single_pictures_and_chunks_change_nothing(monkeypatch):
    scenes = [
        make_geoms(FLOOR, ("slot", (0.1 * i - 0.1, 0, 0.05), turned(i), (0.05,) * 3, RED), shape=i) for i in range(3)
    ]
    eyes = [look((0.7, 0.1 * v, 0.6), (0, 0, 0)) for v in range(2)]
    geoms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)
    cameras = jax.tree.map(lambda *leaves: jnp.stack([jnp.stack(leaves)] * 3), *eyes)
    lights = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 3), make_light((0.3, 0.2, 1)))
    together = jax.jit(lambda *scene: render_batch(*scene, height=24, width=32))(geoms, cameras, lights)
    assert together.rgb.shape == (3, 2, 24, 32, 3) and together.rgb.dtype == jnp.uint8
    for i, scene in enumerate(scenes):
        for v, eye in enumerate(eyes):
            single = draw(scene, eye, make_light((0.3, 0.2, 1)), height=24, width=32)
            assert_same_picture(jax.tree.map(lambda leaf, i=i, v=v: leaf[i, v], together), single)
    monkeypatch.setattr(caster, "RAYS_PER_CHUNK", 2 * 2 * 24 * 32)  # two scenes, then the one left over
    chunked = jax.jit(lambda *scene: render_batch(*scene, height=24, width=32))(geoms, cameras, lights)
    assert_same_picture(chunked, together)


def test_supersampling_is_the_mean_of_finer_pixels():
    geoms = make_geoms(FLOOR, ("sphere", (0, 0, 0.1), np.eye(3), (0.1, 0, 0), RED))
    fine = draw(geoms, DOWN, make_light((0.4, 0.3, 1)), height=48, width=48)
    smooth = draw(geoms, DOWN, make_light((0.4, 0.3, 1)), height=24, width=24, supersample=2)
    mean = np.asarray(fine.rgb, float).reshape(24, 2, 24, 2, 3).mean((1, 3))
    np.testing.assert_allclose(smooth.rgb, mean, atol=1.01)
    np.testing.assert_array_equal(smooth.segment, np.asarray(fine.segment)[1::2, 1::2])


def test_chequered_floor_alternates_in_world_metres():
    second = (0.1, 0.1, 0.5)
    geoms = make_geoms(FLOOR, checkered=0, second_rgb=second, frequency=(10, 10))
    light = make_light(diffuse=0.0, ambient=1.0, headlight=0.0)
    picture = draw(geoms, DOWN, light, **SIZE)
    points = jnp.array([[0.05, 0.05, 0], [0.15, 0.05, 0], [0.15, 0.15, 0], [-0.05, 0.05, 0]])
    pixels, _ = project(DOWN, points, **SIZE)
    colours = [picture.rgb[int(row), int(column)] for column, row in np.asarray(pixels)]
    even, odd = np.round(255 * np.array(GREY)), np.round(255 * np.array(second))
    np.testing.assert_allclose(colours, [even, odd, even, odd], atol=1)


def test_project_tells_what_lies_behind_the_camera():
    _, depth = project(DOWN, jnp.array([[0.0, 0, 0.4], [0.0, 0, 1.5]]), **SIZE)
    np.testing.assert_allclose(depth, [0.6, -0.5], atol=1e-6)


def test_a_camera_inside_a_solid_looks_through_it():
    geoms = make_geoms(FLOOR, ("box", (0, 0, 1.0), np.eye(3), (0.05, 0.05, 0.05), RED))
    assert set(np.unique(draw(geoms, DOWN, make_light(), **SIZE).segment)) == {0}


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="ellipsoid"):
        render(make_geoms(("ellipsoid", (0, 0, 0), np.eye(3), (1, 1, 1), RED)), DOWN, make_light(), **SIZE)
