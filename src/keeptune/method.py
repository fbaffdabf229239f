"""The one abstraction: a method has nine verbs, each with one permitted effect.

            for each task:  begin_task ─► data ─► [ forward ─► loss ─► backward ─► gradients ─►
                            step ─► after_step ]* ─► end_task
            to answer:      [ route ─► ] serve ─► prompt

`keeptune.chain` runs a list of methods as one. No method ever sees a trainer: what it may read is
`Context`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from datasets import Dataset
from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from torch import Tensor, nn

from keeptune.answers import Answers
from keeptune.errors import MethodError
from keeptune.reading import find_head, positions, read
from keeptune.refusals import sentence

IGNORED = -100  # a label without loss, as everywhere in torch
ADDED = "keeptune_added"  # a module of the model's own with weights that a method adds
OPTIONS = "options"  # a column for methods, which no trainer sees: the rows of every choice
Batch = dict[str, Tensor]
Ids = list[int]
Collate = Callable[[list[dict[str, Any]]], Batch]


@dataclass
class Context:
    """What a verb may read.

    Shape letters: B rows, L positions, V vocabulary (or number of classes), N answers in a batch
    (answer tokens of a language model, rows of a classifier).

    Attributes:
        model: The model itself, never a distributed wrapper.
        task: Name of the task being learned.
        index: Its position in the stream, from 0.
        dataset: Its own tokenised training rows (`input_ids`, `labels`), before any `data` verb.
        collate: Turns rows into a padded batch.
        seed: The run's seed.
        step: Optimizer steps done in this task.
        steps: Optimizer steps of this task in all; 0 until training begins.
        grad_scale: What gradients are multiplied by until they are clipped (fp16); else 1.
        may_overflow: Whether a step is left out when gradients are not finite (fp16).
        answers_in_step: Answers in the whole accumulated batch of this step, over all processes.
        learning_rate: Of the step that was just taken; set for `after_step`.
        tokenizer: The model's, for methods that let it write; None where the trainer has none.
        answers: Of this micro batch, for `loss` of a method that needs "answers": terms added to
            it are computed in one pass over the head, together with the trainer's own loss.
        folder: Where a method may keep files while the run goes on; None to keep all in memory.
            Files that are never changed again can be a part of its state.
        online: Whether the rows are a stream: each comes once, in its order, and none is known
            before its turn.
        rows_in_step: Rows of what `data` returns that one optimizer step takes, all processes'.
    """

    model: nn.Module
    task: str
    index: int
    dataset: Dataset
    collate: Collate
    seed: int = 0
    step: int = 0
    steps: int = 0
    grad_scale: float = 1.0
    may_overflow: bool = False
    answers_in_step: Tensor | float = 1.0
    learning_rate: float = 0.0
    tokenizer: Any = None
    answers: Answers | None = None
    folder: Path | None = None
    online: bool = False
    rows_in_step: int = 1

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained now, by name; a tied weight appears once."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def random(self, *words: object) -> np.random.Generator:
        """A generator from (seed, task index, words): the same on every resume and machine."""
        text = repr((self.seed, self.index, *words)).encode()
        return np.random.default_rng(list(hashlib.sha256(text).digest()))

    def batch(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Collate rows, without their options, and move them to the model's device."""
        plain = [{k: v for k, v in row.items() if k != OPTIONS} for row in rows]
        return {k: v.to(self.device) for k, v in self.collate(plain).items()}

    def outputs(self, batch: Batch, **asked: Any) -> Any:
        """What the model gives for a batch, without its own loss."""
        return self.model(**{k: v for k, v in batch.items() if k != "labels"}, **asked)

    def read(self, batch: Batch, call: Callable[[], Any] | None = None) -> Answers:
        """What a model says at a batch's answers, without the logits of all of them at once.

        Args:
            batch: With labels.
            call: Runs the model on the batch without labels in another way than `outputs`: with
                other weights, or through a wrapper.
        """
        asked = {"use_cache": False} if find_head(self.model) is not None else {}
        keep = positions(batch["labels"], IGNORED)
        return read(self.model, call or (lambda: self.outputs(batch, **asked)), keep)

    def answer_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        """The logits that predict an answer: [B, L, V] or [B, V] to [N, V]."""
        labels = batch["labels"]
        if labels.dim() == 1:
            return logits[labels != IGNORED]
        return logits[:, :-1][labels[:, 1:] != IGNORED]

    def answer_labels(self, batch: Batch) -> Tensor:
        """The answers themselves, beside their `answer_logits`: [N]."""
        labels = batch["labels"]
        labels = labels if labels.dim() == 1 else labels[:, 1:]
        return labels[labels != IGNORED]

    def mean_over_answers(self, values: Tensor) -> Tensor:
        """Mean of per-answer values over the whole accumulated batch.

        A term built with this weighs the same however the batch is cut into micro batches.

        Args:
            values: [N], one value for each answer of this micro batch.
        """
        return values.sum() / self.answers_in_step


@contextmanager
def all_bits() -> Iterator[None]:
    """Products of float32 with all their bits, also where `tf32` is asked for in training.

    With TF32 a GPU keeps 10 bits of each factor: enough to learn by, not to hold things in place.
    """
    matmul: Any = torch.backends.cuda.matmul
    is_new = hasattr(matmul, "fp32_precision")  # since torch 2.9
    key, exact = ("fp32_precision", "ieee") if is_new else ("allow_tf32", False)
    was = getattr(matmul, key)
    setattr(matmul, key, exact)
    try:
        yield
    finally:
        setattr(matmul, key, was)


