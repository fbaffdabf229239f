"""KT001 and on: what can be wrong with a run, or with comparing several, in one sentence each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from keeptune.comparison import recipe_key
from keeptune.folder import RunFolder
from keeptune.records import DataInfo
from keeptune.results import load
from keeptune.tracks import task_track
from keeptune.units import shown_as
from keeptune.watchlog import frontiers, looks
from keeptune.wording import range_text, value_text

Severity = Literal["error", "warning", "note"]
FEWEST_EXAMPLES = 30
LOWEST_START = 0.05
CUT_SHARE = 0.05


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong with a run.

    Attributes:
        code: KT and three digits; never used again for anything else.
        title: What is wrong, in a few words.
        severity: "error" (results are void), "warning" (read them with care) or "note".
        run: Gives the sentence, or None when all is well.
    """

    code: str
    title: str
    severity: Severity
    run: Callable[[RunFolder], str | None]


@dataclass(frozen=True)
class Comparison:
    """One thing that can be wrong with the runs that are reported together; one run is enough.

    Attributes:
        code: As in `Check`.
        title: As in `Check`.
        severity: As in `Check`.
        run: Gives the sentence, or None when all is well.
    """

    code: str
    title: str
    severity: Severity
    run: Callable[[Sequence[RunFolder], Collection[str]], str | None]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        code: The check's code.
        title: The check's title.
        severity: The check's severity.
        message: One sentence with the names and numbers.
        run: The run's folder; None for a finding about several together.
    """

    code: str
    title: str
    severity: Severity
    message: str
    run: Path | None = None


def run_checks(*folders: RunFolder, varied: Collection[str] = ()) -> list[Finding]:
    """Run every check on each folder, and those about comparisons on all; the gravest first.

    Args:
        folders: The runs.
        varied: Keys of their recipes that differ on purpose.
    """
    found = [
        Finding(check.code, check.title, check.severity, message, folder.path)
        for folder in folders
        for check in CHECKS
        if (message := check.run(folder))
    ]
    found += [
        Finding(check.code, check.title, check.severity, message)
        for check in COMPARISONS
        if (message := check.run(folders, varied))
    ]
    order = ("error", "warning", "note")
    return sorted(found, key=lambda f: (order.index(f.severity), f.code))


def _inactive(folder: RunFolder) -> str | None:
    silent = []
    for task in folder.evidence():
        for method in folder.info.methods:
            if method.is_neutral or task.index < method.active_from:
                continue
            shown = [e.values.get(method.proof) for e in task.methods if e.name == method.name]
            if not shown or not all(map(_is_positive, shown)):
                got = shown[0] if shown else None
                what = "is missing" if got is None else f"is {got}"
                silent.append(
                    f"method {method.name} did nothing on task {task.task!r}: "
                    f"its evidence {method.proof} {what}, it must be above 0"
                )
    return _sentence(silent)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value) and value > 0


def _nothing_learned(folder: RunFolder) -> str | None:
    flat = []
    for index, column in enumerate(load(folder).tasks):
        track = task_track(column, index)
        gain = track.gain
        if gain is None or gain.low is None:
            continue
        better = gain.is_above if track.unit == "share" else gain.is_below
        if not better:
            what = "perplexity " if track.unit == "perplexity" else ""
            shown = shown_as("change", track.unit)
            change = f"{value_text(gain, shown)}, {range_text(gain, shown)}"
            change += ", within the noise" if gain.is_noise else ""
            flat.append(f"{track.name!r} ({what}{change})")
    if not flat:
        return None
    return (
        f"Training is not shown to have taught task {', '.join(flat)}: there, 'not forgotten' "
        "means nothing."
    )


def _leaked(folder: RunFolder) -> str | None:
    return _sentence(
        f"{d.leaked_rows} of {d.eval_rows} evaluation rows of {d.name!r} are also training rows"
        for d in _data(folder)
        if d.leaked_rows
    )


def _few_examples(folder: RunFolder) -> str | None:
    few = [
        f"{c.info.name!r} ({c.n})"
        for results in [load(folder)]
        for c in (*results.tasks, *results.waiting, *results.guards)
        if any(c.cells) and c.n < FEWEST_EXAMPLES
    ]
    return (
        f"Too few evaluation examples for an interval that can be trusted, {FEWEST_EXAMPLES} are "
        f"wanted: {', '.join(few)}."
        if few
        else None
    )


def _unfinished(folder: RunFolder) -> str | None:
    if folder.info.status == "done":
        return None
    done = len(load(folder).tasks)
    return (
        f"The run is not finished (status: {folder.info.status}): {done} of "
        f"{len(folder.info.tasks)} tasks are learned and evaluated."
    )


def _no_evidence(folder: RunFolder) -> str | None:
    if not folder.info.methods:
        return None
    known = {evidence.index for evidence in folder.evidence()}
    missing = [
        repr(column.info.name)
        for index, column in enumerate(load(folder).tasks)
        if index not in known
    ]
    return f"No evidence was recorded for task {', '.join(missing)}." if missing else None


def _low_start(folder: RunFolder) -> str | None:
    low = [
        f"{c.info.name!r} ({100 * c.goodness[0]:.0f} %)"
        for c in load(folder).kept
        if c.info.unit == "share" and len(c.goodness) and c.goodness[0] < LOWEST_START
    ]
    return (
        f"The untrained model can hardly do what these guards ask, so that they cannot show "
        f"a loss: {', '.join(low)}."
        if low
        else None
    )


def _no_guard(folder: RunFolder) -> str | None:
    if any(not guard.transfer_of for guard in folder.info.guards):
        return None
    return "No guard was measured: nothing is known about what the model could do before."


def _cut(folder: RunFolder) -> str | None:
    results = load(folder)
    said = [
        f"{d.truncated_rows} rows of task {d.name!r} were cut because they are too long, and "
        f"{d.dropped_rows} left out because nothing to learn was left of them; {d.train_rows} were "
        "trained on"
        for d in folder.info.tasks
        if d.truncated_rows + d.dropped_rows > CUT_SHARE * (d.train_rows + d.dropped_rows)
    ]
    for column in (*results.tasks, *results.waiting, *results.guards):
        cell = next((cell for cell in column.cells if cell is not None), None)
        if cell is not None and cell.truncated > CUT_SHARE * cell.n:
            said.append(
                f"{cell.truncated} of {cell.n} evaluation rows of {cell.name!r} were cut because "
                "they are longer than max_length, and are scored on what was left"
            )
    return _sentence(said)


def _fallen(folder: RunFolder) -> str | None:
    found = []
    for look in looks(folder):
        names = ", ".join(repr(point.name) for point in look.points if point.is_below)
        if look.action in ("warn", "strengthen"):
            found.append(f"{names} fell at step {look.step} of {look.steps} of task {look.task!r}")
        elif look.action:
            back = f" with the weights of step {look.back_to}" * (look.back_to is not None)
            found.append(
                f"task {look.task!r} ended at step {look.step} of {look.steps}{back}, because "
                f"{names} fell"
            )
    return _sentence(found)


def _nothing_taken(folder: RunFolder) -> str | None:
    held = [repr(frontier.task) for frontier in frontiers(folder) if not frontier.mix]
    return (
        f"No step at all was sure to keep inside the budget after task {', '.join(held)}: the "
        "model is the one from before. More evaluation rows, or a larger budget, allow more."
        if held
        else None
    )


def _one_seed(folders: Sequence[RunFolder], varied: Collection[str]) -> str | None:
    seeds: dict[str, set[int]] = {}
    for folder in folders:
        known = noise.seeds if (noise := load(folder).noise) else [folder.info.seed]
        seeds.setdefault(recipe_key(folder), set()).update(known)
    if all(len(found) > 1 for found in seeds.values()):
        return None
    return (
        "Only one seed was run: intervals cover the choice of evaluation examples, "
        "not the randomness of training; three seeds or more show that too, as does "
        "`keeptune noise`."
    )


def _unlike(folders: Sequence[RunFolder], varied: Collection[str]) -> str | None:
    first, reasons = folders[0], []
    for other in folders[1:]:
        ours, theirs = _conditions(first), _conditions(other)
        differing = [
            key
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
            and not any(f"{one}.".startswith(f"{key}.") for one in varied)
        ]
        if differing:
            shown = ", ".join(
                f"{key} ({_short(ours.get(key))} and {_short(theirs.get(key))})"
                for key in differing[:4]
            )
            more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            reasons.append(
                f"runs {first.path.name} and {other.path.name} differ in more than their methods: "
                f"{shown}{more}"
            )
    orders: dict[str, set[tuple[str, ...]]] = {}
    for folder in folders:
        orders.setdefault(recipe_key(folder), set()).add(tuple(t.name for t in folder.info.tasks))
    sets = list(orders.values())
    if not reasons and any(one.isdisjoint(other) for one in sets for other in sets):
        reasons.append("there are strategies that learned the tasks in no order that is the same")
    return _sentence(reasons)


def _conditions(folder: RunFolder) -> dict[str, Any]:
    """What two runs must share for a comparison of their methods, by name."""
    recipe = yaml.safe_load((folder.path / "recipe.yaml").read_text("utf-8")) or {}
    trainer = recipe.get("trainer") or {}
    conditions = {f"trainer.{key}": value for key, value in trainer.items()}
    conditions |= {"adapter": recipe.get("adapter"), "max_length": recipe.get("max_length")}
    model = folder.info.model
    conditions |= {f"model {key}": model.get(key) for key in ("name", "identity", "kind")}
    conditions["tasks"] = sorted(task.name for task in folder.info.tasks)
    conditions["guards"] = [guard.name for guard in folder.info.guards]
    for data in _data(folder):
        conditions[f"score of {data.name}"] = data.score
        conditions[f"training data of {data.name}"] = data.train_sha256
        conditions[f"evaluation data of {data.name}"] = data.eval_sha256
    return conditions


def _data(folder: RunFolder) -> list[DataInfo]:
    return [*folder.info.tasks, *folder.info.guards]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:8] + "…" if len(text) == 64 and text.isalnum() else text


def _sentence(parts: Sequence[str] | Any) -> str | None:
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "." if text else None


CHECKS = (
    Check("KT001", "A method did nothing", "error", _inactive),
    Check("KT002", "Nothing was learned", "warning", _nothing_learned),
    Check("KT003", "Evaluation rows were trained on", "warning", _leaked),
    Check("KT004", "Too few examples", "warning", _few_examples),
    Check("KT005", "The run is not finished", "warning", _unfinished),
    Check("KT007", "Evidence is missing", "error", _no_evidence),
    Check("KT009", "A guard starts near zero", "warning", _low_start),
    Check("KT010", "No guard", "note", _no_guard),
    Check("KT011", "Rows were cut", "warning", _cut),
    Check("KT012", "A watched line was crossed", "warning", _fallen),
    Check("KT013", "The budget allowed nothing", "warning", _nothing_taken),
)
COMPARISONS = (
    Comparison("KT006", "One seed only", "note", _one_seed),
    Comparison("KT008", "Runs that cannot be compared", "error", _unlike),
)
