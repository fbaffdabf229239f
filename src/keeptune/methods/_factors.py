"""The best low-rank factors of an update of LoRA modules: what `wise` and `merge` share."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

FRESH = 3**-0.5  # norm of a row of A as PEFT draws it, on average


def in_pairs(names: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """Each weight once: A of a LoRA module with its B, where both are there; any other alone."""
    for name in names:
        a, b = (re.sub(r"\.(lora|lora_embedding)_[AB]\b", rf".\1_{x}", name) for x in "AB")
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
    left, left_r = torch.linalg.qr(torch.cat([(1 - mix) * b0, mix * b1], 1).double())
    right, right_r = torch.linalg.qr(torch.cat([a0, a1], 0).double().T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T)
    a, b, error = _divided(left @ u, s, vh @ right.T, a0.shape[0])
    return a.to(a0.dtype), b.to(b0.dtype), error


def low_rank(update: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of a rank (Eckart–Young).

    Args:
        update: [out, in].
        rank: Any; what is above min(out, in) is nothing.

    Returns:
        A [rank, in], B [out, rank], and the relative Frobenius error.
    """
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=rank > min(update.shape))
    return _divided(u, s, vh, rank)


def _divided(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors of Σ sᵢ uᵢ vᵢᵀ, cut to a rank.

    Where sᵢ is nothing, a row of A still is something, as in a new adapter: with both factors 0
    neither would ever have a gradient again.

    Args:
        u: [out, ≥ len(s)], orthonormal columns.
        s: Falling.
        vh: [n, in], orthonormal rows; those after the first len(s) are used only so.
        rank: Of the factors; where there are too few directions both are filled up with 0.

    Returns:
        A [rank, in], B [out, rank], and the relative Frobenius error.
    """
    kept = s[:rank]
    is_some = kept > kept[0] * 1e-12  # none of a zero update
    a, b = vh.new_zeros(rank, vh.shape[1]), u.new_zeros(u.shape[0], rank)
    a[: len(vh)] = vh[:rank] * FRESH
    a[: len(kept)][is_some] = kept[is_some].sqrt()[:, None] * vh[: len(kept)][is_some]
    b[:, : len(kept)][:, is_some] = u[:, : len(kept)][:, is_some] * kept[is_some].sqrt()
    total = s.square().sum()
    error = float((s[rank:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return a, b, error
