"""Does a policy listen? Measures on held-out scenes where the truth is known, without driving the policy.

Every scene comes with one instruction for each of its N targets, and with the actions that the scripted expert begins
with under each: N instructions, N chunks. The policy looks at the scene once, and is asked how likely each chunk is
under each instruction, how likely it finds each instruction, and what it would do under each.

    identification     how often the true instruction is the one under which the expert's chunk is most likely; chance
                       is 1 / N.
    pmi                E[log pi(a | v, l) - log sum_l' p(l' | v) pi(a | v, l')] in nats, l drawn by the training law
                       p(l | v) and a the expert's. It is H(l | v) minus the cross-entropy of the policy's own guess at
                       the instruction, so it bounds I(l; a | v) from below and is negative for a policy that is
                       moved by the words, but not as they mean. Its ceiling is `target_entropy`.
    pmi_prior          the same with the prior branch as p(a | v): E[log pi(a | v, l) - log p(a | v)]. Not bounded, and
                       of a meaning only where the prior branch was trained. Absent without one.
    target_entropy     H(target | v) of the training law in nats, which is I(l; a | v): every target has a chunk of its
                       own.
    calibration_gap    E[log p(l | v) - log q(l | v)] in nats an instruction, q the language head in the posterior
                       ordering [v, l]: the divergence from the true law of instructions, 0 for one that knows it.
    sensitivity        distance between the ends of the chunks that the policy makes under two instructions of a scene
                       from the same noise, over the distance between the two targets: 0 is deaf, about 1 follows.
    heeding            the same where the instruction stays and what the policy says to itself (`Policy.reason`) is what
                       it says under the other one: 0 does not act on its own words. Absent for a policy that says none.

Axes: B scenes, N targets of a scene (its instructions and its chunks), L instruction length, C chunk length, A action
width, F proprioception width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from vla_jax.data.contract import Contract
from vla_jax.envs import language
from vla_jax.envs.bias import command_distribution
from vla_jax.envs.collect import instruction_log_probability
from vla_jax.envs.control import MAX_STEP
from vla_jax.envs.demonstrate import demonstrate
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.scene import take
from vla_jax.envs.splits import make_alternatives
from vla_jax.envs.views import observe_images
from vla_jax.evaluation.evaluate import EvalConfig, World
from vla_jax.flow.density import log_density, relative_log_likelihood
from vla_jax.flow.solve import Field, identity, solve
from vla_jax.flow.transforms import extrapolate
from vla_jax.losses.information import likelihoods
from vla_jax.models.expert import Condition
from vla_jax.models.policy import Instruction, Policy
from vla_jax.models.reasoning import last_words

SCENES = 100
DRAWS = 16  # noise and time draws of each likelihood


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Scenes at their first moment, with what may be said of each and what the expert then does."""

    images: dict[str, UInt8[Array, "B H W 3"]]
    state: Float[Array, "B F"]  # SI units
    tokens: Int[Array, "B N L"]
    token_mask: Bool[Array, "B N L"]
    chunks: Float[Array, "B N C A"]  # SI units
    target_law: Float[Array, "B N"]  # p(target | scene)
    log_probability: Float[Array, "B N"]  # log p(instruction | scene), nats
    position: Float[Array, "B N 2"]  # of the targets, metres


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """What a policy makes of the candidates; log-likelihoods in nats."""

    actions: Float[Array, "B N N"]  # of chunk [B, N, _] under instruction [B, _, N]; differences in the last axis count
    prior: Float[Array, "B N"] | None  # of each chunk under the prior branch, to be compared with `actions`
    language: Float[Array, "B N"]  # of each instruction
    ends: Float[Array, "B N 2"]  # metres from the start to where a chunk made under each instruction leads
    misled: Float[Array, "B N 2"] | None  # the same with the words that the policy says under the next instruction


def measure(
    policy: nnx.Module,
    contract: Contract,
    config: EvalConfig,
    world: World | None = None,
    *,
    scenes: int = SCENES,
    exact: bool = False,
) -> dict[str, float]:
    """The measures listed at the head of this file, and the standard error over scenes of each as <name>_se.

    The scenes are those of the split in_distribution, and the field is the one by which the policy acts
    (`config.guidance`).

    Args:
        policy: of this contract.
        config: seed, engine, guidance and sampler steps; the rest is for driving.
        world: its law is that of the scenes and the instructions; None is the one of the demonstrations.
        scenes: test scenes.
        exact: likelihoods by `flow.density.log_density`, some hundred times the work of the estimate.

    Raises:
        UserError: the contract's data were not collected on the simulated table.
    """
    candidates = make_candidates(contract, config, policy.config.chunk, scenes, world)
    return summarize(candidates, ask(policy, candidates, config, exact=exact))


