"""A frozen policy, steered: guided particles around its sampler, and the closed loop that remembers between chunks.

VLS (arXiv 2602.03973), algorithm 1, on any policy whose actions move an end effector. Only its position is steered.

Axes: B scenes, P particles, C chunk length, A action width, K keypoints, M bodies, T = C + 1 poses of a path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vla_jax.data.interface import Interface
from vla_jax.errors import UserError
from vla_jax.flow.guidance import NORMS, POINTS, guide
from vla_jax.flow.particles import KERNELS, mcmc, repel, resample
from vla_jax.flow.solve import METHODS, Field, Transform, chain, identity, solve
from vla_jax.flow.transforms import extrapolate, inpaint
from vla_jax.models.expert import Condition
from vla_jax.models.policy import Policy
from vla_jax.steering.loop import LoopConfig, LoopState, begin, look, remember, strength
from vla_jax.steering.perceive import Attached, track
from vla_jax.steering.program import Program
from vla_jax.steering.switch import VlmSwitcher
from vla_jax.steering.terms import View

NoiseSource = Callable[[Condition, PRNGKeyArray], Float[Array, "1 C A"]]
MOVES, PLACE, OPENING = ("dx", "dy", "dz"), ("x", "y", "z"), "opening"


@dataclasses.dataclass(frozen=True)
class SteerConfig:
    """How a chunk is sampled.

    Attributes:
        particles: P. steps: of the solver. method: "euler" or "heun".
        point, norm, window: see `flow.guidance.guide`.
        repel_window, kernel: see `flow.particles.repel`, between end-effector paths.
        resample_weight, threshold: see `flow.particles.resample`; the weight is per square metre.
        inner: extra guided steps at one noise level (`flow.particles.mcmc`).
        extrapolate: w of v_prior + w (v_post - v_prior); None follows the posterior branch alone.
        continued: real-time chunking: each chunk continues the one before (`flow.transforms.inpaint`).
        frozen: actions that are executed while a chunk is computed; for `continued`.
        loop: see LoopConfig.
    """

    particles: int = 16
    steps: int = 10
    method: str = "euler"
    point: str = "clean"
    norm: str = "particle"
    window: tuple[float, float] = (0.2, 0.8)
    repel_window: tuple[float, float] = (0.0, 0.2)
    kernel: str = "inverse"
    resample_weight: float = 200.0
    threshold: float = 0.5
    inner: int = 0
    extrapolate: float | None = None
    continued: bool = False
    frozen: int = 0
    loop: LoopConfig = LoopConfig()

    def __post_init__(self):
        for name in ("particles", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"steer.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("inner", "frozen"):
            if getattr(self, name) < 0:
                raise UserError(f"steer.{name} is {getattr(self, name)}: it must not be negative")
        for name, known in {"method": METHODS, "point": POINTS, "norm": NORMS, "kernel": KERNELS}.items():
            if getattr(self, name) not in known:
                raise UserError(f"steer.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("window", "repel_window"):
            first, end = getattr(self, name)
            if not first < end:
                raise UserError(f"steer.{name} is {first} to {end}: it must end after it begins")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arm:
    """Which parts act, and how strongly; numbers of the compiled program.

    guide: weight of the reward's gradient. random: 1 replaces it by a random direction of the same norm (for
    norm = "particle"). repel: weight. select: 1 executes the particle of the highest reward, 0 particle 0.
    resample: 1 draws particles anew on the way (with select = 1).
    alone: 1 leaves the policy out, as a control. A chunk starts as no motion with an open hand instead of noise, no
    velocity but the steering's moves it, and it stays within what normalises to [-1, 1].
    """

    guide: float = 0.0
    random: float = 0.0
    repel: float = 0.0
    select: float = 0.0
    resample: float = 0.0
    alone: float = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What is fixed for an episode (program, keypoints on their bodies, scene number), and what is remembered.

    origin: keypoints at the first look. previous: the last chunk (model units). chunks: sampled so far.
    """

    program: Program
    attached: Attached
    scene: Int[Array, "*B"]
    origin: Float[Array, "*B K 3"]
    previous: Float[Array, "*B C A"]
    chunks: Int[Array, "*B"]
    loop: LoopState


