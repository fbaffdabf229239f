"""Where the runs of a comparison are worked off: processes here, a Ray cluster, or Slurm.

An engine takes jobs and gives each one back when it ends, with None or with why it failed. What it
starts is `keeptune.jobs.run_job`; all else goes through the run folders.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial

from keeptune.board import Board
from keeptune.errors import RecipeError, suggest
from keeptune.jobs import Job

Ends = Generator[tuple[Job, str | None], None, None]
Engine = Callable[[Sequence[Job], Board], Ends]
NAMES = ("local", "ray", "slurm")


def choose(
    name: str, *, at_once: int, address: str | None = None, slurm: Sequence[str] = ()
) -> Engine:
    """The engine of a name; what it needs is imported when it begins.

    Args:
        name: One of `NAMES`.
        at_once: How many runs at the same time.
        address: For ray, the cluster's address.
        slurm: For slurm, parameters of submitit as key=value.

    Raises:
        RecipeError: There is no such engine, or an option belongs to another one.
    """
    if name not in NAMES:
        raise RecipeError(f"--engine {name}: there is no such engine. {suggest(name, NAMES)}")
    for option, given, belongs in (("--address", address, "ray"), ("--slurm", slurm, "slurm")):
        if given and name != belongs:
            raise RecipeError(f"{option} is for --engine {belongs}, but the engine is {name}.")
    if name == "local":
        from keeptune.engines import local

        return partial(local.run, at_once=at_once)
    if name == "ray":
        from keeptune.engines import ray

        return partial(ray.run, at_once=at_once, address=address)
    from keeptune.engines import slurm as by_slurm

    return partial(by_slurm.run, at_once=at_once, parameters=by_slurm.read_parameters(slurm))
