"""The vision-language model of a trained policy, as a checkpoint that transformers loads.

python -m experiments.export RUN DIR

RUN is the --workdir of a training with `pretrained.directory`; adapters are merged, and settings, tokenizer and image
processor are those of the checkpoint that it started from.
"""

from collections.abc import Sequence
from pathlib import Path

from vla_jax.config import run_entry
from vla_jax.errors import UserError
from vla_jax.pretrained.backbone import save_backbone
from vla_jax.training.checkpoints import load_policy


def main(argv: Sequence[str]) -> None:
    """Writes one checkpoint; see the module's text."""
    if len(argv) != 2 or any(argument.startswith("-") for argument in argv):
        raise UserError("give a run and a new directory: python -m experiments.export RUN DIR")
    run_dir, target = map(Path, argv)
    policy, _, config = load_policy(run_dir)
    if not config.pretrained.directory:
        raise UserError(f"{run_dir} was not trained on a released model: there is nothing for transformers to load")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty: choose a new directory")
    save_backbone(policy, config.pretrained.directory, target)
    print(f"{target}: load it with transformers, or with vla_jax.load_vlm")


if __name__ == "__main__":
    run_entry(main)