def remember_nothing(program: Program, attached: Attached, policy: Policy) -> Memory:
    """The memory of B episodes that are about to begin; program and attached have a leading axis B."""
    count, points = np.shape(attached.body)
    chunk = (policy.config.chunk, len(policy.facts.action_low))
    repeat = lambda leaf: np.broadcast_to(np.asarray(leaf), (count,))  # noqa: E731
    return Memory(
        program=program,
        attached=attached,
        scene=np.arange(count, dtype=np.int32),
        origin=np.zeros((count, points, 3), np.float32),
        previous=np.zeros((count, *chunk), np.float32),
        chunks=np.zeros(count, np.int32),
        loop=jax.tree.map(repeat, begin()),
    )


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Where a policy's actions lead: columns of actions and states."""

    moves: tuple[int, ...]
    place: tuple[int, ...]
    opening: int | None

    @classmethod
    def of(cls, interface: Interface) -> Decoder:
        """Raises UserError for actions that do not move an end effector, or a state that does not say where it is."""
        for kind, needed in (("action", MOVES), ("state", PLACE)):
            names, units = getattr(interface, f"{kind}_names"), getattr(interface, f"{kind}_units")
            missing = [name for name in needed if name not in names or units[names.index(name)] != "m"]
            if missing:
                raise UserError(
                    f"a policy can be steered if its {kind}s give the end effector's {', '.join(needed)} in metres; "
                    f"this contract's {kind}s ({', '.join(names)}) lack {', '.join(missing)}"
                )
        moves = tuple(interface.action_names.index(name) for name in MOVES)
        place = tuple(interface.state_names.index(name) for name in PLACE)
        names = interface.action_names
        return cls(moves, place, names.index(OPENING) if OPENING in names else None)

    def path(self, actions: Float[Array, "*B C A"], tcp: Float[Array, " 3"]) -> Float[Array, "*B T 3"]:
        """Poses (metres) if each action (SI) is obeyed: the present one, then one after each action."""
        moved = jnp.cumsum(actions[..., np.array(self.moves)], -2)
        return tcp + jnp.concatenate([jnp.zeros_like(moved[..., :1, :]), moved], -2)

    def still(self, high: Float[Array, " A"]) -> Float[Array, " A"]:
        """The action (SI) that keeps the hand where it is, opened as widely as in the data."""
        still = jnp.zeros_like(high)
        return still if self.opening is None else still.at[self.opening].set(high[self.opening])

    def closed(self, actions: Float[Array, "C A"], high: Float[Array, " A"]) -> Array:
        """Whether the gripper was last told to close: below half of the widest opening in the data."""
        return jnp.bool_(False) if self.opening is None else actions[-1, self.opening] < high[self.opening] / 2


def act(
    policy: Policy,
    decoder: Decoder,
    config: SteerConfig,
    observation: dict[str, Any],
    tokens: Int[Array, "1 L"],
    token_mask: Array,
    key: PRNGKeyArray,
    memory: Memory,
    arm: Arm,
    *,
    execute: int,
    switcher: VlmSwitcher | None = None,
    source: NoiseSource | None = None,
) -> tuple[Float[Array, "1 C A"], Memory]:
    """One steered chunk of one scene (SI units; all leading axes are 1), and what is remembered after it.

    observation: as for `Policy.act`, and "frames" (`perceive.Watched`). With an arm of zeros (and inner = 0)
    the chunk is that of `Policy.act` for the same key, steps and guidance.
    source: chooses the noise of particle 0, as latent-noise RL learns to; None draws it like that of the others.
    """
    own = jax.tree.map(lambda leaf: leaf[0], memory)
    now = track(memory.attached, observation["frames"])[0]
    view = View(now, jnp.where(own.chunks == 0, now, own.origin))
    tcp = jnp.asarray(observation["state"])[0, np.array(decoder.place)]
    executed = policy.normalizer.denormalize_action(own.previous)[:execute]
    high = jnp.asarray(policy.facts.action_high, jnp.float32)
    closed = jnp.where(own.chunks == 0, False, decoder.closed(executed, high))
    asks = {} if switcher is None else {"switcher": switcher.of(own.scene, observation["images"]["front"][0])}
    loop = look(config.loop, own.loop, own.program, view, tcp, closed, **asks)

    def paths(x):
        return decoder.path(policy.normalizer.denormalize_action(x), tcp)

    def reward(x, t):
        return jax.vmap(jax.vmap(lambda path: own.program.reward(view, path, loop.stage)))(paths(x))

    conditions = policy.conditions(observation, tokens, token_mask, config.extrapolate)
    field, bend = _field(policy, config, conditions, own, execute, 1 - arm.alone)
    noise_key, steer_key = jax.random.split(jax.random.fold_in(key, 1))
    noise = jax.random.normal(key, (1, *own.previous.shape)) if source is None else source(conditions["posterior"], key)
    others = jax.random.normal(noise_key, (config.particles - 1, *own.previous.shape))
    still = policy.normalizer.normalize_action(decoder.still(high))
    start = (1 - arm.alone) * jnp.concatenate([noise, others])[None] + arm.alone * still
    steer = _steering(config, arm, field, bend, reward, paths, strength(config.loop, loop), start.shape, steer_key)
    chunk = solve(field, start, steps=config.steps, method=config.method, transform=steer)[0, 0]
    loop = remember(config.loop, loop, reward(chunk[None, None], 1.0)[0, 0])
    after = dataclasses.replace(own, origin=view.start, previous=chunk, chunks=own.chunks + 1, loop=loop)
    return policy.normalizer.denormalize_action(chunk)[None], jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], after)


