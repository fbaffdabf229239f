"""The README.md of an export: how to load it, what it learned and kept, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from keeptune.comparison import compare
from keeptune.folder import RunFolder
from keeptune.metrics import summarise
from keeptune.results import Column, load
from keeptune.terminal import change_text, score_text
from keeptune.wording import headline

Kind = Literal["model", "adapter"]


def model_card(
    folder: RunFolder, kind: Kind, *, base: str | None, task: str | None, apart: bool = False
) -> str:
    """A model card for the hub, and for people.

    Args:
        folder: The run.
        kind: What is written beside it: a PEFT "adapter" or a whole "model".
        base: The base model's name on the hub, if it has one.
        task: The task that it answers; None for all.
        apart: Whether the run answers each task by a part of its own, so that not all of its
            scores are this export's.
    """
    info = folder.info
    names = ", ".join(column.info.name for column in load(folder).tasks)
    served = f"This {kind} answers " + (f"the task {task}." if task else "all of them.")
    parts = [
        _front(folder, kind, base),
        f"# {info.model['name']}, taught {names}",
        f"{served} Base model: {info.model['name']}. Strategy: {info.strategy}.",
        _part_of(task)
        if apart
        else " ".join(headline(compare([folder])[0])).replace("\u00a0", " "),
        "## Load it",
        _loading(folder, kind),
        "## What it learned and what it kept",
        "Scores with 95 % intervals over the evaluation examples. Shares are per cent right; "
        "perplexities, lower is better, have no sign.",
        _scores(folder),
        "R: one row for each moment, one column for each task and guard.",
        _matrix(folder),
        "## How it was made",
        "Methods: " + (_methods(folder) or "none, plain fine-tuning") + ".",
        f"keeptune {info.provenance.get('versions', {}).get('keeptune', '')}, seed {info.seed}. "
        "The recipe, with every default filled in:",
        f"```yaml\n{(folder.path / 'recipe.yaml').read_text('utf-8').strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _part_of(task: str | None) -> str:
    """Which of a run's scores are those of an export that is not all of it."""
    if task is not None:
        return (
            "The scores below are the run's, which answers each task by a part of its own. Those "
            f"of {task} are this export's; other tasks were answered by other parts, and guards by "
            "what answers when the task is not known."
        )
    return (
        "The scores below are the run's, which answers each task by a part of its own. This export "
        "is what answers when the task is not known: the guards' scores are its own, those of the "
        "learned tasks are not, and how well it answers these was not measured."
    )


def _front(folder: RunFolder, kind: Kind, base: str | None) -> str:
    """What the hub reads."""
    task = "text-classification" if _is_classifier(folder) else "text-generation"
    lines = [
        f"library_name: {'peft' if kind == 'adapter' else 'transformers'}",
        f"pipeline_tag: {task}",
        "tags: [keeptune, continual-learning]",
    ]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    return "\n".join(["---", *lines, "---"])


def _is_classifier(folder: RunFolder) -> bool:
    return folder.info.model.get("kind") == "classification"


def _loading(folder: RunFolder, kind: Kind) -> str:
    name = "SequenceClassification" if _is_classifier(folder) else "CausalLM"
    package, start = ("peft", "AutoPeft") if kind == "adapter" else ("transformers", "Auto")
    return (
        "```python\n"
        f"from {package} import {start}ModelFor{name}\n"
        "from transformers import AutoTokenizer\n\n"
        f'model = {start}ModelFor{name}.from_pretrained(FOLDER, dtype="float32")\n'
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
        "```\n\n"
        "In float32 it gives the logits of the run; in 16 bits, nearly those."
    )


def _scores(folder: RunFolder) -> str:
    summary = summarise(folder)
    lines = [("", "before", "learned", "now", "change since")]
    lines += [
        (
            track.name + ("" if track.learned else " (guard)"),
            score_text(track.before, track.unit),
            score_text(track.learned, track.unit) if track.learned else "",
            score_text(track.after, track.unit),
            change_text(track.change, track.unit),
        )
        for track in (*summary.tasks, *summary.guards)
    ]
    return _table(lines)


def _matrix(folder: RunFolder) -> str:
    results = load(folder)
    columns = [*results.tasks, *results.waiting, *results.guards]
    moments = ["before", *(f"after {column.info.name}" for column in results.tasks)]
    lines = [("", *(column.info.name for column in columns))]
    lines += [(when, *(_cell(c, row) for c in columns)) for row, when in enumerate(moments)]
    return _table(lines)


def _cell(column: Column, row: int) -> str:
    cell = column.cells[row] if row < len(column.cells) else None
    if cell is None:
        return "–"
    return f"{100 * cell.score:.1f} %" if column.info.unit == "share" else f"{cell.score:.4g}"


def _methods(folder: RunFolder) -> str:
    shown = [
        m.name
        + (f" ({', '.join(f'{k} {v}' for k, v in m.settings.items())})" if m.settings else "")
        for m in folder.info.methods
    ]
    return "; ".join(shown)


def _table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *rest = (
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
    return "\n".join([head, "|---" + "|--:" * (len(lines[0]) - 1) + "|", *rest])
