"""Tiny runs of a strategy over three tasks, watched from the inside; equal runs are run once."""

from __future__ import annotations

import random
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn

import pico
from keeptune import state
from keeptune.chain import Chain
from keeptune.method import Batch, Context, Method
from keeptune.tokens import collate
from keeptune.trainers import ClassifierTrainer, TextTrainer, build_trainer

TASKS, ROWS, LENGTH, STEPS, BATCH, VOCAB = 3, 10, 10, 4, 4, 32
CLASSES = 2  # of each task of a classifier
DROPOUT = 0.1  # of adapters
SETTINGS: dict[str, Any] = {
    # SGD, because Adam's first steps turn rounding into whole steps.
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "bf16": False,  # a GPU's default, in which equal and nearly equal are one
    "max_steps": STEPS,
    "output_dir": tempfile.gettempdir(),
}


@dataclass(frozen=True)
class Subject:
    """A method under test, with the settings at which it is looked at, and how hard it holds."""

    cls: type[Method]
    settings: tuple[tuple[str, Any], ...] = ()
    effort: float = 1.0

    def make(self) -> Method:
        """A fresh method."""
        method = self.cls(**dict(self.settings))
        Chain([method]).hold(self.effort)
        return method

    @property
    def classes(self) -> bool:
        """Whether it is looked at on a classifier, in place of a language model."""
        return "classifier" in self.cls.needs

    @property
    def neutral(self) -> Subject:
        """The same method, switched off."""
        return Subject(self.cls, tuple(self.cls.neutral.items()))


Strategy = tuple[Subject, ...]


@dataclass
class Seen:
    """What a run showed.

    Attributes:
        weights: The model's own tensors after each task.
        logits: [rows, L, V] or [rows, C], what the last model answers on rows of all tasks, none
            of them named, after what is put before them.
        evidence: Of each task, one dictionary for each method.
        disturbed: What a verb left otherwise than it found it, in words.
        memory: (when, bytes declared, bytes in `state()`, bytes held in attributes) per method.
        base_moved: Whether weights that are not trained moved.
        strided: Tensors in `state()` that are laid out otherwise than they are when loaded.
    """

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    evidence: list[list[dict[str, Any]]] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)
    memory: list[tuple[str, int, int, int]] = field(default_factory=list)
    base_moved: bool = False
    strided: set[str] = field(default_factory=set)


@cache
def rows(task: int, classes: bool = False) -> Dataset:
    """One task's rows: equally long, with answers of 4 to 7 tokens, or two classes of its own.

    Equally long, because TRL pads each micro batch to its own longest row.
    """
    g = torch.Generator().manual_seed(100 + task)
    ids = torch.randint(6, VOCAB, (ROWS, LENGTH), generator=g).tolist()
    if classes:
        own = [CLASSES * task + i % CLASSES for i in range(ROWS)]
        return Dataset.from_dict({"input_ids": ids, "labels": own})
    labels = [[-100] * (3 + i % 4) + x[3 + i % 4 :] for i, x in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def build_model(lora: bool, dropout: float, classes: bool = False) -> nn.Module:
    """The model every run starts from; dropout shows who touches the global random numbers."""
    model: Any = pico.classifier(CLASSES * TASKS) if classes else pico.causal_lm(VOCAB)
    kind = "SEQ_CLS" if classes else "CAUSAL_LM"
    config = LoraConfig(task_type=kind, r=4, target_modules="all-linear", lora_dropout=dropout)
    return pico.adapted(model, config) if lora else model


class Watched(Chain):
    """A chain that notes what each verb disturbs and how much memory its methods hold."""

    def __init__(self, methods: list[Method], seen: Seen) -> None:
        super().__init__(methods)
        self.seen = seen
        self.parts: tuple[list[nn.Parameter], list[nn.Module]] = ([], [])
        self.found: dict[nn.Parameter, bool] = {}

    def begin_task(self, ctx: Context) -> None:
        self.found = {p: p.requires_grad for p in ctx.model.parameters()}
        super().begin_task(ctx)
        self.parts = (list(ctx.model.parameters()), list(ctx.model.modules()))

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        with self._untouched("data"):
            return super().data(ctx, dataset)

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        with self._untouched("loss"):
            return super().loss(ctx, batch, outputs)

    def gradients(self, ctx: Context) -> None:
        with self._untouched("gradients"):
            super().gradients(ctx)

    def after_step(self, ctx: Context) -> None:
        with self._untouched("after_step"):
            super().after_step(ctx)
        self.weigh("in the middle of", ctx)

    def end_task(self, ctx: Context) -> None:
        before = _surroundings(*self.parts)
        if not any("structure" in method.traits for method in self.methods):
            # What is frozen for a task is given free at its end.
            before["requires_grad"] = [self.found[p] for p in self.parts[0]]
        super().end_task(ctx)
        self._compare("end_task", before)
        self.weigh("after", ctx)

    @contextmanager
    def _untouched(self, verb: str) -> Iterator[None]:
        before = _surroundings(*self.parts)
        yield
        self._compare(verb, before)

    def _compare(self, verb: str, before: dict[str, Any]) -> None:
        for what, now in _surroundings(*self.parts).items():
            if before[what] != now:
                self.seen.disturbed.append(f"{verb} changed {what}")

    def weigh(self, when: str, ctx: Context) -> None:
        """Note the declared and the measured memory."""
        for method in self.methods:
            tensors = method.state().tensors
            kept = sum(t.nbytes for t in tensors.values())
            self.seen.strided |= {name for name, t in tensors.items() if not t.is_contiguous()}
            held = _held(method.__pydantic_private__, set())
            self.seen.memory.append(
                (f"{when} task {ctx.index}", method.declared_bytes(ctx), kept, held)
            )


def _surroundings(parameters: list[nn.Parameter], modules: list[nn.Module]) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "requires_grad": [p.requires_grad for p in parameters],
        "train mode": [m.training for m in modules],
        "torch's global random numbers": torch.get_rng_state().numpy().tobytes(),
        "the GPUs' random numbers": [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()],
        "numpy's global random numbers": (name, np.asarray(keys).tobytes(), *rest),
        "Python's global random numbers": random.getstate(),
    }


