"""One tensor at rest: how exactly it is kept, and where.

Anchors and importances are read once per optimizer step and changed once per task, so they may be
smaller than the weights they belong to, and need not live on the accelerator. They are read block
by block: what is on the way at any moment is one block, never a model.
"""

from __future__ import annotations

import os
from tempfile import TemporaryFile
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Precision = Literal["float32", "bfloat16", "uint8"]
Place = Literal["device", "cpu", "disk"]

BLOCK = 256
# Elements that are converted at a time: 1 MiB in float32, which stays in a processor's cache.
_CHUNK = 1024 * BLOCK


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Non-negative numbers as 8-bit codes of their square roots, with one scale a block.

    Block-wise quantisation with the block's maximum as scale is that of Dettmers et al. 2022,
    https://arxiv.org/abs/2110.02861; the square root, as importances are squares, doubles the
    number of decades that 8 bits hold. A value F of a block whose maximum is M is read back within
    sqrt(F M)/255 + M/510²; what is below M/510² is read back as 0, and 0 and M themselves as
    they are, but for rounding in float32.

    Args:
        values: [n], at least 0 and finite, any floating type.

    Returns:
        Codes [n] in uint8 and scales [ceil(n / 256)] in float32; F ≈ (code · scale)².

    Raises:
        ValueError: A value is negative or not finite.
    """
    root = values.sqrt().float()
    if not root.isfinite().all():
        raise ValueError("Only finite values of at least 0 can be kept in 8 bits.")
    blocks = F.pad(root, (0, -len(root) % BLOCK)).view(-1, BLOCK)
    scales = blocks.amax(1) / 255
    # No root is as small as `tiny` unless it is 0, so a block of zeros is all that this changes.
    codes = blocks.div_(scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
    return codes.to(torch.uint8).view(-1)[: len(root)], scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """What `quantise` kept: (code · scale)² as [n] in float32.

    Args:
        codes: [n] in uint8.
        scales: [ceil(n / 256)] in float32.
    """
    root = codes.float()
    full = len(root) // BLOCK
    root[: full * BLOCK].view(full, BLOCK).mul_(scales[:full, None])
    root[full * BLOCK :].mul_(scales[full:])
    return root.square_()


def _on_disk(size: int, dtype: torch.dtype) -> Tensor:
    """A tensor mapped from a file without a name, which is gone when the tensor or process is.

    Raises:
        OSError: The folder for temporary files (`TMPDIR`) has no room.
    """
    with TemporaryFile() as file:
        # A sparse file would kill the process, instead of raising, when the disk is full.
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        path = f"/proc/self/fd/{file.fileno()}"
        # Unlike a Python mmap, this keeps no file descriptor: a model has hundreds of tensors.
        return torch.from_file(path, shared=True, size=size, dtype=dtype)


def _room(size: int, dtype: torch.dtype, place: Place, device: torch.device) -> Tensor:
    """An unset flat tensor where it shall be."""
    if place == "disk" and size:
        return _on_disk(size, dtype)
    return torch.empty(size, dtype=dtype, device=device if place == "device" else "cpu")


class Kept:
    """A copy of a tensor at rest; changing the tensor afterwards does not change what is kept.

    Args:
        tensor: Any shape. Its values must be at least 0 and finite for "uint8".
        precision: "float32" is as exact as the tensor is (float64 stays float64); "bfloat16" has
            2 bytes per weight and a relative error of at most 2⁻⁸; "uint8" has 1.0156 bytes per
            weight, see `quantise`.
        place: "device" (where the tensor is), "cpu", or "disk" (a temporary file, mapped).

    Raises:
        ValueError: A negative or infinite value was to be kept in 8 bits.
        OSError: There is no room on the disk.

    Attributes:
        shape: The tensor's shape.
    """

    def __init__(
        self, tensor: Tensor, precision: Precision = "float32", place: Place = "device"
    ) -> None:
        self.shape = tensor.shape
        types = {"": torch.bfloat16 if precision == "bfloat16" else tensor.dtype}
        if precision == "uint8":
            types = {"codes": torch.uint8, "scales": torch.float32}
        self._parts = {
            name: _room(self._size(name), dtype, place, tensor.device)
            for name, dtype in types.items()
        }
        self._exact = precision == "float32"
        self.replace(tensor)

    @classmethod
    def restored(
        cls,
        tensors: dict[str, Tensor],
        shape: torch.Size,
        precision: Precision,
        place: Place,
        device: torch.device,
    ) -> Kept:
        """What `tensors` gave, bit for bit.

        Args:
            tensors: From `tensors`, on any device.
            shape: The shape of the tensor that was kept.
            precision: As it was kept.
            place: Where to keep it now.
            device: The weights' device.
        """
        kept = cls.__new__(cls)
        kept.shape = shape
        kept._exact = precision == "float32"
        kept._parts = {}
        for name, tensor in tensors.items():
            kept._parts[name] = _room(tensor.numel(), tensor.dtype, place, device)
            kept._parts[name].copy_(tensor.view(-1))
        return kept

    @property
    def numel(self) -> int:
        """How many numbers are kept."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes held, wherever they are."""
        return sum(part.nbytes for part in self._parts.values())

    def block(self, start: int, stop: int, device: torch.device) -> Tensor:
        """The flat elements from `start` to `stop`.

        Args:
            start: A multiple of 256.
            stop: At most `numel`, or more for all that are left.
            device: Where they are wanted.

        Returns:
            [stop - start], read only: what is kept itself when it is exact and there already;
            else a copy, in float32 unless exact.
        """
        if "codes" not in self._parts:
            part = self._parts[""][start:stop].to(device)
            return part if self._exact else part.float()
        codes = self._parts["codes"][start:stop]
        scales = self._parts["scales"][start // BLOCK : -(-stop // BLOCK)]
        return dequantise(codes.to(device), scales.to(device))

    def full(self, device: torch.device) -> Tensor:
        """All of it in its own shape; as `block`, not for writing."""
        return self.block(0, self.numel, device).view(self.shape)

    @torch.no_grad()
    def write(self, start: int, values: Tensor) -> None:
        """Keep other flat values from `start` on.

        Args:
            start: A multiple of 256.
            values: [n], with n a multiple of 256 unless it reaches the end.

        Raises:
            ValueError: A negative or infinite value was to be kept in 8 bits.
        """
        if "codes" not in self._parts:
            self._parts[""][start : start + len(values)].copy_(values)
            return
        codes, scales = quantise(values)
        self._parts["codes"][start : start + len(codes)].copy_(codes)
        self._parts["scales"][start // BLOCK :][: len(scales)].copy_(scales)

    @torch.no_grad()
    def replace(self, tensor: Tensor) -> None:
        """Keep another tensor of the same shape instead, in the same memory.

        Raises:
            ValueError: The shape differs, or a negative or infinite value was to be kept in 8 bits.
        """
        if tensor.shape != self.shape:
            raise ValueError(f"Kept a tensor of {self.shape}, got one of {tensor.shape}.")
        flat = tensor.reshape(-1)
        for start in range(0, self.numel, _CHUNK):
            self.write(start, flat[start : start + _CHUNK])

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, as it is kept: "" in its own shape, or flat "codes" and "scales"."""
        if "codes" in self._parts:
            return dict(self._parts)
        return {"": self._parts[""].view(self.shape)}

    def _size(self, part: str) -> int:
        return -(-self.numel // BLOCK) if part == "scales" else self.numel
