"""Closed-loop evaluation: scenes in one compiled program against one scene at a time.

python -m benchmarks.closed_loop [--embodiment=floating] [--task=reach] [--image-size=64] [--batch=100] [--singles=5]

Three ways to run whole episodes with the same policy, cameras, physics and success (untrained weights cost as much as
trained ones); the unit is scenes x control ticks per second, compilation left out:

    stepped   one scene, a Python loop over ticks that calls compiled observe, act and step: how simulators are driven
    single    one scene, the whole episode in one compiled program
    batched   many scenes in that program
"""

import argparse
import os
import time

import jax
import numpy as np
from flax import nnx

from configs import quickstart
from experiments.compare import CompareConfig
from vla_jax.config import resolve
from vla_jax.data import tokenizer as tokenizers
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.collect import interface_of
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.splits import make_cases
from vla_jax.evaluation.rollout import Trials, make_rollout, take_rows
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import Policy
from vla_jax.platform import setup_compilation_cache

EXECUTE, SAMPLER_STEPS = 4, 4


def make_policy(env: EnvConfig) -> Policy:
    """The quickstart's BayesianVLA policy with random weights."""
    interface = interface_of(env)
    vocabulary = tokenizers.from_json(interface.tokenizer).get_vocab_size()
    width, states = len(interface.action_names), len(interface.state_names)
    bounds = ((-0.05,) * width, (0.05,) * width, (-1.0,) * states, (1.0,) * states)
    facts = DataFacts(vocabulary, interface.max_tokens, env.image_size, *bounds)
    config = resolve(CompareConfig, quickstart.get_config()).arms["bayesianvla"].policy
    return Policy(config, facts, nnx.Rngs(0))


def make_trials(env: EnvConfig, count: int) -> Trials:
    """The first scenes of the in-distribution split."""
    interface = interface_of(env)
    cases = make_cases("in_distribution", env.task, BiasConfig(), 0, count)
    tokens, mask = tokenizers.encode(tokenizers.from_json(interface.tokenizer), cases.text, interface.max_tokens)
    return jax.device_get(Trials(cases.scene, cases.command, cases.cue, tokens, mask, np.arange(count)))


def measure(run, policy: Policy, trials: Trials, batch: int, calls: int) -> tuple[float, float]:
    """(seconds to compile and run once, median seconds of a call afterwards)."""
    graphdef, weights = nnx.split(policy)

    def call(number: int) -> float:
        part = take_rows(trials, np.arange(number * batch, (number + 1) * batch) % len(trials.index))
        began = time.perf_counter()
        jax.block_until_ready(run(graphdef, weights, part, jax.random.key(0)))
        return time.perf_counter() - began

    first = call(0)
    return first, float(np.median([call(number) for number in range(calls)]))


def measure_stepped(env: Tabletop, policy: Policy, trials: Trials, calls: int) -> tuple[float, float]:
    """Like `measure`, for a Python loop over the ticks of one scene."""
    graphdef, weights = nnx.split(policy)
    reset, observe, step = jax.jit(env.reset), jax.jit(env.observe), jax.jit(env.step)

    @jax.jit
    def act(weights, observation, tokens, mask, key):
        return nnx.merge(graphdef, weights).act(observation, tokens, mask, key, steps=SAMPLER_STEPS)

    def call(number: int) -> float:
        one = take_rows(trials, np.array([number % len(trials.index)]))
        began = time.perf_counter()
        state = reset(one.scene, one.command, one.cue)
        for tick in range(env.max_ticks):
            if tick % EXECUTE == 0:
                chunk = np.asarray(act(weights, observe(state), one.tokens, one.token_mask, jax.random.key(tick)))
            state = step(state, chunk[:, tick % EXECUTE])
            bool(state.success[0])  # the loop wants to know whether it may stop
        return time.perf_counter() - began

    first = call(0)
    return first, float(np.median([call(number) for number in range(calls)]))


def main() -> None:
    """Prints the table; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embodiment", default="floating")
    parser.add_argument("--task", default="reach")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=100, help="scenes in the batched program")
    parser.add_argument("--calls", type=int, default=3, help="timed calls of the batched program")
    parser.add_argument("--singles", type=int, default=5, help="timed calls of the program with one scene")
    options = parser.parse_args()
    setup_compilation_cache()
    config = EnvConfig(options.embodiment, options.task, image_size=options.image_size)
    env, policy = Tabletop(config), make_policy(config)
    trials = make_trials(config, options.batch)
    run = make_rollout(env, execute=EXECUTE, ticks=env.max_ticks, sampler_steps=SAMPLER_STEPS)
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(policy, nnx.Param)))
    print(
        f"{options.embodiment} {options.task}, 2 views of {options.image_size} px, {env.max_ticks} ticks, replan every "
        f"{EXECUTE}, policy of {size / 1e6:.2f} M parameters, {jax.default_backend()}, {os.cpu_count()} cores"
    )
    print(f"{'':<10}{'scenes':>7}{'s per call':>12}{'scenes x ticks / s':>20}{'first call s':>14}")
    measured = {
        "stepped": (1, *measure_stepped(env, policy, trials, options.singles)),
        "single": (1, *measure(run, policy, trials, 1, options.singles)),
        "batched": (options.batch, *measure(run, policy, trials, options.batch, options.calls)),
    }
    rates = {name: batch * env.max_ticks / seconds for name, (batch, _, seconds) in measured.items()}
    for name, (batch, first, seconds) in measured.items():
        print(f"{name:<10}{batch:>7}{seconds:>12.3f}{rates[name]:>20.0f}{first:>14.1f}")
    for name in ("stepped", "single"):
        print(f"batched is {rates['batched'] / rates[name]:.1f} times as fast as {name}")


if __name__ == "__main__":
    main()
