"""Latency of one steered chunk against particles and solver steps, on this machine.

python -m benchmarks.steering [--rounds=15] [--particles 1 4 16] [--steps 5 10]

The quickstart's policy (untrained weights cost as much as trained ones), one scene, compiled, from observation to
actions; the arms take turns and the unit is the median. `plain` is the sampler without any steering transform, `full`
repels, guides (reward gradient on the clean estimate), resamples and selects. Ratios are to `full` with one particle.
"""

import argparse
import functools
import time

import jax
import numpy as np
from flax import nnx

from benchmarks.closed_loop import make_policy, make_trials
from vla_jax.envs.collect import interface_of
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.evaluation.rollout import take_rows
from vla_jax.platform import setup_compilation_cache
from vla_jax.steering.perceive import Watched, join, perceive
from vla_jax.steering.program import parse, stack
from vla_jax.steering.steer import Arm, Decoder, SteerConfig, act, remember_nothing

FULL = Arm(guide=10.0, repel=5.0, select=1.0, resample=1.0)
PROGRAM = '{"stages": [{"name": "reach", "terms": [{"term": "distance", "keypoint": 0, "offset": [0, 0, 0.035]}]}]}'


def main() -> None:
    """Prints one line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    options = parser.parse_args()
    setup_compilation_cache()
    env_config = EnvConfig(task="reach", image_size=64)
    env, policy = Tabletop(env_config), make_policy(env_config)
    trials = make_trials(env_config, 1)
    state = jax.jit(env.reset)(trials.scene, trials.command, trials.cue)
    observation = jax.device_get(jax.jit(Watched(env).observe)(state))
    found = perceive(env, state)
    memory = remember_nothing(stack([parse(PROGRAM, found[0].keypoints.labels)]), join(found), policy)
    words = take_rows((trials.tokens, trials.token_mask), slice(0, 1))
    graph, weights = nnx.split(policy)

    def plain(steps, weights):
        return nnx.merge(graph, weights).act(observation, *words, jax.random.key(0), steps)

    def steered(config, weights, memory, arm):
        inputs = (observation, *words, jax.random.key(0), memory, arm)
        return act(nnx.merge(graph, weights), Decoder.of(interface_of(env_config)), config, *inputs, execute=4)

    arm = jax.tree.map(np.float32, FULL)
    calls = {}
    for steps in options.steps:
        calls["plain", 1, steps] = jax.jit(functools.partial(plain, steps)), (weights,)
        for particles in sorted({1, *options.particles}):
            config = SteerConfig(particles=particles, steps=steps)
            calls["full", particles, steps] = jax.jit(functools.partial(steered, config)), (weights, memory, arm)
    seconds = {name: [] for name in calls}
    for turn in range(options.rounds + 1):
        for name, (call, arguments) in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            if turn:
                seconds[name].append(time.perf_counter() - began)
    print(f"{'arm':<8}{'particles':>10}{'steps':>7}{'ms':>9}{'x one':>8}")
    for (name, particles, steps), times in seconds.items():
        ratio = np.median(np.array(times) / np.array(seconds["full", 1, steps]))
        print(f"{name:<8}{particles:>10}{steps:>7}{1e3 * np.median(times):>9.2f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
