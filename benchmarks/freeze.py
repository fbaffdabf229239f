"""What it costs to hold weights still, as ratios measured side by side in one run.

    python benchmarks/freeze.py [--small] [--markdown FILE]     # --small leaves out SmolLM2-135M

As `anchor.py`: one thread, process CPU time, in turns with the order reversed every round, medians;
float32, batches of 8 rows of 64 tokens. A step is forward, backward and a fused AdamW over what is
trained. What packnet adds is timed alone and divided by a plain step. Tokens per second are of this
machine, by CPU time of the one thread.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console

from anchor import Report, Subject, adapted, extra
from keeptune import Freeze, Half, Method, PackNet, Progressive, models
from run import five_million, interleaved

TOKENS = 8 * 64


def begun(name: str, model: Any, method: Method | None = None) -> Subject:
    """A model in the first task of a method, with an optimizer over what is trained."""
    subject = Subject(name, model, 8, 1)
    if method is not None:
        method.begin_task(subject.ctx)
        subject.model.train()
    trained = list(subject.ctx.trainable().values())
    subject.adamw = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    return subject


Case = tuple[Any, Method | None]


def timed(name: str, cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """CPU seconds of a whole step of each."""
    subjects = {key: begun(name, model, method) for key, (model, method) in cases.items()}
    return interleaved({key: one.step for key, one in subjects.items()}, rounds)


def steps(report: Report, name: str, make: Callable[[], Any], top: int, rounds: int) -> None:
    """Whole steps: all weights, half of them, the top layers, these from the cache, and others."""
    stack = make().config.num_hidden_layers
    top_of, frozen = f"top {top} of {stack}", {"layers": stack - top}
    seconds = timed(
        name,
        {
            "all weights": (make(), None),
            top_of: (make(), Freeze(**frozen)),
            f"{top_of}, from the cache": (make(), Freeze(**frozen, cache=True)),
        },
        rounds,
    )
    for what, spent in seconds.items():
        report.add(f"{what}: tokens/s", name, TOKENS / spent)
    plain, without, cached = seconds.values()
    # Of SmolLM2's operations all of the head's remain, and those of 8 layers: 1.55 by count.
    report.add(f"{top_of}: without the cache / with it", name, without / cached)
    goal = 3.8 if stack > 8 else None
    report.add(f"all weights / {top_of} from the cache", name, plain / cached, least=goal)
    halves = timed(name, {"plain": (make(), None), "half": (make(), Half())}, rounds)
    report.add("half / plain step", name, halves["half"] / halves["plain"])
    lora = adapted(make(), "all-linear")
    others = timed(name, {"lora": (lora, None), "column": (make(), Progressive())}, rounds)
    report.add("progressive, first column / LoRA step", name, others["column"] / others["lora"])


def masking(report: Report, name: str, model: Any, rounds: int) -> None:
    """What packnet adds to an ordinary step of the second task."""
    subject, method = Subject(name, model, 8, 1), PackNet()
    subject.step()
    plain = interleaved({"plain": subject.step}, rounds)["plain"]
    subject.after(method, 1)
    weights = list(subject.ctx.trainable().values())
    subject.adamw = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0, fused=True)
    subject.forward_backward()
    every, owned = dict(subject.model.named_parameters()), method._owned

    @torch.no_grad()
    def back() -> None:
        owned.put_back(every)

    alone = interleaved({"step": extra(subject, method), "back": back}, 3 * rounds)
    report.add("packnet masks / plain step", name, alone["step"] / plain, most=0.015)
    report.add("packnet putting all back / plain step", name, alone["back"] / plain)
    whole = interleaved({"second": subject.step}, rounds)["second"]
    note = "norms and embeddings are frozen"
    report.add("step of packnet's second task, unmasked / plain", name, whole / plain, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="leave out SmolLM2-135M")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    given = parser.parse_args()
    report = Report()
    cases: list[tuple[str, Callable[[], Any], int, int]] = [("5M", five_million, 1, 9)]
    if not given.small:
        cases.append(("SmolLM2-135M", lambda: models.load("demo").model, 8, 3))
    for name, make, top, rounds in cases:
        steps(report, name, make, top, rounds)
        masking(report, name, make(), rounds)
    Console(width=120).print(report.table())
    if given.markdown:
        given.markdown.write_text(report.markdown(), "utf-8")


if __name__ == "__main__":
    main()
