"""Compiled programs are kept on disk without being asked to."""

import os
import subprocess
import sys

CODE = """
from vla_jax.platform import setup_compilation_cache
print(setup_compilation_cache())
import jax
print(jax.jit(lambda x: x * 2 + 1)(3))
"""


def run(home, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(
        command, env={**inherited, "HOME": str(home), **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_programs_of_any_size_are_cached_in_the_home_directory(tmp_path):
    directory = tmp_path / ".cache" / "vla_jax" / "jax"
    assert run(tmp_path) == [str(directory), "7"]
    assert any(name.name.startswith("jit_") for name in directory.iterdir())


def test_the_environment_says_where(tmp_path):
    chosen = tmp_path / "elsewhere"
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(chosen)) == [str(chosen), "7"]
    assert any(chosen.iterdir()) and not (tmp_path / ".cache").exists()