def _held(value: Any, known: set[int]) -> int:
    """Bytes of every tensor and array reachable from a method's attributes."""
    if id(value) in known:
        return 0
    known.add(id(value))
    if isinstance(value, Tensor | np.ndarray):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(_held(v, known) for v in value.values())
    if isinstance(value, list | tuple | set):
        return sum(_held(v, known) for v in value)
    return _held(vars(value), known) if hasattr(value, "__dict__") else 0


def build(
    methods: list[Method],
    *,
    lora: bool = False,
    cut: int = 1,
    dropout: float = DROPOUT,
    seed: int = 0,
    settings: dict[str, Any] = SETTINGS,
    classes: bool = False,
) -> tuple[TextTrainer | ClassifierTrainer, Seen]:
    """A trainer over a fresh model, and what it will have shown."""
    model, seen = build_model(lora, dropout, classes), Seen()
    letters = string.printable[: VOCAB - len(pico.SPECIAL)]
    tokenizer = pico.tokenizer(chat=True, letters=letters)
    settings = settings | {
        "per_device_train_batch_size": BATCH // cut,
        "gradient_accumulation_steps": cut,
        "seed": seed,
    }
    trainer = build_trainer(
        "classification" if classes else "causal_lm",
        model,
        tokenizer,
        rows(0, classes),
        methods,
        settings,
        collate(tokenizer),
    )
    if len(methods) == 1:
        trainer.strategy = Watched(methods, seen)
    return trainer, seen


def go(
    trainer: TextTrainer | ClassifierTrainer,
    seen: Seen,
    tasks: range,
    resume: Path | None = None,
    *,
    served: bool = False,
) -> None:
    """Learn these tasks and note what each left; `resume` is a state inside the first of them.

    With `served` the model answers after each task, as it does in a real run.
    """
    classes = isinstance(trainer, ClassifierTrainer)
    base = _base(trainer.model)
    for task in tasks:
        trainer.learn(f"t{task}", rows(task, classes), index=task, resume=resume)
        resume = None
        own = state.own_tensors(trainer.model)
        seen.weights.append({n: t.detach().clone() for n, t in own.items()})
        seen.evidence.append([m.evidence() for m in trainer.strategy])
        if served:
            ask(trainer)
    now = _base(trainer.model)
    seen.base_moved = not same(base, {n: now.get(n, t + 1) for n, t in base.items()})


def _base(model: nn.Module) -> dict[str, Tensor]:
    own = {id(p) for p in model.parameters() if p.requires_grad}
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if id(p) not in own and "lora_" not in n
    }


def ask(trainer: TextTrainer | ClassifierTrainer) -> Tensor:
    """The answers to unknown tasks."""
    assert trainer.ctx is not None
    trainer.strategy.serve(trainer.ctx, None)
    return answers(trainer)


@torch.no_grad()
def answers(trainer: TextTrainer | ClassifierTrainer) -> Tensor:
    """[rows, L, V] or [rows, C]: logits on the rows of all tasks, after what is put before them."""
    model: Any = trainer.model.eval()
    every = [row["input_ids"] for task in range(TASKS) for row in rows(task)]
    if isinstance(trainer, TextTrainer):
        asked = [trainer.strategy.prompt(trainer.ctx, ids, 100) for ids in every]
        if asked != every:
            logits = [asked_of(model, [ids])[:, -LENGTH:] for ids in asked]
            return torch.cat(logits)
    return asked_of(model, every)


