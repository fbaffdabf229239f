"""The strongest directions of matrices, and keeping what a matrix is there: for `osf`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from keeptune.method import Context, all_bits, wide
from keeptune.methods._adapters import FIRST


@dataclass
class Old:
    """The old directions of a matrix X, and what X is there.

    Attributes:
        u: [out, k] with orthonormal columns, or None where the output side is free.
        v: [in, k] likewise, of the input side.
        kept: Of a side alone Uᵀ X or X V; of both their singular values [k].
    """

    u: Tensor | None
    v: Tensor | None
    kept: Tensor

    @all_bits()
    def free(self, gradient: Tensor) -> None:
        """Leave of a gradient only what is off the old directions, in place."""
        g = wide(gradient)
        if self.u is not None:
            g = g - self.u @ (self.u.T @ g)
        if self.v is not None:
            g = g - (g @ self.v) @ self.v.T
        gradient.copy_(g)

    @all_bits()
    def put_back(self, value: Tensor) -> None:
        """Give a value its old part again, in place; what is off it stays."""
        x = wide(value)
        if self.u is not None:
            left = self.kept if self.v is None else self.kept[:, None] * self.v.T
            x = x - self.u @ (self.u.T @ x - left)
        if self.v is not None:
            right = self.kept if self.u is None else self.u * self.kept
            x = x - (x @ self.v - right) @ self.v.T
        value.copy_(x)


@all_bits()
def strongest(weight: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triples: U [out, k], Σ [k] and V [in, k], k = ⌊share · min(out, in)⌋."""
    u, s, vh = torch.linalg.svd(wide(weight), full_matrices=False)
    k = int(share * len(s))
    # Laid out as they are when loaded: a GPU rounds products with a transposed matrix otherwise.
    u, s, v = (t.clone(memory_format=torch.contiguous_format) for t in (u[:, :k], s[:k], vh[:k].T))
    return u, s, v


def old_directions(ctx: Context, share: float) -> Iterator[tuple[str, Old]]:
    """What is held of every linear layer that is trained, by its parameters' names."""
    trained, free = ctx.trainable(), _outside(ctx.model)
    for name, module in ctx.model.named_modules():
        if isinstance(module, LoraLinear) and isinstance(module.get_base_layer(), nn.Linear):
            stem = f"{name}.lora_{{}}.{FIRST}.weight"
            a, b = trained.get(stem.format("A")), trained.get(stem.format("B"))
            if a is not None and b is not None:
                base = wide(module.get_base_layer().weight)
                with all_bits():
                    u, _, v = strongest(base + module.scaling[FIRST] * (wide(b) @ wide(a)), share)
                    held = [Old(None, v, wide(a) @ v), Old(u, None, u.T @ wide(b))]
                yield stem.format("A"), held[0]
                yield stem.format("B"), held[1]
            continue
        is_layer = isinstance(module, nn.Linear) and module not in free and ".lora_" not in name
        if is_layer and f"{name}.weight" in trained:
            u, s, v = strongest(module.weight, share)
            yield f"{name}.weight", Old(u, v, s)


def _outside(model: Any) -> set[nn.Module]:
    """The head, of a language model or of classes, with what PEFT has put around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(inner, "base_model", inner)
    free = set(inner.modules()) - set(backbone.modules()) if backbone is not inner else set()
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    return free if head is None else free | set(head.modules())
