"""One run of a comparison: the plain function that every engine calls, wherever it is.

What a process imports to find `run_job` is light; training is imported when a run begins.
"""

from __future__ import annotations

import os
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.errors import FolderError, KeeptuneError
from keeptune.failures import in_a_line, write_failure
from keeptune.folder import RunFolder

if TYPE_CHECKING:
    from keeptune.progress import Progress


@dataclass(frozen=True, eq=False)
class Job:
    """One run, as plain values that any engine can send to any machine.

    Attributes:
        title: For people: "replay+ewc, seed 1, order 0".
        folder: The run folder; its name says what is in it.
        recipe: The recipe's values.
        home: Folder from which relative paths start.
    """

    title: str
    folder: Path
    recipe: dict[str, Any]
    home: Path

    @property
    def is_done(self) -> bool:
        """Whether the run is finished."""
        try:
            return RunFolder(self.home / self.folder).info.status == "done"
        except FolderError:
            return False

    @property
    def share(self) -> float:
        """How much of the run its folder shows, 0 to 1, in whole tasks."""
        try:
            rows = RunFolder(self.home / self.folder).rows_done
        except FolderError:
            return 0.0
        return max(rows - 1, 0) / len(self.recipe["tasks"])


def run_job(job: Job, progress: Progress | None = None) -> str | None:
    """Start a run, or go on with one that was stopped.

    Args:
        job: The run.
        progress: Who is told.

    Returns:
        None when the run is finished, else in one sentence why it is not; its folder keeps that.
    """
    os.chdir(job.home)
    from keeptune.recipe import parse_recipe
    from keeptune.runs import run

    if job.folder.is_dir() and not (job.folder / "run.json").is_file():
        # Killed before it was a run folder, or refused before there was one.
        shutil.rmtree(job.folder)
    try:
        run(parse_recipe(job.recipe), resume=True, progress=progress)
    except KeeptuneError as error:
        return write_failure(job.folder, str(error))
    except Exception as error:
        return write_failure(job.folder, in_a_line(error), traceback.format_exc())
    return None
