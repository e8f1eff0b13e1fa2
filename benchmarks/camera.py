"""The ray caster's speed, and MuJoCo's own renderer (OpenGL, with shadows) beside it.

python -m benchmarks.camera [--embodiments=floating,panda] [--pixels=64,128] [--batches=1,16,64,256] [--seconds=3]

Random scenes of the place-on family; both views of a scene are drawn in one call: B scenes are 2 B images.
Images per second are the median and the best call; the best is closest to an idle machine. "difference" is the mean
absolute difference of colours between the two renderers (of 255) over 4 scenes and both views, 2 x 2 rays a pixel.
"""

import argparse
import dataclasses
import os
import time

import jax
import numpy as np

from vla_jax.envs import camera, views
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.reference import ReferenceViews
from vla_jax.envs.scene import VIEWS, take
from vla_jax.envs.splits import make_cases
from vla_jax.errors import UserError


def rates(call, images: int, seconds: float) -> tuple[float, float]:
    """(median, best) images per second of `call`, called again and again for `seconds`."""
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return images / float(np.median(times)), images / min(times)


def measure(env: Tabletop, bodies, scene, pixels: int, seconds: float) -> tuple[float, float, float]:
    """(median, best images per second, seconds to compile) of the ray caster."""
    began = time.perf_counter()
    compiled = jax.jit(lambda *args: views.observe_images(env.model, *args, pixels)).lower(bodies, scene).compile()
    took = time.perf_counter() - began
    images = len(VIEWS) * len(scene.background)
    return *rates(lambda: jax.block_until_ready(compiled(bodies, scene)), images, seconds), took


def measure_reference(env: Tabletop, bodies, scene, pixels: int, seconds: float) -> tuple[float, float, float]:
    """(median, best images per second, mean difference of 255) of MuJoCo's renderer."""
    reference = ReferenceViews(env.config.embodiment, pixels)
    smooth = jax.jit(lambda *args: views.observe_pictures(env.model, *args, pixels, supersample=2))(bodies, scene)
    differences = []
    for i in range(len(scene.background)):
        for name, picture in reference.pictures(*take((bodies, scene), i)).items():
            differences.append(np.abs(picture.rgb.astype(int) - np.asarray(smooth[name].rgb[i]).astype(int)).mean())
    speeds = rates(lambda: [reference.colours(name) for name in VIEWS], len(VIEWS), seconds)
    reference.close()
    return *speeds, float(np.mean(differences))


def main() -> None:
    """Prints the table; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embodiments", default="floating,panda")
    parser.add_argument("--pixels", default="64,128")
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time a row")
    parser.add_argument("--rays-per-chunk", type=int, default=camera.RAYS_PER_CHUNK)
    options = parser.parse_args()
    camera.RAYS_PER_CHUNK = options.rays_per_chunk
    batches = [int(batch) for batch in options.batches.split(",")]
    cases = make_cases("in_distribution", "place_on", BiasConfig(), 0, max(4, *batches))
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    head = f"{'embodiment':<12}{'geoms':>6}{'px':>5}{'scenes':>8}{'img/s':>9}{'best':>9}{'compile s':>11}"
    print(f"{head}{'difference':>12}")
    for embodiment in options.embodiments.split(","):
        env = Tabletop(EnvConfig(embodiment, "place_on"))
        bodies = jax.jit(env.reset)(cases.scene, cases.command, cases.cue).bodies
        for pixels in map(int, options.pixels.split(",")):
            label = f"{embodiment:<12}{env.model.ngeom:>6}{pixels:>5}"
            for batch in batches:
                speeds = measure(env, *take((bodies, cases.scene), np.arange(batch)), pixels, options.seconds)
                print(f"{label}{batch:>8}{speeds[0]:>9.0f}{speeds[1]:>9.0f}{speeds[2]:>11.1f}", flush=True)
            few_bodies, few = take((bodies, cases.scene), np.arange(4))
            few = dataclasses.replace(few, background=few.background % 6)  # MuJoCo draws tables of one colour only
            try:
                speeds = measure_reference(env, few_bodies, few, pixels, options.seconds)
            except UserError as error:
                print(f"{label}  MuJoCo: {error}")
            else:
                print(f"{label}{'MuJoCo':>8}{speeds[0]:>9.0f}{speeds[1]:>9.0f}{'':>11}{speeds[2]:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
