"""A run folder's scores as arrays, with their bootstrap draws: what metrics and checks read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from keeptune.floors import floor
from keeptune.folder import RunFolder
from keeptune.intervals import DRAWS, Array, binomial, generator, resample
from keeptune.records import Cell, DataInfo, Measure, Noise, Spread, Unit

Kind = Literal["task", "guard"]
CHANGES: tuple[Measure, Measure] = ("gain", "change")


@dataclass(frozen=True)
class Column:
    """One task or guard over the rows of the stream that are whole.

    Attributes:
        kind: "task" or "guard".
        info: How run.json lists it.
        cells: One a row; None where it was not evaluated.
        gain_floor: The smallest gain by training that means something; 0 where not measured.
        change_floor: The same of what comes after, or of a guard since the start.
    """

    kind: Kind
    info: DataInfo
    cells: list[Cell | None]
    gain_floor: float = 0.0
    change_floor: float = 0.0

    @property
    def n(self) -> int:
        """Number of examples."""
        return max((cell.n for cell in self.cells if cell), default=0)

    @cached_property
    def goodness(self) -> Array:
        """Higher is better, [rows]: shares as they are, perplexities as minus their logarithm."""
        scores = np.array([cell.score if cell else np.nan for cell in self.cells], dtype=np.float64)
        return scores if self.info.unit == "share" else -np.log(scores)

    @cached_property
    def draws(self) -> Array:
        """Bootstrap draws of `goodness`, [draws, rows].

        The examples drawn depend on the data alone (kind, name, hash, number), so that the same
        evaluation data in another run gives paired draws, and other data independent ones.
        """
        examples = [{e.id: e for e in cell.examples} if cell else {} for cell in self.cells]
        ids = sorted(set().union(*examples))
        rng = generator(self.kind, self.info.name, self.info.eval_sha256, len(ids) or self.n)
        known = [row for row, cell in zip(examples, self.cells, strict=True) if cell]
        if not all(known) or not ids:
            if self.info.unit == "share" and self.n:
                return binomial(self.goodness, self.n, rng)
            return np.full((DRAWS, len(self.cells)), np.nan)
        scores = [[row[i].score if i in row else np.nan for i in ids] for row in examples]
        weights = [[row[i].weight if i in row else 0.0 for i in ids] for row in examples]
        means = resample(np.array(scores), np.array(weights), rng)
        return means if self.info.unit == "share" else -means


@dataclass(frozen=True)
class Results:
    """Every score of a run, up to the last row that is whole.

    Attributes:
        folder: Where they come from.
        tasks: The tasks learned so far, in their order.
        waiting: Tasks that are still to be learned.
        guards: All guards.
        noise: How much the numbers vary by chance, where that was measured after the last task.
    """

    folder: RunFolder
    tasks: list[Column]
    waiting: list[Column]
    guards: list[Column]
    noise: Noise | None = None

    @property
    def kept(self) -> list[Column]:
        """The guards that ask for what was known before; not those that ask a task's facts anew."""
        return [column for column in self.guards if not column.info.transfer_of]

    @property
    def rows(self) -> int:
        """Whole rows of R, row 0 included."""
        return max(len(c.cells) for c in (*self.tasks, *self.waiting, *self.guards))

    def spread(self, kind: Measure, name: str) -> Spread | None:
        """How much one number varies by chance."""
        spreads = self.noise.spreads if self.noise else []
        return next((s for s in spreads if (s.kind, s.name) == (kind, name)), None)

    def goodness(self, kind: Kind, unit: Unit) -> Array:
        """[rows, columns]; columns of another unit are NaN."""
        columns = self.tasks if kind == "task" else self.kept
        masked = [c.goodness if c.info.unit == unit else c.goodness * np.nan for c in columns]
        return np.array(masked).reshape(len(columns), -1).T

    def draws(self, kind: Kind, unit: Unit) -> Array:
        """[draws, rows, columns]; columns of another unit are NaN."""
        columns = self.tasks if kind == "task" else self.kept
        masked = [c.draws if c.info.unit == unit else c.draws * np.nan for c in columns]
        return np.array(masked).reshape(len(columns), DRAWS, -1).transpose(1, 2, 0)


def load(folder: RunFolder) -> Results:
    """Read a run's scores; a last row that an interruption left incomplete is left out."""
    kinds: tuple[Kind, Kind] = ("task", "guard")
    infos = {"task": folder.info.tasks, "guard": folder.info.guards}
    cells = {kind: [folder.column(kind, i) for i in range(len(infos[kind]))] for kind in kinds}
    rows = min(folder.rows_done, len(infos["task"]) + 1)
    while rows > 1 and not _whole(cells["task"], cells["guard"], rows - 1):
        rows -= 1
    done = max(rows - 1, 0)
    noise = folder.noise()
    noise = noise if noise and noise.tasks == done else None
    floors = {(s.kind, s.name): floor(s, 1) for s in (noise.spreads if noise else ())}
    columns = {
        kind: [
            Column(kind, i, c[:rows], *(floors.get((what, i.name), 0.0) for what in CHANGES))
            for i, c in zip(infos[kind], cells[kind], strict=True)
        ]
        for kind in kinds
    }
    tasks = columns["task"]
    return Results(folder, tasks[:done], tasks[done:], columns["guard"], noise)


def _whole(tasks: list[list[Cell | None]], guards: list[list[Cell | None]], row: int) -> bool:
    """Whether a row has every learned task and every guard that was evaluated at first."""
    learned = all(column[row] for column in tasks[:row])
    return learned and all(column[row] or not column[0] for column in guards)
