"""The model as it was, or without its adapter, as a teacher: no second model is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from keeptune.answers import Answers
from keeptune.method import Batch, Context
from keeptune.methods._adapters import base_alone


class Frozen:
    """A copy of the trained weights, with which the same model answers as it did.

    Under LoRA these are the adapters' weights only.

    Args:
        weights: By name.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    @classmethod
    def of(cls, ctx: Context) -> Frozen:
        """The model as it is now."""
        return cls({n: p.detach().clone() for n, p in ctx.trainable().items()})

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    def answers(self, ctx: Context, batch: Batch) -> Answers:
        """What it says at a batch's answers, without dropout and without gradients."""

        def call(**inputs: Any) -> Any:
            return functional_call(ctx.model, self.weights, (), inputs, tie_weights=True)

        return _answers(ctx, batch, call)


def without_adapter(ctx: Context, batch: Batch) -> Answers:
    """What the base model says at a batch's answers, without dropout and without gradients."""
    with base_alone(ctx):
        return _answers(ctx, batch, ctx.model)


def _answers(ctx: Context, batch: Batch, call: Callable[..., Any]) -> Answers:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with _resting(ctx), torch.no_grad():
        return ctx.read(batch, lambda: call(**inputs))


@contextmanager
def _resting(ctx: Context) -> Iterator[None]:
    """Eval mode for a moment."""
    modes = [(module, module.training) for module in ctx.model.modules()]
    ctx.model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
