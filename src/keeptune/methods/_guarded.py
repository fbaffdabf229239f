"""How much of a change of the weights a guard's texts bear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from keeptune.bisection import largest_share
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._distil import read_texts
from keeptune.methods._measure import losses

LENGTH = 256  # tokens of a text, at most


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


def share_within(loss: Callable[[float], float], start: float, limit: float) -> dict[str, float]:
    """The largest share whose loss is at most `limit`.

    Args:
        loss: Of a share from 0 to 1.
        start: The loss of share 0, which is within the limit.
        limit: What is allowed.

    Returns:
        `share`, its loss `after`, and the loss `at_mix` of share 1.
    """
    found = {0.0: start}

    def is_within(share: float) -> bool:
        found[share] = loss(share)
        return found[share] <= limit

    share = largest_share(is_within)
    return {"share": share, "after": found[share], "at_mix": found[1.0]}
