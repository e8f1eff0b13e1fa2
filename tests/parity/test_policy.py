"""From a checkpoint that transformers wrote, through a training run, to a checkpoint that transformers loads."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import vla_jax
from experiments.compare import collect_once
from experiments.export import main as export
from vla_jax.data.loader import data_contract, make_loader
from vla_jax.envs.collect import CollectConfig
from vla_jax.envs.env import EnvConfig
from vla_jax.errors import UserError
from vla_jax.models.qwen_vision import cut
from vla_jax.nn.flat import flatten
from vla_jax.nn.lora import LoraConfig
from vla_jax.pretrained.backbone import PretrainedConfig, load_backbone, save_backbone
from vla_jax.training.checkpoints import load_policy
from vla_jax.training.metrics import metric_lines
from vla_jax.training.trainer import on_pretrained, train

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from tests.parity.tiny import PALIGEMMA, QWEN, paligemma_inputs, qwen_inputs, to_torch, write_checkpoint  # noqa: E402
from tests.training.conftest import WORDS, tiny_config  # noqa: E402

LONGEST = 48  # a word of the table is many tokens of this tokenizer
MODELS = {
    "qwen": (transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLConfig, QWEN),
    "paligemma": (transformers.PaliGemmaForConditionalGeneration, transformers.PaliGemmaConfig, PALIGEMMA),
}


def byte_tokenizer() -> str:
    """A byte-level BPE, as the released models have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Demonstrations on the table, in pictures as small as the models."""
    return collect_once(
        CollectConfig(env=EnvConfig(task="reach", image_size=16), episodes=8, batch=8), tmp_path_factory.mktemp("data")
    )


def checkpoint(directory, name, **vision):
    model, config, values = MODELS[name]
    values = {**values, "vision_config": {**values["vision_config"], **vision}}
    write_checkpoint(directory, model, config(**values))
    (directory / "tokenizer.json").write_text(byte_tokenizer())
    return directory


def run_config(dataset, directory, **policy):
    config = tiny_config(dataset)
    return dataclasses.replace(
        config,
        policy=dataclasses.replace(config.policy, **policy),
        pretrained=PretrainedConfig(str(directory), max_tokens=LONGEST),
        steps=20,
        checkpoint_every=20,
        validate_every=0,
    )


@pytest.mark.parametrize(
    "name, vision", [("qwen", {"patch_size": 4}), ("paligemma", {"image_size": 16, "patch_size": 8})]
)
def test_a_checkpoint_becomes_a_policy_and_a_checkpoint_again(dataset, tmp_path, name, vision):
    source = checkpoint(tmp_path / "source", name, **vision)
    before = vla_jax.load_vlm(source)
    run_dir = train(run_config(dataset, source), tmp_path / "run")
    policy, contract, config = load_policy(run_dir, ema=False)
    assert json.loads(contract.tokenizer) == json.loads(byte_tokenizer()) and contract.max_tokens == LONGEST
    assert config.policy.trunk.width == 64 and metric_lines(run_dir)[-1]["step"] == 20
    moved = np.abs(np.asarray(policy.trunk.norm.scale[...]) - np.asarray(before.trunk.norm.scale[...])).max()
    assert 0 < moved < 0.1  # trained, and not from new weights
    save_backbone(policy, source, tmp_path / "saved")
    export([str(run_dir), str(tmp_path / "exported")])
    averaged = load_backbone(tmp_path / "exported", config.policy, flatten(nnx.state(policy, nnx.Param)), seed=0)
    expected = flatten(nnx.state(load_policy(run_dir)[0], nnx.Param))
    np.testing.assert_array_equal(averaged["trunk/norm/scale"], expected["trunk/norm/scale"])
    with pytest.raises(UserError, match="is not empty"):
        export([str(run_dir), str(tmp_path / "exported")])
    theirs, report = MODELS[name][0].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()) and (tmp_path / "saved" / "tokenizer.json").is_file()
    inputs = qwen_inputs([[5, 6, 7]]) if name == "qwen" else paligemma_inputs([([2, 5, 108], [7])], pictures=0)
    with torch.no_grad():
        expected = theirs.eval()(**to_torch(inputs)).logits.numpy()
    np.testing.assert_allclose(vla_jax.load_vlm(tmp_path / "saved").logits(**inputs), expected, atol=2e-4)


def test_adapters_train_and_everything_else_of_the_model_stays(dataset, tmp_path):
    source = checkpoint(tmp_path / "source", "qwen", patch_size=4)
    config = run_config(dataset, source, lora=LoraConfig(rank=2))
    scales = (("/adapter/", 1.0), ("^(vision|trunk|words)", 0.0))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, scales=scales))
    policy = load_policy(train(config, tmp_path / "run"), ema=False)[0]
    before = vla_jax.load_vlm(source)
    query = policy.trunk.blocks.layers.attention.query
    np.testing.assert_array_equal(query.kernel[...], before.trunk.blocks.layers.attention.query.kernel[...])
    assert np.abs(query.adapter.up[...]).max() > 0
    save_backbone(policy, source, tmp_path / "saved")
    merged = vla_jax.load_vlm(tmp_path / "saved").trunk.blocks.layers.attention.query.kernel[...]
    np.testing.assert_allclose(merged, query.kernel[...] + query.adapter.product, atol=1e-6)


def test_pictures_of_another_size_are_named(dataset, tmp_path):
    source = checkpoint(tmp_path / "source", "paligemma")
    with pytest.raises(UserError, match="another size than those of the checkpoint|not a multiple"):
        train(run_config(dataset, source), tmp_path / "run")


def test_instructions_that_do_not_fit_are_named_or_cut(dataset, tmp_path, capsys):
    source = checkpoint(tmp_path / "source", "qwen", patch_size=4)
    config = run_config(dataset, source)
    config = dataclasses.replace(config, pretrained=PretrainedConfig(str(source), max_tokens=2))
    with pytest.raises(UserError, match="tokens and at most 2 fit"):
        train(config, tmp_path / "run")
    cuts = dataclasses.replace(config, pretrained=PretrainedConfig(str(source), max_tokens=2, truncate=True))
    cuts, contract = on_pretrained(cuts, data_contract(cuts.data))
    with contextlib.closing(make_loader(cuts.data, contract)) as loader:
        assert next(loader)["token_mask"].all()
    assert "(instruction number 1 that is too long)" in capsys.readouterr().out
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        train(config, tmp_path / "other")


def test_pictures_are_cut_as_the_processor_cuts_them(qwen):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False
    )
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = processor(images=[image], return_tensors="np")
    assert expected["image_grid_thw"].tolist() == [[1, 4, 4]]
    ours = cut(image[None] / np.float32(127.5) - 1, qwen.ours.config.vision)
    np.testing.assert_allclose(np.asarray(ours)[0], expected["pixel_values"], atol=1e-5)
    inputs = {**qwen_inputs([[5, (4, 4), 7]]), "pixel_values": expected["pixel_values"]}
    assert qwen.compare_logits(inputs) < 2e-4
