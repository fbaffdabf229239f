"""Which rows of a batch are known ones, found on the device without waiting for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from keeptune.method import Batch
from keeptune.methods._writing.whole_rows import Row

# Odd numbers of 64 bits (Steele et al. 2014, SplitMix): products wrap around, which is meant.
_GOLDEN, _MIX = -7046029254386353131, -4658895280553007687


def keys(batch: Batch) -> Tensor:
    """A number of 64 bits for each row, by its tokens and their order: int64 [B].

    Padding does not count, on whichever side it is. Two rows have the same number by chance once
    in 2^64 pairs.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    place = mask.cumsum(1) * _GOLDEN
    place = (place ^ (place >> 29)) * _MIX
    return ((ids + 1) * (place ^ (place >> 32)) * mask).sum(1)


def keys_of(rows: Iterable[Row], device: torch.device) -> Tensor:
    """The same numbers for rows that are in no batch: int64 [rows]."""
    found = [keys({"input_ids": torch.tensor([row.input_ids])}) for row in rows]
    return torch.cat([*found, torch.empty(0, dtype=torch.int64)]).to(device)
