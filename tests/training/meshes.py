"""Trains one tiny policy for five steps on several meshes of eight simulated devices: `python meshes.py DIRECTORY`.

Prints one JSON object: {mesh: [[loss, gradient norm, a term and its share], …]}; checks what is bit-exact by itself.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from conftest import tiny_config

from vla_jax.models.normalizer import DataFacts
from vla_jax.platform import setup_compilation_cache
from vla_jax.training.checkpoints import Checkpoints
from vla_jax.training.mesh import MeshConfig, global_rows, make_mesh, place_batch
from vla_jax.training.program import make_program

FACTS = DataFacts(16, 6, 16, (-1.0,) * 2, (1.0,) * 2, (-1.0,) * 2, (1.0,) * 2)
B = 16
# devices, mesh, accumulate
MESHES = {
    "one": (1, MeshConfig(), 1),
    "data": (8, MeshConfig(), 1),
    "fsdp": (8, MeshConfig(data=1, fsdp=0), 1),
    "mixed": (8, MeshConfig(data=2, fsdp=2, tensor=2), 1),
    "accumulated": (1, MeshConfig(), 4),
}


def batch(seed: int) -> dict:
    """Samples of which some have no instruction and some no actions, unevenly."""
    random = np.random.default_rng(seed)
    return {
        "images": {"front": random.integers(0, 256, (B, 16, 16, 3), dtype=np.uint8)},
        "state": random.normal(size=(B, 2)).astype(np.float32),
        "tokens": random.integers(1, 16, (B, 6)).astype(np.int32),
        "token_mask": np.arange(6) < random.integers(0, 7, (B, 1)),
        "actions": random.normal(size=(B, 2, 2)).astype(np.float32),
        "action_mask": np.repeat((np.arange(2) < random.integers(0, 3, (B, 1)))[..., None], 2, -1),
        "row": global_rows(B),
    }


def main(directory: Path) -> None:
    assert jax.device_count() == 8
    setup_compilation_cache()
    tiny = tiny_config(Path())
    # A large epsilon: where the gradient is zero, Adam would otherwise blow rounding up to whole steps.
    tiny = dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, batch_size=B),
        policy=dataclasses.replace(tiny.policy, expert=dataclasses.replace(tiny.policy.expert, dropout=0.1)),
        loss=dataclasses.replace(tiny.loss, gate=False),
        optimizer=dataclasses.replace(tiny.optimizer, epsilon=1e-2),
    )
    first, states, results = None, {}, {}
    for name, (devices, shape, accumulate) in MESHES.items():
        mesh = make_mesh(shape, jax.devices()[:devices])
        program = make_program(dataclasses.replace(tiny, accumulate=accumulate), FACTS, mesh)
        first = first or jax.device_get(program.first_state(0))
        state, lines = jax.device_put(first, program.shardings), []
        for step in range(5):
            state, metrics = program.step(state, place_batch(batch(step), mesh))
            term = metrics["terms"]["llr_prior"]
            lines.append([float(x) for x in (metrics["loss"], metrics["grad_norm"], term.value, term.valid_fraction)])
        states[name], results[name] = (program, state), lines
    restore_on_another(directory, *states["mixed"], states["fsdp"][0])
    print(json.dumps(results))


def restore_on_another(directory, program, state, other) -> None:
    """What one mesh saved is the same, bit by bit, on another, and lies as that one says."""
    checkpoints = Checkpoints(directory, write=True)
    checkpoints.save(5, state, {"data": None})
    checkpoints.wait()
    restored, _ = checkpoints.restore(other.shapes)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    path = "trunk/blocks/layers/attention/query/kernel"
    assert restored.params[path].sharding == other.shardings.params[path] != program.shardings.params[path]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
