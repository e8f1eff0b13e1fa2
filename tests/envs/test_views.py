"""What the cameras show of a scene, and that MuJoCo's own renderer shows the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from vla_jax.envs import views
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.camera import project
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.reference import ReferenceViews
from vla_jax.envs.sampling import sample_episode
from vla_jax.envs.scene import COLORS, NUM_BACKGROUNDS, NUM_SLOTS, NUM_ZONES, SHAPES, VIEWS
from vla_jax.errors import UserError

SCENES, PIXELS = 4, 96


@functools.cache
def table(embodiment):
    """An environment and the first states of a few random scenes."""
    env = Tabletop(EnvConfig(embodiment=embodiment, task="place_on"))
    keys = jax.random.split(jax.random.key(3), SCENES)
    scene, command, cue = jax.jit(jax.vmap(lambda key: sample_episode(key, "place_on", BiasConfig())))(keys)
    return env, jax.jit(env.reset)(scene, command, cue)


@functools.cache
def observer(embodiment, supersample=1):
    env, _ = table(embodiment)
    return jax.jit(lambda bodies, scene: views.observe_pictures(env.model, bodies, scene, PIXELS, supersample))


def seen(picture, number):
    """Colours [n, 3] in 0..1 of the pixels that show a geom, for each scene."""
    return [
        np.asarray(rgb)[np.asarray(own) == number] / 255 for rgb, own in zip(picture.rgb, picture.segment, strict=True)
    ]


@pytest.fixture(scope="module")
def floating():
    env, state = table("floating")
    return env, state, functools.partial(observer("floating"), state.bodies)


def test_images_are_the_pictures_colours(floating):
    env, state, observe = floating
    images = jax.jit(env.observe)(state)["images"]
    assert set(images) == set(VIEWS)
    size = env.config.image_size
    for name, image in images.items():
        assert image.shape == (SCENES, size, size, 3) and image.dtype == jnp.uint8
        # The same picture at another size has nearly the same mean colour.
        np.testing.assert_allclose(image.mean((1, 2)), observe(state.scene)[name].rgb.mean((1, 2)), atol=4)


def test_present_objects_are_seen_in_their_colour_and_absent_ones_are_not(floating):
    env, state, observe = floating
    scene = dataclasses.replace(state.scene, movable=jnp.ones((SCENES, NUM_SLOTS), bool))
    pictures = observe(scene)
    palette = np.array(list(COLORS.values()))
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    found = 0
    for n in range(NUM_SLOTS):
        for i, pixels in enumerate(seen(pictures["front"], env.model.geom(f"object{n}").id)):
            if not scene.present[i, n]:
                assert len(pixels) == 0
            elif len(pixels) > 10:
                found += 1
                assert np.argmax(palette @ pixels.mean(0)) == scene.color[i, n]
    assert found >= 0.8 * scene.present.sum()  # the hand may hide some
    gone = observe(dataclasses.replace(scene, present=jnp.zeros((SCENES, NUM_SLOTS), bool)))
    objects = [env.model.geom(f"object{n}").id for n in range(NUM_SLOTS)]
    assert not any(np.isin(picture.segment, objects).any() for picture in gone.values())


def test_fixtures_are_darker(floating):
    env, state, observe = floating
    number = env.model.geom("object0").id
    free = observe(dataclasses.replace(state.scene, movable=jnp.ones((SCENES, NUM_SLOTS), bool)))["front"]
    fixed = observe(dataclasses.replace(state.scene, movable=jnp.zeros((SCENES, NUM_SLOTS), bool)))["front"]
    pairs = [(a.mean(), b.mean()) for a, b in zip(seen(free, number), seen(fixed, number), strict=True) if len(a)]
    assert pairs and views.FIXTURE_SHADE < 0.5
    np.testing.assert_allclose([dark / bright for bright, dark in pairs], views.FIXTURE_SHADE, atol=0.03)


def test_shape_changes_the_picture_but_not_its_place(floating):
    env, state, observe = floating
    scene = dataclasses.replace(state.scene, present=jnp.ones((SCENES, NUM_SLOTS), bool))
    counts = []
    for shape in range(len(SHAPES)):
        picture = observe(dataclasses.replace(scene, shape=jnp.full((SCENES, NUM_SLOTS), shape)))["front"]
        counts.append(
            [(np.asarray(picture.segment) == env.model.geom(f"object{n}").id).sum() for n in range(NUM_SLOTS)]
        )
    cube, cylinder, ball = np.sum(counts, -1)
    assert cube > 1.05 * cylinder > 1.1 * ball > 0


def test_zones_are_a_light_plate_and_a_dark_bowl(floating):
    env, state, observe = floating
    picture = observe(dataclasses.replace(state.scene, zone_present=jnp.ones((SCENES, NUM_ZONES), bool)))["front"]
    for plate, bowl in zip(*(seen(picture, env.model.geom(f"zone{z}").id) for z in range(NUM_ZONES)), strict=True):
        if len(plate) and len(bowl):
            assert np.median(plate) > 1.5 * np.median(bowl)
    gone = observe(dataclasses.replace(state.scene, zone_present=jnp.zeros((SCENES, NUM_ZONES), bool)))["front"]
    assert not np.isin(gone.segment, [env.model.geom(f"zone{z}").id for z in range(NUM_ZONES)]).any()


def test_backgrounds_differ_from_one_another(floating):
    env, state, observe = floating
    number, looks = env.model.geom("table").id, []
    for background in range(NUM_BACKGROUNDS):
        scene = dataclasses.replace(state.scene, background=jnp.full(SCENES, background))
        pixels = seen(observe(scene)["front"], number)[0]
        looks.append(np.concatenate([pixels.mean(0), 2 * np.std(pixels.mean(-1), keepdims=True)]))
    apart = np.linalg.norm(np.array(looks)[:, None] - np.array(looks), axis=-1) + np.eye(NUM_BACKGROUNDS)
    assert apart.min() > 0.08


def test_light_and_brightness_are_the_scenes(floating):
    _, state, observe = floating
    dim = observe(dataclasses.replace(state.scene, brightness=jnp.full(SCENES, 0.5)))["front"].rgb
    bright = observe(dataclasses.replace(state.scene, brightness=jnp.full(SCENES, 0.9)))["front"].rgb
    np.testing.assert_allclose(np.mean(dim) / np.mean(bright), 0.5 / 0.9, atol=0.02)
    turned = dataclasses.replace(state.scene, light=state.scene.light * jnp.array([-1.0, -1.0, 1.0]))
    assert (np.asarray(observe(turned)["front"].rgb) != np.asarray(observe(state.scene)["front"].rgb)).mean() > 0.01


@pytest.mark.parametrize("embodiment", ["floating", "panda"])
def test_cameras_stand_where_mujoco_puts_them(embodiment):
    env, state = table(embodiment)
    shift = np.array([[0.02, -0.03, 0.01], [0.004, 0.006, -0.002]])
    scene = dataclasses.replace(state.scene, camera_shift=jnp.broadcast_to(shift, (SCENES, len(VIEWS), 3)))
    cameras, data = views.cameras_of(env.model, state.bodies, scene), mujoco.MjData(env.model)
    for i in range(SCENES):
        data.qpos[:] = state.physics.qpos[i]
        mujoco.mj_forward(env.model, data)
        for v, (name, body) in enumerate(zip(VIEWS, ("world", "hand"), strict=True)):
            moved = data.camera(name).xpos + data.body(body).xmat.reshape(3, 3) @ shift[v]
            np.testing.assert_allclose(cameras.position[i, v], moved, atol=1e-4)
            np.testing.assert_allclose(cameras.rotation[i, v], data.camera(name).xmat.reshape(3, 3), atol=1e-4)
            assert cameras.fovy[i, v] == pytest.approx(np.radians(env.model.camera(name).fovy[0]))


def test_projected_objects_are_where_the_picture_shows_them(floating):
    env, state, observe = floating
    shift = jnp.broadcast_to(jnp.array([[0.02, -0.03, 0.01], [0.004, 0.006, 0.0]]), (SCENES, len(VIEWS), 3))
    scene = dataclasses.replace(
        state.scene, camera_shift=shift, shape=jnp.full((SCENES, NUM_SLOTS), SHAPES.index("ball"))
    )
    pictures, cameras = observe(scene), views.cameras_of(env.model, state.bodies, scene)
    checked = {name: 0 for name in VIEWS}
    for v, name in enumerate(VIEWS):
        for i in range(SCENES):
            camera = jax.tree.map(lambda leaf, i=i, v=v: leaf[i, v], cameras)
            pixels, depth = project(camera, state.bodies.object_position[i], height=PIXELS, width=PIXELS)
            for n in range(NUM_SLOTS):
                own = np.asarray(pictures[name].segment[i]) == env.model.geom(f"object{n}").id
                whole = np.pi * (0.02 * PIXELS / (2 * np.tan(camera.fovy / 2)) / depth[n]) ** 2
                if not scene.present[i, n] or own.sum() < 0.9 * whole:
                    continue  # hidden in part, so that its middle is not the middle of what is seen
                rows, columns = np.nonzero(own)
                np.testing.assert_allclose([columns.mean() + 0.5, rows.mean() + 0.5], pixels[n], atol=1)
                checked[name] += 1
    assert checked["front"] >= 4 and checked["wrist"] >= 1


def test_the_front_camera_sees_all_of_the_table_that_is_used(floating):
    env, _, _ = floating
    keys = jax.random.split(jax.random.key(0), 64)
    scene, command, cue = jax.jit(jax.vmap(lambda key: sample_episode(key, "place_on", BiasConfig())))(keys)
    bodies = jax.jit(env.reset)(scene, command, cue).bodies
    front = jax.tree.map(lambda leaf: leaf[:, 0], views.cameras_of(env.model, bodies, scene))
    pixels, _ = jax.vmap(functools.partial(project, height=1, width=1))(front, bodies.object_position)
    inside = ((pixels > 0) & (pixels < 1)).all(-1)
    assert inside[scene.present].mean() > 0.99


@pytest.mark.parametrize("embodiment", ["floating", "panda"])
def test_mujocos_own_renderer_shows_the_same(embodiment):
    env, state = table(embodiment)
    scene = dataclasses.replace(state.scene, background=state.scene.background % 6)  # backgrounds of one colour
    sharp, smooth = (observer(embodiment, supersample)(state.bodies, scene) for supersample in (1, 2))
    try:
        reference = ReferenceViews(embodiment, PIXELS)
    except UserError as error:
        pytest.skip(str(error))
    for i in range(SCENES):
        truths = reference.pictures(*jax.tree.map(lambda leaf, i=i: leaf[i], (state.bodies, scene)))
        for name, truth in truths.items():
            difference = np.abs(truth.rgb.astype(int) - np.asarray(smooth[name].rgb[i]).astype(int))
            depth, segment = np.asarray(sharp[name].depth[i]), np.asarray(sharp[name].segment[i])
            assert difference.mean() < 4  # of 255
            assert (segment == truth.segment).mean() > 0.98
            assert np.median(np.abs(depth - truth.depth)) < 1e-4  # metres
    reference.close()


# Mean colours of the thirds of two scenes' pictures as look 1 draws them: [view][scene, row, column, rgb].
LOOK_1 = {
    "front": [
        [[[155, 155, 153], [150, 150, 148], [150, 150, 148]], [[147, 147, 139], [144, 143, 137], [135, 130, 125]],
         [[154, 154, 150], [150, 138, 135], [138, 131, 138]]],
        [[[183, 183, 181], [182, 182, 181], [190, 190, 186]], [[165, 148, 145], [188, 184, 184], [190, 190, 186]],
         [[150, 139, 130], [170, 181, 180], [189, 190, 186]]],
    ],
    "wrist": [
        [[[159, 159, 155], [172, 172, 167], [119, 119, 119]], [[160, 159, 155], [137, 137, 134], [112, 112, 111]],
         [[90, 91, 89], [132, 133, 132], [88, 88, 89]]],
        [[[222, 222, 213], [196, 196, 191], [183, 159, 155]], [[176, 176, 171], [169, 169, 164], [149, 149, 146]],
         [[124, 125, 126], [174, 175, 174], [126, 126, 127]]],
    ],
}  # fmt: skip


def test_the_look_is_numbered(floating):
    """Fails when scenes are drawn differently: raise views.LOOK then, and put the new means here."""
    _, state, observe = floating
    assert views.LOOK == 1
    for name, picture in observe(state.scene).items():
        thirds = np.asarray(picture.rgb)[:2].astype(float).reshape(2, 3, 32, 3, 32, 3).mean((2, 4))
        np.testing.assert_allclose(thirds, LOOK_1[name], atol=1.0)
