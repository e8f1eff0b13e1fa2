"""Gradients of a text loss against PyTorch's, tensor by tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.nn.flat import flatten
from vla_jax.pretrained.checkpoint import pending
from vla_jax.pretrained.tables import FAMILIES

torch = pytest.importorskip("torch")

from tests.parity.tiny import paligemma_inputs, qwen_inputs, to_torch  # noqa: E402

INPUTS = {
    "qwen3_vl": qwen_inputs([[5, (4, 6), 7, 8, 9], [(2, 2), 9, (4, 4), 6, 5, 11, 12]]),
    "paligemma": paligemma_inputs([([2, 5, 108], [7, 8, 9, 1]), ([2, 5, 6, 108], [9, 1])]),
}


def mask_of_targets(inputs):
    """Where the next token is a real one."""
    real = inputs["attention_mask"].astype(bool)
    return real[:, :-1] & real[:, 1:]


def their_gradients(model, inputs):
    model.zero_grad()
    logits = model(**to_torch(inputs)).logits[:, :-1]
    targets = to_torch(inputs)["input_ids"][:, 1:].clamp(max=logits.shape[-1] - 1)
    chosen = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    mask = torch.tensor(mask_of_targets(inputs))
    loss = -(chosen * mask).sum() / mask.sum()
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def our_gradients(vlm, inputs, remat):
    config = vlm.config
    trunk = type(config.trunk)(**{**vars(config.trunk), "remat": remat})
    other = type(config)(**{**vars(config), "trunk": trunk})
    graphdef = nnx.split(nnx.eval_shape(lambda: type(vlm)(other, nnx.Rngs(0))))[0]
    prompt, mask = vlm.prepare(**inputs), mask_of_targets(inputs)
    targets = np.minimum(inputs["input_ids"][:, 1:], config.vocabulary - 1)

    def loss(state):
        logits = nnx.merge(graphdef, state)(prompt)[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -(chosen * mask).sum() / mask.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(nnx.split(vlm)[1])
    return float(value), flatten(gradient)


@pytest.mark.parametrize("fixture, family, remat", [("qwen", "qwen3_vl", "dense"), ("paligemma", "paligemma", "all")])
def test_gradients_of_a_text_loss(request, fixture, family, remat):
    pair, family_of = request.getfixturevalue(fixture), FAMILIES[family]
    their_loss, expected = their_gradients(pair.theirs, INPUTS[family])
    our_loss, gradient = our_gradients(pair.ours, INPUTS[family], remat)
    assert abs(our_loss - their_loss) < 1e-4
    expected = {family_of.canonical(name): value for name, value in expected.items() if name != "lm_head.weight"}
    ours = {t.key: t.get() for row in family_of.table(pair.ours.config) for t in pending(row, gradient)}
    assert ours.keys() == expected.keys()
    # A bias of keys moves no softmax: its gradient is rounding alone, and is compared on the scale of the others'.
    floor = 1e-3 * max(np.abs(value).max() for value in expected.values())
    for key, value in expected.items():
        difference = np.abs(ours[key] - value).max() / max(np.abs(value).max(), floor)
        assert difference < 1e-3, (key, difference)
