"""Takes examples out of a run folder: out of every buffer in every saved state, and every result.

A state is written anew beside the old one and put in its place when it is whole; `disk` mends what
a kill leaves in between. So a killed call has done a part, and the same call again does the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from keeptune import models, state
from keeptune.buffer import Buffer, buffers_in
from keeptune.disk import (
    finish_replacing,
    link,
    locked,
    new_folder,
    read_manifest,
    replace_folder,
    replacement,
    verify,
    write_atomic,
)
from keeptune.errors import RecipeError, suggest
from keeptune.folder import RunFolder
from keeptune.method import State
from keeptune.recipe import load_recipe
from keeptune.records import Cell, Example, Kind
from keeptune.runs import refuse_objects
from keeptune.where import Where, parse

FORGOTTEN = "[forgotten]"  # instead of an example's texts in the results
CHUNK = 1024  # rows decoded at a time
TEXTS = {".csv", ".html", ".json", ".jsonl", ".log", ".md", ".txt", ".yaml"}


@dataclass
class Forgotten:
    """What a call removed, or would remove.

    Attributes:
        rows: By state and method: rows removed, and rows that there were.
        examples: By file of results: examples whose texts were replaced.
        left: Other files in which the words still are, which people must see to.
        begins_again: Whether a task that is not finished begins again.
    """

    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    begins_again: bool = False

    @property
    def nothing(self) -> bool:
        """Whether no row and no example is meant."""
        return not any(removed for removed, _ in self.rows.values()) and not self.examples


def forget(
    path: str | Path, where: Sequence[str], *, dry_run: bool = False, tokenizer: Any = None
) -> Forgotten:
    """Remove examples from a run folder.

    The weights, and what methods computed of them, still hold what they learned of the examples.

    Args:
        path: The run folder; no other process may be at work in it.
        where: Conditions as in `keeptune.where`, all of which must hold.
        dry_run: Only count.
        tokenizer: The run's; None loads it as the recipe says.

    Raises:
        KeeptuneError: A condition is none, or the folder or its tokenizer cannot be read.
    """
    meant = parse(where)
    folder = RunFolder(path)
    known = [task.name for task in folder.info.tasks]
    if unknown := set(meant.tasks) - set(known):
        name = sorted(unknown)[0]
        raise RecipeError(f"{folder.path} has no task {name!r}. {suggest(name, known)}")
    with locked(folder.path):
        states = folder.path / "state"
        for parent in (states, states / "progress"):
            finish_replacing(parent)
        if meant.reads_text and tokenizer is None:
            tokenizer = _tokenizer(folder)
        done = Forgotten()
        if not dry_run:
            _remove_leftovers(folder)
            # From now on the data files may lack rows, even if this call is killed.
            requests = folder.info.forget_requests + 1
            folder.info = folder.info.model_copy(update={"forget_requests": requests})
            folder.save_info()
        for kept in [*states.glob("task-*"), *(states / "progress").glob("[0-9]*-[0-9]*")]:
            _forget_state(kept, meant, tokenizer, states / "files", done, dry_run=dry_run)
        shutil.rmtree(states / "files", ignore_errors=True)
        _forget_examples(folder, meant, done, dry_run=dry_run)
        page = folder.path / "report.html"
        if not dry_run and page.is_file():
            from keeptune.report import write

            write([folder.path], page)
        done.left = [] if dry_run else _left(folder.path, meant)
    return done


def _tokenizer(folder: RunFolder) -> Any:
    refuse_objects(folder, "Call keeptune.forget with `tokenizer`.", what="tokenizer")
    recipe = load_recipe(folder.path / "recipe.yaml")
    return models.load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)


def _remove_leftovers(folder: RunFolder) -> None:
    """Halves of files and folders that killed processes left, and the files of a killed run."""
    shutil.rmtree(folder.path / "state" / "files", ignore_errors=True)
    for left in sorted(folder.path.rglob(".*.tmp")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


# -- states ---------------------------------------------------------------------------------------


def _forget_state(
    path: Path, meant: Where, tokenizer: Any, files: Path, done: Forgotten, *, dry_run: bool
) -> None:
    verify(path)  # what is damaged must not get a hash that fits
    changed: dict[str, State] = {}
    total = 0
    for stem in state.method_stems(path):
        kept = state.read_method(path, stem)
        removed = rows = 0
        for name in buffers_in(kept):
            buffer = Buffer(None)
            buffer.restore(kept.part(name) if name else kept, files)
            positions = _meant(buffer, meant, tokenizer)
            removed, rows = removed + len(positions), rows + len(buffer)
            if not dry_run and (positions or buffer.has_dead):
                buffer.delete(positions, files)
                kept = changed[stem] = _with(kept, name, buffer)
        if rows:
            done.rows[f"{path.name}, {stem.split('-', 2)[2]}"] = (removed, rows)
        total += removed
    if total and path.parent.name == "progress":
        # What this task is trained on is another set of rows now: it begins again.
        done.begins_again = True
        if not dry_run:
            shutil.rmtree(path)
    elif changed:
        _rewrite(path, changed)


def _meant(buffer: Buffer, meant: Where, tokenizer: Any) -> list[int]:
    """Positions of the rows that are meant."""
    found: list[int] = []
    every = np.arange(len(buffer))
    for begin in range(0, len(every), CHUNK):
        part = every[begin : begin + CHUNK].tolist()
        owners = buffer.owners(part)
        part = [p for p, owner in zip(part, owners, strict=True) if meant.of_task(owner)]
        ids = [row["input_ids"].tolist() for row in buffer.examples(part)]
        is_meant = meant.of_tokens(ids, tokenizer)
        found += [p for p, ok in zip(part, is_meant, strict=True) if ok]
    return found


def _with(kept: State, name: str, buffer: Buffer) -> State:
    """A method's state with this buffer in the place of the one of this name."""
    start, own = f"{name}/" if name else "", buffer.state()
    former = Buffer.tensors_of(kept.part(name) if name else kept)
    others = {key: t for key, t in kept.tensors.items() if key.removeprefix(start) not in former}
    files = {key: f for key, f in kept.files.items() if not key.startswith(f"{start}rows-")}
    own = own.under(name) if name else own
    return State(others | own.tensors, kept.values, files | own.files)


