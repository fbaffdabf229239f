"""Sums for evidence, of which each process has a share."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from keeptune.processes import processes


class Sums:
    """Numbers that are added up while a task is learned, without waiting for the device.

    Args:
        count: How many sums.
        device: Where the model is.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu") -> None:
        self.share = torch.zeros(count, dtype=torch.float64, device=device)
        self._total: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self.share.nbytes

    def add(self, which: int, value: Tensor | int) -> None:
        """Add to one of them."""
        self.share[which] += value
        self._total = None

    def total(self) -> Tensor:
        """Over all processes, each of which must call it; a tensor of their own."""
        if self._total is None:
            self._total = self.share.clone()
            if processes()[1] > 1:
                distributed.all_reduce(self._total)
        return self._total.clone()

    def values(self) -> list[float]:
        """What `total` found last, or this process's share if more was added since."""
        found: list[float] = (self.share if self._total is None else self._total).tolist()
        return found

    @classmethod
    def of(cls, total: Tensor, device: torch.device) -> Sums:
        """Take up what `total` gave; in the first process, so that it is not there twice."""
        sums = cls(len(total), device)
        sums._total = total.to(device)
        if processes()[0] == 0:
            sums.share += sums._total
        return sums
