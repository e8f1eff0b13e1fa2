"""A small Qwen3-VL against transformers in PyTorch: forward, and forward and backward of a text loss, in float32.

    python -m benchmarks.vlm [--rounds=10] [--compile]        # needs the extra `parity`

The same random weights, inputs and number of threads. The programs take turns, so that whatever else the machine does
falls on all of them; ratios are taken within a turn and printed as median [lower quartile, upper quartile].
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import vla_jax
from vla_jax.models.vlm import VLM
from vla_jax.platform import keep_freed_memory

IMAGE, BATCH, GRID, WORDS = 1000, 4, (32, 32), 24  # 256 picture tokens a sample
VISION = dict(
    depth=4,
    hidden_size=128,
    num_heads=4,
    intermediate_size=512,
    patch_size=16,
    out_hidden_size=256,
    num_position_embeddings=256,
    deepstack_visual_indexes=[0, 1, 2],
)
TEXT = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1024,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[12, 10, 10], mrope_interleaved=True),
)


def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    patches = GRID[0] * GRID[1]
    picture = [1002, *[IMAGE] * (patches // 4), 1003]
    rows = np.array([[*picture, *random.integers(1, 999, WORDS)] for _ in range(BATCH)])
    return dict(
        input_ids=rows,
        attention_mask=np.ones_like(rows),
        pixel_values=random.normal(size=(BATCH * patches, 3 * 2 * 16 * 16)).astype(np.float32),
        image_grid_thw=np.array([[1, *GRID]] * BATCH),
        mm_token_type_ids=(rows == IMAGE).astype(int),
    )


def their_programs(directory: str, compile: bool) -> dict[str, Callable[[], None]]:
    """transformers, eager and, if wanted, compiled."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    tokens = dict(image_token_id=IMAGE, video_token_id=1001, vision_start_token_id=1002, vision_end_token_id=1003)
    config = Qwen3VLConfig(vision_config=VISION, text_config=TEXT, tie_word_embeddings=True, **tokens)
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.save_pretrained(directory)
    given = {name: torch.tensor(value) for name, value in inputs().items()}

    def programs(run) -> tuple[Callable, Callable]:
        def forward():
            with torch.no_grad():
                return run(**given).logits

        def backward():
            model.zero_grad(set_to_none=True)
            logits = run(**given).logits[:, -WORDS - 1 : -1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["input_ids"][:, -WORDS:].flatten()).backward()

        return forward, backward

    made = {"PyTorch eager": programs(model)}
    if compile:
        made["PyTorch compiled"] = programs(torch.compile(model))
    whats = ("forward", "both")
    return {f"{name}, {what}": run for name, pair in made.items() for what, run in zip(whats, pair, strict=True)}


def our_programs(directory: str) -> dict[str, Callable[[], None]]:
    """This project's model with its layers unrolled, which is the faster way on a CPU."""
    vlm = vla_jax.load_vlm(directory, scan=False)
    graph, state = nnx.split(vlm)
    prompt = jax.device_put(vlm.prepare(**inputs()))

    def loss(state, prompt):
        model: VLM = nnx.merge(graph, state)
        logits = model.word_logits(model.hidden(prompt)[:, -WORDS - 1 : -1])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), prompt.tokens[:, -WORDS:, None], -1)
        return -chosen.mean()

    forward = jax.jit(lambda state, prompt: nnx.merge(graph, state)(prompt))
    both = jax.jit(jax.value_and_grad(loss))
    return {
        "ours, forward": lambda: jax.block_until_ready(forward(state, prompt)),
        "ours, both": lambda: jax.block_until_ready(both(state, prompt)),
    }


def measure(programs: dict[str, Callable[[], None]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every program in every round; the first one begins each round in turn."""
    for run in programs.values():
        run()
    names, seconds = list(programs), {name: np.zeros(rounds) for name in programs}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            programs[name]()
            seconds[name][turn] = time.perf_counter() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile too; takes minutes")
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        programs = their_programs(directory, arguments.compile)
        programs |= our_programs(directory)
        seconds = measure(programs, arguments.rounds)
    print("| program | seconds (median) | x ours |\n|---|---|---|")
    for name, own in seconds.items():
        low, middle, high = np.percentile(own / seconds[f"ours, {name.split(', ')[1]}"], [25, 50, 75])
        print(f"| {name} | {np.median(own):.3f} | {middle:.2f} [{low:.2f}, {high:.2f}] |")


if __name__ == "__main__":
    main()
