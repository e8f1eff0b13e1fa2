"""The task families by name."""

import difflib

from vla_jax.envs.tasks.base import Task
from vla_jax.envs.tasks.pick import Pick
from vla_jax.envs.tasks.place_on import PlaceOn
from vla_jax.envs.tasks.place_relative import PlaceRelative
from vla_jax.envs.tasks.push import Push
from vla_jax.envs.tasks.reach import Reach
from vla_jax.errors import UserError

TASKS: dict[str, Task] = {task.name: task for task in (Reach(), Push(), Pick(), PlaceOn(), PlaceRelative())}


def get_task(name: str) -> Task:
    """The family of that name. UserError with the nearest name when there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(TASKS)}"
        raise UserError(f"unknown task {name!r}: {hint}")
    return TASKS[name]
