"""Self-rewriting: learn the answers in the model's own words, which moves it less.

Paper: Yang et al. 2024, Self-distillation bridges distribution gap in language model fine-tuning
    (SDFT), https://arxiv.org/abs/2402.13669
Equation: the loss on (x, ỹ) with ỹ ~ p(· | x, y) of the model that is shown the answer y as a
    reference, where ỹ agrees with y; else on (x, y)
Changes: data, end_task
Cost: before the task one answer written for each row, of at most twice its length and 16 tokens;
    while it is learned 2.2 bytes a token of the rewritten rows (of large vocabularies 4.2).
Use when: answers are longer texts, in a style that is not the model's, and its own style and
    abilities shall stay. An instruct model; the larger, the better it follows the request.
Not when: answers are labels or names, of which there are no other words; or the style of the data
    is what is to be learned. Small models seldom agree with the reference (see `share_rewritten`).
Differs from the paper: the request is the paper's, put as a user's turn where there is a chat
    template; special tokens are left out of what is asked; the likeliest answer is taken (top_k 1).
    The paper compares final answers in mathematics and takes every answer elsewhere; here `agree`
    is chosen, and by default all words of the reference must be there. It is not the later SDFT of
    Shenfeld et al. 2026.
Status: contract tested
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from pydantic import Field, PrivateAttr
from torch import Tensor

from keeptune.errors import MethodError
from keeptune.method import Context, Method, State
from keeptune.methods._adapters import BASE, base_alone, refuse_biases
from keeptune.methods._writing.agreement import Agree
from keeptune.methods._writing.rewriting import Rewriter
from keeptune.methods._writing.sampling import require_writer
from keeptune.methods._writing.stock import Stock, dataset_of, rows_of


def _nowhere() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


class SelfRewrite(Method):
    """Before a task, let the model put its answers in its own words; keep those that agree."""

    ratio: float = Field(1.0, ge=0, le=1, description="share of the rows that are rewritten")
    agree: Agree = Field("contains", description="when a rewritten answer is taken")
    writer: Literal["before", "base"] = Field(
        "before", description="the model before the task, or the base model under its adapter"
    )
    top_k: int = Field(1, ge=1, description="likeliest tokens that are drawn from")
    longest: int = Field(256, ge=1, description="tokens of a rewritten answer at most")

    neutral: ClassVar[dict[str, Any]] = {"ratio": 0.0}
    proof: ClassVar[str] = "rows_rewritten"
    active_from: ClassVar[int] = 0
    excludes: ClassVar[frozenset[str]] = frozenset({"structure"})

    _stock: Stock = PrivateAttr(default_factory=Stock)
    _places: Tensor = PrivateAttr(default_factory=_nowhere)

    def begin_task(self, ctx: Context) -> None:
        """Refuse what cannot write.

        Raises:
            MethodError: A classifier, no tokenizer, sharded weights, or no adapter over a base.
        """
        if self.is_neutral():
            return
        require_writer(ctx, self.name())
        if self.writer == "base" and not hasattr(ctx.model, "disable_adapter"):
            raise MethodError(
                "SelfRewrite.writer is 'base', but all weights are trained and there is no base "
                "model below. Use 'before', or train an adapter."
            )
        if self.writer == "base":
            refuse_biases(ctx, self.name(), BASE)

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        """The rows given, with the task's own answers rewritten where the model agrees."""
        if self.is_neutral():
            return dataset
        own = rows_of(ctx.dataset)
        if self._stock.of != ctx.index:
            self._rewrite(ctx)
        new = [row for rows in self._stock.rows(ctx.dataset).values() for row in rows]
        by_ids = {
            tuple(own[place].input_ids): row
            for place, row in zip(self._places.tolist(), new, strict=True)
        }
        rows = [by_ids.get(tuple(row.input_ids), row) for row in rows_of(dataset)]
        return dataset_of(rows, dataset)

    def _rewrite(self, ctx: Context) -> None:
        """Let the answers be rewritten; a resumed run has them in its state."""
        count = round(self.ratio * len(ctx.dataset))
        places = sorted(ctx.random("rewrite").permutation(len(ctx.dataset))[:count].tolist())
        rewriter = Rewriter(self.agree, self.longest, self.top_k)
        with base_alone(ctx) if self.writer == "base" else nullcontext():
            found, counts = rewriter.rewrite(ctx, rows_of(ctx.dataset), places)
        self._places = torch.tensor(list(found), dtype=torch.int64)
        self._stock = Stock()
        self._stock.fill(ctx, {"rewritten": list(found.values())})
        self._evidence.update(
            rows_rewritten=len(found),
            rows_offered=len(places),
            share_rewritten=len(found) / max(len(places), 1),
            **{f"rows_{what}": counts[what] for what in ("unfinished", "disagreeing", "same")},
        )

    def end_task(self, ctx: Context) -> None:
        """Drop the rewritten rows."""
        self._stock, self._places = Stock(), _nowhere()

    def state(self) -> State:
        """The rewritten rows during a task; afterwards nothing."""
        stock = self._stock.state()
        return State(stock.tensors | {"places": self._places}, stock.values)

    def restore(self, ctx: Context, state: State) -> None:
        """Take the rewritten rows back."""
        self._places = state.tensors["places"]
        self._stock.restore(state)

    def declared_bytes(self, ctx: Context) -> int:
        """During a task, of each token of a rewritten row its id and a bit, and its place."""
        return self._stock.nbytes + self._places.nbytes
