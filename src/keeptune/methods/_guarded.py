"""How much of a change of the weights a guard's texts bear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._distil import read_texts
from keeptune.methods._measure import losses

LENGTH = 256  # tokens of a text, at most
HALVINGS = 5


def guard_texts(ctx: Context, path: str, field: str) -> list[dict[str, Any]]:
    """The texts of a file, as rows to be learned from the first token on.

    Raises:
        MethodError: A classifier is trained, or `read_texts` finds none.
    """
    rows = ctx.dataset
    if "labels" in rows.column_names and isinstance(rows[0]["labels"], int):
        raise MethodError(
            f"{field} is a file of texts, by which a classifier cannot be measured. Leave it out."
        )
    return read_texts(ctx, Path(path), LENGTH, field)


def text_loss(ctx: Context, texts: list[dict[str, Any]]) -> float:
    """Mean over texts of the model's loss, in nats a token."""
    return float(losses(replace(ctx, dataset=Dataset.from_list(texts))).mean())


def largest_share(loss: Callable[[float], float], start: float, limit: float) -> dict[str, float]:
    """The largest share whose loss is at most `limit`: all, or else found by halving.

    Args:
        loss: Of a share from 0 to 1.
        start: The loss of share 0, which is within the limit.
        limit: What is allowed.

    Returns:
        `share`, its loss `after`, and the loss `at_mix` of share 1.
    """
    full = loss(1.0)
    if full <= limit:
        return {"share": 1.0, "after": full, "at_mix": full}
    share, held, beyond = 0.0, start, 1.0
    for _ in range(HALVINGS):
        middle = (share + beyond) / 2
        found = loss(middle)
        if found <= limit:
            share, held = middle, found
        else:
            beyond = middle
    return {"share": share, "after": held, "at_mix": full}
