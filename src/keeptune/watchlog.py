"""What watching and the budget leave in a run folder: watch.jsonl and budget/002.json.

One line of watch.jsonl is one look. Lines are only added, but when a killed run goes on from an
earlier step: then those after that step are taken out first, since they are to come again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from keeptune.disk import write_atomic
from keeptune.folder import RunFolder
from keeptune.records import Unit

FILE = "watch.jsonl"
Role = Literal["learning", "task", "guard"]
Action = Literal["", "warn", "stop", "rollback", "strengthen"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Point(_Record):
    """What one sample showed at one moment.

    Attributes:
        name: Of the guard, the group of guards or the task.
        role: "learning" for the task that is learned now, "task" for earlier ones, or "guard".
        unit: "share" (0 to 1) or "perplexity".
        n: Examples scored.
        score: Their score.
        change: Against the same examples earlier, higher is better: in shares, or minus the change
            of the perplexity's logarithm.
        low: The true change is above this, at the confidence asked for.
        high: The true change is below this, at the confidence asked for.
        allowed: How far it may fall, in the same unit; None where nothing was said.
        error: Standard error of the change; None in looks of older versions.
        is_below: A look: it has surely fallen further than that. A step of the budget: it is not
            sure that it has not.
    """

    name: str
    role: Role
    unit: Unit
    n: int
    score: float
    change: float
    low: float
    high: float
    allowed: float | None
    is_below: bool
    error: float | None = None


class Look(_Record):
    """One line of watch.jsonl: every sample at one step.

    Attributes:
        task: The task that is learned.
        index: Its position in the stream, from 0.
        step: Optimizer steps done in it; 0 is the moment before.
        steps: Optimizer steps planned.
        seconds: What the look took.
        overhead: Share of the time of this task's training that looks have taken so far.
        points: What it showed.
        action: What was done about it.
        back_to: After a rollback, the step whose weights were taken.
        effort: How hard the methods hold from here on, as a multiple of what they are set to; None
            where that is not steered.
    """

    task: str
    index: int
    step: int
    steps: int
    seconds: float
    overhead: float
    points: list[Point]
    action: Action = ""
    back_to: int | None = None
    effort: float | None = None


class Tried(_Record):
    """One step between the weights before a task and those after it.

    Attributes:
        mix: Share of the new weights, 0 to 1; the mean over the blocks of layers.
        sample: Whether it was tried to find the step, or to confirm it on rows not seen before.
        points: What it showed.
        inside: Whether all of the budget is kept, at the confidence asked for.
        mixes: The share of each block, from the lower layers to the upper; None where all had one.
    """

    mix: float
    sample: Literal["search", "fresh"]
    points: list[Point]
    inside: bool
    mixes: list[float] | None = None


class Frontier(_Record):
    """budget/TTT.json: what was tried after one task, and the step that was taken.

    Attributes:
        task: The task learned.
        index: Its position in the stream, from 0.
        mix: Share of the new weights that was taken; 0 is the model from before the task. The mean
            over the blocks of layers.
        cut: Under LoRA, the largest relative error of an update by its cut to the adapter's rank.
        tried: In the order it was tried.
        seconds: What it took.
        mixes: The share of each block, from the lower layers to the upper; None where all had one.
    """

    task: str
    index: int
    mix: float
    cut: float
    tried: list[Tried]
    seconds: float
    mixes: list[float] | None = None


def add(folder: RunFolder, look: Look) -> None:
    """Append a look; a torn last line is passed over by `looks`."""
    with (folder.path / FILE).open("a", encoding="utf-8") as file:
        file.write(look.model_dump_json() + "\n")


def looks(folder: RunFolder) -> list[Look]:
    """Every look, in the order taken."""
    file, found = folder.path / FILE, []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(Look.model_validate_json(line))
    return found


def cut(folder: RunFolder, index: int, step: int) -> None:
    """Take out what comes after a step of a task: it is to come again."""
    every = looks(folder)
    kept = [look for look in every if (look.index, look.step) <= (index, step)]
    if len(kept) < len(every) or _is_torn(folder.path / FILE):
        text = "".join(look.model_dump_json() + "\n" for look in kept)
        write_atomic(folder.path / FILE, text.encode())


def _is_torn(file: Path) -> bool:
    return file.is_file() and not file.read_bytes().endswith(b"\n")


def write_frontier(folder: RunFolder, frontier: Frontier) -> None:
    """Keep what was tried after a task."""
    file = folder.path / "budget" / f"{frontier.index + 1:03d}.json"
    write_atomic(file, frontier.model_dump_json(indent=1).encode())


def frontiers(folder: RunFolder) -> list[Frontier]:
    """What was tried after each task."""
    files: Sequence[Path] = sorted((folder.path / "budget").glob("[0-9]*.json"))
    return [folder.read(file, Frontier) for file in files]
