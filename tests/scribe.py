"""A model that writes by rule, and contexts for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

import pico
from keeptune.method import Context
from keeptune.tokens import collate

Ids = list[int]


class Scribe(nn.Module):
    """Says what a rule says: the logits of the next token given all before it.

    It keeps the texts so far as its cache, and notes how many rows each forward had.
    """

    def __init__(self, rule: Any, vocab: int = pico.VOCAB) -> None:
        super().__init__()
        self.rule, self.vocab = rule, vocab
        self.weight = nn.Parameter(torch.zeros(1))
        self.sizes: list[int] = []

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        assert attention_mask is not None
        assert not torch.is_grad_enabled()
        assert not self.training
        self.sizes.append(len(input_ids))
        texts = [] if past_key_values is None else past_key_values
        old = texts or [[] for _ in input_ids]
        new = [
            text + [t for t, there in zip(ids, mask[-len(ids) :], strict=True) if there]
            for text, ids, mask in zip(
                old, input_ids.tolist(), attention_mask.tolist(), strict=True
            )
        ]
        logits = torch.stack([self.rule(text) for text in new])[:, None]
        return SimpleNamespace(logits=logits, past_key_values=new)


def says(*ids: int, vocab: int = pico.VOCAB, sure: float = 50.0) -> Tensor:
    """Logits that are the same for these tokens and far below for all others."""
    logits = torch.zeros(vocab)
    logits[list(ids)] = sure
    return logits


def echo(answer: Ids, after: int) -> Any:
    """A rule: from position `after` on the answer, token by token, then <unk>."""

    def rule(text: Ids) -> Tensor:
        at = len(text) - after
        return says(answer[at] if 0 <= at < len(answer) else 3)

    return rule


def rows(*texts: tuple[str, str]) -> Dataset:
    """Questions and answers as rows, each ended by EOS."""
    tokenizer = pico.tokenizer()
    ids, labels = [], []
    for question, answer in texts:
        head, tail = tokenizer.encode(question), [*tokenizer.encode(answer), 2]
        ids.append(head + tail)
        labels.append([-100] * len(head) + tail)
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def context(model: nn.Module, dataset: Dataset | None = None, **more: Any) -> Context:
    """The first task's, unless told otherwise, with a tokenizer of characters and a template."""
    tokenizer = pico.tokenizer(chat=True)
    given: dict[str, Any] = {"task": "t0", "index": 0, "tokenizer": tokenizer} | more
    own = rows(("1+1=", "2")) if dataset is None else dataset
    return Context(model=model, dataset=own, collate=collate(tokenizer), **given)
