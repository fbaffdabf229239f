"""What the engines' tests have done in other processes, in place of training."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from keeptune.jobs import Job


def job(folder: Path, name: str, *, does: str = "", seconds: float = 0.0) -> Job:
    """A job for `work`; `does` says how it ends."""
    recipe = {"does": does, "seconds": seconds, "tasks": [{"name": "a"}, {"name": "b"}]}
    return Job(f"{name}, seed 0", folder / name, recipe, folder)


def work(job: Job, progress: Any = None) -> str | None:
    """Leaves a mark of its beginning and of its end, and ends as its job says."""
    os.chdir(job.home)
    mark(job, "began")
    if progress is not None:
        progress.task(2, 2, "b")
        progress.phase("train b", 4)
        progress.advance(3)
        progress.warn("b has few rows")
    sys.stdout.write("printed in the process\n")
    sys.stdout.flush()
    time.sleep(job.recipe["seconds"])
    does = job.recipe["does"]
    if does == "fail":
        return "the loss is not a number"
    if does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "break":
        raise RuntimeError("a bug")
    if does == "stop":
        raise KeyboardInterrupt
    mark(job, "finished")
    return None


def mark(job: Job, what: str) -> None:
    file = job.folder.with_name(f"{job.folder.name}.{what}")
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    file.write_text(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {gpu}")


def marks(folder: Path, what: str) -> dict[str, list[str]]:
    """Of each job, its process, threads and GPUs at a mark."""
    return {f.stem: f.read_text().split() for f in sorted(folder.glob(f"*.{what}"))}
