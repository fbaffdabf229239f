"""The processes that train one model together: which one this is, and what all must agree on.

Started by `torchrun` or `accelerate launch`, every process runs the same program. The first one
writes the run folder; what depends on a disk or a clock it decides for all.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

Value = TypeVar("Value")


def launched() -> int:
    """As how many processes this program was started; known before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes and tells; known before they have met."""
    number, count = processes()
    return number == 0 if count > 1 or launched() == 1 else os.environ.get("RANK", "0") == "0"


def processes() -> tuple[int, int]:
    """This process's number, and how many have met."""
    alone = not (distributed.is_available() and distributed.is_initialized())
    return (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())


def first_says(value: Value) -> Value:
    """The first process's value, in every process; all must call it."""
    if processes()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Value) -> list[Value]:
    """Every process's value, in their order; all must call it."""
    count = processes()[1]
    if count == 1:
        return [value]
    found: list[Any] = [None] * count
    distributed.all_gather_object(found, value)
    return found


def any_says(flags: list[bool], device: torch.device) -> list[bool]:
    """Of each flag whether it is up in any process; all must call it."""
    if processes()[1] == 1:
        return flags
    up = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(up, op=distributed.ReduceOp.MAX)
    return [bool(flag) for flag in up.tolist()]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP spreads the model's weights over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let FSDP take the weights apart again, which it keeps whole for a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, spread over processes as `example` is; all must call it."""
    if not isinstance(example, DTensor):
        return tensor
    mesh = example.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, example.placements)
