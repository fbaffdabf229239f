"""The best low-rank factors of an update of LoRA modules: what `wise` and `merge` share."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor


def in_pairs(names: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """Each weight once: A of a LoRA module with its B, where both are there; any other alone."""
    for name in names:
        a, b = (name.replace(f".lora_{x}.", f".lora_{y}.") for x, y in ("BA", "AB"))
        if a == name or a not in names:
            yield name, b if b != name and b in names else None


def mix_factors(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], mix: float
) -> tuple[Tensor, Tensor, float]:
    """The best rank-r factors of (1 − mix) B₀A₀ + mix B₁A₁.

    QR of the stacked factors, then an SVD of a 2r × 2r matrix (Eckart–Young).

    Args:
        old: A₀ [r, in] and B₀ [out, r].
        new: A₁ and B₁.
        mix: Share of the new update, 0 to 1.

    Returns:
        A [r, in], B [out, r], and the relative Frobenius error of the cut to rank r.
    """
    (a0, b0), (a1, b1) = old, new
    rank = a0.shape[0]
    left, left_r = torch.linalg.qr(torch.cat([(1 - mix) * b0, mix * b1], 1).double())
    right, right_r = torch.linalg.qr(torch.cat([a0, a1], 0).double().T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T)
    root = s[:rank].sqrt()
    b = (left @ u[:, :rank]) * root
    a = root[:, None] * (vh[:rank] @ right.T)
    total = s.square().sum()
    error = float((s[rank:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return a.to(a0.dtype), b.to(b0.dtype), error


def low_rank(update: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of a rank (Eckart–Young).

    Args:
        update: [out, in].
        rank: At most min(out, in).

    Returns:
        A [rank, in], B [out, rank], and the relative Frobenius error.
    """
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    root = s[:rank].sqrt()
    total = s.square().sum()
    error = float((s[rank:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return root[:, None] * vh[:rank], u[:, :rank] * root, error
