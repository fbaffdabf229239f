"""A fast learner replays old rows, held to the hidden states of a slow one, which answers.

Paper: Ren et al. 2024, Analyzing and reducing catastrophic forgetting in parameter efficient
    tuning, https://arxiv.org/abs/2402.18865 ; derived from Arani et al. 2022 (CLS-ER),
    https://arxiv.org/abs/2201.12604
Equation: L(w; B_t) + CE(w; B_M) + strength · mean (h(B_M; w) − h(B_M; s))², with B_M old rows and h
    all hidden states; after each step s ← decay · s + (1 − decay) · w; the model answers with s
Changes: gradients, after_step, end_task, serve
Cost: one copy of the trained weights in float32 (adapters only, under LoRA), a second one while the
    model answers, and `size` rows; in each step a forward and backward of the fast weights and a
    forward of the slow ones on `rows` old rows, together 1.6 of a step's time for as many rows.
Use when: some old rows may be kept, and a little time is to be had for more than replay alone.
Not when: no old rows may be kept (ema), or tasks are shorter than about 1 / (1 − decay) steps.
Differs from the paper: a row is chosen for the buffer when its task ends, not as it is trained on.
    The authors' released code does not do what is written: its slow adapter is never updated (it is
    looked for under another name), would keep 0.25 of itself if it were, and the target is the
    larger of fast and slow in each element; here it is the formula. Works on all weights too.
    What other methods add to the loss is not added on the old rows.
Status: contract tested
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, distributed
from torch.func import functional_call
from torch.nn import functional as F

from keeptune.buffer import Buffer
from keeptune.method import Batch, Context, State, wide
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._reference import moved_weights, shared_gradient
from keeptune.methods._slow import Slow
from keeptune.processes import processes


def squared_distance(fast: tuple[Tensor, ...], slow: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Squared differences at tokens that are no padding: mean over layers and hidden size, summed.

    Args:
        fast: Hidden states of each layer, [B, L, hidden size].
        slow: The same of the slow weights.
        mask: [B, L], 1 for a token.
    """
    pairs = zip(fast, slow, strict=True)
    sums = [((wide(f) - wide(s)).square().mean(-1) * mask).sum() for f, s in pairs]
    return torch.stack(sums).mean()


class ILoRA(Slow):
    """Replay with a slow learner that follows, holds the hidden states, and answers."""

    strength: float = Field(1.0, ge=0, description="weight of the hidden states' distance; γ")
    rows: int = Field(8, ge=0, description="old rows replayed in each step")
    size: int = Field(500, ge=1, description="rows kept over all earlier tasks")

    neutral: ClassVar[dict[str, Any]] = {"decay": 0.0, "rows": 0}
    traits: ClassVar[frozenset[str]] = frozenset({"buffer"})

    _buffer: Buffer = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Start with an empty buffer."""
        super().model_post_init(context)
        self._buffer = Buffer(self.size)

    def begin_task(self, ctx: Context) -> None:
        """Refuse sharded weights: FSDP would run the fast ones in the slow ones' place.

        Raises:
            MethodError: The weights are spread over processes.
        """
        if self.rows:
            why = "cannot run the model with slow weights while FSDP spreads them over processes"
            refuse_shards(ctx, self.name(), why)
        super().begin_task(ctx)

    def gradients(self, ctx: Context) -> None:
        """Add the gradient of both terms on old rows."""
        super().gradients(ctx)
        if not self.rows or not len(self._buffer):
            return
        drawn = self._buffer.draw(self.rows, ctx.random("ilora", ctx.step))
        batch = ctx.batch(list(self._buffer.rows(drawn, ctx.dataset)))
        answers = max(1, ctx.answer_labels(batch).numel())
        tokens = int(_mask(batch).sum())
        weights = moved_weights(ctx)
        sums = torch.zeros(2, device=ctx.device)

        holds = self.strength > 0 and bool(self._slow)

        def objective(part: Batch) -> Tensor:
            out = ctx.outputs(part, output_hidden_states=holds)
            logits, labels = ctx.answer_logits(out.logits, part), ctx.answer_labels(part)
            loss = F.cross_entropy(wide(logits), labels, reduction="sum") / answers
            sums[0] += loss.detach()
            if holds:
                slow = self._slow_states(ctx, part)
                gap = squared_distance(out.hidden_states, slow, _mask(part)) / tokens
                sums[1] += gap.detach()
                loss = loss + self.strength * gap
            return loss

        found = shared_gradient(ctx, weights, batch, objective, "ilora", ctx.step)
        for weight, gradient in zip(weights, found, strict=True):
            assert weight.grad is not None
            weight.grad.add_(gradient)
        shown = self._evidence
        shown["rows_replayed"] = shown.get("rows_replayed", 0) + len(drawn)
        if not ctx.step & (ctx.step - 1):  # at steps that are powers of two
            if processes()[1] > 1:
                distributed.all_reduce(sums)
            shown["old_loss"], shown["hidden_distance"] = sums.tolist()

    @torch.no_grad()
    def _slow_states(self, ctx: Context, batch: Batch) -> tuple[Tensor, ...]:
        weights = self._followed(ctx)
        slow = {name: self._slow[name].to(weight.dtype) for name, weight in weights.items()}
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
        inputs["output_hidden_states"] = True
        base = getattr(ctx.model, "get_base_model", lambda: ctx.model)()
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            inputs["logits_to_keep"] = 1  # nobody reads them
        ctx.model.eval()
        states = functional_call(ctx.model, slow, (), inputs, tie_weights=True).hidden_states
        ctx.model.train()
        return tuple(states)

    def end_task(self, ctx: Context) -> None:
        """Keep rows of the task."""
        super().end_task(ctx)
        if self.rows:
            random = ctx.random("reservoir")
            self._buffer.add(ctx.dataset, ctx.task, random, folder=ctx.folder)

    def state(self) -> State:
        """The slow weights and the kept rows."""
        slow, rows = super().state(), self._buffer.state().under("rows")
        return State(slow.tensors | rows.tensors, slow.values, rows.files)

    def restore(self, ctx: Context, state: State) -> None:
        """Take the slow weights and the kept rows back."""
        super().restore(ctx, state)
        self._buffer.restore(state.part("rows"), ctx.folder)

    def declared_bytes(self, ctx: Context) -> int:
        """The slow weights and the kept rows."""
        return super().declared_bytes(ctx) + self._buffer.nbytes()


def _mask(batch: Batch) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
