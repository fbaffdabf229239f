"""Runs as jobs of Slurm, by submitit.

Every node needs keeptune, and the data, the model and the run folders under the same paths.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

from keeptune.board import Board
from keeptune.errors import RecipeError
from keeptune.failures import in_a_line
from keeptune.jobs import Job, run_job
from keeptune.yamltext import Document

# submitit would end a job after five minutes.
MINUTES = 24 * 60


def run(
    jobs: Sequence[Job],
    board: Board,
    *,
    at_once: int = 1,
    parameters: dict[str, Any] | None = None,
    every: float = 2.0,
) -> Generator[tuple[Job, str | None], None, None]:
    """Submit runs as jobs, `at_once` at a time.

    What they print is in the folder `.slurm` beside the run folders.

    Args:
        jobs: The runs.
        board: Is told how far they are, by their folders.
        at_once: How many are submitted at a time.
        parameters: submitit's; `cluster` is "slurm", or "local" for processes of this machine.
        every: Seconds between two looks.

    Yields:
        Each job when it ends, with None or with why it failed.

    Raises:
        RecipeError: submitit is not installed, here is no Slurm, or a parameter is none.
        KeyboardInterrupt: Ctrl-C; the jobs are cancelled, what they saved is kept.
    """
    waiting = list(jobs)
    running: list[tuple[Any, Job]] = []
    executor = _executor(jobs, dict(parameters or {})) if jobs else None
    try:
        while waiting or running:
            assert executor is not None
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                board.started(job)
                running.append((executor.submit(run_job, job), job))
            time.sleep(every)
            for one in [one for one in running if one[0].done()]:
                running.remove(one)
                yield one[1], _said(one[0])
            for _, job in running:
                board.looked(job)
            board.tick()
    finally:
        for submitted, _ in running:
            submitted.cancel()


def read_parameters(words: Sequence[str]) -> dict[str, Any]:
    """`timeout_min=600` and the like as values.

    Raises:
        RecipeError: A word is no key=value.
    """
    found: dict[str, Any] = {}
    for word in words:
        if "=" not in word.strip("="):
            raise RecipeError(f"--slurm {word}: write key=value, such as timeout_min=600.")
        found |= Document().override(word).values()
    return found


def _executor(jobs: Sequence[Job], parameters: dict[str, Any]) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise RecipeError(
            "--engine slurm needs submitit: pip install -c constraints.txt 'keeptune[slurm]'."
        ) from error
    cluster = parameters.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(jobs[0].folder.parent / ".slurm", cluster=cluster)
        executor.update_parameters(**{"timeout_min": MINUTES, "name": "keeptune", **parameters})
    except (RuntimeError, ValueError, NameError, TypeError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise RecipeError(
            f"--engine slurm: submitit says: {first}. Without Slurm, --slurm cluster=local tries "
            "it on this machine."
        ) from error
    return executor


def _said(submitted: Any) -> str | None:
    try:
        said: str | None = submitted.result()
    except Exception as error:  # whatever submitit makes of a job that was lost
        return in_a_line(error)
    return said
