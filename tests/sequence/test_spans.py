"""The rule of sight against masks drawn by hand: a row is a query, a column a key, # means that it may look."""

import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.sequence.layouts import branched
from vla_jax.sequence.spans import NOISY, Layout, Sight, Span, sees


def drawn(picture: str) -> np.ndarray:
    return np.array([[mark == "#" for mark in row] for row in picture.split()])


def test_causal_language_model():
    assert (Layout((Span("text", 5, segment=0),)).mask == np.tril(np.ones((5, 5), bool))).all()


def test_bidirectional_prefix_then_state_then_actions():
    layout = Layout(
        (
            Span("image", 2, 0, bidirectional=True),
            Span("text", 1, 0, bidirectional=True),
            Span("state", 1, 1),
            Span("action", 2, 2, bidirectional=True),
        )
    )
    assert (
        layout.mask
        == drawn("""
        ###...
        ###...
        ###...
        ####..
        ######
        ######""")
    ).all()


def test_actions_of_a_chunk_do_not_see_each_other():
    actions = [Span("action", 2, segment=1 + i, siblings=0, name=f"action {i}") for i in range(3)]
    layout = Layout((Span("image", 2, 0), *actions, Span("text", 1, 9)))
    assert (
        layout.mask
        == drawn("""
        #........
        ##.......
        ###......
        ####.....
        ##..#....
        ##..##...
        ##....#..
        ##....##.
        #########""")
    ).all()
    assert list(layout.sight.position) == list(range(9)), "siblings keep running positions"


def test_block_diffusion_with_clean_and_noisy_copies():
    clean = [Span("text", 2, segment=b, bidirectional=True, name=f"clean {b}") for b in range(3)]
    noisy = [
        Span("text", 2, segment=b, bidirectional=True, stream=NOISY, copies=f"clean {b}", name=f"noisy {b}")
        for b in range(3)
    ]
    layout = Layout((*clean, *noisy))
    block, is_noisy = np.arange(12) // 2 % 3, np.arange(12) >= 6
    row, column = np.meshgrid(np.arange(12), np.arange(12), indexing="ij")
    same_block_of_noise = is_noisy[row] & is_noisy[column] & (block[row] == block[column])
    noise_on_earlier_clean = is_noisy[row] & ~is_noisy[column] & (block[column] < block[row])
    clean_on_clean = ~is_noisy[row] & ~is_noisy[column] & (block[column] <= block[row])
    assert (layout.mask == (same_block_of_noise | noise_on_earlier_clean | clean_on_clean)).all()
    assert (layout.sight.position == np.tile(np.arange(6), 2)).all(), "noisy copies reuse the clean positions"


def test_packed_prior_and_posterior():
    layout = branched(image=2, queries=2, text=2, room=3, branches=("prior", "posterior"))
    assert [span.name for span in layout.spans] == [
        "image",
        "prior/query",
        "prior/text",
        "posterior/text",
        "posterior/query",
    ]
    assert (
        layout.mask
        == drawn("""
        #.........
        ##........
        ###.......
        ####......
        #####.....
        ######....
        ##....#...
        ##....##..
        ##....###.
        ##....####""")
    ).all()
    assert list(layout.sight.position) == [0, 1, 2, 3, 4, 5, 2, 3, 5, 6]


@pytest.mark.parametrize("branch", ["prior", "posterior"])
def test_a_packed_branch_is_the_branch_alone(branch):
    both, alone = branched(3, 2, 4, 6, ("prior", "posterior")), branched(3, 2, 4, 6, (branch,))
    names = [span.name for span in alone.spans]
    index = np.concatenate([np.arange(both.length)[both[name]] for name in names])
    assert (both.mask[np.ix_(index, index)] == alone.mask).all()
    assert (both.sight.position[index] == alone.sight.position).all()
    others = np.setdiff1d(np.arange(both.length), index)
    assert not both.mask[np.ix_(index, others)].any()


def test_queries_after_the_text_stay_in_place_when_padding_grows():
    short, long = (branched(3, 2, text, 16, ("posterior",)) for text in (4, 11))
    positions = [layout.sight.position[layout["posterior/query"]] for layout in (short, long)]
    assert (positions[0] == positions[1]).all() and positions[0][0] == 3 + 16


def test_the_first_token_of_a_text_is_predicted_by_what_stands_before_it():
    layout = branched(image=3, queries=2, text=4, room=4, branches=("prior", "posterior"))
    assert layout.predecessor("prior/text") == layout["prior/query"].stop - 1
    assert layout.predecessor("posterior/text") == layout["image"].stop - 1


