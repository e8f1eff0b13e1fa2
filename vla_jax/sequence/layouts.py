"""The layouts that the policies use."""

from __future__ import annotations

from vla_jax.errors import UserError
from vla_jax.sequence.spans import Layout, Span

PRIOR, POSTERIOR = 1, 2
BRANCHES = {"prior": PRIOR, "posterior": POSTERIOR}


def branched(image: int, queries: int, text: int, room: int, branches: tuple[str, ...]) -> Layout:
    """Image prefix followed by the prior `[Q, l]` and / or the posterior `[l, Q]` ordering of queries and text.

    Prior: v, Q, l, where Q sees only the image and l sees both (BayesianVLA / LangForce, arXiv 2601.15197, Sec. 3.2).
    Posterior: v, l, Q. Both together are the packed sequence [v | Q | l | l' | Q'], which computes the image once.
    Every token keeps the position that it would have with its branch alone.

    image, queries, text: numbers of tokens. room: positions reserved for the text (>= text), so that the position of
    the posterior's queries does not depend on how far a batch is padded. queries = 0 leaves the queries out.
    """
    unknown = [name for name in branches if name not in BRANCHES]
    if unknown or not branches:
        raise UserError(f"branches must be some of {tuple(BRANCHES)}, got {branches}")
    spans = [Span("image", image, segment=0)]
    for name in sorted(branches, reverse=True):  # "prior" first
        order = ("query", "text") if name == "prior" else ("text", "query")
        lengths, reserve = {"query": queries, "text": text}, {"query": None, "text": room}
        spans += [
            Span(kind, lengths[kind], segment, branch=BRANCHES[name], reserve=reserve[kind], name=f"{name}/{kind}")
            for segment, kind in enumerate(order, start=1)
            if lengths[kind]
        ]
    return Layout(tuple(spans))
