"""How fast the table is: physics steps per second on both engines, and closed loops of expert, physics and success.

python -m benchmarks.physics --scenes 1 16 64 256
"""

import argparse
import time

import jax

import vla_jax  # noqa: F401  sizes the CPU thread pool before JAX starts it
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.control import SUBSTEPS
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.mjcf import EMBODIMENTS
from vla_jax.envs.sampling import sample_episode

TICKS = 10


def seconds(function, *args) -> tuple[float, float]:
    """(compile, best of three runs)."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    first, runs = time.perf_counter() - start, []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        runs.append(time.perf_counter() - start)
    return first - min(runs), min(runs)


def loops(env: Tabletop):
    """Two jitted scans over TICKS control ticks: physics alone, and expert + controller + physics + success."""

    def physics_only(state):
        _, commands = env.controller.advance(state.target_pose, env.expert(state)[0], state.bodies)

        def step(physics, _):
            return env.engine.step(physics, commands), None

        return jax.lax.scan(step, state.physics, length=TICKS)[0]

    def closed(state):
        def tick(state, _):
            action, state = env.expert(state)
            return env.step(state, action), None

        return jax.lax.scan(tick, state, length=TICKS)[0].physics

    return jax.jit(physics_only), jax.jit(closed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--engines", nargs="+", default=["c", "mjx"])
    parser.add_argument("--embodiments", nargs="+", default=list(EMBODIMENTS))
    options = parser.parse_args()
    print("| robot | engine | scenes | physics steps/s | closed-loop ticks/s | compile s |")
    print("|---|---|---|---|---|---|")
    for embodiment in options.embodiments:
        for engine in options.engines:
            env = Tabletop(EnvConfig(embodiment=embodiment, task="pick", engine=engine))
            for scenes in options.scenes:
                sample = jax.jit(jax.vmap(lambda key: sample_episode(key, "pick", BiasConfig())))
                state = jax.jit(env.reset)(*sample(jax.random.split(jax.random.key(0), scenes)))
                physics_only, closed = loops(env)
                compiling, alone = seconds(physics_only, state)
                _, whole = seconds(closed, state)
                steps, ticks = scenes * TICKS * SUBSTEPS / alone, scenes * TICKS / whole
                print(
                    f"| {embodiment} | {engine} | {scenes} | {steps:,.0f} | {ticks:,.0f} | {compiling:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
