"""The layouts that the policies use."""

from __future__ import annotations

from vla_jax.errors import UserError
from vla_jax.sequence.spans import Layout, Span

# name: (branch id, the order of its spans after the image)
BRANCHES = {
    "prior": (1, ("query", "text")),
    "posterior": (2, ("text", "query")),
    "action": (3, ("action", "text")),
    "words": (4, ("start", "text")),
    "negative": (5, ("other", "query")),
}


def branched(
    image: int | tuple[Span, ...], queries: int, text: int, room: int, branches: tuple[str, ...], actions: int = 0
) -> Layout:
    """Image prefix followed by some orderings of queries, text and actions that do not see each other.

    Prior: v, Q, l, where Q sees only the image and l sees both (BayesianVLA / LangForce, arXiv 2601.15197, Sec. 3.2).
    Posterior: v, l, Q. Both together are the packed sequence [v | Q | l | l' | Q'], which computes the image once.
    Action: v, a, l, the instruction after the action chunk, whose tokens see each other both ways.
    Words: s, l, the instruction alone after a token that starts it; neither sees the image.
    Negative: the posterior ordering of another instruction of as many tokens.
    Every token keeps the position that it would have with its branch alone.

    image: number of tokens, or the spans of the shared prefix, all in segment 0. queries, text, actions: numbers of
    tokens. room: positions reserved for the text (>= text), so that the position of the posterior's queries does not
    depend on how far a batch is padded. queries = 0 leaves the queries out.
    """
    unknown = [name for name in branches if name not in BRANCHES]
    if unknown or not branches:
        raise UserError(f"branches must be some of {tuple(BRANCHES)}, got {branches}")
    lengths = {"query": queries, "text": text, "other": text, "action": actions, "start": 1}
    reserve = {"text": room, "other": room}
    spans = [Span("image", image, segment=0)] if isinstance(image, int) else list(image)
    for name, (branch, order) in BRANCHES.items():
        spans += [
            Span(
                kind,
                lengths[kind],
                segment,
                branch=branch,
                blind=name == "words",
                bidirectional=kind == "action",
                reserve=reserve.get(kind),
                name=f"{name}/{kind}",
            )
            for segment, kind in enumerate(order, start=1)
            if lengths[kind] and name in branches
        ]
    return Layout(tuple(spans))
