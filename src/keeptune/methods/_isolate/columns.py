"""Narrow columns beside the layers of a model that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keeptune.method import ADDED, Context, wide


def rms(values: Tensor) -> Tensor:
    """Root of the mean square over the last dimension, which is kept; never 0."""
    return values.square().mean(-1, keepdim=True).add(1e-6).sqrt()


class Column(nn.Module):
    """One task's weights: of every layer a few small matrices, and one way back.

    Args:
        depth: Layers of the model, N.
        width: Its hidden size, D.
        rank: The column's own size, R.
        before: Columns that it reads, K.

    Attributes:
        down: A [N, R, D].
        own: W [N, R, R], 0 at first.
        read: V [N, R, K R].
        scale: α [N], 1 at first.
        lateral: U [N, R, R], 0 at first.
        up: B [D, R], 0 at first.
    """

    def __init__(self, depth: int, width: int, rank: int, before: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(depth, rank, width).uniform_(-1, 1) / width**0.5)
        self.own = nn.Parameter(torch.zeros(depth, rank, rank))
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.before = before
        if before:
            size = before * rank
            self.read = nn.Parameter(torch.empty(depth, rank, size).uniform_(-1, 1) / size**0.5)
            self.scale = nn.Parameter(torch.ones(depth))
            self.lateral = nn.Parameter(torch.zeros(depth, rank, rank))

    def state(self, layer: int, hidden: Tensor, last: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Its state after one layer.

        Args:
            layer: Which, from 0.
            hidden: The model's hidden state after that layer over its rms, [B, L, D].
            last: The column's own state after the layer before, [B, L, R].
            others: Those of earlier columns after the layer before.
        """
        total = F.linear(hidden, self.down[layer]) + F.linear(last, self.own[layer])
        if others:
            seen = self.scale[layer] * torch.cat(list(others), -1)
            total = total + F.linear(F.linear(seen, self.read[layer]).relu(), self.lateral[layer])
        return last + total.relu()


class Columns(nn.Module):
    """All columns of a model, one for each task, and which of them answer.

    Each reads the model's hidden states and the columns before it, and is read by later ones only;
    what those that answer say is added to the last layer's output, so that nothing within the
    model, and no column, depends on a later column.

    Args:
        depth: Layers of the model.
        width: Its hidden size.
        rank: Size of each column.
    """

    def __init__(self, depth: int, width: int, rank: int) -> None:
        super().__init__()
        self.depth, self.width, self.rank = depth, width, rank
        self.columns = nn.ModuleList()
        self.answering: list[int] = []
        self._seen: list[Tensor] = []

    def __iter__(self) -> Iterator[Column]:
        for column in self.columns:
            assert isinstance(column, Column)
            yield column

    def add(self, ctx: Context) -> Column:
        """Add a column that says nothing yet, drawn from the seed and the task alone."""
        seed = int(ctx.random("column").integers(2**31))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            column = Column(self.depth, self.width, self.rank, len(self.columns))
        self.columns.append(column.to(ctx.device))
        return column

    def states(self, hidden: Sequence[Tensor], count: int) -> list[Tensor]:
        """What the first `count` columns hold after the last layer.

        Args:
            hidden: The model's hidden states after each layer, [B, L, D].
            count: 1 or more.
        """
        shape = (*hidden[0].shape[:-1], self.rank)
        now = [wide(hidden[0]).new_zeros(shape) for _ in range(count)]
        for layer, values in enumerate(hidden):
            values = wide(values) / rms(wide(values))
            now = [
                column.state(layer, values, now[k], now[:k])
                for k, column in zip(range(count), self, strict=False)
            ]
        return now

    def forward(self, hidden: Sequence[Tensor]) -> Tensor:
        """What is added to the last layer's output: the mean over those that answer."""
        states = self.states(hidden, max(self.answering) + 1)
        columns = list(self)
        said = [F.linear(states[k], columns[k].up) for k in self.answering]
        mean = torch.stack(said).mean(0) if len(said) > 1 else said[0]
        return (rms(wide(hidden[-1])) * mean).to(hidden[-1].dtype)

    def attach(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Stand beside these layers from now on, as a part of the model."""
        model.add_module(ADDED, self)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._beside(index))

    def _beside(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not self.answering:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            self._seen = [*self._seen[:index], hidden.detach()]
            if index < self.depth - 1:
                return None
            hidden, self._seen = hidden + self(self._seen), []
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook
