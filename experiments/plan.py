"""Asks whether a training run fits some accelerators, and how long it takes, before they are paid for.

python -m experiments.plan --config=configs/bayesianvla_qwen3vl_4b.py --topology=v5e:16x16 [--mfu=0.4]
    [--config.mesh.tensor=2 …]

Topologies: v5e:16x16, v6e:8x8, v5p:4x4x4, 2xv5e:16x16, which is two slices (the training step is compiled for them; the
extra `tpu` has the compiler, no TPU is needed), and 8xH100, 64xH200 (by arithmetic). Sizes come from the data, where
--config.data.directory or data.mixture names some; else the pictures are 224 pixels wide, with 7 actions and 8 numbers
of state. Where the run does not fit, the status is 1 and the settings that would make it fit are named with what they
need.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

from vla_jax import config as configuration
from vla_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Plans one run; see the module's text."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX would look for the TPU that the compiler is for
    from vla_jax.data.loader import data_contract
    from vla_jax.models.normalizer import DataFacts
    from vla_jax.pretrained.backbone import policy_on
    from vla_jax.training.checkpoints import policy_facts
    from vla_jax.training.chips import parse_topology
    from vla_jax.training.mesh import in_units
    from vla_jax.training.plan import make_plan, remedies, report
    from vla_jax.training.train_config import TrainConfig
    from vla_jax.training.trainer import on_pretrained

    arguments = configuration.parse_args(argv, schema=TrainConfig, options=("topology", "mfu"))
    if arguments.flags["topology"] is None:
        raise UserError("no accelerators: give them by --topology=v5e:16x16, or 8xH100")
    topology, mfu = parse_topology(arguments.flags["topology"]), _share(arguments.flags["mfu"] or "0.4")
    config = configuration.resolve(TrainConfig, arguments.config)
    if config.data.directory or config.data.mixture:
        config, contract = on_pretrained(config, data_contract(config.data))
        facts = policy_facts(contract, config.policy.views)
    else:
        if config.pretrained.directory:
            config = dataclasses.replace(config, policy=policy_on(config.pretrained.directory, config.policy))
        print("no data.directory: pictures of 224 pixels, 7 actions and 8 numbers of state are taken")
        facts = DataFacts(1000, config.pretrained.max_tokens, 224, (-1.0,) * 7, (1.0,) * 7, (-1.0,) * 8, (1.0,) * 8)
    plan = make_plan(config, facts, topology)
    print(report(plan, mfu), flush=True)
    if plan.fits:
        return
    tried = remedies(plan, facts)
    for settings, other in tried:
        print(f"  {'fits' if other.fits else 'still too much'}: {in_units(other.memory.total)} with {settings}")
    if not any(other.fits for _, other in tried):
        print("  nothing here makes it fit: take more chips, or chips with more memory")
    sys.exit(1)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"--mfu is a share of the peak above 0 and at most 1, not {text!r}")
    return share


if __name__ == "__main__":
    configuration.run_entry(main)