def make_candidates(
    contract: Contract, config: EvalConfig, chunk: int, scenes: int = SCENES, world: World | None = None
) -> Candidates:
    """The first `scenes` scenes of in_distribution, with the expert's first `chunk` actions under each instruction;
    world: see `measure`.

    Raises:
        UserError: the contract's data were not collected on the simulated table.
    """
    world = world or World.of(contract, config)
    task, targets = world.env.task, world.scene.objects
    scene, commands = make_alternatives(task, world.bias, config.seed, scenes, world.scene)
    each = take(scene, np.repeat(np.arange(scenes), targets))
    asked = jax.tree.map(lambda leaf: leaf.reshape(-1), commands)
    env = _tabletop(dataclasses.replace(world.env, max_ticks=chunk))
    shown = demonstrate(env, each, asked, asked, jax.random.key(config.seed), noise=0.0)
    begin = jax.tree.map(lambda leaf: leaf[0, ::targets], shown.bodies)
    look = jax.jit(functools.partial(observe_images, env.model, image_size=world.env.image_size))
    law = jax.jit(functools.partial(_law, task, world.bias, targets))
    tokens, mask = contract.encode(language.instructions(task, each, asked))
    target_law, log_probability = law(scene, commands)
    return Candidates(
        images=look(bodies=begin, scene=scene),
        state=shown.state[0, ::targets],
        tokens=tokens.reshape(scenes, targets, -1),
        token_mask=mask.reshape(scenes, targets, -1),
        chunks=np.swapaxes(shown.actions, 0, 1).reshape(scenes, targets, chunk, -1),
        target_law=target_law,
        log_probability=log_probability,
        position=scene.position[:, :targets],
    )


@functools.cache
def _tabletop(config: EnvConfig) -> Tabletop:
    """One table, and so one compiled expert, for all the policies that are measured in a process."""
    return Tabletop(config)


def _law(task, bias, targets, scene, commands):
    """p(target | scene) and log p(instruction | scene), both [B, N]."""

    def case(scene, commands):
        asked, probability = command_distribution(task, scene, bias)
        by_target = jnp.zeros(targets).at[asked.target].add(probability, mode="drop")
        return by_target, jax.vmap(lambda command: instruction_log_probability(task, scene, command, bias))(commands)

    return jax.vmap(case)(scene, commands)


def ask(policy: nnx.Module, candidates: Candidates, config: EvalConfig, *, exact: bool = False) -> Answers:
    """The policy's answers. Scene i meets the same noise whatever the policy.

    Raises:
        UserError: guidance, for a policy without a prior branch.
    """
    graphdef, weights = nnx.split(policy)
    keys = jax.random.split(jax.random.key(config.seed), len(candidates.state))
    steps = config.sampler_steps
    return jax.device_get(_ask(graphdef, weights, candidates, keys, config.guidance, sampler_steps=steps, exact=exact))


@functools.partial(jax.jit, static_argnames=("graphdef", "sampler_steps", "exact"))
def _ask(graphdef, weights, candidates, keys, guidance, *, sampler_steps, exact):
    policy = nnx.merge(graphdef, weights)

    def scene(case):
        return _ask_in_scene(policy, *case, guidance, sampler_steps, exact)

    return jax.lax.map(scene, (candidates, keys))


def _ask_in_scene(policy: Policy, case: Candidates, key: PRNGKeyArray, guidance, sampler_steps, exact) -> Answers:
    """Answers of one scene; its candidates come without the axis B."""
    targets = len(case.tokens)
    everywhere = functools.partial(jax.tree.map, lambda leaf: jnp.broadcast_to(leaf, (targets, *leaf.shape)))
    state, chunks = everywhere(case.state), policy.normalizer.normalize_action(case.chunks)
    has_prior = policy.queries is not None
    branches = ("prior", "posterior") if has_prior or guidance is not None else ("posterior",)
    images = everywhere(case.images)
    readings = policy.encode(images, case.tokens, case.token_mask, branches)
    draw_key, act_key = jax.random.split(key)
    estimate = log_density if exact else functools.partial(relative_log_likelihood, key=draw_key, draws=DRAWS)

    conditions = {name: policy.condition(reading, state) for name, reading in readings.items()}

    def under(conditions):
        """The likelihood of every chunk under one instruction."""
        return estimate(acting_field(policy, everywhere(conditions), guidance), chunks)

    actions = jax.vmap(under, out_axes=1)(conditions)
    prior = estimate(policy.field(conditions["prior"]), chunks) if has_prior else None
    spoken = jnp.where(case.token_mask, likelihoods(policy, readings["posterior"], case.tokens), 0.0).sum(-1)
    noise = everywhere(jax.random.normal(act_key, chunks.shape[1:]))

    def ends(conditions):
        made = solve(acting_field(policy, conditions, guidance), noise, steps=sampler_steps)
        return policy.normalizer.denormalize_action(made)[..., :2].sum(1)

    misled = None
    if policy.config.reasoning:
        other = _with_words_of_the_next(policy, policy.reason(images, case.tokens, case.token_mask))
        readings = policy.read(images, *other, branches)
        misled = ends({name: policy.condition(reading, state) for name, reading in readings.items()})
    return Answers(actions, prior, spoken, ends(conditions), misled)


