"""The task families by name."""

from vla_jax.envs.tasks.base import Task
from vla_jax.envs.tasks.pick import Pick
from vla_jax.envs.tasks.place_on import PlaceOn
from vla_jax.envs.tasks.place_relative import PlaceRelative
from vla_jax.envs.tasks.push import Push
from vla_jax.envs.tasks.reach import Reach
from vla_jax.errors import UserError
from vla_jax.schema import nearest

TASKS: dict[str, Task] = {task.name: task for task in (Reach(), Push(), Pick(), PlaceOn(), PlaceRelative())}
FAMILIES = tuple(TASKS)


def check_family(name: str) -> None:
    """Raises UserError, with the nearest known name, unless `name` is one of FAMILIES."""
    if name not in FAMILIES:
        raise UserError(f"unknown task {name!r}{nearest(name, FAMILIES)}")


def get_task(name: str) -> Task:
    """The family of that name. Raises UserError when there is none."""
    check_family(name)
    return TASKS[name]
