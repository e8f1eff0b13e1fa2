"""Checkpoints in and out: every bit, every key, every mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import vla_jax
from vla_jax.errors import UserError
from vla_jax.nn.flat import flatten
from vla_jax.pretrained.checkpoint import find_tensors
from vla_jax.pretrained.safetensors import Pending, write_file

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from tests.parity.tiny import QWEN, paligemma_inputs, qwen_inputs, to_torch, write_checkpoint  # noqa: E402

ROOT = Path(__file__).parents[2]
CLASSES = {
    "qwen": (transformers.Qwen3VLForConditionalGeneration, qwen_inputs([[5, (4, 6), 7]])),
    "paligemma": (transformers.PaliGemmaForConditionalGeneration, paligemma_inputs([([2, 5, 108], [7])])),
}


def weights(vlm):
    return flatten(nnx.split(vlm)[1])


def same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(np.asarray(a[path]).view(np.uint8), np.asarray(b[path]).view(np.uint8), path)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_saved_loads_here_and_there(request, tmp_path, name):
    pair = request.getfixturevalue(name)
    vla_jax.save_vlm(pair.ours, tmp_path / "saved", shard=100_000)
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    again = vla_jax.load_vlm(tmp_path / "saved")
    assert again.config == pair.ours.config
    same(weights(again), weights(pair.ours))
    theirs, inputs = CLASSES[name]
    loaded, report = theirs.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        expected, actual = (model.eval()(**to_torch(inputs)).logits for model in (pair.theirs, loaded))
    np.testing.assert_array_equal(actual.numpy(), expected.numpy())


def test_every_tensor_is_written_as_it_was_read(qwen, tmp_path):
    vla_jax.save_vlm(qwen.ours, tmp_path / "saved")
    before, after = find_tensors(qwen.directory), find_tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key].read(), after[key].read(), key)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_half_precision_keeps_its_bits(tmp_path, tied):
    config = transformers.Qwen3VLConfig(**{**QWEN, "tie_word_embeddings": tied})
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded = vla_jax.load_vlm(tmp_path / "half")
    assert loaded.config.dtype == "bfloat16" and (loaded.head is None) == tied
    vla_jax.save_vlm(loaded, tmp_path / "saved")
    same(weights(vla_jax.load_vlm(tmp_path / "saved")), weights(loaded))
    before, after = find_tensors(tmp_path / "half"), find_tensors(tmp_path / "saved")
    for key in before:
        np.testing.assert_array_equal(before[key].read().view(np.uint16), after[key].read().view(np.uint16), key)
    path = tmp_path / "half" / "config.json"  # the released file names the type beside the language model's sizes alone
    written = json.loads(path.read_text())
    released = {name: value for name, value in written.items() if name not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps({**released, "text_config": {**written["text_config"], "dtype": "bfloat16"}}))
    assert vla_jax.load_vlm(tmp_path / "half").config.dtype == "bfloat16"
    wide = vla_jax.load_vlm(tmp_path / "half", dtype="float32")
    inputs = qwen_inputs([[5, 6, 7]])
    near, exact = loaded.logits(**inputs), wide.logits(**inputs)
    assert near.dtype == exact.dtype == np.float32 and 0 < np.abs(near - exact).max() < 0.1


SPREAD = """
import sys, jax, numpy as np, vla_jax
from jax.sharding import AxisType
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
vlm = vla_jax.load_vlm(sys.argv[1], mesh=mesh)
query = vlm.trunk.blocks.layers.attention.query.kernel[...]
assert query.addressable_shards[0].data.shape == (4, 32, 32), query.sharding
assert vlm.words[...].addressable_shards[0].data.shape == (160, 32)
np.save(sys.argv[2], vlm.logits(input_ids=np.arange(12).reshape(2, 6)))
vla_jax.save_vlm(vlm, sys.argv[3])
"""


def test_weights_are_spread_over_a_mesh(qwen, tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-c", SPREAD, str(qwen.directory), str(tmp_path / "logits.npy"), str(tmp_path / "saved")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    expected = qwen.ours.logits(input_ids=np.arange(12).reshape(2, 6))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)
    same(weights(vla_jax.load_vlm(tmp_path / "saved")), weights(qwen.ours))


def changed(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint whose tensors `change` edits, a dictionary of arrays."""
    shutil.copytree(source, target)
    tensors = {key: tensor.read() for key, tensor in find_tensors(source).items()}
    change(tensors)
    pending = [Pending(key, value.shape, value.dtype, lambda value=value: value) for key, value in tensors.items()]
    write_file(target / "model.safetensors", pending)
    return target


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NORM), f"lacks '{NORM}' \\(1 keys missing\\)"),
        (lambda t: t.update({"model.language_model.norms.weight": t.pop(NORM)}), "did you mean .*norms.weight"),
        (lambda t: t.update({"model.visual.extra.weight": t[NORM]}), "unknown key 'model.visual.extra.weight'"),
        (lambda t: t.update({NORM: t[NORM][:5]}), r"norm.weight' is \[5\] in the checkpoint.*implies \[64\]"),
        (lambda t: t.update({"lm_head.weight": t["model.language_model.embed_tokens.weight"] + 1}), "ties lm_head"),
    ],
)
def test_wrong_keys_are_named(qwen, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        vla_jax.load_vlm(changed(qwen.directory, tmp_path / "wrong", change))


def test_a_repeated_tied_head_is_no_mistake(qwen, tmp_path):
    words = "model.language_model.embed_tokens.weight"
    directory = changed(qwen.directory, tmp_path / "more", lambda t: t.update({"lm_head.weight": t[words]}))
    same(weights(vla_jax.load_vlm(directory)), weights(qwen.ours))


def test_other_spellings_of_paligemmas_keys_are_known(paligemma, tmp_path):
    def older(tensors):
        for key in list(tensors):
            if key.startswith("vision_tower.") and not key.startswith("vision_tower.vision_model."):
                tensors[key.replace("vision_tower.", "vision_tower.vision_model.", 1)] = tensors.pop(key)

    def newer(tensors):
        for key in list(tensors):
            tensors[key.replace("vision_tower.vision_model.", "vision_tower.", 1)] = tensors.pop(key)

    for change in (older, newer):
        changed_to = changed(paligemma.directory, tmp_path / change.__name__, change)
        same(weights(vla_jax.load_vlm(changed_to)), weights(paligemma.ours))


def test_paligemma_is_saved_with_the_released_keys(paligemma, tmp_path):
    vla_jax.save_vlm(paligemma.ours, tmp_path / "saved")
    keys = find_tensors(tmp_path / "saved")
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in keys
    assert "language_model.model.embed_tokens.weight" in keys


def test_wrong_directories_are_named(qwen, tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        vla_jax.load_vlm(tmp_path)
    copy = shutil.copytree(qwen.directory, tmp_path / "copy")
    whole = (copy / "model.safetensors").read_bytes()
    for cut, message in ((4, "truncated"), (1000, "truncated"), (len(whole) - 7, "truncated: '.*copy the file again")):
        (copy / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=message):
            vla_jax.load_vlm(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors files"):
        vla_jax.load_vlm(copy)
    with pytest.raises(UserError, match="is not empty"):
        vla_jax.save_vlm(qwen.ours, copy)
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "'llama'; supported are .*qwen3_vl.*paligemma"),
        ({"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type = 'yarn'"),
        ({"text_config": {"hidden_size": None}}, "has no text_config.hidden_size"),
    ],
)
def test_settings_that_are_not_supported_are_named(qwen, tmp_path, change, message):
    copy = shutil.copytree(qwen.directory, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        vla_jax.load_vlm(copy)


PEAK = """
import re, sys, jax, vla_jax
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
vla_jax.load_vlm(sys.argv[2])  # what compiling costs is no matter of the weights
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
vlm = jax.block_until_ready(vla_jax.load_vlm(sys.argv[1]))
print(status("VmHWM") - status("VmRSS"), status("VmRSS") - before)
"""


def test_loading_needs_little_more_memory_than_the_weights(tmp_path):
    """The peak stays below the final footprint by 1.5 x the largest tensor."""
    text = {**QWEN["text_config"], "vocab_size": 60_000, "hidden_size": 512, "intermediate_size": 8192}
    vision = {**QWEN["vision_config"], "out_hidden_size": 512}
    config = transformers.Qwen3VLConfig(**{**QWEN, "text_config": text, "vision_config": vision})
    directory = tmp_path / "large"
    write_checkpoint(directory, transformers.Qwen3VLForConditionalGeneration, config, max_shard_size="100MB")
    tensors = find_tensors(directory)
    assert len({tensor.file for tensor in tensors.values()}) > 2
    command = [sys.executable, "-c", PEAK, str(directory), str(directory)]
    above, weights = map(int, subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split())
    largest = max(tensor.size for tensor in tensors.values())
    assert above < 1.5 * largest
    assert weights < 1.2 * sum(tensor.size for tensor in tensors.values()) + 1.5 * largest


def test_inspect_prints_what_is_there(paligemma):
    command = [sys.executable, "-m", "experiments.inspect", str(paligemma.directory)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    total = sum(leaf.size for leaf in weights(paligemma.ours).values())
    assert f"| all | {total:,} | float32 |" in out
    for module in ("vision/patch", "vision/blocks", "vision/project", "trunk/blocks", "words"):
        assert f"| {module} |" in out
    assert "(unknown)" not in out and "full fine-tuning" in out
    wrong = subprocess.run(command[:-1] + ["nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no directory nowhere")
