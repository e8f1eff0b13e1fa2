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
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from vla_jax.errors import UserError
from vla_jax.flow.solve import Field, Transform, identity, solve
from vla_jax.flow.transforms import Weight, extrapolate
from vla_jax.models.actions import ActionReader
from vla_jax.models.expert import ActionExpert, Condition, ExpertConfig, present
from vla_jax.models.keypoints import KeypointConfig, KeypointEncoder
from vla_jax.models.normalizer import DataFacts, Normalizer
from vla_jax.models.qwen_vision import QwenViews, QwenVisionConfig
from vla_jax.models.reasoning import continued, last_words
from vla_jax.models.trunk import Trunk, TrunkConfig
from vla_jax.models.vision import VisionConfig, VisionEncoder
from vla_jax.models.words import Words
from vla_jax.nn.flat import frozen
from vla_jax.nn.lora import LoraConfig, add_adapters
from vla_jax.sequence.layouts import branched
from vla_jax.sequence.spans import Layout, Span

PAD_ID = 0  # of the tokenizer
LANGUAGE_MODEL = ("vision", "words", "head", "trunk")  # the parts that have nothing to do with actions
CONDITIONINGS = ("queries", "tokens", "reasoning")
# name: (module, the field of PolicyConfig that holds its settings)
ENCODERS = {
    "vit": (VisionEncoder, "vision"),
    "keypoints": (KeypointEncoder, "keypoints"),
    "qwen3_vl": (QwenViews, "qwen_vision"),
}


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """encoder: "vit" (set up by `vision`), "keypoints" (by `keypoints`) or "qwen3_vl" (by `qwen_vision`).
    vocabulary, tied, word_scale: see `models.words`; 0 words are those of the tokenizer.
    opening, closing: ids of the words before and after all pictures; brackets: of one before and one after each.
    image_bidirectional: picture tokens see all pictures and all of those words, not only what comes before them.
    conditioning: "queries" (the expert sees the latent queries only), "tokens" (it sees all of [v, l], and there are no
    queries: the usual baseline) or "reasoning" (it sees only the words of `reasoning`; no queries either).
    reasoning: words that the language model says after the instruction, before the policy acts on both (0: none; see
    `Policy.reason`). read_actions: the trunk can read an action chunk (branch "action" of `encode`).
    dtype: of the computation; parameters are float32."""

    encoder: str = "vit"
    vision: VisionConfig = VisionConfig()
    keypoints: KeypointConfig = KeypointConfig()
    qwen_vision: QwenVisionConfig = QwenVisionConfig()
    trunk: TrunkConfig = TrunkConfig()
    expert: ExpertConfig = ExpertConfig()
    vocabulary: int = 0
    tied: bool = True
    word_scale: float = 1.0
    opening: tuple[int, ...] = ()
    brackets: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    image_bidirectional: bool = False
    views: tuple[str, ...] = ("front", "wrist")
    queries: int = 8
    chunk: int = 8
    conditioning: str = "queries"
    reasoning: int = 0
    read_actions: bool = False
    lora: LoraConfig = LoraConfig()
    dtype: str = "float32"


class Chunk(NamedTuple):
    """Points x_t of the flow of actions (model units), and their t: 1 for clean actions."""

    actions: Float[Array, "B C A"]
    time: Float[Array, " B"]


class Instruction(NamedTuple):
    """Instructions, padded, and which tokens count."""

    tokens: Int[Array, "B L"]
    mask: Bool[Array, "B L"]


class Packed(NamedTuple):
    """What the trunk takes, see `Trunk.__call__`."""

    sequence: Float[Array, "B T D"]
    layout: Layout
    valid: Bool[Array, "B T"]
    position: Int[Array, "3 T"] | None
    taps: Float[Array, "n B T D"] | None


class Reading(NamedTuple):
    """What the trunk made of one branch.

    hidden: the states that condition the expert (with conditioning = "reasoning" the embedded words; in the branches
    without queries the states of the instruction, which condition nothing). valid: which of them count (None: all).
    predictors: the states from which the L instruction tokens are predicted, one place earlier each (for the first
    token that is the last query in the prior branch, the last image token in the posterior, the last action in the
    action branch, the start token in the words branch).
    """

    hidden: Float[Array, "B S D"]
    valid: Bool[Array, "B S"] | None
    predictors: Float[Array, "B L D"]