def test_the_rule_is_the_same_on_the_device():
    layout = branched(3, 2, 4, 6, ("prior", "posterior"))
    device = Sight(*(jnp.asarray(vector) for vector in layout.sight))
    assert (np.asarray(sees(device, device)) == layout.mask).all()


@pytest.mark.parametrize(
    "layout",
    [
        branched(3, 2, 4, 6, ("prior", "posterior")),
        branched(3, 2, 4, 6, ("posterior",)),
        branched(3, 0, 4, 6, ("posterior",)),
        Layout((Span("image", 2, 0, bidirectional=True), Span("action", 3, 1))),
        Layout((Span("text", 2, 0, name="a"), Span("text", 2, 0, stream=NOISY, copies="a", name="b"))),
    ],
)
def test_blocks_hold_all_that_is_seen_and_leave_out_whole_spans_that_are_not(layout):
    covered = np.zeros_like(layout.mask)
    for queries, keys in layout.blocks:
        for where in keys:
            assert not covered[queries, where].any()
            covered[queries, where] = True
    assert (covered >= layout.mask).all()
    assert [queries.start for queries, _ in layout.blocks[1:]] == [queries.stop for queries, _ in layout.blocks[:-1]]


def test_packed_branches_are_never_multiplied_with_each_other():
    layout = branched(image=10, queries=2, text=3, room=3, branches=("prior", "posterior"))
    assert layout.blocks == (
        (slice(0, 10), (slice(0, 10),)),
        (slice(10, 15), (slice(0, 15),)),
        (slice(15, 20), (slice(0, 10), slice(15, 20))),
    )


def test_layouts_are_static_values():
    one, other = (branched(3, 2, 4, 6, ("posterior",)) for _ in range(2))
    assert one == other and hash(one) == hash(other) and one != branched(3, 2, 5, 6, ("posterior",))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Layout((Span("text", 2, 0), Span("text", 2, 1))), "different names"),
        (lambda: Span("text", 5, 0, reserve=4), "4 reserved"),
        (lambda: branched(2, 2, 2, 2, ("posterior", "postprior")), "postprior"),
        (lambda: branched(2, 2, 2, 2, ()), "branches must be"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_an_unknown_span_is_named():
    with pytest.raises(KeyError, match="image"):
        branched(2, 2, 2, 2, ("prior",))["posterior/text"]


def test_words_alone_see_neither_the_image_nor_another_branch():
    layout = branched(image=2, queries=1, text=2, room=3, branches=("posterior", "words"))
    assert [span.name for span in layout.spans][-2:] == ["words/start", "words/text"]
    assert (
        layout.mask
        == drawn("""
        #.......
        ##......
        ###.....
        ####....
        #####...
        .....#..
        .....##.
        .....###""")
    ).all()
    assert list(layout.sight.position) == [0, 1, 2, 3, 5, 0, 1, 2], "a blind branch begins at the beginning"
    assert layout.predecessor("words/text") == 5


def test_pictures_are_placed_in_height_and_width():
    prefix = (Span("word", 1, 0), Span("image", 6, 0, grid=(2, 3)), Span("word", 1, 0, name="after"))
    layout = branched(prefix, queries=1, text=1, room=2, branches=("prior", "posterior"))
    time, height, width = layout.places
    picture = layout["image"]
    assert list(time[picture]) == [1] * 6
    assert list(height[picture]) == [1, 1, 1, 2, 2, 2] and list(width[picture]) == [1, 2, 3, 1, 2, 3]
    rest = [0, 4, 5, 6, 5, 7]  # the picture takes up as many places as its longer side
    for axis in layout.places:
        assert list(np.delete(axis, np.arange(picture.start, picture.stop))) == rest
    assert list(layout.sight.position[:8]) == list(range(8)), "who sees whom still goes by the order of tokens"
    with pytest.raises(UserError, match="no grid"):
        Span("image", 5, 0, grid=(2, 3))


def test_a_prefix_can_see_itself_both_ways():
    prefix = (Span("image", 2, 0, bidirectional=True), Span("word", 1, 0))
    layout = branched(prefix, queries=1, text=1, room=1, branches=("posterior",))
    assert (
        layout.mask
        == drawn("""
        ###..
        ###..
        ###..
        ####.
        #####""")
    ).all()
