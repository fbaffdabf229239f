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
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from keeptune import models, phantom, prices, registry, sizing
from keeptune.dressing import dress
from sizing import ADAPTERS, STRATEGIES, Clock, case_of, learn_two

Figures = dict[str, float]

BATCH = phantom.Batch(8, 512, half=True, recompute=True)
HEADS = ("model", "strategy", "trained", "what", "estimate", "measured", "ratio", "verdict")
MARKS = ("---", "---", "---", "---", "---:", "---:", "---:", "---")


def now() -> float:
    """Seconds, when all that was asked of the GPU is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def configs() -> dict[str, Any]:
    big = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    return {"135M": AutoConfig.from_pretrained(models.demo_folder()), "1.2B": big}


def one(config: Any, tokenizer: Any, case: prices.Case, strategy: str, trained: str) -> Figures:
    """Train two tasks, and measure and estimate the second."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    methods, clock = [registry.build(strategy)], Clock(case, now)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = dress(model, ADAPTERS[trained], 0)
    learn_two(model, tokenizer, methods, clock, torch.cuda.reset_peak_memory_stats)
    speed, needed = clock.speed(), sizing.need(methods, case)
    return {
        "memory": torch.cuda.max_memory_allocated() - before,
        "memory_estimate": needed.memory,
        "seconds": statistics.median(clock.steps),
        "seconds_estimate": needed.seconds(speed),
        "tflops": speed.flops / 1e12,
    }


def lines(found: dict[tuple[str, str, str], Figures]) -> list[tuple[str, ...]]:
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
            case = case_of(config, adapter, given.steps, BATCH)
            for strategy in STRATEGIES:
                key = name, strategy, trained
                found[key] = one(config, tokenizer, case, strategy, trained)
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
