"""What the model makes of each row of a task, without disturbing anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from keeptune.errors import MethodError
from keeptune.method import IGNORED, Batch, Context
from keeptune.methods._anchor.examples import require_answers
from keeptune.methods._anchor.objectives import log_likelihood
from keeptune.methods._anchor.undisturbed import undisturbed
from keeptune.processes import processes
from keeptune.rowstore import COLUMNS

BATCH = 8  # rows in one forward
Measure = Callable[[Batch, Any], Tensor]


def losses(ctx: Context) -> NDArray[np.float32]:
    """Mean negative log-likelihood of each row's answer.

    Returns:
        [n], in nats a token (of a classifier, a row); 0 for a row without an answer.

    Raises:
        MethodError: The rows have no labels.
    """
    require_answers(ctx, every=False)

    def measure(batch: Batch, outputs: Any) -> Tensor:
        labels = batch["labels"]
        answers = (labels[:, 1:] != IGNORED).sum(1) if labels.dim() == 2 else labels.new_ones(1)
        (total,) = log_likelihood(batch, outputs.logits, ())
        return -total / answers.clamp(min=1)

    return _every_row(ctx, measure)


def features(ctx: Context) -> NDArray[np.float32]:
    """Mean over each row's tokens of the last hidden state: [n, hidden size].

    Raises:
        MethodError: The model is none of transformers.
    """
    if not hasattr(ctx.model, "config"):
        raise MethodError(
            f"{type(ctx.model).__name__} is no transformers model and gives no hidden states, by "
            "which `policy: herding` and `policy: diversity` go. Use another policy."
        )

    def measure(batch: Batch, outputs: Any) -> Tensor:
        states: Tensor = outputs.hidden_states[-1].float()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        there = mask[:, :, None].to(states)
        return (states * there).sum(1) / there.sum(1)

    return _every_row(ctx, measure, output_hidden_states=True)


def _every_row(ctx: Context, measure: Measure, **asked: Any) -> NDArray[np.float32]:
    """One value, or one line of them, for each row of the task, in the rows' order."""
    dataset = ctx.dataset.select_columns(COLUMNS)
    lengths = [len(row["input_ids"]) for row in dataset]
    # Rows of like length side by side, so that little is padded.
    order = np.argsort(lengths, kind="stable")[::-1]
    parts = []
    with undisturbed(ctx, {}), torch.no_grad():
        for begin in range(0, len(order), BATCH):
            batch = ctx.batch([dataset[int(row)] for row in order[begin : begin + BATCH]])
            parts.append(measure(batch, ctx.outputs(batch, **asked)).float())
    values = torch.cat(parts)
    if processes()[1] > 1:
        # Every process goes through all rows; what differs by rounding must not decide.
        distributed.broadcast(values, 0)
    found = values.cpu().numpy()
    sorted_back = np.empty_like(found)
    sorted_back[order] = found
    return sorted_back
