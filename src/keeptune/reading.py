"""Reading off a model what it says at the answers of a batch, without running its head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keeptune.answers import Answers, Head

# Heads whose output a model changes in a way that is not known here.
_STRANGE: WeakSet[nn.Module] = WeakSet()
# What a head is made to put out, to see what a model does with it.
_PROBE = torch.tensor([2**-20, -(2**30), -30.0, -2.0, 0.0, 0.5, 7.0], dtype=torch.float64)


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_head(model: nn.Module) -> nn.Linear | None:
    """The head of a language model where it is a plain linear layer, whole and not adapted."""
    base = base_model(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if type(head) is not nn.Linear or "forward" in vars(head) or head in _STRANGE:
        return None
    return None if isinstance(head.weight, DTensor) else head


def read(model: nn.Module, call: Callable[[], Any], keep: Tensor) -> Answers:
    """What a model says at some positions, as hidden states where its head is known.

    Args:
        model: Its own, not a distributed wrapper.
        call: Runs it on a batch, in whatever way, and returns what it gives: logits [B, L, V], or
            [B, V] for a classifier.
        keep: bool, of the shape of the logits without V: whether a position predicts an answer.
    """
    head = find_head(model) if keep.dim() == 2 else None
    if head is None:
        return Answers(call().logits[keep])
    with _bypassed(head) as seen:
        outputs = call()
    scale, cap = _change(outputs.logits)
    if len(seen) != 1 or seen[0][0].shape[:2] != keep.shape or math.isnan(scale):
        _STRANGE.add(head)
        return Answers(call().logits[keep])
    hidden, weight, bias = seen[0]
    return Answers(hidden[keep], Head(weight, bias, scale, cap))


@contextmanager
def _bypassed(head: nn.Linear) -> Iterator[list[tuple[Tensor, Tensor, Tensor | None]]]:
    """Let the head hand over what comes in, and its weights of the moment, and put out little."""
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        seen.append((hidden, head.weight, head.bias))
        found: Tensor = _Stand.apply(hidden, head.weight, head.bias)  # type: ignore[no-untyped-call]
        return found

    head.__dict__["forward"] = forward
    try:
        yield seen
    finally:
        del head.__dict__["forward"]


class _Stand(torch.autograd.Function):
    """What the head puts out in place of logits, tied to what they would depend on.

    DDP looks from a forward's outputs for the weights that it has to wait for in the backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # On the CPU, where looking at what became of it waits for no other device.
        return _PROBE.expand(*hidden.shape[:-1], len(_PROBE)).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, None


def _change(probe: Tensor) -> tuple[float, float]:
    """(scale, cap) by which the output of a head became logits; NaN where it is something else."""
    if probe.shape[-1:] != _PROBE.shape or not probe.numel():
        return math.nan, math.nan
    got = probe.detach().reshape(-1, len(_PROBE))[0].double()
    scale = float(got[0] / _PROBE[0])
    linear = _PROBE * scale
    if torch.allclose(got, linear, rtol=1e-5):
        return scale, math.inf
    cap = float(-got[1])
    same = torch.allclose(got, cap * (linear / cap).tanh(), rtol=1e-5)
    return (scale, cap) if same else (math.nan, math.nan)


def positions(labels: Tensor, ignored: int) -> Tensor:
    """Which positions predict an answer: labels [B, L] or [B] to bool of their shape."""
    keep = labels != ignored
    if labels.dim() == 2:
        keep = torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], 1)
    return keep
