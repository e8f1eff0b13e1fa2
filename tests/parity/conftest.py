"""Tiny random checkpoints, read by transformers and by this project. The tests need the extra `parity`."""

import jax
import pytest

import vla_jax


@pytest.fixture(scope="session", autouse=True)
def precise():
    """Products of float32 in float32, and no bars from the other library."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    import transformers

    from tests.parity.tiny import QWEN, Pair, write_checkpoint

    directory = tmp_path_factory.mktemp("qwen")
    config = transformers.Qwen3VLConfig(**QWEN)
    model = write_checkpoint(directory, transformers.Qwen3VLForConditionalGeneration, config)
    return Pair(directory, model, vla_jax.load_vlm(directory))


@pytest.fixture(scope="session")
def paligemma(tmp_path_factory):
    import transformers

    from tests.parity.tiny import PALIGEMMA, Pair, write_checkpoint

    directory = tmp_path_factory.mktemp("paligemma")
    config = transformers.PaliGemmaConfig(**PALIGEMMA)
    model = write_checkpoint(directory, transformers.PaliGemmaForConditionalGeneration, config)
    return Pair(directory, model, vla_jax.load_vlm(directory))
