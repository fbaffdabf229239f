"""What is differentiated per example: scalars that a batch's logits give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from keeptune.errors import MethodError
from keeptune.method import IGNORED, Batch, Context, wide

# (batch, logits [B, L, V] or [B, C], row numbers) -> tensors [B]: one value an example.
Objective = Callable[[Batch, Tensor, Sequence[int]], Iterable[Tensor]]


def log_likelihood(batch: Batch, logits: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
    """Log-probability of each row's answer, summed over its tokens: [B], in nats."""
    answers, labels, owners = _answers(batch, logits)
    yield _by_row(_log_p(answers, labels), owners, batch)


def sampled(ctx: Context) -> Objective:
    """The objective of the true Fisher: labels are drawn from the model, one for every answer.

    For a language model each answer token is drawn given the true tokens before it. The draw
    depends on the run's seed, the task and the row only, not on the batch.
    """

    def objective(batch: Batch, logits: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
        answers, _, owners = _answers(batch, logits)
        counts = owners.bincount(minlength=len(rows)).tolist()
        drawn = [ctx.random("labels", int(r)).random(n) for r, n in zip(rows, counts, strict=True)]
        uniforms = torch.cat([torch.as_tensor(u) for u in drawn]).to(logits.device)
        labels = draw_labels(answers.detach(), uniforms)
        yield _by_row(_log_p(answers, labels), owners, batch)

    return objective


def all_labels(batch: Batch, logits: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
    """For every class c: √p(c) · log p(c) with p held fixed, so that squares sum to E[(∂ log p)²].

    Raises:
        MethodError: The model is no classifier.
    """
    if logits.dim() != 2:
        raise MethodError(
            "The exact Fisher goes through every possible answer, which only a classifier or rows "
            "with choices have. Use `fisher: sampled` for other language-model tasks."
        )
    log_p = wide(logits).log_softmax(-1)
    for c in range(logits.shape[1]):
        yield log_p[:, c].detach().exp().sqrt() * log_p[:, c]


def squared_norm(top_k: int | None = None) -> Objective:
    """The objective of MAS: the squared norm of an answer's logits, summed over a row's answers.

    Args:
        top_k: Only the k largest logits of an answer count; None: all.
    """

    def objective(batch: Batch, logits: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
        answers, _, owners = _answers(batch, logits)
        if top_k is not None and top_k < answers.shape[1]:
            answers = answers.topk(top_k, sorted=False).values
        yield _by_row(wide(answers).square().sum(1), owners, batch)

    return objective


def choices(batch: Batch, logits: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
    """`all_labels` for the choices of one example, whose answers are the rows of the batch.

    p(c) is the softmax over the choices of their summed log-probabilities; each tensor is [1].
    """
    (log_likelihoods,) = log_likelihood(batch, logits, rows)
    yield from all_labels(batch, log_likelihoods[None], rows)


def draw_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One label of each distribution, by its cumulative sum (multinomial is 5–10 times dearer).

    Args:
        logits: [N, V].
        uniforms: [N], in [0, 1).

    Returns:
        int64 [N]; a label of probability 0 is never drawn.
    """
    heights = wide(logits).softmax(-1).cumsum(-1)
    below_one = 1 - torch.finfo(heights.dtype).eps
    aims = uniforms.to(heights.dtype).clamp(max=below_one)[:, None] * heights[:, -1:]
    return torch.searchsorted(heights, aims, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _answers(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] that predict an answer, the answers' labels [N], and their rows [N]."""
    if "labels" not in batch:
        raise MethodError(
            "This trainer's rows have no labels, so there is no answer to look at. "
            "Methods that need it work with SFTTrainer and with classifiers."
        )
    labels = batch["labels"]
    if labels.dim() == 1:
        (owners,) = (labels != IGNORED).nonzero(as_tuple=True)
        return logits[owners], labels[owners], owners
    # One indexing, not a slice and a mask: each would fill another [B, L, V] in the backward.
    owners, before = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return logits[owners, before], labels[owners, before + 1], owners


def _log_p(answers: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(wide(answers), labels, reduction="none")


def _by_row(values: Tensor, owners: Tensor, batch: Batch) -> Tensor:
    return values.new_zeros(len(batch["labels"])).index_add(0, owners, values)
