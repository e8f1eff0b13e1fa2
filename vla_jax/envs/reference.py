"""MuJoCo's own pictures (OpenGL) of the scenes that views.py draws: the yardstick of the ray caster.

The two differ by design in three ways: here edges are smoothed by multisampling, round shapes are polygons, and the
table is drawn in its background's first colour only. Needs a GL library (EGL, else OSMesa).
"""

import importlib

import jax
import mujoco
import numpy as np

from vla_jax.envs import mjcf, views
from vla_jax.envs.camera import FAR, NEAR, Picture
from vla_jax.envs.physics import Bodies
from vla_jax.envs.scene import SHAPES, VIEWS, Scene
from vla_jax.errors import UserError

_GEOM_TYPES = {kind: number for number, kind in views.KINDS.items()}
_SLOT_KINDS = dict(zip(SHAPES, ("box", "cylinder", "sphere"), strict=True))
MAX_DEPTH = 50.0  # metres; beyond lies the sky


def gl_context(size: int):
    """An off-screen GL context. UserError with the reasons when no GL library can be loaded."""
    reasons = []
    for library in ("egl", "osmesa"):
        try:
            context = importlib.import_module(f"mujoco.{library}").GLContext(size, size)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            reasons.append(f"{library}: {error}")
        else:
            context.make_current()
            return context
    raise UserError(f"no OpenGL library for off-screen pictures ({'; '.join(reasons)}): install libegl1 or libosmesa6")


class ReferenceViews:
    """Draws one scene at a time with MuJoCo's renderer."""

    def __init__(self, embodiment: str, image_size: int, shadow_size: int = 4096):
        self._context = gl_context(image_size)
        self._size = image_size
        model = mujoco.MjModel.from_xml_string(mjcf.mjcf(embodiment))  # a copy of its own: its looks are changed
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        model.vis.quality.shadowsize = shadow_size
        model.vis.map.znear, model.vis.map.zfar = NEAR / model.stat.extent, MAX_DEPTH / model.stat.extent
        self._model, self._data = model, mujoco.MjData(model)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        self._target = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        self._target.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._target)

    def close(self) -> None:
        """Frees the GL context."""
        self._target.free()
        self._context.free()

    def pictures(self, bodies: Bodies, scene: Scene) -> dict[str, Picture]:
        """What each camera sees of one scene (leaves without batch axis); `segment` numbers the model's geoms."""
        batch = jax.tree.map(lambda leaf: np.asarray(leaf)[None], (bodies, scene))
        self._dress(*batch)
        return {name: self._picture(name) for name in VIEWS}

    def _dress(self, bodies: Bodies, scene: Scene) -> None:
        """Writes places, shapes, colours and lights into the model and its data."""
        model, data = self._model, self._data
        geoms, light, cameras = jax.tree.map(
            lambda leaf: np.asarray(leaf)[0],
            (views.geoms_of(model, bodies, scene), views.light_of(scene), views.cameras_of(model, bodies, scene)),
        )
        for g, kind in enumerate(geoms.kinds):
            size = geoms.size[g]
            if kind == "slot":
                kind = _SLOT_KINDS[SHAPES[geoms.shape[g]]]
                size = size[[0, 2, 2]] if kind == "cylinder" else size
            model.geom_type[g], model.geom_size[g] = _GEOM_TYPES[kind], size
        model.geom_rgba[:] = np.concatenate([geoms.rgb, geoms.visible[:, None]], -1)
        model.light_ambient[0] = model.light_specular[0] = model.vis.headlight.specular = 0
        model.light_diffuse[0], model.vis.headlight.diffuse = light.diffuse, light.headlight
        model.vis.headlight.ambient = light.ambient
        data.geom_xpos[:], data.geom_xmat[:] = geoms.position, geoms.rotation.reshape(-1, 9)
        for v, name in enumerate(VIEWS):
            camera = model.camera(name).id
            data.cam_xpos[camera], data.cam_xmat[camera] = cameras.position[v], cameras.rotation[v].reshape(9)
        data.light_xpos[0], data.light_xdir[0] = np.array([0.5, 0, 0]) + 2 * light.direction, -light.direction

    def colours(self, view: str) -> np.ndarray:
        """The colours of the scene that was drawn last, uint8 [H, W, 3]."""
        camera = mujoco.MjvCamera()
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self._model.camera(view).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, self._data, mujoco.MjvOption(), None, camera, everything, self._scene)
        return self._draw()[0]

    def _picture(self, view: str) -> Picture:
        rgb = self.colours(view)
        codes, depth = self._draw(mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR)
        table = np.full(self._scene.ngeom + 1, -1)
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                table[geom.segid + 1] = geom.objid
        segment = table[(codes.astype(int) * [1, 2**8, 2**16]).sum(-1)]
        metres = 1 / (depth * (1 / NEAR - 1 / MAX_DEPTH) + 1 / MAX_DEPTH)
        return Picture(rgb, np.where(segment < 0, FAR, metres).astype(np.float32), segment)

    def _draw(self, *flags) -> tuple[np.ndarray, np.ndarray]:
        for flag in flags:
            self._scene.flags[flag] = 1
        rgb = np.empty((self._size, self._size, 3), np.uint8)
        depth = np.empty((self._size, self._size), np.float32)
        area = mujoco.MjrRect(0, 0, self._size, self._size)
        mujoco.mjr_render(area, self._scene, self._target)
        mujoco.mjr_readPixels(rgb, depth, area, self._target)
        for flag in flags:
            self._scene.flags[flag] = 0
        return np.flipud(rgb), np.flipud(depth)
