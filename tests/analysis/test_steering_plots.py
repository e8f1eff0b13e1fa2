"""Figures of steered policies, of a study that needs no simulator."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from vla_jax.analysis import steering_plots
from vla_jax.evaluation.rollout import Recording
from vla_jax.steering.program import parse

REACH = '{"stages": [{"name": "reach", "terms": [{"term": "distance", "keypoint": 0}]}]}'


class Study:
    """One scene with one keypoint, to which every arm goes straight."""

    def prepare(self, shift):
        points = SimpleNamespace(keypoints=SimpleNamespace(position=jnp.array([[0.5, 0.1, 0.02]])))
        target = SimpleNamespace(complete=lambda: [parse(REACH, ("cube",))])
        return SimpleNamespace(target=target, found=[points], texts=["reach the cube"])

    def watch(self, shift, arm, scene):
        return Recording(None, np.linspace([0.4, 0.0, 0.1], [0.5, 0.1, 0.02], 5)), True


def test_every_arm_has_its_line(monkeypatch):
    monkeypatch.setattr(steering_plots, "_draw_table", lambda *arguments: None)
    arms = [f"arm {number}" for number in range(9)]
    figure = steering_plots.plot_steered(Study(), "swapped", 0, arms)
    listed = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes[:2]]
    assert listed == [arms[:1], arms[1:]]
