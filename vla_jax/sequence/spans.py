"""One sequence, one rule of sight.

Every model input is a tuple of spans. `Layout` turns it into a few static vectors, and `sees` turns those into
"query q may look at key k". Nothing else in the project builds an attention mask.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from vla_jax.errors import UserError

SHARED = 0  # the branch that every other branch can see
CLEAN, NOISY = 0, 1  # the streams


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of tokens that play the same role.

    kind: what the tokens are ("image", "text", "query", "state", "action", ...).
    length: number of tokens (static; padding inside it is a per-example mask, see `Layout`).
    segment: place in the causal order; a token sees the clean tokens of all lower segments.
    branch: SHARED, or the id of one of several alternatives that do not see each other.
    blind: tokens do not see SHARED spans either, only their own branch.
    stream: CLEAN or NOISY; nobody outside its own segment sees a noisy token.
    bidirectional: tokens see their whole segment, not only what comes before them.
    siblings: group id; segments of the same group do not see each other. -1 is no group.
    reserve: positions set aside for the span (default: its length), so that what follows stays at the same
        position however far the span is padded.
    copies: name of an earlier span whose positions this one repeats (the noisy copy of a clean block).
    grid: rows and columns of a picture's tokens, for trunks that place pictures in height and width (`places`).
    name: unique in a layout; defaults to the kind.
    """

    kind: str
    length: int
    segment: int
    branch: int = SHARED
    blind: bool = False
    stream: int = CLEAN
    bidirectional: bool = False
    siblings: int = -1
    reserve: int | None = None
    copies: str | None = None
    grid: tuple[int, int] | None = None
    name: str = ""

    def __post_init__(self):
        if not self.name:
            object.__setattr__(self, "name", self.kind)
        if self.reserve is not None and self.reserve < self.length:
            raise UserError(f"span {self.name!r} has {self.length} tokens but only {self.reserve} reserved positions")
        if self.grid is not None and self.grid[0] * self.grid[1] != self.length:
            raise UserError(f"span {self.name!r} has {self.length} tokens, which are no grid of {self.grid}")

    @property
    def reach(self) -> tuple[int, ...]:
        """The branches that the span can see."""
        return (self.branch,) if self.blind else (SHARED, self.branch)


class Sight(NamedTuple):
    """What the rule of sight needs to know of each token: integer (or boolean) vectors of one length."""

    segment: Int[Array, " T"]
    branch: Int[Array, " T"]
    blind: Bool[Array, " T"]
    stream: Int[Array, " T"]
    position: Int[Array, " T"]
    bidirectional: Bool[Array, " T"]
    siblings: Int[Array, " T"]