def _field(
    policy: Policy,
    config: SteerConfig,
    conditions: dict[str, Condition],
    own: Memory,
    execute: int,
    share: Float[Array, ""],
) -> tuple[Field, Transform]:
    """The velocity field, and what bends it before any steering: extrapolation, and the chunk before.

    share: 1, or 0 for a policy that is left out; it multiplies every velocity of the policy.
    """

    def shared(field):
        return lambda x, t: share * field(x, t)

    fields = {name: shared(policy.field(condition)) for name, condition in conditions.items()}
    field, bends = fields["posterior"], []
    if config.extrapolate is not None:
        bends.append(extrapolate(fields["prior"], config.extrapolate))
    if config.continued:
        if execute + config.frozen > policy.config.chunk or execute == policy.config.chunk:
            raise UserError(
                f"steer.continued: of a chunk of {policy.config.chunk} actions, {execute} executed and {config.frozen} "
                "frozen ones leave nothing to continue: execute fewer"
            )
        begun = (own.chunks > 0).astype(jnp.float32)
        bends.append(inpaint(field, own.previous, begun, executed=execute, frozen=config.frozen))
    return field, chain(*bends) if bends else identity


def _steering(config: SteerConfig, arm: Arm, field, bend, reward, paths, amount, shape, key) -> Transform:
    """What bends the field before any steering, the bounds of a chunk without the policy, repulsion, guidance and
    resampling."""
    # What the policy has learned keeps its chunks within the data; the gradient knows no bounds.
    limit = jnp.where(arm.alone > 0, 1.0, jnp.inf)
    bounded = Transform(lambda noise: (), lambda x, v, t, state: (jnp.clip(x, -limit, limit), v, state))
    direction_key, draw_key, inner_key = jax.random.split(key, 3)
    direction = jax.random.normal(direction_key, shape)

    def followed(x, t):
        """The reward; for a random arm its value, with the gradient of a random linear function of the path."""
        value = reward(x, t)
        other = (paths(x)[..., 1:, :] * direction[..., :3]).sum((-2, -1))
        held = jax.lax.stop_gradient(value) + other - jax.lax.stop_gradient(other)
        return (1 - arm.random) * value + arm.random * held

    def bent(x, t):
        return bend.update(x, field(x, t), t, bend.init(x))[1]

    push = guide(
        followed,
        arm.guide,
        point=config.point,
        velocity=bent if config.point == "jacobian" else None,
        norm=config.norm,
        window=config.window,
        strength=amount,
    )
    apart = repel(
        arm.repel,
        features=lambda x: paths(x).reshape(*x.shape[:-2], -1),
        kernel=config.kernel,
        norm="particle",
        window=config.repel_window,
    )
    moved = chain(bend, bounded, apart, push)
    if config.inner:
        moved = mcmc(field, inner_key, count=config.inner, stride=1 / config.steps, transform=moved)
    first = config.window[0]
    drawn = resample(
        reward,
        draw_key,
        weight=arm.select * config.resample_weight,
        window=(first, first + arm.resample * (1 - first)),
        threshold=config.threshold,
        end="best",
    )
    return chain(moved, drawn)
