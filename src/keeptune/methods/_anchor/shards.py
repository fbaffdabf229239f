"""Weights that several processes hold together, each its own shard (FSDP2's DTensors).

Everything that a penalty does is element by element, so a method keeps and edits only this
process's shard and talks to nobody. Only sums for evidence, and states, need the other processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Replicate

from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.processes import is_sharded


@dataclass(frozen=True)
class Spec:
    """How a tensor is spread over processes: all that is needed to put it together again.

    Attributes:
        mesh: The processes (a `DeviceMesh`).
        placements: One for each dimension of the mesh.
        shape: Of the whole tensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing memory; a tensor that is not sharded is returned itself.

    A process may own no row of a small tensor: the shard is then empty. To edit a weight through
    its shard, call this under `torch.no_grad()`.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_shards(ctx: Context, who: str, why: str) -> None:
    """Refuse weights that are spread over processes.

    Args:
        ctx: The task.
        who: The method's name.
        why: What of it they do not bear, to follow its name.

    Raises:
        MethodError: They are.
    """
    if is_sharded(ctx.model):
        raise MethodError(
            f"The method {who!r} {why}. Train with DDP (leave `fsdp` out), or remove the method."
        )


def spec_of(parameter: Tensor) -> Spec | None:
    """How a weight is spread, or None when every process has the whole of it."""
    if not isinstance(parameter, DTensor):
        return None
    return Spec(parameter.device_mesh, tuple(parameter.placements), parameter.shape)


@torch.no_grad()
def whole(shard: Tensor, spec: Spec | None) -> Tensor:
    """Put the shards of all processes together; every process must call it, in the same order.

    Args:
        shard: This process's, of any dtype, on any device.
        spec: Of the weight that it belongs to; with None the shard is returned as it is.

    Returns:
        The whole tensor, the same on all processes, on the device that they communicate with.
    """
    if spec is None:
        return shard
    return DTensor.from_local(
        shard.to(spec.mesh.device_type),
        spec.mesh,
        spec.placements,
        run_check=False,
        shape=spec.shape,
        # Shards may be of unequal size, so the whole one's layout cannot be told from one's own.
        stride=torch.empty(spec.shape, device="meta").stride(),
    ).full_tensor()


@torch.no_grad()
def part(full: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a whole tensor, cut as the weight is; nothing is communicated.

    Args:
        full: Of the weight's whole shape, of any dtype, the same on all processes.
        parameter: The weight.

    Returns:
        A tensor of the shape of `local(parameter)` on its device, with memory of its own where
        the weight is sharded; else `full` on the weight's device.
    """
    if not isinstance(parameter, DTensor):
        return full.to(parameter.device)
    mesh = parameter.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    spread = DTensor.from_local(full.to(mesh.device_type), mesh, everywhere, run_check=False)
    shard = spread.redistribute(mesh, parameter.placements).to_local()
    # A clone, or the view would keep the whole tensor in memory.
    return shard.clone().to(parameter.to_local().device)


@torch.no_grad()
def sum_over_shards(value: Tensor, parameter: Tensor) -> Tensor:
    """Sum numbers that each process computed on its shard; every process must call it.

    Args:
        value: One or several sums over elements of the shard, on its device; left as it is.
        parameter: The weight; where it is not sharded, the value is whole already.

    Returns:
        The sums over the whole weight, the same on all processes.
    """
    if not isinstance(parameter, DTensor):
        return value
    mesh = parameter.device_mesh
    total = value.detach().to(mesh.device_type, copy=True)
    for dimension, placement in enumerate(parameter.placements):
        # Along the other dimensions of the mesh all processes have the same shard.
        if placement.is_shard():
            distributed.all_reduce(total, group=mesh.get_group(dimension))
    return total
