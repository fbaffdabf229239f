"""What a run needs: memory of each device, bytes on disk, and time, before anything is loaded.

Plain training is counted on a model without memory (`phantom`), what methods add comes from the
table in `prices`, and seconds from two short measurements of this machine:

    memory = weights + optimizer + gradients and activations + methods
    seconds = products / (products a second) + bytes / (bytes a second), small pieces and large
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from keeptune.head_pass import CHUNK
from keeptune.machine import fastest
from keeptune.method import Method
from keeptune.phantom import WIDE, Batch, Step, count
from keeptune.prices import PRICES, Case, Price
from keeptune.tokens import Tokenised

ADAM_MOVES = 28  # bytes of a weight: it, its gradient and moments are read, all but one written
DEVICES = (1, 2, 4, 8, 16, 32)
TILE = 2**24  # numbers in memory that is fresh
# Numbers that an optimizer keeps for a weight, by parts of its name; all others keep none.
STATES = {
    "ademamix": 3, "schedule_free_sgd": 1, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1,
}  # fmt: skip
HEAD_PASS = 2 * WIDE * CHUNK  # bytes in logits of answers and in what is made of them
# On a CPU freed pieces of memory stay with the process as holes between those in use. Measured on
# SmolLM2-135M: from 0.4 (all weights) to 0.8 (LoRA) of what a forward keeps for its backward.
HOLES = 0.6


@dataclass(frozen=True)
class Speed:
    """What this machine does in a second.

    Attributes:
        flops: Operations in matrix products.
        traffic: Bytes read and written in small pieces of memory.
        streamed: Bytes read and written in large ones.
    """

    flops: float
    traffic: float
    streamed: float


@dataclass(frozen=True)
class Need:
    """What a strategy needs.

    Attributes:
        weights: Bytes of all weights.
        optimizer: Bytes of Adam's moments.
        gradients: Bytes of gradients at the end of a backward.
        peak: Most bytes of gradients and activations at any time of a step.
        activations: Most bytes of a step beside the layers' gradients and the copies of weights
            in half precision; no number of devices divides them.
        spread: Bytes that methods hold for weights.
        whole: Bytes that methods hold otherwise.
        kept: Bytes that a forward keeps for its backward.
        layer: Bytes of the largest layer.
        state: Bytes that a saved state has on disk.
        rows: Training rows for each new row.
        flops: Of a step.
        traffic: Bytes moved in a step, in small pieces of memory.
        streamed: Those in large ones, and for whole weights, the optimizer's among them.
    """

    weights: float
    optimizer: float
    gradients: float
    peak: float
    activations: float
    spread: float
    whole: float
    kept: float
    layer: float
    state: float
    rows: float
    flops: float
    traffic: float
    streamed: float

    @property
    def memory(self) -> float:
        """Most bytes in use on one device."""
        return self.weights + self.optimizer + self.peak + self.spread + self.whole

    @property
    def resident(self) -> float:
        """Most bytes that a process on a CPU has, its holes included, beside its libraries."""
        return self.memory + HOLES * self.kept

    def ddp(self, devices: int) -> float:
        """Bytes on each of several devices under DDP, which keeps a second copy of gradients."""
        return self.memory + self.gradients * (devices > 1)

    def fsdp(self, devices: int) -> float:
        """Bytes on each of several devices under FSDP2.

        All that belongs to weights is divided. Not divided are the activations of a device's own
        rows, kept rows, and two layers that are whole at a time, each with its gradients.
        """
        if devices == 1:
            return self.memory
        divided = self.weights + self.optimizer + self.gradients + self.spread
        return divided / devices + self.activations + 4 * self.layer + self.whole

    def seconds(self, speed: Speed) -> float:
        """Of a step."""
        return (
            self.flops / speed.flops + self.traffic / speed.traffic + self.streamed / speed.streamed
        )


def need(methods: Sequence[Method], case: Case, logits: Step | None = None) -> Need:
    """What a strategy needs in a model's training.

    Args:
        methods: The strategy; empty is plain. One of another package adds nothing.
        case: Model, batch and tasks.
        logits: The step with the logits of all positions, where a method of it needs those.
    """
    known = [m for m in methods if m.name() in PRICES and not m.is_neutral()]
    prices = [PRICES[m.name()](m, case) for m in known]
    step = logits or case.step
    top = step.top
    if logits is None and any("answers" in m.needs for m in known):
        # Its loss is one pass over the head, which holds less than the trainer's own.
        top = step.kept + HEAD_PASS + case.head
    idle = max((p.idle for p in prices), default=0.0)
    skipped = max((p.skipped for p in prices), default=0.0)
    trained = step.trained * (1 - idle) + _sum(prices, lambda p: p.own)
    gradients = WIDE * trained
    saved = WIDE * step.trained * idle
    forwards = 1 + _sum(prices, lambda p: p.forwards + p.passes)
    backwards = 1 - skipped + _sum(prices, lambda p: p.passes)
    passing = max((p.passing for p in prices), default=0.0)
    own = _sum(prices, lambda p: WIDE * p.own)
    return Need(
        weights=WIDE * step.weights + own,
        optimizer=case.moments * trained,
        gradients=gradients + passing,
        peak=max(top + gradients * case.batch.accumulated, step.rest - saved) + passing + own,
        activations=max(step.lean, step.rest - WIDE * step.trained),
        spread=_sum(prices, lambda p: p.spread),
        whole=_sum(prices, lambda p: p.whole),
        kept=step.kept,
        layer=WIDE * step.largest,
        state=WIDE * (step.trained if case.adapted else step.weights)
        + _sum(prices, lambda p: p.kept),
        rows=math.prod(p.rows for p in prices),
        flops=forwards * step.forward_flops + backwards * step.backward_flops,
        traffic=forwards * (step.forward_traffic - step.forward_streamed)
        + backwards * (step.backward_traffic - step.backward_streamed),
        streamed=forwards * step.forward_streamed
        + backwards * step.backward_streamed
        + ADAM_MOVES * trained
        + _sum(prices, lambda p: p.moved),
    )


def _sum(prices: Sequence[Price], part: Callable[[Price], float]) -> float:
    return sum(part(price) for price in prices)


class Sizer:
    """Says what strategies need in a model's training; what is counted is counted once.

    Args:
        config: The model's, of transformers.
        adapter: A PEFT config, or None to train all weights.
        settings: The trainer's, as in a recipe.
        kind: "causal_lm" or "classification".
        longest: Tokens of the longest row: a batch of such rows decides the memory.
        rows: Training rows of a task.
        tokens: Tokens of a row, on average.
        answers: Those of them that are learned.
    """

    def __init__(
        self,
        config: Any,
        adapter: Any,
        settings: Mapping[str, Any],
        *,
        kind: str = "causal_lm",
        longest: int = 512,
        rows: int = 1000,
        tokens: float = 128.0,
        answers: float = 64.0,
    ) -> None:
        self._model = (config, adapter, kind)
        # What TRL chooses there; transformers, which trains classifiers, does not.
        on_gpu = torch.cuda.is_available() and kind != "classification"
        recompute = settings.get("gradient_checkpointing", on_gpu)
        batch = Batch(
            rows=settings.get("per_device_train_batch_size", 8),
            length=longest,
            half=bool(settings.get("bf16", on_gpu)),
            recompute=bool(settings.get("activation_checkpointing", recompute)),
            accumulated=settings.get("gradient_accumulation_steps", 1) > 1,
        )
        text = config.get_text_config()
        self.case = Case(
            step=self._count(batch),
            batch=batch,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            vocabulary=text.vocab_size,
            adapted=adapter is not None,
            moments=_moments(settings.get("optim", "adamw")),
            rows=rows,
            tokens=tokens,
            answers=answers,
        )
        self._logits: Step | None = None

    @classmethod
    def of(
        cls,
        config: Any,
        adapter: Any,
        settings: Mapping[str, Any],
        tasks: Sequence[Tokenised],
        *,
        kind: str,
    ) -> Sizer:
        """What sizes a run on these tasks: batches of their longest row, tasks of the mean size."""
        rows = sum(len(task.dataset) for task in tasks)
        return cls(
            config,
            adapter,
            settings,
            kind=kind,
            longest=max(len(ids) for task in tasks for ids in task.dataset["input_ids"]),
            rows=-(-rows // len(tasks)),
            tokens=sum(task.tokens for task in tasks) / rows,
            answers=sum(task.answer_tokens for task in tasks) / rows,
        )

    def _count(self, batch: Batch) -> Step:
        config, adapter, kind = self._model
        return count(config, adapter, batch, kind=kind)

    def need(self, methods: Sequence[Method], past: int = 1) -> Need:
        """What a strategy needs while a task is learned after so many others."""
        case = replace(self.case, past=past)
        if not any("logits" in m.needs for m in methods if not m.is_neutral()):
            return need(methods, case)
        if self._logits is None:
            self._logits = self._count(replace(case.batch, logits=True))
        return need(methods, case, self._logits)


def _moments(optimizer: str) -> float:
    """Bytes of optimizer state for a weight."""
    states = next((count for name, count in STATES.items() if name in optimizer), 0)
    bits = next((bits for bits in (4, 8) if f"{bits}bit" in optimizer), 8 * WIDE)
    return states * bits / 8


def measure_speed(case: Case, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Measure this machine, as busy as it is, in about a second.

    Products and small pieces have a layer's own shapes; a large piece is fresh memory of the size
    of a head's tile, which the system gives page by page, as it does in a step.
    """
    tokens = case.batch.rows * case.batch.length
    device = fastest()
    kind = torch.bfloat16 if case.batch.half else torch.float32
    wide = max(int(case.step.largest / case.hidden / 4), 1)
    states = torch.ones(tokens, case.hidden, device=device, dtype=kind)
    matrix = torch.ones(case.hidden, wide, device=device, dtype=kind)
    tile = torch.ones(TILE, device=device)
    products = _seconds(lambda: states @ matrix, clock)
    small = states @ matrix
    return Speed(
        2 * tokens * matrix.numel() / products,
        2 * small.nbytes / _seconds(lambda: small + 1, clock),
        2 * tile.nbytes / _seconds(lambda: tile + 1, clock),
    )


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    """The median of a few calls, after one that is not counted."""
    seconds = []
    for _ in range(6):
        started = clock()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return statistics.median(seconds[1:])
