"""A gate that shares each token out among experts, by what enters one layer of a model.

Everything below that layer stays as it is, so that a token of an old task enters the gate exactly
as it did when that task was learned, whatever came after. The gate reads each token by itself, and
so a text is shared out alike at once, token by token from a cache, or beside others in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from keeptune.method import ADDED, Context, wide
from keeptune.methods._anchor.undisturbed import undisturbed
from keeptune.methods._features import BATCH, input_of, mask_of, taken_down
from keeptune.processes import processes

ROWS = 512  # of a task, by which the gate learns it
TOKENS = 32  # of each of these rows
SHOWN = 64  # rows on which the shares of the experts are shown


def level(values: Tensor) -> Tensor:
    """Over their root mean square in the last dimension, in float32: [..., D] to [..., D].

    A few tokens, such as the first of a text, are hundreds of times as large as others.
    """
    values = wide(values)
    return values / values.square().mean(-1, keepdim=True).add(1e-6).sqrt()


class Gate(nn.Module):
    """Shares of T experts in each token: softmax((K x + c) / temperature), x leveled.

    Args:
        temperature: Above 1 experts share more evenly, towards 0 the likeliest takes all.

    Attributes:
        keys: K [T, D].
        offsets: c [T].
        shares: Of the tokens that pass the model now, [B, L, T]; None while there is one expert.
    """

    keys: Tensor
    offsets: Tensor

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        # Not saved with the model: they follow from what the method keeps.
        self.register_buffer("keys", torch.empty(0, 0), persistent=False)
        self.register_buffer("offsets", torch.empty(0), persistent=False)
        self.shares: Tensor | None = None
        self._upper: list[nn.Module] = []
        self._weighed: set[str] = set()

    def attach(self, model: nn.Module, layers: Sequence[nn.Module]) -> Self:
        """Become a part of the model, and read what enters the first of these layers."""
        model.add_module(ADDED, self)
        self._upper = list(layers)
        layers[0].register_forward_pre_hook(self._read, with_kwargs=True)
        return self

    def weigh(self, adapters: Sequence[str], layers: Sequence[Any]) -> None:
        """Multiply what LoRA adapters say in these layers by their experts' shares from now on.

        Args:
            adapters: Of experts 0, 1, …; the last one is always the newest expert's.
            layers: PEFT's LoRA layers, above where the gate reads.
        """
        for number, name in enumerate(adapters):
            if name not in self._weighed:
                self._weighed.add(name)
                weight = partial(self._weigh, -1 if name == adapters[-1] else number)
                for layer in layers:
                    layer.lora_B[name].register_forward_hook(weight)

    def learned(self, keys: Tensor, offsets: Tensor) -> None:
        """Share out by these from now on: K [T, D] and c [T]."""
        self.keys, self.offsets = keys.to(self.keys.device), offsets.to(self.keys.device)

    def forward(self, values: Tensor) -> Tensor:
        """The shares of tokens: [..., D] to [..., T]."""
        # Small differences of large numbers, of which half precision would leave nothing.
        with torch.autocast(values.device.type, enabled=False):
            scores = level(values) @ self.keys.T + self.offsets
        return (scores / self.temperature).softmax(-1)

    def _read(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        _, values = input_of(args, kwargs)
        self.shares = self(values.detach()) if len(self.keys) > 1 else None
        for layer in self._upper:
            # Set by whoever turns it on, which may be after the gate is attached.
            run = getattr(layer, "_gradient_checkpointing_func", None)
            if run is not None and not isinstance(run, Recalled):
                layer._gradient_checkpointing_func = Recalled(run, self)  # type: ignore[assignment]

    def _weigh(self, number: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self.shares is None:
            return None
        # A mixture of experts of the model's own lays all tokens in a line.
        own = self.shares[..., number].reshape(output.shape[:-1])
        return output * own[..., None].to(output.dtype)


class Recalled:
    """Recomputes a layer for the backward with the shares it had, whatever passed since.

    Args:
        run: What transformers recomputes a layer by.
        gate: Whose shares.
    """

    def __init__(self, run: Callable[..., Any], gate: Gate) -> None:
        self.run, self.gate = run, gate

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer now, and again later."""
        shares = self.gate.shares

        def again(*inputs: Any, **named: Any) -> Any:
            self.gate.shares = shares
            return layer(*inputs, **named)

        return self.run(again, *args, **kwargs)


def _passes(ctx: Context, rows: Sequence[int]) -> Iterator[Tensor]:
    """Pass rows of the task through the model, head aside; which tokens are there, [B, L]."""
    model: Any = ctx.model
    body = model.get_base_model().base_model
    with undisturbed(ctx, {}), torch.no_grad():
        for begin in range(0, len(rows), BATCH):
            batch = ctx.batch(list(ctx.dataset.select(rows[begin : begin + BATCH])))
            body(**{name: values for name, values in batch.items() if name != "labels"})
            yield mask_of(batch).bool()


def tokens(ctx: Context, layer: nn.Module) -> Tensor:
    """What enters a layer at some tokens of some rows of the task, leveled: [n, D] on the CPU."""
    random, found = ctx.random("gate"), []
    chosen = random.permutation(len(ctx.dataset))[:ROWS]
    with taken_down(layer) as seen:
        for mask in _passes(ctx, chosen.tolist()):
            for states, there in zip(seen.pop(), mask, strict=True):
                some = random.permutation(int(there.sum()))[:TOKENS]
                found.append(level(states[there][some.tolist()]))
    values = torch.cat(found)
    if processes()[1] > 1:
        # What differs by rounding must not give each process a gate of its own.
        distributed.broadcast(values, 0)
    return values.cpu()


def used(ctx: Context, gate: Gate) -> Tensor:
    """The experts' shares in the tokens of some rows of the task, on average: [T]."""
    every = range(min(len(ctx.dataset), SHOWN))
    given = [gate.shares[mask] for mask in _passes(ctx, every) if gate.shares is not None]
    return torch.cat(given).mean(0) if given else torch.ones(1)


def likely_shares(center: Tensor, covariance: Tensor, gate: Gate, normal: Tensor) -> Tensor:
    """The experts' shares, on average, in tokens of which only the statistics are known: [T].

    Args:
        center: Mean of the tokens, [D].
        covariance: Of the tokens, [D, D].
        gate: Whose shares; its scores are then T numbers of a Gaussian as well.
        normal: Draws from the standard one, [n, T].
    """
    keys, offsets = gate.keys.cpu(), gate.offsets.cpu()
    values, vectors = torch.linalg.eigh(keys @ covariance @ keys.T)
    apart = normal @ (vectors * values.clamp_min(0).sqrt()).T
    shares: Tensor = ((keys @ center + offsets + apart) / gate.temperature).softmax(-1)
    return shares.mean(0)
