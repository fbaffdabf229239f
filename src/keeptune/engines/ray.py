"""Runs on a Ray cluster, or on a Ray that is started here for them.

Every machine of the cluster needs keeptune, and the data, the model and the run folders under the
same paths.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Any

from keeptune.board import Board
from keeptune.errors import RecipeError
from keeptune.failures import in_a_line
from keeptune.jobs import Job, run_job

SECONDS_TO_SAVE = 120.0


def run(
    jobs: Sequence[Job], board: Board, *, at_once: int = 1, address: str | None = None
) -> Generator[tuple[Job, str | None], None, None]:
    """Run jobs as tasks of Ray, `at_once` at a time; each has a process of its own.

    They share the cluster's processors, and each gets one GPU where there are some.

    Args:
        jobs: The runs.
        board: Is told how far they are, by their folders.
        at_once: How many.
        address: The cluster's, or "auto"; None starts Ray on this machine alone.

    Yields:
        Each job when it ends, with None or with why it failed.

    Raises:
        RecipeError: Ray is not installed, or does not start or answer.
        KeyboardInterrupt: Ctrl-C; each run saves a state first.
    """
    ray = _started(address)
    waiting = list(jobs)
    running: dict[Any, Job] = {}
    try:
        share = _share(ray, at_once)
        # A process that did one run would count that one's memory as the next one's.
        task = ray.remote(max_retries=0, max_calls=1, **share)(run_job)
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                board.started(job)
                running[task.remote(job)] = job
            for end in ray.wait(list(running), timeout=1)[0]:
                yield running.pop(end), _said(ray, end)
            for job in running.values():
                board.looked(job)
            board.tick()
    except KeyboardInterrupt:
        board.stopping()
        for end in running:
            ray.cancel(end)
        ray.wait(list(running), num_returns=len(running), timeout=SECONDS_TO_SAVE)
        raise
    finally:
        ray.shutdown()


def _started(address: str | None) -> Any:
    try:
        # Ray reports its use to a server unless told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError as error:
        raise RecipeError(
            "--engine ray needs Ray: pip install -c constraints.txt 'keeptune[ray]'."
        ) from error
    here = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address, log_to_driver=False, **here)
    except Exception as error:  # Ray raises many, its own and Python's
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise RecipeError(
            f"--engine ray: Ray says: {first}. Start a cluster with `ray start --head` and name it "
            "with --address, or leave --address out to use this machine alone."
        ) from error
    return ray


def _share(ray: Any, at_once: int) -> dict[str, int]:
    """Processors and GPUs for each run, such that some machine has as many."""
    every = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpu = [node for node in every if node.get("GPU", 0) > 0]
    there = [int(node.get("CPU", 0)) for node in with_gpu or every]
    share = min(sum(there) // at_once, max(there))
    return {"num_cpus": max(1, share), "num_gpus": int(bool(with_gpu))}


def _said(ray: Any, end: Any) -> str | None:
    try:
        said: str | None = ray.get(end)
    except ray.exceptions.RayError as error:
        return in_a_line(error)
    return said