def asked_of(model: Any, ids: list[list[int]]) -> Tensor:
    """[rows, L, V] or [rows, C]: logits of questions of one length."""
    logits: Tensor = model(input_ids=torch.tensor(ids, device=model.device)).logits
    return logits


def context(trainer: Any, task: int) -> Context:
    """A context of a task, outside its training."""
    own = rows(task, isinstance(trainer, ClassifierTrainer))
    return Context(trainer.model, f"t{task}", task, own, trainer.data_collator)


@cache
def run(
    strategy: Strategy = (),
    *,
    lora: bool = False,
    cut: int = 1,
    tasks: int = TASKS,
    dropout: float = DROPOUT,
    seed: int = 0,
    served: bool = False,
    classes: bool = False,
) -> Seen:
    """Learn the tasks one after another; use `run.__wrapped__` to really run a second time."""
    methods = [s.make() for s in strategy]
    classes = classes or any(s.classes for s in strategy)
    trainer, seen = build(methods, lora=lora, cut=cut, dropout=dropout, seed=seed, classes=classes)
    go(trainer, seen, range(tasks), served=served)
    seen.logits = ask(trainer)
    return seen


def continued(subject: Subject, folder: Path, *, lora: bool) -> tuple[Seen, list[str]]:
    """Learn all but the last task, save, load into fresh objects, learn the last.

    Returns:
        What the second half showed, and what was not the same after loading as before saving.
    """
    trainer, seen = build([subject.make()], lora=lora, classes=subject.classes)
    go(trainer, seen, range(TASKS - 1))
    state.write_tensors(folder / "weights.safetensors", state.own_tensors(trainer.model))
    state.write_methods(folder, trainer.strategy)
    again, seen = build([subject.make()], lora=lora, classes=subject.classes)
    ctx = context(again, TASKS - 2)
    state.read_methods(folder, again.strategy, ctx)
    state.put_tensors(again.model, state.load_file(folder / "weights.safetensors"))
    pairs = zip(trainer.strategy, again.strategy, strict=True)
    lost = [word for old, new in pairs for word in _lost(old, new)]
    go(again, seen, range(TASKS - 1, TASKS))
    return seen, lost


def _lost(old: Method, new: Method) -> list[str]:
    then, now = old.state(), new.state()
    lost = [
        n for n in {*then.tensors, *now.tensors}
        if n not in then.tensors or n not in now.tensors
        or not torch.equal(then.tensors[n], now.tensors[n])
    ]  # fmt: skip
    lost += ["values"] * (then.values != now.values)
    return lost + ["evidence"] * (old.evidence() != new.evidence())


def interrupted(subject: Subject, folder: Path, *, lora: bool) -> Seen:
    """Stop in the middle of the last task, load that state into fresh objects, and go on."""
    trainer, seen = build([subject.make()], lora=lora, classes=subject.classes)
    go(trainer, seen, range(TASKS - 1))
    state.write_tensors(folder / "weights.safetensors", state.own_tensors(trainer.model))
    state.write_methods(folder, trainer.strategy)
    stop = Event()
    trainer.progress_root = folder / "progress"
    trainer.watch(lambda step, *_: stop.set() if step == STEPS // 2 else None, 60, stop)
    trainer.learn(f"t{TASKS - 1}", rows(TASKS - 1, subject.classes), index=TASKS - 1)
    (progress,) = trainer.progress_root.iterdir()
    again, seen = build([subject.make()], lora=lora, classes=subject.classes)
    ctx = context(again, TASKS - 2)
    state.read_methods(folder, again.strategy, ctx)
    state.put_tensors(again.model, state.load_file(folder / "weights.safetensors"))
    go(again, seen, range(TASKS - 1, TASKS), resume=progress)
    return seen


def answers_again(
    subject: Subject, other: type[Method] | None, *, lora: bool, tasks: int = 4
) -> list[tuple[int, Tensor, Tensor]]:
    """Learn tasks by AdamW with weight decay; serve each after itself and all that follow.

    Returns:
        (task, its answers right after it, its answers after a later task).
    """
    methods = [subject.make(), *([other()] if other else [])]
    trainer, _ = build(
        methods,
        lora=lora,
        settings=SETTINGS | {"optim": "adamw_torch", "learning_rate": 0.02, "weight_decay": 0.1},
    )
    first, found = [], []
    for task in range(tasks):
        trainer.learn(f"t{task}", rows(task), index=task)
        for earlier in range(task + 1):
            trainer.strategy.serve(trainer.ctx, f"t{earlier}")
            now = answers(trainer)
            if earlier == task:
                first.append(now)
            else:
                found.append((earlier, first[earlier], now))
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def distance(one: Seen, other: Seen) -> float:
    """How far two runs' last models answer apart: norm of the logits' difference.

    In answers, not in weights, because a method may train other weights than plain does.
    """
    return float((one.logits - other.logits).norm())
