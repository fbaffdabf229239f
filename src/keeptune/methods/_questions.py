"""Questions as the base model sees them: one hidden state each, and which task's are nearest."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from keeptune.method import IGNORED, Context, Ids
from keeptune.methods._anchor.undisturbed import undisturbed

BATCH = 8  # questions in one forward
SHRINKAGE = 0.1  # share of the covariance that is spread evenly over all directions


def questions(ctx: Context, most: int) -> list[Ids]:
    """The questions of a task's rows, each up to where its answer begins; at most so many."""
    chosen = ctx.random("questions").permutation(len(ctx.dataset))[:most]
    return [question(ctx.dataset[int(i)]) for i in chosen]


def question(row: dict[str, Any]) -> Ids:
    """What comes before a row's first answer; of a text's row and a classifier's, all of it."""
    ids, labels = list(row["input_ids"]), row["labels"]
    if isinstance(labels, int) or labels[0] != IGNORED:
        return ids
    first = next((i for i, label in enumerate(labels) if i and label != IGNORED), len(ids))
    return ids[:first]


def hidden(ctx: Context, asked: Sequence[Ids], at: Literal["last", "mean"] = "last") -> Tensor:
    """The base model's last hidden states, adapters off: float32 [n, d], on the CPU.

    Args:
        ctx: Whose model.
        asked: Token ids.
        at: The state at the end of each question, or the mean over its tokens.
    """
    model: Any = ctx.model
    is_adapted = hasattr(model, "disable_adapter")
    inner = model.get_base_model() if is_adapted else model
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    found = [torch.empty(0)] * len(asked)
    plain = model.disable_adapter() if is_adapted else nullcontext()
    with undisturbed(ctx, {}), torch.no_grad(), plain:
        for begin in range(0, len(order), BATCH):
            some = order[begin : begin + BATCH]
            rows = [torch.tensor(asked[i], device=ctx.device) for i in some]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows], device=ctx.device)
            mask = (torch.arange(ids.shape[1], device=ctx.device) < lengths[:, None]).long()
            states = inner.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            if at == "last":
                picked = states[torch.arange(len(rows)), lengths - 1]
            else:
                picked = (states * mask[:, :, None]).sum(1) / lengths[:, None]
            for i, state in zip(some, picked.float().cpu(), strict=True):
                found[i] = state
    return torch.stack(found)


class Router:
    """Which task a question is of, by its hidden state; learned task by task, in any order.

    Args:
        kind: "nearest", argmin_t ‖h − μ_t‖; or "classifier", the likeliest of Gaussians with one
            covariance, argmax_t μ_tᵀ Σ⁻¹ h − ½ μ_tᵀ Σ⁻¹ μ_t, which is a linear classifier.
    """

    def __init__(self, kind: Literal["nearest", "classifier"]) -> None:
        self.kind = kind
        self.tensors: dict[str, Tensor] = {}  # means [T, d]; scatter [d, d] within the tasks
        self.seen = 0

    def learn(self, features: Tensor) -> None:
        """The questions of one more task: [n, d]."""
        mean = features.mean(0, keepdim=True)
        self.seen += len(features)
        if self.kind == "classifier":
            apart = features - mean
            self.tensors["scatter"] = self.tensors.get("scatter", 0) + apart.T @ apart
        before = [self.tensors["means"]] if "means" in self.tensors else []
        self.tensors["means"] = torch.cat([*before, mean])

    def choose(self, features: Tensor) -> list[int]:
        """The number of the task that each question [n, d] is taken for."""
        means = self.tensors["means"]
        if self.kind == "nearest":
            return list(torch.cdist(features, means).argmin(1).tolist())
        weights, offsets = self.discriminant()
        return list((features @ weights - offsets).argmax(1).tolist())

    def discriminant(self) -> tuple[Tensor, Tensor]:
        """The classifier itself: Σ⁻¹ μ_t of each task, [d, T], and ½ μ_tᵀ Σ⁻¹ μ_t, [T].

        It depends on sums over the tasks alone, and so not on the order in which they came.
        """
        means, covariance = self.tensors["means"], self.covariance()
        weights = torch.linalg.solve(covariance, means.T)
        return weights, (means.T * weights).sum(0) / 2

    def covariance(self) -> Tensor:
        """Within the tasks, shrunk: [d, d]."""
        covariance = self.tensors["scatter"] / max(self.seen - len(self.tensors["means"]), 1)
        # There may be fewer questions than dimensions.
        even = covariance.trace() / len(covariance) * torch.eye(len(covariance))
        return (1 - SHRINKAGE) * covariance + SHRINKAGE * even
