"""What the low-rank and averaging methods cost, as ratios measured side by side in one run.

    python benchmarks/lowrank.py [--small] [--markdown FILE]     # --small leaves out SmolLM2-135M

As `anchor.py`: one thread, process CPU time, in turns with the order reversed every round, medians;
float32, LoRA of rank 16 on all linear layers, batches of 8 rows of 64 tokens. What a method adds to
a step is timed alone, with real gradients in place, and divided by a plain LoRA step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from anchor import Report, Subject, adapted, extra, held
from keeptune import EMA, OSF, ILoRA, OLoRA, models
from run import five_million, interleaved


def averages(report: Report, subject: Subject) -> None:
    """The moving average, and replay with its hidden states."""
    name = subject.name
    ema = subject.after(EMA(), 1)
    replaying = {rows: subject.after(ILoRA(rows=rows), 1) for rows in (8, 2)}
    subject.step()
    alone = interleaved({"ema": extra(subject, ema)}, 5 * subject.rounds)
    median = interleaved(
        {"step": subject.step}
        | {str(rows): extra(subject, method) for rows, method in replaying.items()},
        subject.rounds,
    )
    step = median["step"]
    report.add("ema extra / LoRA step", name, alone["ema"] / step, most=0.005)
    for rows in replaying:
        share, whole = rows / 8, 1 + median[str(rows)] / step
        most = 1 + 1.5 * share
        report.add(f"ilora step, replay fraction {share:g} / LoRA step", name, whole, most=most)


def orthogonal(report: Report, make: Callable[[], Subject], earlier: int) -> None:
    """O-LoRA's term, and what the frozen adapters add to each step."""
    plain, stacked = make(), make()
    method = stacked.after(OLoRA(), earlier)
    stacked.step()
    term = interleaved({"term": extra(stacked, method, index=earlier)}, 5 * stacked.rounds)["term"]
    median = interleaved({"plain": plain.step, "stacked": stacked.step}, stacked.rounds)
    title = f"{earlier} earlier adapter{'s' if earlier > 1 else ''}"
    most = 0.005 if earlier == 1 else None
    report.add(f"olora term, {title} / LoRA step", plain.name, term / median["plain"], most=most)
    ratio = median["stacked"] / median["plain"]
    report.add(f"olora step without the term, {title} / LoRA step", plain.name, ratio)


def memory(report: Report, make: Callable[[], Subject]) -> None:
    """What the average holds between steps."""
    subject = make()
    trained = sum(p.nbytes for p in subject.parameters)
    report.add("ema: held / trained weights", subject.name, held(subject, EMA(), 1) / trained)


def held_subspace(report: Report, subject: Subject) -> None:
    """OSF on all weights, with half of the directions held."""
    osf = subject.after(OSF(grow=0), 1)
    subject.step()
    median = interleaved({"step": subject.step, "osf": extra(subject, osf)}, subject.rounds)
    report.add("osf extra / plain step", subject.name, median["osf"] / median["step"])


def measure(report: Report, name: str, make: Callable[[], Any], rounds: int) -> None:
    def subject() -> Subject:
        return Subject(f"{name} LoRA", adapted(make(), "all-linear"), 16, rounds)

    averages(report, subject())
    for earlier in (1, 4):
        orthogonal(report, subject, earlier)
    memory(report, subject)
    held_subspace(report, Subject(name, make(), 16, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="leave out SmolLM2-135M")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    given = parser.parse_args()
    report = Report()
    measure(report, "5M", five_million, rounds=9)
    if not given.small:
        measure(report, "SmolLM2-135M", lambda: models.load("demo").model, rounds=3)
    Console(width=120).print(report.table())
    if given.markdown:
        given.markdown.write_text(report.markdown(), "utf-8")


if __name__ == "__main__":
    main()
