"""The two stages of a study whose runs go through `keeptune.fit`: run, and report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from lines import Run, Runs, append, read, write

SEEDS = (0, 1, 2)


def command_line(about: str, page: Path, methods: Collection[str]) -> argparse.ArgumentParser:
    """What every study can be asked.

    Args:
        about: Its docstring.
        page: Its page; lines and run folders are named after it.
        methods: Names of what it compares.
    """
    name = page.stem
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("stage", choices=["run", "report"])
    parser.add_argument(
        "--out",
        type=Path,
        default=page.with_name(f"{name}-runs.jsonl"),
        help="one JSON line a run",
    )
    parser.add_argument("--folders", type=Path, default=Path("runs", name), help="run folders")
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    return parser


def run(
    jobs: Iterable[Run], out: Path, folders: Path, execute: Callable[..., Run], *shown: str
) -> None:
    """Run the jobs that have no line yet, and append a line for each as it ends.

    Args:
        jobs: What makes each run one of its own; the first fields of its line.
        out: One JSON line a run.
        folders: Where the run folders are made.
        execute: Called with a job's fields and its `folder`; gives the rest of its line.
        shown: Fields of the line to print; of a list its last entry.
    """
    done = read(out)
    for job in jobs:
        if any(job.items() <= line.items() for line in done):
            continue
        name = "-".join(str(value) for value in job.values()).replace(", ", "-").replace(" ", "-")
        line = job | execute(**job, folder=folders / name)
        append(out, line)
        values = [line[key] for key in shown]
        print(*job.values(), *(v[-1] if isinstance(v, list) else v for v in values), flush=True)


def report(out: Path, page: Path, tables: Callable[[Runs], dict[str, str]]) -> None:
    """Put the tables of all runs between the page's markers."""
    write(page, tables(read(out)))


def study(
    about: str,
    page: Path,
    methods: Collection[str],
    tables: Callable[[Runs], dict[str, str]],
    execute: Callable[..., Run],
    *,
    axis: tuple[str, str, Collection[str]] | None = None,
    shown: Sequence[str] = ("R", "G", "seconds"),
) -> None:
    """Both stages of a study that varies the method, the seed, and perhaps one thing more.

    Args:
        about: As in `command_line`.
        page: As in `command_line`.
        methods: As in `command_line`.
        tables: As in `report`.
        execute: As in `run`.
        axis: The further thing's field in a line, its option, and what it can be.
        shown: As in `run`.
    """
    parser = command_line(about, page, methods)
    if axis is not None:
        parser.add_argument(axis[1], dest="axis", nargs="+", choices=axis[2], default=axis[2])
    args = parser.parse_args()
    if args.stage == "report":
        report(args.out, page, tables)
        return
    places: list[Run] = [{axis[0]: chosen} for chosen in args.axis] if axis else [{}]
    jobs = [
        {**place, "method": method, "seed": seed}
        for seed in args.seeds
        for place in places
        for method in args.methods
    ]
    run(jobs, args.out, args.folders, execute, *shown)
