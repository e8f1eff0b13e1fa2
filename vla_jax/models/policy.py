"""The policy: one sequence, read by one trunk, conditions one velocity field.

BayesianVLA / LangForce (arXiv 2601.15197). Latent queries stand either before the instruction (prior, [v, Q, l]: they
can only know the scene) or after it (posterior, [v, l, Q]); the action expert sees nothing but their hidden states.

Axes: B batch, R noise draws of one sample, T query length, S key length, D model width, V vocabulary, Q latent queries,
L instruction length, C chunk length, A action width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.errors import UserError
from vla_jax.flow.solve import Field, Transform, identity, solve
from vla_jax.flow.transforms import extrapolate
from vla_jax.models.actions import ActionReader
from vla_jax.models.expert import ActionExpert, Condition, ExpertConfig
from vla_jax.models.keypoints import KeypointConfig, KeypointEncoder
from vla_jax.models.normalizer import DataFacts, Normalizer
from vla_jax.models.trunk import Trunk, TrunkConfig
from vla_jax.models.vision import VisionConfig, VisionEncoder
from vla_jax.sequence.layouts import branched
from vla_jax.sequence.spans import Layout

# name: (module, the field of PolicyConfig that holds its settings)
ENCODERS = {"vit": (VisionEncoder, "vision"), "keypoints": (KeypointEncoder, "keypoints")}


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """encoder: "vit" (set up by `vision`) or "keypoints" (by `keypoints`).
    conditioning: "queries" (the expert sees the latent queries only) or "tokens" (it sees all of [v, l], and there are
    no queries: the usual baseline). read_actions: the trunk can read an action chunk (branch "action" of `encode`).
    dtype: of the computation; parameters are float32."""

    encoder: str = "vit"
    vision: VisionConfig = VisionConfig()
    keypoints: KeypointConfig = KeypointConfig()
    trunk: TrunkConfig = TrunkConfig()
    expert: ExpertConfig = ExpertConfig()
    views: tuple[str, ...] = ("front", "wrist")
    queries: int = 8
    chunk: int = 8
    conditioning: str = "queries"
    read_actions: bool = False
    dtype: str = "float32"


class Chunk(NamedTuple):
    """Points x_t of the flow of actions (model units), and their t: 1 for clean actions."""

    actions: Float[Array, "B C A"]
    time: Float[Array, " B"]


class Reading(NamedTuple):
    """What the trunk made of one branch.

    hidden: the states that condition the expert (in the action branch those of the actions, which condition nothing);
    valid: which of them count (None: all).
    predictors: the states from which the L instruction tokens are predicted, one place earlier each (for the first
    token that is the last query in the prior branch, the last image token in the posterior, the last action in the
    action branch).
    """

    hidden: Float[Array, "B S D"]
    valid: Bool[Array, "B S"] | None
    predictors: Float[Array, "B L D"]


class Policy(nnx.Module):
    """Embed, encode, velocity, sample, act."""

    def __init__(self, config: PolicyConfig, facts: DataFacts, rngs: nnx.Rngs):
        if config.encoder not in ENCODERS:
            raise UserError(f"policy.encoder must be one of {', '.join(ENCODERS)}, got {config.encoder!r}")
        if config.conditioning not in ("queries", "tokens"):
            raise UserError(f"conditioning must be 'queries' or 'tokens', got {config.conditioning!r}")
        if config.conditioning == "queries" and config.queries < 1:
            raise UserError(f"conditioning = 'queries' needs at least one latent query, got queries = {config.queries}")
        D, dtype = config.trunk.width, config.dtype
        self.config, self.facts = config, facts
        self.normalizer = Normalizer(facts)
        encoder, settings = ENCODERS[config.encoder]
        self.vision = encoder(getattr(config, settings), facts.image_size, config.views, D, dtype=dtype, rngs=rngs)
        self.words = nnx.Param(jax.random.normal(rngs.params(), (facts.vocabulary, D)) * D**-0.5)
        self.trunk = Trunk(config.trunk, dtype=dtype, rngs=rngs)
        queries = jax.random.normal(rngs.params(), (config.queries, D)) * D**-0.5
        self.queries = nnx.Param(queries) if config.conditioning == "queries" else None
        reads, size = config.read_actions, (len(facts.action_low), config.chunk, D)
        self.reader = ActionReader(*size, dtype=dtype, rngs=rngs) if reads else None
        self.expert = ActionExpert(
            config.expert,
            context_width=D,
            chunk=config.chunk,
            action_width=len(facts.action_low),
            state_width=len(facts.state_low),
            dtype=dtype,
            rngs=rngs,
        )

    def embed(
        self, images: dict[str, Array], tokens: Int[Array, "B L"], chunk: Chunk | None = None
    ) -> dict[str, Float[Array, "B T D"]]:
        """One embedding array for each kind of span."""
        image = self.vision(images)
        parts = {"image": image, "text": self.words[...][tokens].astype(image.dtype)}
        if self.queries is not None:
            parts["query"] = jnp.broadcast_to(self.queries[...].astype(image.dtype), (len(tokens), *self.queries.shape))
        if chunk is not None:
            parts["action"] = self.reader(*chunk).astype(image.dtype)
        return parts

    def layout(self, text: int, branches: tuple[str, ...]) -> Layout:
        """The sequence for instructions padded to `text` tokens."""
        if self.queries is None and "prior" in branches:
            raise UserError("a policy with conditioning = 'tokens' has no prior branch; use conditioning = 'queries'")
        if self.reader is None and "action" in branches:
            raise UserError("this policy cannot read actions: set policy.read_actions = true")
        if text > self.facts.max_tokens:
            raise UserError(f"instructions of {text} tokens; this policy was made for at most {self.facts.max_tokens}")
        queries = 0 if self.queries is None else self.config.queries
        room = self.facts.max_tokens
        return branched(self.vision.tokens, queries, text, room, tuple(branches), actions=self.config.chunk)

    def encode(
        self,
        images: dict[str, Array],
        tokens: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        branches: tuple[str, ...] = ("posterior",),
        chunk: Chunk | None = None,
    ) -> dict[str, Reading]:
        """Read the sequence once, for all branches.

        chunk: the actions that the branch "action" reads.
        """
        sequence, layout, valid = self.pack(images, tokens, token_mask, branches, chunk)
        hidden = self.trunk(sequence, layout, valid)
        return {branch: self._reading(hidden, valid, layout, branch) for branch in branches}

    def pack(
        self,
        images: dict[str, Array],
        tokens: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        branches: tuple[str, ...],
        chunk: Chunk | None = None,
    ) -> tuple[Float[Array, "B T D"], Layout, Bool[Array, "B T"]]:
        """The sequence that the trunk reads, its layout, and which tokens are no padding. Several branches are packed
        after one shared image: [v | Q | l | l' | Q' | a | l'']."""
        layout = self.layout(tokens.shape[1], branches)
        parts = self.embed(images, tokens, chunk)
        sequence = jnp.concatenate([parts[span.kind] for span in layout.spans], 1)
        everything = jnp.ones((len(tokens), 1), bool)
        valid = jnp.concatenate(
            [token_mask if span.kind == "text" else jnp.repeat(everything, span.length, 1) for span in layout.spans], 1
        )
        return sequence, layout, valid

    def _reading(self, hidden, valid, layout: Layout, branch: str) -> Reading:
        text, before = layout[f"{branch}/text"], layout.predecessor(f"{branch}/text")
        predictors = jnp.concatenate([hidden[:, before : before + 1], hidden[:, text.start : text.stop - 1]], 1)
        if branch == "action":
            return Reading(hidden[:, layout["action/action"]], None, predictors)
        if self.queries is None:
            return Reading(hidden[:, : text.stop], valid[:, : text.stop], predictors)
        return Reading(hidden[:, layout[f"{branch}/query"]], None, predictors)

    def word_logits(self, predictors: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Next-token logits, by the transposed word embedding; float32."""
        B, L, D = predictors.shape
        words = self.words[...].astype(predictors.dtype)
        return (predictors.reshape(-1, D) @ words.T).reshape(B, L, -1).astype(jnp.float32)

    def condition(self, reading: Reading, state: Float[Array, "B F"]) -> Condition:
        """What the expert gets to see. state: proprioception in SI units."""
        return Condition(reading.hidden, reading.valid, self.normalizer.normalize_state(state))

    def velocity(
        self,
        actions: Float[Array, "B R C A"],
        time: Float[Array, "B R"],
        condition: Condition,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B R C A"]:
        """v(x_t, t | condition) in model units, for R draws of each sample. key: for dropout, in training only."""
        return self.expert(actions, time, self.expert.read(condition), key)

    def field(self, condition: Condition) -> Field:
        """The velocity field (x [B, C, A], t) -> v under a condition that is read once."""
        memory = self.expert.read(condition)

        def velocity(x, t):
            return self.expert(x[:, None], jnp.full((len(x), 1), t), memory)[:, 0]

        return velocity

    def sample(
        self, condition: Condition, noise: Float[Array, "B C A"], *, steps: int = 4, transform: Transform = identity
    ) -> Float[Array, "B C A"]:
        """Carry noise to actions (model units) along the velocity field."""
        return solve(self.field(condition), noise, steps=steps, transform=transform)

    def act(
        self,
        observation: dict[str, Any],
        tokens: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray,
        steps: int = 4,
        guidance: Float[Array, ""] | float | None = None,
    ) -> Float[Array, "B C A"]:
        """A chunk of actions in SI units.

        observation: {"images": {view: uint8[B, H, W, 3]}, "state": float32[B, F] in SI units}.
        guidance: None acts by the posterior branch alone, as in the paper. A number w reads both branches in one packed
            pass and follows v_prior + w (v_post - v_prior); it may be traced.
        """
        branches = ("posterior",) if guidance is None else ("prior", "posterior")
        readings = self.encode(observation["images"], tokens, token_mask, branches)
        conditions = {name: self.condition(reading, observation["state"]) for name, reading in readings.items()}
        noise = jax.random.normal(key, (len(tokens), self.config.chunk, len(self.facts.action_low)))
        transform = identity if guidance is None else extrapolate(self.field(conditions["prior"]), guidance)
        actions = self.sample(conditions["posterior"], noise, steps=steps, transform=transform)
        return self.normalizer.denormalize_action(actions)
