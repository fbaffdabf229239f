"""SEQ*: learn the first task with all weights, later ones only in the rows of their own classes.

Paper: Zheng, Qiu and Ma 2024, Learn or recall? Revisiting incremental learning with pre-trained
    language models, https://arxiv.org/abs/2312.07887
Equation: logit_c = cos(h, w_c) / temperature over the classes of all tasks from the start; task 1
    trains everything, later tasks w_c for c in no earlier task. ‖w_c‖ = 1 / rate when a task begins
    and when it has ended; served: h · w_c
Changes: begin_task, gradients, after_step, end_task
Cost: the old classes' rows of the head, once more. From the second task on only the head is
    trained: no gradients in the backbone and no optimizer state for it.
Use when: a classifier gets new classes task by task, no old data may be kept, and the labels to
    come are listed in advance.
Not when: tasks share their classes, later tasks need other features than the first one teaches, or
    the model is not a classifier.
Differs from the paper: all of the first task is the warm-up, with the loss of the classes, where
    the released code takes one epoch of it (for decoders as language modelling) and then freezes.
    Cosines are divided by a temperature; the released code leaves it out, which is 1. The released
    code gives the head a learning rate of its own; here its rows are short instead: Adam's steps
    do not depend on a weight's size and a cosine not on a row's length, so that rows of length
    1 / rate turn `rate` times as fast. A plain linear head is served: its rows have one length and
    no bias, so that the classes keep their order.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from keeptune.errors import MethodError
from keeptune.method import Context, Method, State


def cosines(features: Tensor, rows: Tensor) -> Tensor:
    """Cosine of each feature with each row of a head: [..., d], [C, d] to [..., C]."""
    return F.linear(F.normalize(features, dim=-1), F.normalize(rows, dim=-1))


class SeqStar(Method):
    """A cosine classifier with a place for every class, whose old rows and backbone stay."""

    temperature: float = Field(0.05, gt=0, le=1, description="what cosines are divided by")
    rate: float = Field(
        100.0, gt=0, le=1e4, description="how much faster the head's rows turn than length 1 would"
    )

    proof: ClassVar[str] = "cosine_batches"
    active_from: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"classifier"})
    traits: ClassVar[frozenset[str]] = frozenset({"freeze"})
    excludes: ClassVar[frozenset[str]] = frozenset({"restart", "structure"})

    _old: list[int] = PrivateAttr(default_factory=list)  # classes of earlier tasks
    _new: list[int] = PrivateAttr(default_factory=list)  # those of this task
    _rows: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0))  # of the old classes
    _still: list[str] = PrivateAttr(default_factory=list)  # weights that this task leaves alone
    _hook: RemovableHandle | None = PrivateAttr(None)

    @torch.no_grad()
    def begin_task(self, ctx: Context) -> None:
        """Make the head a cosine classifier; after the first task, freeze all but new rows."""
        head = self._head(ctx)
        if isinstance(head.weight, DTensor):
            raise MethodError(
                "seq_star holds rows of the classifier, which FSDP cuts into shards. Train with "
                "DDP (leave `fsdp` out)."
            )
        self._old = sorted({*self._old, *self._new})
        self._new = sorted(set(map(int, ctx.dataset["labels"])) - set(self._old))
        if not self._new:
            raise MethodError(
                f"seq_star has learned every class of task {ctx.task!r} before, and old classes "
                "stay as they are. Use it for tasks that bring classes of their own."
            )
        if head.bias is not None:
            head.bias.zero_()
        if ctx.index == 0:
            head.weight.copy_(self._short(head.weight))
        trained = ctx.trainable()
        self._still = [
            name
            for name, weight in trained.items()
            if weight is head.bias or (ctx.index and weight is not head.weight)
        ]
        for name in self._still:
            trained[name].requires_grad_(False)
        self._rows = head.weight[self._old].clone()
        self._hook = head.register_forward_hook(self._cosines)

    def _short(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) / self.rate

    def _head(self, ctx: Context) -> nn.Linear:
        """The last linear layer that is trained and has a row for every class."""
        model: Any = ctx.model
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        heads = [layer for layer in layers if layer.out_features == model.config.num_labels]
        if not heads:
            raise MethodError(
                f"seq_star found no trained linear layer with {model.config.num_labels} rows in "
                f"{type(model).__name__}, one for each class. Use a model with such a head."
            )
        return heads[-1]

    def _cosines(self, head: nn.Module, given: Any, output: Tensor) -> Tensor:
        assert isinstance(head.weight, Tensor)
        if head.training:
            self._evidence["cosine_batches"] = self._evidence.get("cosine_batches", 0) + 1
        return cosines(given[0], head.weight) / self.temperature

    def gradients(self, ctx: Context) -> None:
        """None for the rows of old classes."""
        gradient = self._head(ctx).weight.grad
        if gradient is not None:
            gradient[self._old] = 0

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Put the rows of old classes back, whatever else moved them."""
        self._head(ctx).weight[self._old] = self._rows

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Make the head a linear one again, in which the classes have the same order."""
        weight = self._head(ctx).weight
        learned = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        learned[self._old] = False
        weight[learned] = self._short(weight[learned])
        if self._hook is not None:
            self._hook.remove()
        weights = dict(ctx.model.named_parameters())
        still = [weights[name].requires_grad_(True) for name in self._still]
        self._evidence.update(
            classes_new=len(self._new),
            classes_held=len(self._old),
            weights_frozen=sum(weight.numel() for weight in still),
        )

    def state(self) -> State:
        """Which classes are learned, and the rows of the old ones."""
        return State({"rows": self._rows}, {"old": self._old, "new": self._new})

    def restore(self, ctx: Context, state: State) -> None:
        """Take it back; the hook and what is frozen come with the next `begin_task`."""
        self._rows = state.tensors["rows"].to(ctx.device)
        self._old, self._new = list(state.values["old"]), list(state.values["new"])

    def declared_bytes(self, ctx: Context) -> int:
        """The old classes' rows."""
        return self._rows.nbytes
