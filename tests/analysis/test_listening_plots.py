"""The figures show the numbers that they are given."""

from types import SimpleNamespace

import numpy as np
from matplotlib.patches import Rectangle

from vla_jax.analysis.attention import Gaze
from vla_jax.analysis.imagine import Start
from vla_jax.analysis.listening_plots import plot_explained, plot_gaze, plot_said, plot_suggested


def frames(axis):
    return [patch.get_center().round().tolist() for patch in axis.patches if isinstance(patch, Rectangle)]


def test_instructions_that_were_given_are_framed():
    values = {"policy": np.log([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]), "expert": np.zeros((1, 3)) - 50}
    figure = plot_explained(values, {"policy": ["a", "c"], "expert": ["b"]}, ["a", "b", "c"])
    policy, expert = figure.axes[:2]
    np.testing.assert_allclose(policy.images[0].get_array(), [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(expert.images[0].get_array(), 1 / 3)
    assert frames(policy) == [[0, 0], [2, 1]] and frames(expert) == [[1, 0]]
    assert [text.get_text() for text in expert.texts] == ["-50.0"] * 3


def test_the_language_head_is_shown_as_shares():
    figure = plot_suggested({"x": np.log([0.3, 0.1]), "y": np.array([-9.0, -9.0])}, ["a", "b"], "red cube")
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(widths, [0.75, 0.25, 0.5, 0.5])


def test_attention_is_summed_by_thing_and_by_word():
    """Two views of 4 x 4 pixels, a token each half; the thing fills the left half of the second view."""
    places = np.array([[[1, 2], [3, 2], [1, 2], [3, 2]]])
    vision = SimpleNamespace(places=lambda images: places, reach=2, views=("wrist", "front"))
    picture, empty, thing = np.zeros((1, 4, 4, 3), np.uint8), np.full((4, 4), -1), np.full((4, 4), -1)
    thing[:, :2] = 0
    start = Start({"images": {"front": picture, "wrist": picture}}, ["red cube"], {"front": thing, "wrist": empty}, "")
    gaze = Gaze(
        np.array([[[0.1, 0.2, 0.3, 0.0], [0.3, 0.0, 0.1, 0.0]]]),  # one instruction, two readers
        np.array([[[0.2, 0.1, 0.0], [0.2, 0.2, 0.0]]]),
        np.array([[[0.1, 0.0], [0.0, 0.2]]]),
    )
    figure = plot_gaze(SimpleNamespace(vision=vision), start, gaze, ["red, cube"])
    front, bars = figure.axes[1], figure.axes[2]
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == ["red cube", "elsewhere in the pictures", "“red”", "“cube”", "latent queries"]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [0.2, 0.3, 0.2, 0.15, 0.15])
    np.testing.assert_allclose(bars.lines[0].get_xdata(), [0.125, 0.375])
    alone = plot_gaze(SimpleNamespace(vision=vision), start, gaze, ["red, cube"], reader=0).axes[2]
    np.testing.assert_allclose([bar.get_width() for bar in alone.patches], [0.3, 0.3, 0.2, 0.1, 0.1])
    brightest = front.patches[-1]
    assert brightest.get_xy() == (-0.5, 0.5) and brightest.get_alpha() == 0.75


def test_a_cross_stands_where_the_policy_says_the_thing_is():
    start = SimpleNamespace(observation={"images": {"front": np.zeros((1, 64, 64, 3), np.uint8)}})
    texts = ["touch the red cube", "touch the blue ball", "lift it"]
    axis = plot_said(start, texts, ["touch the red cube x0 y31", "touch the blue ball a ball", "lift it"]).axes[0]
    crosses = [line.get_xydata()[0] for line in axis.lines]
    np.testing.assert_allclose(crosses[0], [0.5, 62.5])  # between the two pixels of the bin
    assert np.isnan(crosses[1:]).all()
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["“touch the red cube”: x0 y31", "“touch the blue ball”: a ball", "“lift it”: says nothing"]
