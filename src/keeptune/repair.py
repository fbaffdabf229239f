"""Repair a model that was tuned elsewhere: take as much of the tuning as a budget allows.

Between the base model and the tuned one lies a line of models; the one furthest along it is taken
whose guards have surely lost no more than they may, as `budget` does after each task of a run. The
inputs are only read. Weights are mixed tensor by tensor from the files, so that beside the one
model that is asked memory holds two tensors at a time.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune import lines, models
from keeptune.budget import Steps, find_step
from keeptune.disk import is_taken, new_folder, refuse_unwritable, write_atomic
from keeptune.errors import FolderError, ModelError, RecipeError
from keeptune.evaluate import score_rows
from keeptune.guard import Guard
from keeptune.likelihood import context_length
from keeptune.lines import FEWEST, Line, Probe
from keeptune.machine import fastest
from keeptune.progress import Progress
from keeptune.recipe_parts import BudgetRecipe
from keeptune.records import Example
from keeptune.session import DEFAULT_LENGTH
from keeptune.tunings import ADAPTER, WEIGHTS, Adapter, Mix, Whole, write_like
from keeptune.watchlog import Frontier, Tried

# Pickles can run code when read, and other forms would hold the model from before the repair.
LEFT_OUT = (WEIGHTS, "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")


@dataclass(frozen=True)
class Repaired:
    """What came of a repair.

    Attributes:
        path: The new model.
        frontier: The step that was taken, 0 to 1, and what was tried.
    """

    path: Path
    frontier: Frontier


def repair(
    base: str,
    tuned: str,
    out: Path,
    *,
    guards: Sequence[Guard],
    tasks: Sequence[Guard] = (),
    budget: BudgetRecipe,
    seed: int = 0,
    batch_size: int = 16,
    trust_remote_code: bool = False,
    progress: Progress,
) -> Repaired:
    """Write the largest step from `base` towards `tuned` that keeps inside a budget.

    Args:
        base: The model before tuning: a hub id, a folder, or "demo".
        tuned: The model after it, or its LoRA adapter: a hub id or a folder.
        out: A new folder.
        guards: What must not get worse; half of the rows find the step, the others confirm it.
        tasks: What was tuned for; shown for each step.
        budget: What each guard may lose against the base model.
        seed: Divides the rows.
        batch_size: Rows at a time.
        trust_remote_code: Run Python code that comes with the base model.
        progress: Who is told.

    Raises:
        KeeptuneError: Anything a user can mend; nothing is written.
    """
    if is_taken(out):
        raise FolderError(f"{out} is not empty, and a repair overwrites nothing. Give a new OUT.")
    refuse_unwritable(out)
    began, chosen = time.monotonic(), _lines(guards, tasks, budget)
    folder = _folder_of(tuned)
    loaded = models.load(base, trust_remote_code=trust_remote_code)
    loaded.model.to(fastest())
    with ExitStack() as files:
        is_adapter = (folder / ADAPTER).is_file()
        with _explained(base, tuned):
            mix: Mix = (
                Adapter(loaded.model, folder, files)
                if is_adapter
                else Whole(loaded.model, _folder_of(base), folder, files)
            )
        (step,), tried = _find(mix, loaded.tokenizer, chosen, budget, seed, batch_size, progress)
        name = Path(tuned).name or tuned
        seconds = time.monotonic() - began
        frontier = Frontier(task=name, index=0, mix=step, cut=0.0, tried=tried, seconds=seconds)
        with new_folder(out, replace=False) as filled:
            for file in sorted(folder.glob(WEIGHTS)):
                write_like(file, filled / file.name, lambda name: mix.mixed(name, step))
            _copy_the_rest(folder, filled)
            said = {"base": base, "tuned": tuned, "budget": budget.model_dump()}
            told = {**said, **frontier.model_dump(mode="json")}
            write_atomic(filled / "repair.json", json.dumps(told, indent=1).encode())
    return Repaired(out, frontier)


def _find(
    mix: Mix,
    tokenizer: Any,
    chosen: Sequence[Line],
    budget: BudgetRecipe,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> tuple[Steps, list[Tried]]:
    """The step inside the budget, and all that was tried."""

    def score(probe: Probe) -> list[Example]:
        return score_rows(
            mix.model,
            tokenizer,
            probe.rows,
            probe.item.score,
            batch_size=batch_size,
            max_new_tokens=probe.item.max_new_tokens,
            max_length=context_length(mix.model, DEFAULT_LENGTH),
        )

    progress.phase("the base model's scores", 0, "trials")
    mix.move(0.0)
    before = {(probe.kind, probe.index): score(probe) for line in chosen for probe in line.probes}
    progress.phase("the step inside the budget", 0, "trials")
    return find_step(
        mix.move,
        chosen,
        score,
        lambda probe: [before[probe.kind, probe.index][i] for i in probe.ids],
        confidence=budget.confidence,
        seed=seed,
        tick=progress.advance,
    )


def _lines(guards: Sequence[Guard], tasks: Sequence[Guard], budget: BudgetRecipe) -> list[Line]:
    """The lines of a budget; what was tuned for comes first, and is not judged."""
    lines.refuse_unknown_names("--budget", list(budget.guards), guards)
    if budget.blocks > 1:
        raise RecipeError("A repair takes one step in all layers: leave budget.blocks out.")
    chosen = [
        Line(task.name, "learning", [Probe("task", i, task, range(task.size), 0)], None)
        for i, task in enumerate(tasks)
    ]
    for name, loss in budget.guards.items():
        chosen += lines.guard_lines(name, guards, 0, loss)
    few = [line for line in chosen if line.allowed is not None and line.size < 2 * FEWEST]
    if few:
        raise RecipeError(
            f"The guard {few[0].name!r} has {few[0].size} rows, and a budget needs at least "
            f"{2 * FEWEST}: half of them to find a step, half to confirm it. Give it more rows."
        )
    return chosen


def _folder_of(model: str) -> Path:
    """Where a model's files are.

    Raises:
        ModelError: It is not there, or has no safetensors.
    """
    folder = models.files_of(model, without=LEFT_OUT[1:])
    if not any(folder.glob(WEIGHTS)):
        raise ModelError(f"{model} holds no .safetensors, which a repair reads and writes.")
    return folder


@contextmanager
def _explained(base: str, tuned: str) -> Iterator[None]:
    """Put what the libraries say of files that do not fit into one sentence."""
    try:
        yield
    except models.LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        raise ModelError(f"{tuned} cannot be read as a tuning of {base}: {reason}.") from error


def _copy_the_rest(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in LEFT_OUT):
            shutil.copyfile(file, target / file.name)
