"""Joint training: start again from the first weights and train on all tasks so far. The ceiling.

Paper: Caruana 1997, Multitask learning, https://doi.org/10.1023/A:1007379606734
Equation: minimise the loss over D_1 ∪ … ∪ D_t, starting from w_0
Changes: begin_task, data, end_task
Cost: every row of every task (2.2 bytes a token for vocabularies of at most 65,536, else 4.2) and
    one copy of the trained weights; the time of a task grows with the number of tasks before it.
Use when: you need the ceiling, for intransigence, or you may keep all data and can pay the time.
Not when: the stream is long, or old data must not be stored.
Differs from the paper: no difference; each task in turn is the last one of a joint run.
Status: contract tested
"""

from __future__ import annotations

from typing import ClassVar

import torch
from datasets import Dataset
from pydantic import PrivateAttr
from torch import Tensor

from keeptune.buffer import Buffer
from keeptune.method import Context, Method, State
from keeptune.processes import spread_like


class Joint(Method):
    """Train on the union of all tasks so far, from the first weights each time."""

    proof: ClassVar[str] = "rows_of_earlier_tasks"
    traits: ClassVar[frozenset[str]] = frozenset({"buffer", "restart"})
    excludes: ClassVar[frozenset[str]] = frozenset({"buffer", "anchor", "structure"})

    _buffer: Buffer = PrivateAttr(default_factory=lambda: Buffer(None))
    _first: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @torch.no_grad()
    def begin_task(self, ctx: Context) -> None:
        """Keep the first weights, or go back to them."""
        for name, parameter in ctx.model.named_parameters():
            if name in self._first:
                parameter.copy_(self._first[name])
        for name, parameter in ctx.trainable().items():
            if name not in self._first:  # another method may let other weights learn
                self._first[name] = parameter.detach().clone()

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        """The rows given, plus every row of every earlier task."""
        positions = list(range(len(self._buffer)))
        self._evidence.update(
            rows_of_earlier_tasks=len(positions), rows_by_task=self._buffer.counts()
        )
        if not positions:
            return dataset
        return self._buffer.beside(dataset, positions)

    def end_task(self, ctx: Context) -> None:
        """Keep the task's rows."""
        self._buffer.add(ctx.dataset, ctx.task, ctx.random("joint"), folder=ctx.folder)

    def state(self) -> State:
        """All rows, and the first weights."""
        state = self._buffer.state()
        state.tensors |= {f"first/{n}": t for n, t in self._first.items()}
        return state

    def restore(self, ctx: Context, state: State) -> None:
        """Take the rows and the first weights back."""
        self._buffer.restore(state, ctx.folder)
        weights, first = dict(ctx.model.named_parameters()), "first/"
        self._first = {
            (name := n.removeprefix(first)): spread_like(t.to(ctx.device), weights[name])
            for n, t in state.tensors.items()
            if n.startswith(first)
        }

    def declared_bytes(self, ctx: Context) -> int:
        """Of each token its id and a bit; one copy of the trained weights."""
        return self._buffer.nbytes() + sum(t.nbytes for t in self._first.values())
