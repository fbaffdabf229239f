"""Bottlenecks behind the feed-forward parts of a model that stays as it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keeptune.method import wide
from keeptune.methods._isolate.grown import Parts
from keeptune.methods._isolate.layers import units


class Bottleneck(nn.Module):
    """One task's weights: for each layer a way into few dimensions and one back.

    Args:
        depth: Layers of the model, N.
        width: Its hidden size, D.
        rank: Size of the bottleneck, R.

    Attributes:
        down: A [N, R, D].
        shift: a [N, R], 0 at first.
        up: B [N, D, R], 0 at first.
        offset: b [N, D], 0 at first.
    """

    def __init__(self, depth: int, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(depth, rank, width).uniform_(-1, 1) / width**0.5)
        self.shift = nn.Parameter(torch.zeros(depth, rank))
        self.up = nn.Parameter(torch.zeros(depth, width, rank))
        self.offset = nn.Parameter(torch.zeros(depth, width))

    def forward(self, layer: int, values: Tensor) -> Tensor:
        """What is added to a layer's values: [..., D] to [..., D]."""
        inside = F.linear(values, self.down[layer], self.shift[layer]).relu()
        return F.linear(inside, self.up[layer], self.offset[layer])


def feed_forward(stack: nn.ModuleList, index: int) -> nn.Module:
    """What a layer adds to its state last: its `mlp`, or else its last linear part."""
    linear = [name for category, name in units(stack, index) if category != "norm"]
    layer = stack[index]
    return layer.get_submodule("mlp" if hasattr(layer, "mlp") else linear[-1].rstrip("."))


class Bottlenecks(Parts):
    """All tasks' bottlenecks, which add the mean of what those say that answer."""

    def behind(self, stack: nn.ModuleList) -> None:
        """Stand behind these layers' feed-forward parts from now on."""
        for index in range(len(stack)):
            feed_forward(stack, index).register_forward_hook(partial(self._behind, index))

    def _behind(self, index: int, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not self.answering:
            return None
        values, *more = output if isinstance(output, tuple) else (output,)
        said = [part(index, wide(values)) for part in self.chosen()]
        mean = torch.stack(said).mean(0) if len(said) > 1 else said[0]
        values = values + mean.to(values.dtype)
        return (values, *more) if isinstance(output, tuple) else values
