"""What keeptune costs, as ratios measured side by side in one run.

    python benchmarks/run.py [--small]      # --small leaves out SmolLM2-135M

One thread, process CPU time (a shared machine's wall clock says little), the order reversed every
round, medians. The goals are printed beside the figures; nothing here is asserted by a test.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from keeptune import models, tokens
from keeptune.evaluate import score_rows
from keeptune.rows import read_rows
from keeptune.streams import toy
from keeptune.trainers import build_trainer

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each variant, run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for name in variants:
        variants[name]()
    for turn in range(rounds):
        for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
            start = time.process_time()
            variants[name]()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def five_million() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def rows(vocab: int, n: int, length: int = 64) -> Dataset:
    ids = torch.randint(10, vocab, (n, length), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def training(make: Callable[[], Any], tokenizer: Any, steps: int, rounds: int) -> float:
    """CPU seconds of keeptune's plain run over those of the bare TRL trainer."""
    with TemporaryDirectory() as folder:
        first = make()
        data = rows(first.config.vocab_size, 8 * steps)
        common: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": 8, "max_steps": steps, "seed": 0,
        }  # fmt: skip
        bare = SFTTrainer(
            first,
            SFTConfig(
                **common, bf16=False, activation_checkpointing=False, save_strategy="no",
                report_to="none", disable_tqdm=True, max_length=None, dataloader_pin_memory=False,
                logging_steps=1,
            ),
            train_dataset=data, processing_class=tokenizer, data_collator=tokens.collate(tokenizer),
        )  # fmt: skip
        bare.remove_callback(transformers.PrinterCallback)
        ours = build_trainer(
            "causal_lm", make(), tokenizer, data, [], common, tokens.collate(tokenizer)
        )
        ours.progress_root = Path(folder, "progress")
        ours.watch(lambda *_: None, 10.0, Event())

        def run_bare() -> None:
            bare.optimizer = bare.lr_scheduler = None
            bare.train()

        median = interleaved({"bare": run_bare, "ours": lambda: ours.learn("t", data)}, rounds)
    return median["ours"] / median["bare"]


def evaluation(model: Any, tokenizer: Any, score: str, rounds: int) -> float:
    """CPU seconds of scoring one example at a time over those of batches of 16."""
    task = toy.stream(seed=0, train=1, evaluation=32)[0]
    chosen = task.eval
    if score == "choice":
        answers = [row["completion"].strip() for row in chosen.rows[:4]]
        chosen = read_rows(
            [
                {"prompt": r["prompt"], "choices": answers, "answer": i % 4}
                for i, r in enumerate(chosen.rows)
            ]
        )

    def at(size: int) -> Callable[[], Any]:
        return lambda: score_rows(model, tokenizer, chosen, score, batch_size=size)

    median = interleaved({"batched": at(16), "single": at(1)}, rounds)
    return median["single"] / median["batched"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="leave out SmolLM2-135M")
    small = parser.parse_args().small
    demo = models.load("demo")
    table = Table("what", "model", "ratio", "goal", "verdict")

    def line(what: str, model: str, ratio: float, goal: float, *, least: bool = False) -> None:
        good = ratio >= goal if least else ratio <= goal
        sign = "at least" if least else "at most"
        table.add_row(what, model, f"{ratio:.3f}", f"{sign} {goal}", "met" if good else "NOT met")

    plain = "plain run / bare TRL trainer"
    line(plain, "5M", training(five_million, demo.tokenizer, 8, 9), 1.03)
    if not small:
        line(
            plain,
            "SmolLM2-135M",
            training(lambda: models.load("demo").model, demo.tokenizer, 2, 5),
            1.03,
        )
        for score in ("exact_match", "choice", "perplexity"):
            ratio = evaluation(demo.model, demo.tokenizer, score, 3)
            line(f"{score}: one at a time / batched", "SmolLM2-135M", ratio, 3.0, least=True)
    Console().print(table)


if __name__ == "__main__":
    main()
