"""Vision-language-action policies in JAX, measured in closed loop."""

import os

__version__ = "0.1.0"

# jaxlib 0.10 blocks inside its own CPU thread pool while it runs batched linear algebra and host callbacks; with one
# thread a core, two cores wait for each other for ever, silently. The size is read once, when JAX first uses the CPU.
if (os.cpu_count() or 1) < 8:
    os.environ.setdefault("NPROC", "8")


def __getattr__(name: str):
    """`load_vlm` and `save_vlm`, imported when they are first used: `import vla_jax` starts no device."""
    if name in ("load_vlm", "save_vlm"):
        from vla_jax.pretrained import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'vla_jax' has no attribute {name!r}")
