"""What the buffer of old rows costs: adding, drawing, memory, saving and reloading.

    python benchmarks/buffer.py [--rows N] [--markdown FILE]    # a million rows of 64 tokens

One thread, process CPU time, medians; ids below 49,152, half of each row an answer. Rows lie in
files as in a run folder, or in memory as without one. Goals are printed beside the figures; nothing
here is asserted by a test.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
from datasets import Dataset
from rich.console import Console

from anchor import Report
from keeptune import state
from keeptune.buffer import Buffer

TOKENS = 64
TASK = 50_000  # rows that are made at a time
REPEATS, LOOPS = 9, 300


def rows(count: int, first: int = 0) -> Dataset:
    """Rows of a language model that learns the second half of each."""
    ids = np.random.default_rng(first).integers(0, 49_152, (count, TOKENS)).astype(np.int32)
    labels = ids.copy()
    labels[:, : TOKENS // 2] = -100
    ends = pa.array(np.arange(count + 1) * TOKENS, pa.int32())
    columns = {
        name: pa.ListArray.from_arrays(ends, pa.array(values.reshape(-1)))
        for name, values in (("input_ids", ids), ("labels", labels))
    }
    return Dataset(pa.table(columns))


def seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def microseconds(work: Callable[[], Any]) -> float:
    """Of one call, the median of several loops."""

    def loop() -> None:
        for _ in range(LOOPS):
            work()

    return statistics.median(seconds(loop) for _ in range(REPEATS)) / LOOPS * 1e6


def fill(count: int, folder: Path) -> None:
    """Fill a buffer in files, task by task, and print the process's memory that is not mapped."""
    buffer = Buffer(None)
    for first in range(0, count, TASK):
        task = rows(min(TASK, count - first), first)
        buffer.add(task, "task", np.random.default_rng(first), folder=folder)
    lines = Path("/proc/self/status").read_text().splitlines()
    anonymous = next(line for line in lines if line.startswith("RssAnon"))
    sys.stdout.write(f"{int(anonymous.split()[1]) * 1024}\n")


def memory_grown(count: int, root: Path) -> int:
    """Bytes by which a fresh process with so many rows is larger than one with few."""
    sizes = []
    for number, amount in enumerate((TASK, count)):
        command = [sys.executable, __file__, "--fill", str(amount), str(root / f"fill{number}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sizes.append(int(done.stdout.splitlines()[-1]))
    return sizes[1] - sizes[0]


def measure(report: Report, place: str, task: Dataset, folder: Path | None) -> Buffer:
    """Add rows to an empty buffer, and draw some of them."""
    tokens, random, buffer = len(task) * TOKENS, np.random.default_rng(0), Buffer(None)
    spent = seconds(lambda: buffer.add(task, "task", random, folder=folder))
    report.add("10^6 rows added a second, all kept", place, len(task) / spent / 1e6, least=0.7)
    tenth = Buffer(len(task) // 10)
    spent = seconds(lambda: tenth.add(task, "task", random, folder=folder))
    report.add("10^6 rows added a second, a tenth kept", place, len(task) / spent / 1e6, least=0.7)
    spent = microseconds(lambda: buffer.draw(8, random))
    report.add("draw 8 positions, us", place, spent)
    spent = microseconds(lambda: buffer.examples(buffer.draw(8, random)))
    report.add("draw 8 rows for a batch, us", place, spent, most=50)
    held = buffer.nbytes() - buffer.on_disk()
    report.add("bytes in memory / token", place, held / tokens, most=2.2)
    report.add("bytes in files / token", place, buffer.on_disk() / tokens)
    few = rows(8, 1)
    spent = seconds(lambda: buffer.add(few, "more", random, folder=folder))
    report.add("add 8 rows more, ms", place, spent * 1e3)
    return buffer


def floor(report: Report, count: int) -> None:
    """What any buffer must do: draw 8 numbers without repeats, and copy 8 rows of one array."""
    every = np.zeros((count, TOKENS), np.uint16)
    random = np.random.default_rng(0)
    spent = microseconds(lambda: every[random.choice(count, 8, replace=False)].astype(np.int64))
    report.add("draw 8 rows, us", "bare array", spent)


def saved(report: Report, buffer: Buffer, root: Path) -> None:
    """What a saved state costs beside the rows that are in files already."""
    folder, kept = root / "state", buffer.state()
    folder.mkdir()
    spent = seconds(lambda: state.write_method(folder, "method-0-replay", kept, {}))
    report.add("save a state, ms", "files", spent * 1e3)
    new = sum(file.stat().st_size for file in folder.iterdir() if file.stat().st_nlink == 1)
    report.add("bytes written for it / row", "files", new / len(buffer))
    again, loaded = Buffer(None), state.read_method(folder, "method-0-replay")
    spent = seconds(lambda: again.restore(loaded, root / "again"))
    report.add("reload it, ms", "files", spent * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--fill", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill:
        fill(int(options.fill[0]), Path(options.fill[1]))
        return
    report, task = Report(), rows(options.rows)
    with tempfile.TemporaryDirectory(prefix="buffer-", dir=".") as folder:
        root = Path(folder)
        saved(report, measure(report, "files", task, root / "files"), root)
        measure(report, "memory", task, None)
        floor(report, options.rows)
        grown = memory_grown(options.rows, root) / options.rows / TOKENS
        report.add("process grown by, bytes / token", "files", grown, most=2.2)
    Console(width=110).print(report.table())
    if options.markdown:
        options.markdown.write_text(report.markdown())


if __name__ == "__main__":
    main()
