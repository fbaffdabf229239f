"""Weights that are not trained in one task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from keeptune.errors import MethodError
from keeptune.method import Context

# Why a method that freezes refuses weights that are spread over processes.
SETTLED = (
    "cannot choose what is trained while FSDP spreads the weights over processes, which settles "
    "that once"
)


def freeze(ctx: Context, names: Iterable[str], who: str) -> list[str]:
    """Stop training these weights.

    Returns:
        The names of those that were trained until now.

    Raises:
        MethodError: Nothing would be left to train.
    """
    trained = ctx.trainable()
    held = [name for name in names if name in trained]
    if held and len(held) == len(trained):
        raise MethodError(
            f"The method {who!r} would leave nothing to train in task {ctx.task!r}: all "
            f"{len(trained)} weights that are trained here are frozen. Freeze fewer."
        )
    for name in held:
        trained[name].requires_grad_(False)
    return held


def give_free(ctx: Context, names: Sequence[str]) -> None:
    """Train these weights again."""
    weights = dict(ctx.model.named_parameters())
    for name in names:
        weights[name].requires_grad_(True)


def size(ctx: Context, names: Sequence[str]) -> int:
    """How many numbers these weights have."""
    weights = dict(ctx.model.named_parameters())
    return sum(weights[name].numel() for name in names)
