"""What the studies share: one JSON line a run, and tables of estimates on a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keeptune.intervals import Estimate, over_seeds

Run = dict[str, Any]
Runs = list[Run]


def read(path: Path) -> Runs:
    """The runs in a file; a line that was torn by a kill is left out."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(path: Path, run: Run) -> None:
    """Add one run to a file, on a line of its own even after a torn one."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(run).encode() + b"\n")


def on(key: str, formula: Callable[[Any], Any]) -> Callable[[Run], float]:
    """A formula's value on one of a run's matrices."""
    return lambda run: float(formula(np.array(run[key])))


def over(runs: Runs, value: Callable[[Run], float]) -> Estimate:
    """Mean of runs of several seeds."""
    return over_seeds([value(run) for run in runs])


def paired(runs: Runs, others: Runs, value: Callable[[Run], float]) -> Estimate:
    """Mean difference between runs of the same seeds."""
    by_seed = {run["seed"]: value(run) for run in others}
    both = [value(run) - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed]
    return over_seeds(both)


def points(estimate: Estimate, *, signed: bool = False) -> str:
    """A share in points with half of its interval; a change marked where it is not noise."""
    if estimate.value is None:
        return ""
    text = f"{100 * estimate.value:{'+' if signed else ''}.1f}"
    if estimate.low is not None:
        text += f" ± {100 * (estimate.value - estimate.low):.1f}"
    if signed:
        text += " ▲" if estimate.is_above else " ▼" if estimate.is_below else ""
    return text


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A table whose first column is text, and all others figures; its first line is given."""
    lines = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def by_method(
    head: str, runs: Runs, methods: Iterable[str], cells: Callable[[Runs, Runs], Iterator[str]]
) -> str:
    """A table with a row for each method that was run.

    Args:
        head: The table's first line.
        runs: Of all methods.
        methods: In the order of the rows.
        cells: Called with a method's runs and those of plain training, which are none for plain
            itself.
    """

    def rows() -> Iterator[list[str]]:
        for label in methods:
            if found := [run for run in runs if run["method"] == label]:
                plain = [run for run in runs if run["method"] == "plain"]
                yield [label, *cells(found, plain if label != "plain" else [])]

    return table(head, rows())


def fill(page: str, name: str, text: str) -> str:
    """A page with `text` between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    before, begin, rest = page.partition(f"<!-- begin {name} -->")
    _, end, after = rest.partition(f"<!-- end {name} -->")
    assert end, f"the page has no markers for {name}"
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def write(page: Path, tables: dict[str, str]) -> None:
    """Put each table between the page's markers of its name; everything else stays as it is."""
    text = page.read_text("utf-8")
    for name, filled in tables.items():
        text = fill(text, name, filled)
    page.write_text(text, "utf-8")
