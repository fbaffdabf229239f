"""How likely a model finds tokens, batched; and the model's state while it is asked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from keeptune.method import IGNORED, Ids
from keeptune.processes import reshard
from keeptune.reading import base_model

# Logits of one batch: 2**27 in float32 are 512 MB.
MOST_LOGITS = 2**27
CHUNK = 512  # positions whose logits are float32 probabilities at one time
NO_LIMIT = 10**9


def sequence_losses(model: Any, pairs: Sequence[tuple[Ids, Ids]], padding: int) -> list[float]:
    """Negative log-likelihood of each row's labels, in nats, summed.

    Args:
        model: A causal language model.
        pairs: Ids and labels per row, equally long; -100 is no label, nor is the first ever one.
        padding: Id to pad with; it is masked.
    """
    ids, mask = padded([ids for ids, _ in pairs], padding, model)
    labels, _ = padded([labels for _, labels in pairs], IGNORED, model)
    first = min((_first_label(labels) for _, labels in pairs), default=1)
    logits = _last_logits(model, ids.shape[1] - first + 1, input_ids=ids, attention_mask=mask)
    return _summed(logits[:, :-1], labels[:, first:])


def sequence_guesses(model: Any, pairs: Sequence[tuple[Ids, Ids]], padding: int) -> list[Ids]:
    """The likeliest token at each label's place, given everything right before it.

    Args:
        model: A causal language model.
        pairs: As in `sequence_losses`.
        padding: Id to pad with; it is masked.
    """
    ids, mask = padded([ids for ids, _ in pairs], padding, model)
    labels, _ = padded([labels for _, labels in pairs], IGNORED, model)
    first = min((_first_label(labels) for _, labels in pairs), default=1)
    logits = _last_logits(model, ids.shape[1] - first + 1, input_ids=ids, attention_mask=mask)
    best, asked = logits[:, :-1].argmax(-1), labels[:, first:] != IGNORED
    return [row[keep].tolist() for row, keep in zip(best, asked, strict=True)]


def option_losses(
    model: Any, heads: Sequence[Ids], tails: Sequence[Sequence[Ids]], padding: int
) -> list[list[float]]:
    """Negative log-likelihood of each row's options after its question, in nats, summed.

    The questions run once and their keys and values serve all options, where the model's cache
    allows it; the result is that of `sequence_losses` up to float rounding.

    Args:
        model: A causal language model.
        heads: Ids of the question, per row.
        tails: Ids of each option, per row.
        padding: Id to pad with; it is masked.
    """
    cache = _plain_cache(model)
    if cache is None:
        pairs = [
            (head + tail, [IGNORED] * len(head) + tail)
            for head, options in zip(heads, tails, strict=True)
            for tail in options
        ]
        flat = sequence_losses(model, pairs, padding)
    else:
        owner = [i for i, options in enumerate(tails) for _ in options]
        flat = _shared_losses(model, heads, owner, [t for row in tails for t in row], cache)
    losses = iter(flat)
    return [[next(losses) for _ in options] for options in tails]


def _shared_losses(
    model: Any,
    heads: Sequence[Ids],
    owner: Sequence[int],
    tails: Sequence[Ids],
    cache: DynamicCache,
) -> list[float]:
    """Losses of the tails, tail i after head `owner[i]`; the padding id is 0, always masked."""
    ids, seen = padded(heads, 0, model)
    lengths = seen.sum(1)
    keep = ids.shape[1] - min(map(len, heads)) + 1
    logits = _last_logits(model, keep, input_ids=ids, attention_mask=seen, past_key_values=cache)
    # What follows a question's last token gives the first token of each of its options.
    at = torch.arange(len(heads), device=ids.device)
    known = logits[at, lengths - ids.shape[1] + keep - 1].float().log_softmax(-1)
    losses: list[float] = (-known[list(owner), [tail[0] for tail in tails]]).tolist()
    longer = [i for i, tail in enumerate(tails) if len(tail) > 1]
    if not longer:
        return losses
    rows = torch.tensor([owner[i] for i in longer], device=ids.device)
    cache.batch_select_indices(rows)
    ids, mask = padded([tails[i][:-1] for i in longer], 0, model)
    labels, _ = padded([tails[i][1:] for i in longer], IGNORED, model)
    logits = _last_logits(
        model,
        ids.shape[1],
        input_ids=ids,
        attention_mask=torch.cat([seen[rows], mask], dim=1),
        position_ids=lengths[rows, None] + torch.arange(ids.shape[1], device=ids.device),
        past_key_values=cache,
    )
    for i, more in zip(longer, _summed(logits, labels), strict=True):
        losses[i] += more
    return losses


def _last_logits(model: Any, keep: int, **inputs: Any) -> Tensor:
    """Logits [B, keep, V] of the last positions; no labels go in, so no forward fuses them away."""
    if "logits_to_keep" in inspect.signature(base_model(model).forward).parameters:
        inputs["logits_to_keep"] = keep
    logits: Tensor = model(use_cache="past_key_values" in inputs, **inputs).logits
    return logits[:, -keep:]


def _summed(logits: Tensor, labels: Tensor) -> list[float]:
    """Cross-entropy of logits [B, T, V] at labels [B, T], summed over T in float64."""
    total = torch.zeros(len(labels), dtype=torch.float64)
    at = (labels != IGNORED).nonzero()
    for begin in range(0, len(at), CHUNK):
        rows, columns = at[begin : begin + CHUNK].unbind(1)
        nats = F.cross_entropy(
            logits[rows, columns].float(), labels[rows, columns], reduction="none"
        )
        total.index_add_(0, rows.cpu(), nats.cpu().double())
    return [float(nats) for nats in total]


def _first_label(labels: Ids) -> int:
    found = (i for i, label in enumerate(labels) if i and label != IGNORED)
    return next(found, max(len(labels) - 1, 1))


def _plain_cache(model: Any) -> DynamicCache | None:
    """An empty cache if every layer keeps all keys and values, else None.

    Sliding windows, recurrent states and PEFT's virtual tokens do not bear padding in between.
    """
    prompted = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    takes = inspect.signature(base_model(model).forward).parameters
    if prompted or not {"position_ids", "past_key_values"} <= takes.keys():
        return None
    cache = DynamicCache(config=base_model(model).config)
    plain = bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache if plain else None


def context_length(model: Any, max_length: int | None) -> int:
    """Longest sequence in tokens: the model's own limit, or `max_length` where that is less."""
    config = base_model(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    return int(min(limit, max_length or NO_LIMIT))


def most_tokens(model: Any) -> int:
    """How many tokens of a batch may have logits at one time."""
    return MOST_LOGITS // int(base_model(model).config.get_text_config().vocab_size)


def padded(
    rows: Sequence[Ids], padding: int, model: Any, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 [B, longest row], on the model's device."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    device = next(model.parameters()).device
    return ids.to(device), mask.to(device)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off; every module's own mode is put back afterwards, and weights are spread again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        reshard(model)


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """The model without generation settings of its own, which would fill in for those not given.

    A repetition penalty, for one, would make the answers not greedy.
    """
    owners = {id(m): m for m in (model, base_model(model)) if "generation_config" in vars(m)}
    kept = [(owner, owner.generation_config) for owner in owners.values()]
    try:
        for owner, _ in kept:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in kept:
            owner.generation_config = config
