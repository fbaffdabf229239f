"""A task's rows, written rows and whole texts in one data set, and what each of them weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.nn import functional as F

from keeptune.method import IGNORED, Batch, Context, wide
from keeptune.methods._writing.keys import keys, keys_of
from keeptune.methods._writing.stock import as_texts, dataset_of, learned, rows_of
from keeptune.methods._writing.whole_rows import Form, Row
from keeptune.rowstore import COLUMNS


def _no_keys() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Mixture:
    """What is trained on.

    Attributes:
        dataset: All of it.
        old: Keys of the rows that were written.
        texts: Keys of the whole texts.
        longest: Tokens of the longest text of the task's own rows; 0 without texts.
        weights: Of an answer and of a token of a text, so that the trainer's mean over all of them
            becomes L_QA + strength · L_LM, each the mean over its own.
    """

    dataset: Dataset = field(default_factory=lambda: Dataset.from_dict({}))
    old: Tensor = field(default_factory=_no_keys)
    texts: Tensor = field(default_factory=_no_keys)
    longest: int = 0
    weights: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(
        cls,
        ctx: Context,
        dataset: Dataset,
        written: Mapping[str, Sequence[Row]],
        longest: int,
        strength: float,
    ) -> Mixture:
        """Mix.

        Args:
            ctx: The task; its own rows become whole texts, beside those written of old tasks.
            dataset: Rows that are trained on in any case.
            written: Rows by the task they stand for.
            longest: Tokens of a whole text at most; 0 for no texts.
            strength: Weight of L_LM.
        """
        old = [row for some in written.values() for row in some]
        own: list[Row] = []
        others: list[Row] = []
        if longest:
            own = as_texts(rows_of(ctx.dataset), Form.of(ctx.task, ctx.tokenizer), longest)
            for task, some in written.items():
                others += as_texts(some, Form.of(task, ctx.tokenizer), longest)
        texts = own + others
        answers = learned(dataset["labels"]) + learned(row.labels for row in old)
        tokens = learned(text.labels for text in texts)
        more = dataset_of([*old, *texts], ctx.dataset)
        return cls(
            dataset=concatenate_datasets([dataset.select_columns(COLUMNS), more]),
            old=keys_of(old, ctx.device),
            texts=keys_of(texts, ctx.device),
            longest=max((len(text.input_ids) for text in own), default=0),
            weights=weights_of(answers, tokens, strength),
        )

    def reweighted(self, ctx: Context, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What the weights add to the trainer's loss, and which rows were written: bool [B]."""
        found = keys(batch)
        is_text = torch.isin(found, self.texts)
        rows = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]  # of each answer
        losses = F.cross_entropy(
            wide(ctx.answer_logits(logits, batch)), ctx.answer_labels(batch), reduction="none"
        )
        answer, text = self.weights
        weights = torch.where(is_text[rows], text - 1, answer - 1)
        return ctx.mean_over_answers(weights * losses), torch.isin(found, self.old)

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, for a state."""
        return {"keys/old": self.old, "keys/texts": self.texts}

    @property
    def nbytes(self) -> int:
        """Bytes of `tensors`."""
        return self.old.nbytes + self.texts.nbytes


def weights_of(answers: int, tokens: int, strength: float) -> tuple[float, float]:
    """Weights in a mean over `answers` + `tokens` that make it mean + strength · mean.

    Args:
        answers: Answers in all.
        tokens: Tokens of texts in all.
        strength: Weight of the texts' mean.
    """
    both = answers + tokens
    return both / max(answers, 1), strength * both / max(tokens, 1)