def wide(values: Tensor) -> Tensor:
    """In float32 at least: in 16 bits small terms and products vanish."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass
class State:
    """What a method must not lose.

    Attributes:
        tensors: Kept as safetensors.
        values: Kept as JSON.
        files: Files that are never changed again; a saved state has links to them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def part(self, name: str) -> State:
        """The tensors and files that `under` put under a name."""
        cut, start = len(name) + 1, f"{name}/"
        tensors = {k[cut:]: t for k, t in self.tensors.items() if k.startswith(start)}
        return State(
            tensors, {}, {k[cut:]: f for k, f in self.files.items() if k.startswith(start)}
        )

    def under(self, name: str) -> State:
        """The tensors and files under a name, so that several states can be joined."""
        tensors = {f"{name}/{k}": t for k, t in self.tensors.items()}
        return State(tensors, {}, {f"{name}/{k}": f for k, f in self.files.items()})


class Method(BaseModel):
    """Base of all methods: pydantic fields are hyperparameters, private attributes are state.

    Attributes:
        neutral: The setting that equals plain fine-tuning bit for bit; empty if there is none.
        proof: The evidence that is above 0 when the method was active.
        active_from: The first task (from 0) on which it must have been active.
        needs: What must be there: "adapter" (a LoRA model), "classifier" (a sequence classifier),
            "logits" (given to `loss`), "answers" (in `ctx.answers`, for terms that do without the
            logits of all answers at once).
        traits: What it does that others may not bear: "anchor" (holds weights by name),
            "structure" (adds or swaps weights), "buffer" (keeps old rows), "restart",
            "freeze" (chooses which weights are trained in a task), "moves" (sets the weights anew
            when a task ends), "isolation" (answers of an earlier task, served by its name, never
            change by one bit), "path" (adds up over the steps of a task).
        excludes: Traits that another method in the strategy must not have.
        keeps_order: Whether its `data` knows `ctx.online`: it leaves a stream's rows in their
            order and adds none before its turn. A method without a `data` verb need not say so.
        served: What can be exported: "one model" for all tasks, a model "per task", or nothing,
            because answers come from "keeptune" and not from a model alone.
        steered: The setting that says how hard it holds, if that can be raised while a task is
            learned: then it acts as if this setting were `_effort` times what it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    neutral: ClassVar[dict[str, Any]] = {}
    proof: ClassVar[str] = ""
    active_from: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    traits: ClassVar[frozenset[str]] = frozenset()
    excludes: ClassVar[frozenset[str]] = frozenset()
    keeps_order: ClassVar[bool] = False
    served: ClassVar[Literal["one model", "per task", "keeptune"]] = "one model"
    steered: ClassVar[str] = ""

    _evidence: dict[str, Any] = PrivateAttr(default_factory=dict)
    _effort: float = PrivateAttr(1.0)

    @model_validator(mode="wrap")
    @classmethod
    def _plain_errors(cls, values: Any, handler: ModelWrapValidatorHandler[Method]) -> Method:
        try:
            return handler(values)
        except ValidationError as error:
            sentences = [sentence(cls, dict(e)) for e in error.errors()]
            raise MethodError(" ".join(sentences)) from None

    @classmethod
    def name(cls) -> str:
        """The published name: the file's, for keeptune's own; else the class name in lower case."""
        package, _, file = cls.__module__.rpartition(".")
        return file if package == "keeptune.methods" else cls.__name__.lower()

    def is_neutral(self) -> bool:
        """Whether the settings make this method equal to plain fine-tuning."""
        return bool(self.neutral) and all(getattr(self, k) == v for k, v in self.neutral.items())

    def reads_the_step(self, ctx: Context) -> bool:
        """Whether its `gradients` and `after_step` must run before those of the others.

        For a method that looks at the task's own gradient and the optimizer's own step.
        """
        return False

    # -- the nine verbs -----------------------------------------------------------------------

    def begin_task(self, ctx: Context) -> None:
        """May change the model's structure or take snapshots."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        """Returns what is trained on."""
        return dataset

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        """Returns a term to add to the loss of one micro batch."""
        return None

    def gradients(self, ctx: Context) -> None:
        """May edit `.grad`, once per optimizer step, before clipping."""

    def after_step(self, ctx: Context) -> None:
        """May edit weights, once per optimizer step."""

    def end_task(self, ctx: Context) -> None:
        """May learn from the task, or merge weights."""

    def serve(self, ctx: Context, task: str | None) -> None:
        """Sets the model up to answer for a task, or for an unknown one (None)."""

    def route(self, ctx: Context, prompts: Sequence[Ids]) -> list[str] | None:
        """Returns the task that each question of unknown task is served as; None leaves it open."""
        return None

    def prompt(self, ctx: Context, ids: Ids, room: int) -> Ids:
        """Returns what a language model is asked in place of `ids`, in at most `room` tokens."""
        return ids

    # -- what is kept and shown ---------------------------------------------------------------

    def state(self) -> State:
        """Everything that a later task, or a resumed run, needs."""
        return State()

    def restore(self, ctx: Context, state: State) -> None:
        """Take back what `state` gave; may rebuild the model's structure."""

    def evidence(self) -> dict[str, Any]:
        """What the method did in the task that just ended; JSON values only."""
        return dict(self._evidence)

    def declared_bytes(self, ctx: Context) -> int:
        """Bytes of state that the card promises at the present point of the stream."""
        return 0
