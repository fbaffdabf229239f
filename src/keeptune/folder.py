"""What a run folder holds: the only link between training and everything that reads its results.

    RUN/
    ├── recipe.yaml            the recipe with every default filled in
    ├── run.json               RunInfo: what is trained, on which data, by which versions
    ├── rows/002/task-000.json Cell: one entry of R (here R[2, 0]) with its per-example results
    ├── rows/002/guard-000.json
    ├── rows/002/routes.json   which task each task's questions are taken for, where that is chosen
    ├── evidence/002.json      what each method did while the second task was learned
    ├── cost.json              seconds by phase, peak memory, stored bytes
    ├── steps.jsonl            loss and speed over steps, for people and plots
    ├── watch.jsonl            what was seen while tasks were learned, and what was done about it
    ├── noise.json             how much its numbers vary by chance, where that was measured
    ├── budget/002.json        the steps tried after the second task, and the one taken
    ├── report.html
    ├── error.txt              why the run ended, where it was one of a comparison and failed
    └── state/                 weights and method state after the last tasks, each with its hashes

Each file is written once, whole, to a temporary name, synced and renamed: a process killed at any
instant leaves either the old file or the new one. No file here is a pickle.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from keeptune.disk import is_taken, refuse_unwritable, write_atomic
from keeptune.errors import FolderError
from keeptune.records import (
    FORMAT,
    Cell,
    Cost,
    Kind,
    Noise,
    Phase,
    Routes,
    RunInfo,
    TaskEvidence,
)

Record = TypeVar("Record", bound=BaseModel)


def refuse_full(out: Path) -> None:
    """A new run never starts in a folder that holds something.

    Raises:
        FolderError: It does, or cannot be made.
    """
    if not is_taken(out):
        refuse_unwritable(out)
        return
    if not out.is_dir():
        raise FolderError(f"{out} is a file, and a run needs a folder. Give another --out.")
    if not (out / "run.json").exists():
        raise FolderError(
            f"{out} is not empty, and holds no run to go on with (it has no run.json). Give "
            "another --out, or empty it."
        )
    raise FolderError(
        f"{out} is not empty. Continue that run with --resume, or give another --out."
    )


class RunFolder:
    """Reads and writes one run folder.

    Args:
        path: The folder; it must hold a run.json unless `create` made it.

    Raises:
        FolderError: It is not a run folder, or run.json is damaged or of a newer format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "run.json"
        if not file.is_file():
            raise FolderError(
                f"{self.path} is not a run folder (it has no run.json). "
                "Give the folder that `keeptune run` printed."
            )
        self.info = self.read(file, RunInfo)
        if self.info.format > FORMAT:
            raise FolderError(
                f"{self.path} was written in format {self.info.format}; this keeptune reads up to "
                f"{FORMAT}. Install a newer keeptune."
            )

    @classmethod
    def create(cls, path: str | Path, info: RunInfo, recipe_yaml: str) -> RunFolder:
        """Start a run folder; `path` must be new or empty.

        Raises:
            FolderError: The folder holds something already.
        """
        path = Path(path)
        refuse_full(path)
        write_atomic(path / "recipe.yaml", recipe_yaml.encode())
        write_atomic(path / "run.json", info.model_dump_json(indent=1).encode())
        return cls(path)

    @staticmethod
    def read(file: Path, kind: type[Record]) -> Record:
        """Read one of the folder's files.

        Raises:
            FolderError: It is damaged.
        """
        try:
            return kind.model_validate_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise FolderError(f"{file} is damaged: {str(error).splitlines()[0]}.") from error

    def save_info(self) -> None:
        """Write run.json after `info` changed."""
        self._write("run.json", self.info.model_dump_json(indent=1))

    def _write(self, name: str | Path, text: str) -> None:
        write_atomic(self.path / name, text.encode())

    # -- results ------------------------------------------------------------------------------

    def cell_file(self, row: int, kind: Kind, index: int) -> Path:
        """Where R[row, index] is kept; `index` counts from 0."""
        return self.path / "rows" / f"{row:03d}" / f"{kind}-{index:03d}.json"

    def write_cell(self, row: int, kind: Kind, index: int, cell: Cell) -> None:
        """Keep one entry of R."""
        self._write(self.cell_file(row, kind, index).relative_to(self.path), cell.model_dump_json())

    def cell(self, row: int, kind: Kind, index: int) -> Cell | None:
        """One entry of R, or None where it was not evaluated."""
        file = self.cell_file(row, kind, index)
        return self.read(file, Cell) if file.is_file() else None

    def write_routes(self, row: int, routes: Routes) -> None:
        """Keep which tasks were chosen after one task of the stream."""
        self._write(self._routes_file(row).relative_to(self.path), routes.model_dump_json())

    def routes(self, row: int) -> Routes | None:
        """Which tasks were chosen, or None where the strategy chooses none."""
        file = self._routes_file(row)
        return self.read(file, Routes) if file.is_file() else None

    def _routes_file(self, row: int) -> Path:
        return self.path / "rows" / f"{row:03d}" / "routes.json"

    def column(self, kind: Kind, index: int) -> list[Cell | None]:
        """One task or guard over the whole stream: row 0 (before training) to the last row."""
        return [self.cell(row, kind, index) for row in range(self.rows_done)]

    def require_state(self) -> None:
        """Refuse a run whose tasks were learned, but whose weights are gone.

        Raises:
            FolderError: They are.
        """
        if self.rows_done > 1 and not any((self.path / "state").glob("task-[0-9]*")):
            raise FolderError(
                f"{self.path} has learned tasks, but state/ in it holds no weights any more. Run "
                "the recipe into another --out, or put state/ back."
            )

    @property
    def rows_done(self) -> int:
        """Number of rows of R that have at least one entry."""
        rows = self.path / "rows"
        numbers = [int(p.name) for p in rows.iterdir() if p.name.isdigit()] if rows.exists() else []
        return max(numbers) + 1 if numbers else 0

    def matrix(self, kind: Kind) -> NDArray[np.float64]:
        """Scores [rows, tasks or guards]; row 0 is before training; NaN where not evaluated."""
        columns = self.info.tasks if kind == "task" else self.info.guards
        scores = [
            [cell.score if cell else np.nan for cell in self.column(kind, index)]
            for index in range(len(columns))
        ]
        return np.array(scores, dtype=np.float64).reshape(len(columns), -1).T

    def write_evidence(self, evidence: TaskEvidence) -> None:
        """Keep what the methods did while one task was learned."""
        self._write(f"evidence/{evidence.index + 1:03d}.json", evidence.model_dump_json(indent=1))

    def evidence(self) -> list[TaskEvidence]:
        """What the methods did, task by task."""
        files = sorted((self.path / "evidence").glob("[0-9]*.json"))
        return [self.read(file, TaskEvidence) for file in files]

    def write_noise(self, noise: Noise) -> None:
        """Keep how much the run's numbers vary by chance."""
        self._write("noise.json", noise.model_dump_json(indent=1))

    def noise(self) -> Noise | None:
        """How much the run's numbers vary by chance; None where that was not measured."""
        file = self.path / "noise.json"
        return self.read(file, Noise) if file.is_file() else None

    # -- cost and steps -----------------------------------------------------------------------

    def cost(self) -> Cost:
        """What the run cost so far."""
        file = self.path / "cost.json"
        return self.read(file, Cost) if file.is_file() else Cost()

    def add_phase(self, phase: Phase) -> None:
        """Add a phase to what the run cost so far."""
        cost = self.cost()
        self.write_cost(cost.model_copy(update={"phases": [*cost.phases, phase]}))

    def write_cost(self, cost: Cost) -> None:
        """Keep what the run cost so far."""
        self._write("cost.json", cost.model_dump_json(indent=1))

    def log_step(self, **figures: Any) -> None:
        """Append one line to steps.jsonl; a torn last line is tolerated by `steps`."""
        with (self.path / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps.jsonl; where a resumed run repeated a step, the later one counts."""
        file = self.path / "steps.jsonl"
        by_step: dict[tuple[Any, Any], dict[str, Any]] = {}
        for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
            with contextlib.suppress(ValueError):
                figures = json.loads(line)
                by_step[figures.get("task"), figures.get("step")] = figures
        return list(by_step.values())


class ReadOnlyFolder(RunFolder):
    """A run folder that another process writes; what is written here goes nowhere."""

    def _write(self, name: str | Path, text: str) -> None:
        """Nothing."""

    def log_step(self, **figures: Any) -> None:
        """Nothing."""
