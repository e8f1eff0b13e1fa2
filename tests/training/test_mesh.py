"""Several devices train the same policy as one."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from vla_jax.config import to_json
from vla_jax.errors import UserError
from vla_jax.training.checkpoints import load_policy
from vla_jax.training.mesh import check_batch_size, make_mesh
from vla_jax.training.metrics import read_metrics
from vla_jax.training.trainer import train

CODE = """
import sys, jax
from vla_jax.config import from_json
from vla_jax.training.train_config import TrainConfig
from vla_jax.training.trainer import train
assert jax.device_count() == 2
train(from_json(TrainConfig, sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_two_devices_learn_what_one_learns(config, tmp_path):
    # A large epsilon: where the gradient is zero, Adam would otherwise blow rounding up to whole steps.
    optimizer = dataclasses.replace(config.optimizer, epsilon=1e-2)
    config = dataclasses.replace(config, optimizer=optimizer, steps=4, checkpoint_every=4)
    one = train(config, tmp_path / "one")
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", CODE, to_json(config), str(tmp_path / "two")]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    for ours, theirs in zip(read_metrics(one), read_metrics(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    # What two devices saved is loaded on one.
    policies = [load_policy(run)[0] for run in (one, tmp_path / "two")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *policies)


def test_a_batch_must_be_divisible():
    mesh = make_mesh()
    check_batch_size(4 * mesh.devices.size, mesh)
    pair = jax.sharding.Mesh(np.array([jax.devices()[0]] * 2), ("data",))
    with pytest.raises(UserError, match="batch_size 3 cannot be divided among 2 devices"):
        check_batch_size(3, pair)
