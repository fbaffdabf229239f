"""Rehearsal of kept rows with the answers the model gave to them: what `der` and `der_pp` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from keeptune.answers import Answers
from keeptune.buffer import Buffer
from keeptune.head_pass import CrossEntropy
from keeptune.method import Batch, Context, Method, State, wide
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._anchor.undisturbed import undisturbed
from keeptune.methods._distil.recorded import Recorded, answers_of, batches, record_rows
from keeptune.methods._distil.sums import Sums
from keeptune.methods._reference import NO_SECOND_GRADIENT, add_gradient

DRAWN = "drawn"  # a column for which rows of a draw there are


class Rehearsed(Method):
    """A method that adds the gradient of a loss on kept rows to that of each step.

    It does so once for a step, after the step's own backward, so that nothing depends on the number
    of micro batches, and no more than one of the two is in memory.
    """

    strength: float = Field(0.5, ge=0, description="weight of the recorded answers; the paper's α")
    rows: int = Field(8, ge=2, description="old rows at each step, all draws together")
    size: int = Field(2000, ge=1, description="rows kept over all earlier tasks")
    top_k: int = Field(64, ge=1, description="entries kept of an answer of a language model")

    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    proof: ClassVar[str] = "rows_replayed"
    traits: ClassVar[frozenset[str]] = frozenset({"buffer"})
    steered: ClassVar[str] = "strength"

    _buffer: Buffer = PrivateAttr()
    _sums: Sums = PrivateAttr(default_factory=lambda: Sums(2))

    def model_post_init(self, context: Any, /) -> None:
        """Start with an empty buffer."""
        super().model_post_init(context)
        self._buffer = Buffer(self.size)

    def _amounts(self) -> dict[str, int]:
        """Rows of each draw: for recorded "outputs", and for "labels"."""
        return {"outputs": self.rows}

    def _label_weight(self) -> float:
        """Weight of the cross-entropy on the rows drawn for "labels"."""
        return 0.0

    def begin_task(self, ctx: Context) -> None:
        """Count anew, and refuse sharded weights.

        Raises:
            MethodError: The weights are spread over processes.
        """
        self._sums = Sums(2, ctx.device)
        if not self.is_neutral():
            refuse_shards(ctx, self.name(), NO_SECOND_GRADIENT)

    def gradients(self, ctx: Context) -> None:
        """Add the gradient of the loss on kept rows."""
        if self.is_neutral() or not len(self._buffer):
            return
        drawn = {
            name: self._buffer.draw(amount, ctx.random(self.name(), name, ctx.step))
            for name, amount in self._amounts().items()
        }
        together = [position for positions in drawn.values() for position in positions]
        batch = ctx.batch(self._buffer.examples(together))
        counts = torch.tensor(answers_of(batch))
        first = len(drawn["outputs"])
        amounts = int(counts[:first].sum()), int(counts[first:].sum())
        # Which rows a process has in its share.
        batch[DRAWN] = torch.arange(len(together))

        def objective(part: Batch) -> Tensor:
            own = part.pop(DRAWN).tolist()
            recorded = [drawn["outputs"][i] for i in own if i < first]
            return self._loss(ctx, part, recorded, amounts)

        add_gradient(ctx, batch, objective, self.name(), "dropout", ctx.step)
        self._evidence["rows_replayed"] = self._evidence.get("rows_replayed", 0) + len(together)

    def _loss(
        self, ctx: Context, batch: Batch, recorded: list[int], amounts: tuple[int, int]
    ) -> Tensor:
        """What some of the rows that were drawn add to the means over all of them.

        Args:
            ctx: The task.
            batch: The rows: those for their outputs, then those for their labels.
            recorded: Positions in the buffer of the former.
            amounts: Answers of all rows of each draw.
        """
        answers = ctx.read(batch)
        n = sum(answers_of(batch)[: len(recorded)])
        outputs = torch.zeros(len(answers), device=ctx.device)
        outputs[:n] = self.strength * self._effort / max(1, amounts[0])
        others = torch.zeros(len(answers), device=ctx.device)
        others[n:] = self._label_weight() * self._effort / max(1, amounts[1])
        answers.add(CrossEntropy(ctx.answer_labels(batch)), others)
        squares = torch.zeros((), device=ctx.device)
        kept = self._buffer.extras(recorded)
        if "logits" in kept:
            z = torch.from_numpy(kept["logits"]).to(ctx.device)
            values = (wide(answers.values[:n]) - z).square().mean(1)
            self._note(values.detach(), n)
            squares = (values * outputs[:n]).sum()
        elif n:
            known = np.where(np.arange(len(answers)) < n, np.arange(len(answers)), -1)
            term = Recorded(**kept).take(known).term(1.0, ctx.device)
            answers.add(term, outputs, lambda kl: self._note(kl[:n], n))
        total = answers.total()
        assert total is not None
        return total + squares

    def _note(self, values: Tensor, answers: int) -> None:
        self._sums.add(0, values.sum())
        self._sums.add(1, answers)

    def evidence(self) -> dict[str, Any]:
        """Rows replayed, how far their answers are from the recorded ones, and what is kept."""
        total, answers = self._sums.values()
        replayed = self._evidence.get("rows_replayed", 0)
        return {
            "rows_replayed": replayed,
            "distance": total / max(answers, 1),
            "rows_kept": len(self._buffer),
            "rows_kept_by_task": self._buffer.counts(),
            "extra_forward_rows": replayed,
            "extra_backward_rows": replayed,
        }

    def end_task(self, ctx: Context) -> None:
        """Keep rows of the task, with what the model says to them now."""
        self._sums.total()
        if self.is_neutral():
            return

        def said(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, Sequence[Any]]:
            rows = ctx.dataset.select(numbers)
            if isinstance(rows[0]["labels"], int):
                return {"logits": _logits(ctx, rows)}
            parts = record_rows(ctx, rows, self.top_k, 1.0)
            return {name: [part.arrays()[name] for part in parts] for name in parts[0].arrays()}

        random = ctx.random("reservoir")
        self._buffer.add(ctx.dataset, ctx.task, random, extras=said, folder=ctx.folder)

    def state(self) -> State:
        """The buffer and what was counted."""
        own = self._buffer.state()
        values = {"rows_replayed": self._evidence.get("rows_replayed", 0)}
        return State(own.tensors | {"sums": self._sums.total()}, own.values | values, own.files)

    def restore(self, ctx: Context, state: State) -> None:
        """Take the buffer back."""
        self._buffer.restore(state, ctx.folder)
        self._sums = Sums.of(state.tensors["sums"], ctx.device)
        self._evidence["rows_replayed"] = state.values["rows_replayed"]

    def declared_bytes(self, ctx: Context) -> int:
        """The kept rows with the answers to them, and two sums."""
        return self._buffer.nbytes() + self._sums.nbytes


def _logits(ctx: Context, rows: Any) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """A classifier's logits of each row: [1, V] each, of all classes."""
    found: dict[int, Any] = {}
    with undisturbed(ctx, {}), torch.no_grad():
        for numbers, batch in batches(ctx, rows):
            answers: Answers = ctx.read(batch)
            for number, logits in zip(numbers, answers.values.float().cpu().numpy(), strict=True):
                found[number] = logits[None]
    return [found[number] for number in range(len(rows))]