def _rewrite(path: Path, changed: dict[str, State]) -> None:
    """Put a state with these methods' states in the place of one without."""
    with new_folder(replacement(path)) as files:
        for name in read_manifest(path):
            if not any(name.startswith((f"{stem}.", f"{stem}-")) for stem in changed):
                link(path / name, files / name)
        for stem, kept in changed.items():
            evidence = state.read_json(path / f"{stem}.json")["evidence"]
            state.write_method(files, stem, kept, evidence)
    replace_folder(path)


# -- results --------------------------------------------------------------------------------------


def _forget_examples(folder: RunFolder, meant: Where, done: Forgotten, *, dry_run: bool) -> None:
    rows = folder.path / "rows"
    for file in sorted(f for kind in get_args(Kind) for f in rows.glob(f"*/{kind}-*.json")):
        cell = folder.read(file, Cell)
        is_meant = [meant.of_example(cell.name, example) for example in cell.examples]
        # What was replaced before needs no second time.
        texts = [FORGOTTEN not in (e.prompt, e.expected, e.answer) for e in cell.examples]
        which = [a and b for a, b in zip(is_meant, texts, strict=True)]
        if not any(which):
            continue
        done.examples[str(file.relative_to(folder.path))] = sum(which)
        if dry_run:
            continue
        examples = [_emptied(e) if o else e for e, o in zip(cell.examples, which, strict=True)]
        cell = cell.model_copy(update={"examples": examples})
        write_atomic(file, cell.model_dump_json().encode())


def _emptied(example: Example) -> Example:
    return example.model_copy(update=dict.fromkeys(("prompt", "expected", "answer"), FORGOTTEN))


def _left(path: Path, meant: Where) -> list[str]:
    if not (meant.texts or meant.patterns):
        return []
    files = [f for f in sorted(path.rglob("*")) if f.suffix in TEXTS and f.is_file()]
    return [
        str(file.relative_to(path))
        for file in files
        if meant.of_text(file.read_text("utf-8", errors="replace"))
    ]
