"""What `keeptune check` and `keeptune advise` estimate of a GPU, against steps on one.

    python benchmarks/gpu.py [--steps N] [--markdown FILE]

SmolLM2-135M, and a Llama of 1.2 billion random weights: two tasks, batches of 8 rows of 512 tokens,
with TRL's settings for GPUs: bfloat16 products over float32 weights, layers computed again in the
backward. Memory is the most that was allocated in the second task, of weights, optimizer and all; a
step's time is the median there. Goals: memory within 15 %, time within 30 %.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, TrainerCallback

from keeptune import models, phantom, prices, registry, sizing, tokens
from keeptune.session import dress
from keeptune.trainers import build_trainer
from sizing import ADAPTERS, STRATEGIES, rows

ROWS, LENGTH = 8, 512
HEADS = ("model", "strategy", "trained", "what", "estimate", "measured", "ratio", "verdict")
MARKS = ("---", "---", "---", "---", "---:", "---:", "---:", "---")


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, and the GPU's speed before it."""

    def __init__(self, case: prices.Case) -> None:
        self.case = case
        self.steps: list[float] = []
        self.speeds: list[sizing.Speed] = []
        self.began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.speeds.append(sizing.measure_speed(self.case))
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.steps.append(time.perf_counter() - self.began)


def configs() -> dict[str, Any]:
    big = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    return {"135M": AutoConfig.from_pretrained(models.demo_folder()), "1.2B": big}


def case_of(config: Any, adapter: Any, steps: int) -> prices.Case:
    batch = phantom.Batch(ROWS, LENGTH, half=True, recompute=True)
    return prices.Case(
        step=phantom.count(config, adapter, batch),
        batch=batch,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        adapted=adapter is not None,
        past=1,
        rows=ROWS * steps,
        tokens=LENGTH,
        answers=LENGTH,
    )


def one(
    config: Any, tokenizer: Any, case: prices.Case, strategy: str, trained: str, steps: int
) -> dict[str, float]:
    """Train two tasks, and measure and estimate the second."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    methods, clock = [registry.build(strategy)], Clock(case)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with TemporaryDirectory() as folder:
        data = [rows(config.vocab_size, ROWS * steps, seed, length=LENGTH) for seed in (0, 1)]
        trainer = build_trainer(
            "causal_lm", dress(model, ADAPTERS[trained], 0), tokenizer, data[0], methods,
            {"output_dir": folder, "per_device_train_batch_size": ROWS, "num_train_epochs": 1,
             "seed": 0},
            tokens.collate(tokenizer),
        )  # fmt: skip
        trainer.progress_root = Path(folder, "progress")
        trainer.watch(lambda *_: None, 60.0, Event())
        trainer.add_callback(clock)
        trainer.learn("first", data[0])
        clock.steps.clear()
        clock.speeds.clear()
        torch.cuda.reset_peak_memory_stats()
        trainer.learn("second", data[1])
    speed = sizing.Speed(
        *(
            statistics.median(getattr(speed, name) for speed in clock.speeds)
            for name in ("flops", "traffic", "streamed")
        )
    )
    needed = sizing.need(methods, case)
    return {
        "memory": torch.cuda.max_memory_allocated() - before,
        "memory_estimate": needed.memory,
        "seconds": statistics.median(clock.steps),
        "seconds_estimate": needed.seconds(speed),
        "tflops": speed.flops / 1e12,
    }


def lines(found: dict[tuple[str, str, str], dict[str, float]]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    made = []

    def add(key: tuple[str, ...], what: str, guess: float, real: float, goal: float) -> None:
        off = guess / real
        verdict = "met" if 1 - goal <= off <= 1 + goal else "NOT met"
        made.append((*key, what, f"{guess:.3g}", f"{real:.3g}", f"{off:.2f}", verdict))

    for key, got in found.items():
        add(key, "memory, GiB", got["memory_estimate"] / 2**30, got["memory"] / 2**30, 0.15)
        add(key, "a step, s", got["seconds_estimate"], got["seconds"], 0.30)
        plain = found[(key[0], "plain", key[2])]
        if got is not plain:
            guess, real = (got[n] / plain[n] for n in ("seconds_estimate", "seconds"))
            add(key, "step / plain", guess, real, 0.30)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="steps of a task")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    given = parser.parse_args()
    tokenizer = models.load("demo").tokenizer
    found = {}
    for name, config in configs().items():
        for trained, adapter in ADAPTERS.items():
            case = case_of(config, adapter, given.steps)
            for strategy in STRATEGIES:
                key = name, strategy, trained
                found[key] = one(config, tokenizer, case, strategy, trained, given.steps)
                print(*key, found[key], flush=True)
    made = lines(found)
    table = Table(*HEADS)
    for line in made:
        table.add_row(*line)
    Console(width=120).print(torch.cuda.get_device_name(), table)
    if given.markdown:
        text = "".join(f"| {' | '.join(line)} |\n" for line in (HEADS, MARKS, *made))
        given.markdown.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