def _with_words_of_the_next(policy: Policy, told: Instruction) -> Instruction:
    """Instructions with what the policy said to itself, but each with what it said after the next one."""
    row, place = jnp.arange(len(told.tokens))[:, None], last_words(told.mask, policy.config.reasoning)
    return told._replace(tokens=told.tokens.at[row, place].set(jnp.roll(told.tokens[row, place], -1, 0)))


def acting_field(policy: Policy, conditions: dict[str, Condition], guidance) -> Field:
    """The velocity field by which a policy acts, as in `Policy.act`: that of the posterior branch or, with guidance w,
    v_prior + w (v_post - v_prior). conditions: by branch, those that this takes (`Policy.conditions`)."""
    fields = {name: policy.field(condition) for name, condition in conditions.items()}
    transform = identity if guidance is None else extrapolate(fields["prior"], guidance)
    return lambda x, t: transform.update(x, fields["posterior"](x, t), t, ())[1]


def summarize(candidates: Candidates, answers: Answers) -> dict[str, float]:
    """Means over scenes (two or more), and their standard errors, <name>_se."""
    law = np.asarray(candidates.target_law, float)
    actions = np.asarray(answers.actions, float)
    true = np.diagonal(actions, axis1=1, axis2=2)
    most = actions == actions.max(2, keepdims=True)
    with np.errstate(divide="ignore"):
        mixture = np.logaddexp.reduce(actions + np.log(law)[:, None], axis=2)
    by_scene = {
        # Where several instructions tie, one of them is a guess.
        "identification": (np.diagonal(most, axis1=1, axis2=2) / most.sum(2)).mean(1),
        "pmi": _expectation(law, true - mixture),
        "target_entropy": _expectation(law, -np.log(np.where(law > 0, law, 1))),
        "calibration_gap": _expectation(law, np.asarray(candidates.log_probability) - answers.language),
        "sensitivity": _sensitivity(candidates, answers.ends),
    }
    if answers.misled is not None:
        moved = np.linalg.norm(answers.misled - answers.ends, axis=-1)
        by_scene["heeding"] = (moved / _apart(candidates, np.roll(candidates.position, -1, 1))).mean(1)
    if answers.prior is not None:
        by_scene["pmi_prior"] = _expectation(law, true - answers.prior)
    measures = {}
    for name, values in by_scene.items():
        measures[name] = float(values.mean())
        measures[f"{name}_se"] = float(values.std(ddof=1) / len(values) ** 0.5)
    return measures


def _expectation(law: Float[np.ndarray, "B N"], values: Float[np.ndarray, "B N"]) -> Float[np.ndarray, "B"]:
    """Mean over the targets, some of which may never be asked for."""
    return np.where(law > 0, law * np.where(law > 0, values, 0.0), 0.0).sum(1)


def _apart(candidates: Candidates, other: Float[np.ndarray, "B N 2"]) -> Float[np.ndarray, "B N"]:
    """Metres between the targets and other ones. No chunk leads further than its number of ticks at full speed."""
    reach = MAX_STEP * candidates.chunks.shape[2]
    return np.minimum(np.linalg.norm(np.asarray(candidates.position) - other, axis=-1), reach)


def _sensitivity(candidates: Candidates, ends: Float[np.ndarray, "B N 2"]) -> Float[np.ndarray, "B"]:
    """Mean over pairs of targets."""
    ratios = []
    for steps in range(1, ends.shape[1]):  # every pair twice
        moved = np.linalg.norm(ends - np.roll(ends, -steps, 1), axis=-1)
        ratios.append(moved / _apart(candidates, np.roll(candidates.position, -steps, 1)))
    return np.mean(ratios, axis=(0, 2))