class Policy(Words):
    """Embed, encode, velocity, sample, act."""

    def __init__(self, config: PolicyConfig, facts: DataFacts, rngs: nnx.Rngs):
        if config.encoder not in ENCODERS:
            raise UserError(f"policy.encoder must be one of {', '.join(ENCODERS)}, got {config.encoder!r}")
        if config.conditioning not in CONDITIONINGS:
            raise UserError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {config.conditioning!r}")
        if config.conditioning == "queries" and config.queries < 1:
            raise UserError(f"conditioning = 'queries' needs at least one latent query, got queries = {config.queries}")
        if config.reasoning < (config.conditioning == "reasoning"):
            raise UserError(f"policy.reasoning is {config.reasoning} with conditioning = {config.conditioning!r}")
        if len(config.brackets) not in (0, 2):
            raise UserError(f"policy.brackets must be two word ids or none, got {config.brackets}")
        D, dtype = config.trunk.width, config.dtype
        self.config, self.facts = config, facts
        self.normalizer = Normalizer(facts)
        encoder, settings = ENCODERS[config.encoder]
        self.vision = encoder(getattr(config, settings), facts.image_size, config.views, D, dtype=dtype, rngs=rngs)
        vocabulary = config.vocabulary or facts.vocabulary
        super().__init__(vocabulary, D, tied=config.tied, scale=config.word_scale, dtype=dtype, rngs=rngs)
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
        if config.lora.rank:
            add_adapters(self, config.lora, rngs)

    def embed(
        self,
        images: dict[str, Array],
        tokens: Int[Array, "B L"],
        chunk: Chunk | None = None,
        other: Instruction | None = None,
    ) -> tuple[dict[str, Float[Array, "B T D"]], Float[Array, "n B T D"] | None]:
        """Embeddings by the name or the kind of their span, and the taps of all image tokens, where there are any."""
        seen = self.vision(images)
        image, taps = seen if isinstance(seen, tuple) else (seen, None)
        parts = {"text": self.embed_words(tokens).astype(image.dtype)}
        for view, where in self._views:
            parts[f"image/{view}"] = image[:, where]
        if self.queries is not None:
            parts["query"] = jnp.broadcast_to(self.queries[...].astype(image.dtype), (len(tokens), *self.queries.shape))
        # The likelihood of a first word is asked for at padding's word, which stands for the start.
        parts["start"] = self.embed_words(jnp.full((len(tokens), 1), PAD_ID)).astype(image.dtype)
        if chunk is not None:
            parts["action"] = self.reader(*chunk).astype(image.dtype)
        if other is not None:
            parts["other"] = self.embed_words(other.tokens).astype(image.dtype)
        opening, brackets, closing = self.config.opening, self.config.brackets, self.config.closing
        around = {"opening": opening, "before": brackets[:1], "after": brackets[1:], "closing": closing}
        for name, ids in around.items():
            if ids:
                embedded = self.embed_words(jnp.array(ids, jnp.int32)).astype(image.dtype)
                parts[name] = jnp.broadcast_to(embedded, (len(tokens), *embedded.shape))
        return parts, taps

    def layout(self, text: int, branches: tuple[str, ...]) -> Layout:
        """The sequence for instructions padded to `text` tokens."""
        if self.queries is None and "prior" in branches:
            raise UserError("a policy without latent queries has no prior branch; use conditioning = 'queries'")
        if self.reader is None and "action" in branches:
            raise UserError("this policy cannot read actions: set policy.read_actions = true")
        room = self.facts.max_tokens + self.config.reasoning
        self._check_length(text, room)
        queries = 0 if self.queries is None else self.config.queries
        return branched(self.prefix, queries, text, room, tuple(branches), actions=self.config.chunk)

    def _check_length(self, tokens: int, most: int) -> None:
        if tokens > most:
            raise UserError(f"instructions of {tokens} tokens; this policy was made for at most {most}")

    @property
    def _views(self) -> list[tuple[str, slice]]:
        """Where the tokens of each view lie among those of the encoder."""
        each = self.vision.tokens // len(self.config.views)
        return [(view, slice(index * each, (index + 1) * each)) for index, view in enumerate(self.config.views)]

    @property
    def prefix(self) -> tuple[Span, ...]:
        """The spans that all branches share: the pictures, with words around them where the model is used to it."""
        config = self.config
        grid = self.vision.grid if config.trunk.rope_sections else None
        spans = [Span("opening", len(config.opening), segment=0)] if config.opening else []
        for view, where in self._views:
            size = where.stop - where.start
            picture = Span("image", size, 0, bidirectional=config.image_bidirectional, grid=grid, name=f"image/{view}")
            before, after = (Span(kind, 1, 0, name=f"{kind}/{view}") for kind in ("before", "after"))
            spans += [before, picture, after] if config.brackets else [picture]
        closing = [Span("closing", len(config.closing), segment=0)] if config.closing else []
        return (*spans, *closing)

    def encode(
        self,
        images: dict[str, Array],
        tokens: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        branches: tuple[str, ...] = ("posterior",),
        chunk: Chunk | None = None,
        other: Instruction | None = None,
    ) -> dict[str, Reading]:
        """What the policy makes of a scene and an instruction, in all branches: it reasons (`reason`), and then reads
        what it was told and what it said to itself.

        branches: some of `sequence.layouts.BRANCHES`.
        chunk: the actions that the branch "action" reads. other: the instruction that the branch "negative" reads.
        """
        length = tokens.shape[1]
        tokens, token_mask = self.reason(images, tokens, token_mask)
        other = None if other is None else self.reason(images, *other)
        readings = self.read(images, tokens, token_mask, branches, chunk, other)
        return {name: part._replace(predictors=part.predictors[:, :length]) for name, part in readings.items()}

    def reason(
        self, images: dict[str, Array], tokens: Int[Array, "B L"], token_mask: Bool[Array, "B L"]
    ) -> Instruction:
        """The instruction followed by the `config.reasoning` words that the language model finds likeliest after it: a
        chain of thought before the action (arXiv 2407.08693).

        They say what the model was taught to answer (`losses.questions`). No gradient passes, so actions do not teach
        them; and the policy learns to act on its own words, not on true ones.
        """
        self._check_length(tokens.shape[1], self.facts.max_tokens)
        if not self.config.reasoning:
            return Instruction(tokens, token_mask)
        thinker = frozen(self)
        packed = thinker.pack(images, tokens, token_mask, ("posterior",))
        return Instruction(*continued(thinker, packed, tokens, token_mask, self.config.reasoning))

    def read(
        self,
        images: dict[str, Array],
        tokens: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        branches: tuple[str, ...] = ("posterior",),
        chunk: Chunk | None = None,
        other: Instruction | None = None,
    ) -> dict[str, Reading]:
        """Read the sequence once, for all branches, as it is; see `encode`."""
        packed = self.pack(images, tokens, token_mask, branches, chunk, other)
        hidden = self.trunk(*packed)
        return {branch: self._reading(hidden, packed, branch) for branch in branches}

    def pack(
        self,
        images: dict[str, Array],
        tokens: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        branches: tuple[str, ...],
        chunk: Chunk | None = None,
        other: Instruction | None = None,
    ) -> Packed:
        """The sequence that `read` reads; several branches are packed after one shared image:
        [v | Q l | l Q | a l | s l | …]."""
        layout = self.layout(tokens.shape[1], branches)
        parts, taps = self.embed(images, tokens, chunk, other)
        masks = {"text": token_mask} if other is None else {"text": token_mask, "other": other.mask}
        sequence = jnp.concatenate([parts.get(span.name, parts.get(span.kind)) for span in layout.spans], 1)
        everything = jnp.ones((len(tokens), 1), bool)
        valid = jnp.concatenate(
            [masks.get(span.kind, jnp.repeat(everything, span.length, 1)) for span in layout.spans], 1
        )
        if taps is not None:
            taps = self._spread(taps, layout)
        return Packed(sequence, layout, valid, layout.places if self.config.trunk.rope_sections else None, taps)

    def _reading(self, hidden, packed: Packed, branch: str) -> Reading:
        layout, valid = packed.layout, packed.valid
        name = f"{branch}/{'other' if branch == 'negative' else 'text'}"
        text, before = layout[name], layout.predecessor(name)
        predictors = jnp.concatenate([hidden[:, before : before + 1], hidden[:, text.start : text.stop - 1]], 1)
        if branch in ("action", "words"):
            return Reading(hidden[:, text], valid[:, text], predictors)
        if self.config.conditioning == "reasoning":
            said = text.start + last_words(valid[:, text], self.config.reasoning)
            # The words as they are, not the trunk's states at them: those have seen the picture.
            return Reading(jnp.take_along_axis(packed.sequence, said[..., None], 1), None, predictors)
        if self.queries is None:
            seen = slice(sum(span.length for span in self.prefix)), text
            hidden, valid = (jnp.concatenate([each[:, where] for where in seen], 1) for each in (hidden, valid))
            return Reading(hidden, valid, predictors)
        return Reading(hidden[:, layout[f"{branch}/query"]], None, predictors)

    def _spread(self, taps: Float[Array, "n B S D"], layout: Layout) -> Float[Array, "n B T D"]:
        """The taps of image tokens at their places in the sequence, nothing elsewhere."""
        views = {f"image/{view}": where for view, where in self._views}

        def part(span: Span) -> Float[Array, "n B T D"]:
            if span.name in views:
                return taps[:, :, views[span.name]]
            return jnp.zeros((*taps.shape[:2], span.length, taps.shape[-1]), taps.dtype)

        return jnp.concatenate([part(span) for span in layout.spans], 2)

    def condition(
        self, reading: Reading, state: Float[Array, "B F"], dimensions: Bool[Array, "B A"] | None = None
    ) -> Condition:
        """What the expert gets to see.

        state: proprioception in SI units. dimensions: of an action, those that the robot has (None: all of them).
        """
        return Condition(reading.hidden, reading.valid, self.normalizer.normalize_state(state), dimensions)

    def velocity(
        self,
        actions: Float[Array, "B R C A"],
        time: Float[Array, "B R"],
        condition: Condition,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B R C A"]:
        """v(x_t, t | condition) in model units, for R draws of each sample. keys: for dropout, in training only."""
        return self.expert(actions, time, self.expert.read(condition), keys)

    def field(self, condition: Condition) -> Field:
        """The velocity field (x, t) -> v under a condition that is read once; x [B, C, A] or, for R samples that share
        the condition, [B, R, C, A]."""
        memory = self.expert.read(condition)

        def velocity(x, t):
            draws = x if x.ndim == 4 else x[:, None]
            return self.expert(draws, jnp.full(draws.shape[:2], t), memory).reshape(x.shape)

        return velocity

    def sample(
        self, condition: Condition, noise: Float[Array, "B C A"], *, steps: int = 4, transform: Transform = identity
    ) -> Float[Array, "B C A"]:
        """Carry noise to actions (model units) along the velocity field; 0 in dimensions that the robot lacks."""
        noise = present(noise, condition.dimensions)
        return solve(self.field(condition), noise, steps=steps, transform=transform)

    def conditions(
        self,
        observation: dict[str, Any],
        tokens: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        guidance: Weight | None = None,
    ) -> dict[str, Condition]:
        """Everything that a chunk depends on but the noise, by branch: the posterior's, and with `guidance` the prior's
        too, read in one packed pass. observation, guidance: see `act`."""
        branches = ("posterior",) if guidance is None else ("prior", "posterior")
        readings = self.encode(observation["images"], tokens, token_mask, branches)
        seen = observation["state"], observation.get("dimensions")
        return {name: self.condition(reading, *seen) for name, reading in readings.items()}

    def act(
        self,
        observation: dict[str, Any],
        tokens: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray,
        steps: int = 4,
        guidance: Weight | None = None,
    ) -> Float[Array, "B C A"]:
        """A chunk of actions in SI units.

        observation: {"images": {view: uint8[B, H, W, 3]}, "state": float32[B, F] in SI units}; for a robot of a mixture
            also "dimensions", bool[B, A]: those of an action that it has (`Contract.dimensions`).
        guidance: None acts by the posterior branch alone, as in the paper. A number w reads both branches in one packed
            pass and follows v_prior + w (v_post - v_prior); it may be traced, and be a schedule (see `extrapolate`).
        """
        conditions = self.conditions(observation, tokens, token_mask, guidance)
        noise = jax.random.normal(key, (len(tokens), self.config.chunk, len(self.facts.action_low)))
        transform = identity if guidance is None else extrapolate(self.field(conditions["prior"]), guidance)
        actions = self.sample(conditions["posterior"], noise, steps=steps, transform=transform)
        return self.normalizer.denormalize_action(actions)
