"""The mesh of a run: every parameter has its place; every mesh trains what one device does."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from configs import bayesianvla_paligemma, bayesianvla_qwen3vl_4b, train
from vla_jax.config import resolve
from vla_jax.errors import UserError
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import Policy
from vla_jax.nn.placement import AXES, partition
from vla_jax.training.mesh import MeshConfig, check_batch_size, describe, make_mesh, state_shardings
from vla_jax.training.program import make_program
from vla_jax.training.state import abstract
from vla_jax.training.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
FACTS = DataFacts(1000, 24, 224, (-1.0,) * 7, (1.0,) * 7, (-1.0,) * 8, (1.0,) * 8)
LARGE = 1_000_000


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """{mesh: a line of numbers for each step}; see meshes.py."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "tests/training/meshes.py", str(tmp_path_factory.mktemp("meshes"))]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "fsdp", "mixed"])
def test_every_mesh_trains_what_one_device_trains(losses, mesh):
    assert np.ptp([line[0] for line in losses["one"]]) > 0.05  # the steps do something
    np.testing.assert_allclose(losses[mesh], losses["one"], rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_four_parts_of_a_batch_are_the_whole_batch(losses):
    """The parts have unequal numbers of samples that carry a term, and every sample keeps its noise and dropout."""
    np.testing.assert_allclose(losses["accumulated"], losses["one"], rtol=2e-5, atol=1e-6)


def policies():
    configs = [
        bayesianvla_qwen3vl_4b.get_config(),
        bayesianvla_qwen3vl_4b.get_config("qwen_groot,lora"),
        bayesianvla_paligemma.get_config(),
        train.get_config("information"),
    ]
    resolved = [resolve(TrainConfig, config).policy for config in configs]
    keypoints = dataclasses.replace(resolved[-1], encoder="keypoints", tied=False)
    return dict(zip(("qwen", "qwen_lora", "paligemma", "small", "keypoints"), (*resolved, keypoints), strict=True))


@pytest.mark.parametrize("name", ["qwen", "qwen_lora", "paligemma", "small", "keypoints"])
def test_every_parameter_has_a_place(name):
    policy = policies()[name]
    _, params, constants = abstract(lambda rngs: Policy(policy, FACTS, rngs))
    mesh = AbstractMesh((2, 64, 2), AXES)
    for path, leaf in {**params, **constants}.items():
        spec = partition(path, leaf.shape, mesh)
        assert len(spec) == leaf.ndim
        if leaf.size >= LARGE and name.startswith("qwen"):
            assert "fsdp" in spec, f"{path} {leaf.shape} lies on every device"


def test_a_parameter_without_a_place_is_an_error():
    with pytest.raises(KeyError, match="no place for the parameter 'trunk/gate_of_a_new_kind'"):
        partition("trunk/gate_of_a_new_kind", (4, 4), AbstractMesh((1, 2, 2), AXES))


def test_axes_that_do_not_divide_are_left_out():
    mesh = AbstractMesh((1, 4, 2), AXES)
    assert tuple(partition("trunk/a/query/kernel", (3, 8, 6), mesh)) == (None, "fsdp", "tensor")
    assert tuple(partition("trunk/a/query/kernel", (3, 6, 5), mesh)) == (None, None, None)


def test_moments_and_averages_lie_where_their_parameters_do(config):
    mesh = AbstractMesh((1, 4, 2), AXES)
    program = make_program(
        dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8)), FACTS, mesh
    )
    path = "trunk/blocks/layers/attention/query/kernel"
    places = [
        leaf.spec
        for where, leaf in jax.tree_util.tree_leaves_with_path(state_shardings(program.shapes, mesh))
        if any(getattr(entry, "key", None) == path for entry in where)
    ]
    assert len(places) == 4 and set(map(tuple, places)) == {(None, "fsdp", "tensor")}  # itself, average, two moments
    text = describe(program.shapes, program.shardings)
    assert re.search(r"data=1 fsdp=4 tensor=2 \(8 devices\)", text) and "optimiser" in text and "fsdpxtensor" in text


def test_shapes_of_a_mesh():
    assert MeshConfig().shape(8) == (8, 1, 1)
    assert MeshConfig(data=1, fsdp=0, tensor=2).shape(8) == (1, 4, 2)
    with pytest.raises(UserError, match="data=3 x fsdp=1 x tensor=1 does not fit 8 devices"):
        MeshConfig(data=3).shape(8)
    with pytest.raises(UserError, match="only one may be 0"):
        MeshConfig(data=0, fsdp=0)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU's chip."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int = 0
    platform, device_kind, core_on_chip, client = "tpu", "TPU v5 lite", 0, None


def test_slices_of_a_tpu_divide_the_data_axis():
    chips = [Chip(4 * s + 2 * y + x, s, (x, y, 0)) for s in range(2) for y in range(2) for x in range(2)]
    for shape in (MeshConfig(2, 2, 2), MeshConfig(4, 1, 2)):
        first, second = np.split(make_mesh(shape, chips).devices, 2)
        assert [{chip.slice_index for chip in half.flat} for half in (first, second)] == [{0}, {1}]
    with pytest.raises(UserError, match="mesh.data = 1 cannot be divided among 2 slices: make it a multiple of 2"):
        make_mesh(MeshConfig(1, 4, 2), chips)


def test_samples_are_not_shared_between_hosts():
    """A host of a v5e has 2 x 2 chips, and four in a row are chips of two hosts: each would read other samples."""
    chips = [Chip(4 * y + x, 0, (x, y, 0), 2 * (y // 2) + x // 2) for y in range(4) for x in range(4)]
    assert make_mesh(MeshConfig(1, 8, 2), chips).shape["tensor"] == 2
    with pytest.raises(UserError, match="mesh.tensor = 4 reaches over several processes .*mesh.fsdp larger"):
        make_mesh(MeshConfig(1, 4, 4), chips)


def test_a_batch_must_be_divisible():
    mesh = AbstractMesh((2, 2, 2), AXES)
    check_batch_size("data.batch_size", 8, mesh, 2)
    with pytest.raises(UserError, match="batch_size 6 cannot be divided among 4 devices .* multiple of 4"):
        check_batch_size("data.batch_size", 6, mesh)
    with pytest.raises(UserError, match="in 4 parts: make it a multiple of 16"):
        check_batch_size("data.batch_size", 8, mesh, 4)
