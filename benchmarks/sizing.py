"""What `keeptune check` and `keeptune advise` estimate, against what runs really take.

    python benchmarks/sizing.py [--only NAME] [--steps N] [--markdown FILE]

SmolLM2-135M, each strategy in a fresh process: two tasks, batches of 8 rows of 64 tokens, float32,
one thread. Memory is the largest resident size less that after imports: as it is ("resident"), and
where freed memory goes back at once ("in use"). A step's time is process CPU time, the median over
the second task; the machine is measured before each step. Goals: memory within 15 %, time within
30 %; nothing here is asserted by a test.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, TrainerCallback

from keeptune import machine, models, phantom, prices, registry, sizing, tokens
from keeptune.dressing import dress
from keeptune.method import Method
from keeptune.trainers import build_trainer

torch.set_num_threads(1)
ROWS, LENGTH = 8, 64
STRATEGIES = ("plain", "replay", "lwf", "ewc")
ADAPTERS = {
    "all weights": None,
    "LoRA": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
}
# Every piece of memory is given back at once, so that none stays as a hole.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
HEADS = ("strategy", "trained", "what", "estimate", "measured", "ratio", "goal", "verdict")


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, and the machine's speed before it.

    Args:
        case: What is run.
        now: The time in seconds; by default of this process alone.
    """

    def __init__(self, case: prices.Case, now: Callable[[], float] = time.process_time) -> None:
        self.case, self.now = case, now
        self.steps: list[float] = []
        self.speeds: list[sizing.Speed] = []
        self.began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.speeds.append(sizing.measure_speed(self.case, self.now))
        self.began = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.now() - self.began)

    def speed(self) -> sizing.Speed:
        """The median of what was measured."""
        names = ("flops", "traffic", "streamed")
        return sizing.Speed(*(statistics.median(getattr(s, n) for s in self.speeds) for n in names))


def rows(vocabulary: int, count: int, seed: int, length: int) -> Dataset:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, vocabulary, (count, length), generator=random).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def case_of(config: Any, adapter: Any, steps: int, batch: phantom.Batch) -> prices.Case:
    return prices.Case(
        step=phantom.count(config, adapter, batch),
        batch=batch,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        adapted=adapter is not None,
        past=1,
        rows=batch.rows * steps,
        tokens=batch.length,
        answers=batch.length,
    )


def learn_two(
    model: Any, tokenizer: Any, methods: Sequence[Method], clock: Clock, between: Callable[[], None]
) -> None:
    """Learn two tasks; the clock tells of the second alone, before which `between` is called."""
    case = clock.case
    with TemporaryDirectory() as folder:
        data = [rows(case.vocabulary, int(case.rows), seed, case.batch.length) for seed in (0, 1)]
        trainer = build_trainer(
            "causal_lm", model, tokenizer, data[0], methods,
            {"output_dir": folder, "per_device_train_batch_size": case.batch.rows,
             "num_train_epochs": 1, "seed": 0},
            tokens.collate(tokenizer),
        )  # fmt: skip
        trainer.progress_root = Path(folder, "progress")
        trainer.watch(lambda *_: None, 60.0, Event())
        trainer.add_callback(clock)
        trainer.learn("first", data[0])
        clock.steps.clear()
        clock.speeds.clear()
        between()
        trainer.learn("second", data[1])


def one(strategy: str, trained: str, steps: int) -> dict[str, float]:
    """Run one strategy here, and measure and estimate it."""
    adapter, methods = ADAPTERS[trained], [registry.build(strategy)]
    config = AutoConfig.from_pretrained(models.demo_folder())
    case = case_of(config, adapter, steps, phantom.Batch(ROWS, LENGTH))
    clock = Clock(case)
    clock.on_step_begin()
    before = resident()
    loaded = models.load("demo")
    model = dress(loaded.model, adapter, 0)
    learn_two(model, loaded.tokenizer, methods, clock, lambda: None)
    memory, speed = machine.peak_memory() - before, clock.speed()
    needed = sizing.need(methods, case)
    return {
        "memory": memory,
        "used_estimate": needed.memory,
        "resident_estimate": needed.resident,
        "seconds": statistics.median(clock.steps),
        "seconds_estimate": needed.seconds(speed),
        "plain_estimate": sizing.need([], case).seconds(speed),
        "gflops": speed.flops / 1e9,
        "small": speed.traffic / 1e9,
        "large": speed.streamed / 1e9,
    }


def apart(strategy: str, trained: str, steps: int, more: dict[str, str]) -> dict[str, float]:
    """Run one strategy in a fresh process."""
    words = [sys.executable, __file__, "--here", strategy, trained, "--steps", str(steps)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, env=os.environ | more)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines(found: dict[tuple[str, str], dict[str, float]]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    made = []

    def add(key: tuple[str, str], what: str, guess: float, real: float, unit: str, goal: float):
        off = guess / real
        good = 1 - goal <= off <= 1 + goal
        shown = f"{guess:.2f}{unit}", f"{real:.2f}{unit}", f"{off:.2f}", f"±{goal:.0%}"
        made.append((*key, what, *shown, "met" if good else "NOT met"))

    for key, got in found.items():
        gib = 2**30
        add(key, "in use", got["used_estimate"] / gib, got["used"] / gib, " GiB", 0.15)
        add(key, "resident", got["resident_estimate"] / gib, got["memory"] / gib, " GiB", 0.15)
        add(key, "a step", got["seconds_estimate"], got["seconds"], " s", 0.30)
        plain = found.get(("plain", key[1]))
        if plain and key[0] != "plain":
            guess = got["seconds_estimate"] / got["plain_estimate"]
            add(key, "step / plain", guess, got["seconds"] / plain["seconds"], "", 0.30)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="one strategy")
    parser.add_argument("--steps", type=int, default=4, help="steps of a task")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(one(*given.here, given.steps)))
        return
    found = {}
    for trained in ADAPTERS:
        for strategy in [given.only] if given.only else STRATEGIES:
            usual, mapped = (apart(strategy, trained, given.steps, more) for more in ({}, MAPPED))
            found[strategy, trained] = usual | {"used": mapped["memory"]}
            print(strategy, trained, found[strategy, trained], file=sys.stderr)
    table = Table(*HEADS)
    made = lines(found)
    for line in made:
        table.add_row(*line)
    Console(width=120).print(table)
    if given.markdown:
        marks = ("---", "---", "---", "---:", "---:", "---:", "---", "---")
        text = "".join(f"| {' | '.join(line)} |\n" for line in (HEADS, marks, *made))
        given.markdown.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