def sees(query: Sight, key: Sight) -> Bool[Array, "T S"]:
    """The rule of sight: may query token q look at key token k?

    A key in another branch than SHARED or the query's own is never seen, and a blind query sees its own only.
    Otherwise q sees k when they share segment
    and stream and k does not come later (or the query's span is bidirectional), or when k is a clean token of a lower
    segment that is not a sibling of q's. Works on numpy and on jax arrays.
    """
    q, k = Sight(*(x[:, None] for x in query)), Sight(*(x[None, :] for x in key))
    reachable = ((k.branch == SHARED) & ~q.blind) | (k.branch == q.branch)
    same = (q.segment == k.segment) & (q.stream == k.stream) & (q.bidirectional | (k.position <= q.position))
    before = (k.segment < q.segment) & (k.stream == CLEAN) & ~((q.siblings == k.siblings) & (q.siblings >= 0))
    return reachable & (same | before)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The spans of a sequence, in the order in which their tokens lie. Static and hashable: no array depends on data.

    Padding is not part of a layout: attention takes it as a mask of valid keys per example.
    """

    spans: tuple[Span, ...]

    def __post_init__(self):
        names = [span.name for span in self.spans]
        if len(set(names)) != len(names):
            raise UserError(f"the spans of a layout need different names, got {names}")

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(span.length for span in self.spans)

    def __getitem__(self, name: str) -> slice:
        """Where the span called `name` lies."""
        start = 0
        for span in self.spans:
            if span.name == name:
                return slice(start, start + span.length)
            start += span.length
        raise KeyError(f"no span {name!r}; there are {[span.name for span in self.spans]}")

    @functools.cached_property
    def starts(self) -> dict[str, int]:
        """The position of each span's first token: right after all earlier spans that its branch can see."""
        return self._starts(lambda span: span.reserve or span.length)

    def _starts(self, extent: Callable[[Span], int]) -> dict[str, int]:
        """`starts`, where a span takes up `extent` positions."""
        starts: dict[str, int] = {}
        ends: list[tuple[int, int]] = []
        for span in self.spans:
            follows = max((end for branch, end in ends if branch in span.reach), default=0)
            starts[span.name] = starts[span.copies] if span.copies else follows
            ends.append((span.branch, starts[span.name] + extent(span)))
        return starts

    @functools.cached_property
    def places(self) -> Int[np.ndarray, "3 T"]:
        """Time, height and width of every token (M-RoPE, arXiv 2409.12191).

        A picture stands still in time, counts its rows and columns, and takes up as many positions as its longer side
        has tokens. All else counts up in the three alike.
        """
        starts = self._starts(lambda span: max(span.grid) if span.grid else span.reserve or span.length)
        columns = []
        for span in self.spans:
            within = np.indices((1, *span.grid)).reshape(3, -1) if span.grid else np.arange(span.length)[None]
            columns.append(np.broadcast_to(starts[span.name] + within, (3, span.length)))
        return np.concatenate(columns, 1).astype(np.int32)

    @functools.cached_property
    def sight(self) -> Sight:
        """One numpy vector of length `self.length` for each fact that the rule of sight uses."""

        def repeat(values: list, dtype) -> np.ndarray:
            return np.repeat(np.asarray(values, dtype), [span.length for span in self.spans])

        def column(field: str, dtype) -> np.ndarray:
            return repeat([getattr(span, field) for span in self.spans], dtype)

        within = np.concatenate([np.arange(span.length) for span in self.spans])
        position = repeat([self.starts[span.name] for span in self.spans], np.int32) + within.astype(np.int32)
        return Sight(
            segment=column("segment", np.int32),
            branch=column("branch", np.int32),
            blind=column("blind", bool),
            stream=column("stream", np.int32),
            position=position,
            bidirectional=column("bidirectional", bool),
            siblings=column("siblings", np.int32),
        )

    @property
    def mask(self) -> np.ndarray:
        """bool[T, S]: the whole rule of sight, written out."""
        return sees(self.sight, self.sight)

    @functools.cached_property
    def blocks(self) -> tuple[tuple[slice, tuple[slice, ...]], ...]:
        """What attention has to compute: runs of query tokens, each with the runs of keys that some of them see.

        Neighbouring spans of one branch make a run. Between the branches of a packed sequence, and from a prefix to
        what follows it, nobody looks, so nothing need be computed there.
        """
        ends = np.cumsum([span.length for span in self.spans])
        # the last token of a span sees all that its other tokens see
        visible = sees(Sight(*(vector[ends - 1] for vector in self.sight)), self.sight)
        visible = np.logical_or.reduceat(visible, ends - [span.length for span in self.spans], axis=1)
        blocks = []
        for _, run in itertools.groupby(range(len(self.spans)), lambda index: self.spans[index].branch):
            run = list(run)
            keys = np.flatnonzero(visible[run].any(0))
            blocks.append((self._slices(run)[0], self._slices(keys)))
        return tuple(blocks)

    def _slices(self, indices) -> tuple[slice, ...]:
        """The tokens of the spans with these indices, neighbours joined."""
        slices: list[slice] = []
        for where in (self[self.spans[index].name] for index in indices):
            if slices and slices[-1].stop == where.start:
                where = slice(slices.pop().start, where.stop)
            slices.append(where)
        return tuple(slices)

    def predecessor(self, name: str) -> int:
        """Index of the token from which the first token of span `name` is predicted: the last one before it that its
        branch can see."""
        span = next(span for span in self.spans if span.name == name)
        start = self[name].start
        return int(np.flatnonzero(np.isin(self.sight.branch[:start], span.reach))[-1])
