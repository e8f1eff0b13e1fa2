"""Each block against its formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from vla_jax.errors import UserError
from vla_jax.nn.attention import Attention, Block, attend, attend_in_blocks
from vla_jax.nn.dense import Dense
from vla_jax.nn.mlp import GatedMLP, GeluMLP
from vla_jax.nn.norm import LayerNorm, RMSNorm
from vla_jax.nn.rotary import interleaved_rotation, plane_rotation, rotate, rotation
from vla_jax.nn.stack import Stack


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=tolerance)


def test_dense_keeps_leading_axes():
    layer = Dense(4, 3, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(3.0)
    x = normal(2, 5, 4)
    close(layer(x), np.einsum("btd,df->btf", x, layer.kernel[...]) + np.arange(3.0))


def test_dense_computes_in_its_type_with_float32_parameters():
    layer = Dense(4, 3, dtype="bfloat16", rngs=nnx.Rngs(0))
    assert layer(normal(2, 4)).dtype == jnp.bfloat16
    assert layer.kernel[...].dtype == jnp.float32


def test_norms():
    x = 3 * normal(4, 8) + 1
    rms, layer = RMSNorm(8), LayerNorm(8)
    rms.scale[...], layer.scale[...], layer.bias[...] = jnp.arange(8.0), jnp.arange(8.0), jnp.ones(8)
    close(rms(x), x / np.sqrt((x**2).mean(-1, keepdims=True)) * np.arange(8.0))
    close(layer(x), (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * np.arange(8.0) + 1, 1e-4)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_compute_in_float32(norm):
    x = jnp.tile(jnp.array([100.0, 100.5], jnp.bfloat16), 8)[None]
    assert norm(16)(x).dtype == jnp.bfloat16
    expected = x.astype(jnp.float32) / 100.25 if norm is RMSNorm else jnp.tile(jnp.array([-1.0, 1.0]), 8)[None]
    close(norm(16)(x).astype(jnp.float32), expected, 5e-3)
    roots = [line for line in str(jax.make_jaxpr(norm(16))(x)).splitlines() if "rsqrt" in line]
    assert roots and all("f32" in line and "bf16" not in line for line in roots)


def test_attention_by_loops():
    q, k, v = normal(2, 3, 4, 5), normal(2, 6, 2, 5, seed=1), normal(2, 6, 2, 5, seed=2)
    mask = np.random.default_rng(3).random((2, 3, 6)) < 0.6
    mask[..., 0] = True
    expected = np.zeros_like(q)
    for b in range(2):
        for t in range(3):
            for n in range(4):
                scores = np.exp(k[b, :, n // 2] @ q[b, t, n] / np.sqrt(5)) * mask[b, t]
                expected[b, t, n] = scores / scores.sum() @ v[b, :, n // 2]
    close(attend(q, k, v, mask), expected)


def test_attention_in_blocks_is_attention():
    q, k, v = normal(2, 5, 4, 3), normal(2, 5, 2, 3, seed=1), normal(2, 5, 2, 3, seed=2)
    mask = np.zeros((2, 5, 5), bool)
    mask[:, :2, :2], mask[:, 2:, :1], mask[:, 2:, 3:] = True, True, True
    mask[1, 2:, 4] = False
    keys = (slice(0, 1), slice(3, 5))
    blocks = (
        Block(slice(0, 2), (slice(0, 2),), mask[:, :2, :2]),
        Block(slice(2, 5), keys, np.concatenate([mask[:, 2:, where] for where in keys], 2)),
    )
    close(attend_in_blocks(q, k, v, blocks), attend(q, k, v, mask))


def test_hidden_keys_have_no_effect_and_no_gradient():
    q, k, v = normal(1, 2, 2, 4), normal(1, 3, 2, 4, seed=1), normal(1, 3, 2, 4, seed=2)
    mask = np.array([[[True, True, False]]])
    gradient = jax.grad(lambda k, v: attend(q, k, v, mask).sum(), argnums=(0, 1))(k, v)
    assert all((np.asarray(g)[:, 2] == 0).all() and (np.asarray(g)[:, 1] != 0).any() for g in gradient)
    close(attend(q, k, v, mask), attend(q, k[:, :2], v[:, :2]))


def test_attention_has_the_derivatives_of_its_formula():
    """In both modes and twice over, with grouped heads and a mask."""
    q, k, v = normal(2, 3, 4, 2), normal(2, 5, 2, 2, seed=1), normal(2, 5, 2, 2, seed=2)
    mask = jnp.arange(5) <= jnp.arange(3)[:, None] + 1
    check_grads(lambda q, k, v: attend(q, k, v, mask[None]), (q, k, v), order=2, atol=0.02, rtol=0.02)

    def formula(q, k, v):
        k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * 2**-0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    for ours, theirs in zip(
        *(
            jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2))(q, k, v)
            for f in (lambda q, k, v: attend(q, k, v, mask[None]), formula)
        ),
        strict=True,
    ):
        close(ours, theirs)


def test_attention_in_bfloat16_has_the_derivatives_of_float32():
    """Also where keys and values share a mean, as those of trained models do."""
    q, k, v, weight = (normal(1, 16, 1, 64, seed=seed) for seed in range(4))
    k, v = k + 4 * normal(64, seed=5), v + 3 * normal(64, seed=6)
    # both meet the same rounded inputs
    q, k, v, weight = (x.astype(jnp.bfloat16) for x in (q, k, v, weight))

    def gradients(dtype):
        def loss(*inputs):
            return jnp.sum((attend(*inputs) * weight.astype(dtype)).astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(*(x.astype(dtype) for x in (q, k, v)))

    for low, high in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        error = jnp.linalg.norm(low.astype(jnp.float32) - high) / jnp.linalg.norm(high)
        assert error < 0.02, error


def test_attention_normalises_in_float32():
    q, k = jnp.zeros((1, 1, 1, 2), jnp.bfloat16), jnp.zeros((1, 1000, 1, 2), jnp.bfloat16)
    v = jnp.ones((1, 1000, 1, 2), jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(attend)(q, k, v))
    assert "exp" in jaxpr and "bf16" not in next(line for line in jaxpr.splitlines() if "= exp" in line)


def test_cross_attention_is_attention_to_given_keys():
    layer = Attention(8, 2, 4, context_width=6, qk_norm=True, rngs=nnx.Rngs(0))
    x, context = normal(2, 3, 8), normal(2, 5, 6, seed=1)
    seen = layer.look(x, *layer.keys_values(context))
    assert seen.shape == (2, 3, 8)
    assert not np.allclose(seen, layer.look(x, *layer.keys_values(context + normal(2, 5, 6, seed=2))))


def test_query_key_norm_makes_scores_independent_of_scale():
    layer = Attention(8, 2, 4, qk_norm=True, bias=False, rngs=nnx.Rngs(0))
    x = normal(2, 3, 8)
    before = layer(x)
    layer.query.kernel[...] *= 7.0
    close(layer(x), before, 1e-4)


def test_rotation_keeps_length_and_depends_on_distance_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def turn(x, position):
        return np.asarray(rotate(x, rotation(np.array([position]), 8)))[0, 0, 0]

    close(np.linalg.norm(turn(q, 17)), np.linalg.norm(q))
    close(turn(q, 9) @ turn(k, 4), turn(q, 25) @ turn(k, 20), 1e-4)
    assert abs(turn(q, 9) @ turn(k, 4) - turn(q, 9) @ turn(k, 5)) > 1e-3
    with pytest.raises(ValueError, match="even"):
        rotation(np.arange(3), 7)


def test_feed_forward_layers():
    x = normal(2, 3, 4)
    gelu, swiglu = GeluMLP(4, 6, rngs=nnx.Rngs(0)), GatedMLP(4, 6, "silu", rngs=nnx.Rngs(1))
    up = x @ np.asarray(gelu.up.kernel[...])
    tanh_gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    close(gelu(x), tanh_gelu @ np.asarray(gelu.down.kernel[...]))
    gate = x @ np.asarray(swiglu.gate.kernel[...])
    hidden = gate / (1 + np.exp(-gate)) * (x @ np.asarray(swiglu.up.kernel[...]))
    close(swiglu(x), hidden @ np.asarray(swiglu.down.kernel[...]))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.dense = Dense(4, 4, rngs=rngs)

    def __call__(self, x, each, shared):
        return x + jnp.tanh(self.dense(x)) * each + shared


@pytest.mark.parametrize("scan, remat", [(True, "none"), (False, "all"), (True, "dense")])
def test_scan_and_remat_change_nothing(scan, remat):
    x, each = normal(2, 4), normal(3, 1, seed=1)

    def run(scan, remat):
        graph, state = nnx.split(Stack(Layer, 3, scan=scan, remat=remat, rngs=nnx.Rngs(0)))

        def loss(state, each):
            stack = nnx.merge(graph, state)
            return (stack(x, 0.5, each=each) ** 2).sum() + stack.map(lambda layer: layer.dense(x)).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, each)

    jax.tree.map(lambda a, b: close(a, b, 1e-4), run(scan, remat), run(False, "none"))


def test_layers_of_a_stack_differ():
    kernel = Stack(Layer, 2, scan=False, remat="none", rngs=nnx.Rngs(0)).layers.dense.kernel[...]
    assert kernel.shape == (2, 4, 4) and not np.allclose(kernel[0], kernel[1])


def test_gemmas_norm_keeps_scale_minus_one():
    x = normal(4, 8)
    norm, plain = RMSNorm(8, offset=1.0), RMSNorm(8)
    close(norm(x), plain(x))
    norm.scale[...], plain.scale[...] = jnp.arange(8.0), 1 + jnp.arange(8.0)
    close(norm(x), plain(x))


def test_geglu_and_the_exact_gelu():
    x = normal(2, 3, 4)
    geglu, gelu = GatedMLP(4, 6, "gelu", rngs=nnx.Rngs(0)), GeluMLP(4, 6, 5, exact=True, rngs=nnx.Rngs(1))
    gate, up, down = (np.asarray(part.kernel[...]) for part in (geglu.gate, geglu.up, geglu.down))
    hidden = x @ gate
    tanh_gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    close(geglu(x), (tanh_gelu * (x @ up)) @ down)
    hidden = x @ np.asarray(gelu.up.kernel[...])
    error_function = np.vectorize(math.erf)(hidden / np.sqrt(2))
    close(gelu(x), (0.5 * hidden * (1 + error_function)) @ np.asarray(gelu.down.kernel[...]), 1e-6)
    assert gelu(x).shape == (2, 3, 5)


def test_positions_in_time_height_and_width_take_turns():
    position = np.random.default_rng(0).integers(0, 50, (2, 3, 5))
    table = interleaved_rotation(position, 16, 1e4, (4, 2, 2))
    for channel, axis in enumerate([0, 1, 2, 0, 1, 2, 0, 0]):  # t h w t h w, then t alone
        angle = position[:, axis] * 1e4 ** (-channel / 8)
        close(table.cos[..., channel], np.cos(angle), 1e-5)
        close(table.sin[..., channel], np.sin(angle), 1e-5)
    traced = jax.jit(lambda p: interleaved_rotation(p, 16, 1e4, (4, 2, 2)))(position)
    close(traced.cos, table.cos, 1e-4)
    line = rotation(np.arange(5), 16, 1e4)
    close(interleaved_rotation(np.broadcast_to(np.arange(5), (3, 5)), 16, 1e4, (4, 2, 2)).sin, line.sin)


def test_rows_and_columns_turn_half_of_the_angles_each():
    place = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
    table = plane_rotation(place, 8)
    assert table.cos.shape == (4, 4)
    close(table.sin[:, :2], np.sin(place[0][:, None] * np.array([1.0, 0.01])))
    close(table.sin[:, 2:], np.sin(place[1][:, None] * np.array([1.0, 0.01])))


def test_each_sample_can_have_positions_of_its_own():
    x, position = normal(2, 5, 3, 8), np.array([np.arange(5), 3 * np.arange(5)])
    turned = rotate(x, rotation(position, 8))
    for sample in range(2):
        close(turned[sample], rotate(x[sample : sample + 1], rotation(position[sample], 8))[0])


@pytest.mark.parametrize("scan", [False, True])
def test_a_stack_returns_what_its_layers_say(scan):
    stack, x = Stack(Layer, 3, scan=scan, remat="none", rngs=nnx.Rngs(0)), normal(2, 4)
    end, seen = stack.run(lambda layer, x, each: (layer(x, each, 0.5), x.sum()), x, jnp.ones((3, 1)))
    close(end, stack(x, 0.5, each=jnp.ones((3, 1))))
    assert seen.shape == (3,) and abs(float(seen[0]) - x.sum()) < 1e-5


def test_remat_is_named():
    with pytest.raises(UserError, match="none, all, dense, got 'some'"):
        Stack(Layer, 1, scan=False, remat="some", rngs=nnx.Rngs(0))
