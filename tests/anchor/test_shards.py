"""Shards of whole tensors and back, on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from keeptune.methods._anchor.shards import local, part, spec_of, sum_over_shards, whole

# Rows that divide evenly, rows that do not, and a row that one process has alone.
SHAPES = [(4,), (5, 3), (1,), (3, 2, 2)]
MESHES: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((2,), [Shard(0)]),
    ((2, 1), [Replicate(), Shard(0)]),
    ((1, 2), [Replicate(), Shard(0)]),
]


def counted(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def check(rank: int, meeting: str) -> None:
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for sizes, placements in MESHES:
        mesh = init_device_mesh("cpu", sizes)
        for shape in SHAPES:
            parameter = Parameter(distribute_tensor(counted(shape), mesh, placements))
            _check_one(parameter, shape)
    distributed.destroy_process_group()


@torch.no_grad()
def _check_one(parameter: Tensor, shape: tuple[int, ...]) -> None:
    full = counted(shape, torch.uint8)
    shard = part(full, parameter)
    assert torch.equal(shard, local(parameter).to(torch.uint8))
    assert shard.untyped_storage().nbytes() == shard.numel()
    assert torch.equal(whole(shard, spec_of(parameter)), full)
    sums = torch.stack([local(parameter).sum(), local(parameter).square().sum()])
    kept = sums.clone()
    want = torch.stack([full.double().sum(), full.double().square().sum()])
    assert torch.equal(sum_over_shards(sums, parameter).double(), want)
    assert torch.equal(sums, kept)
    local(parameter).add_(1)
    assert torch.equal(whole(local(parameter), spec_of(parameter)), counted(shape) + 1)


def test_two_processes_cut_sum_and_join_any_tensor(tmp_path: Path) -> None:
    multiprocessing.spawn(check, (f"file://{tmp_path}/meeting",), nprocs=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_process_has_the_whole_of_everything(dtype: torch.dtype) -> None:
    weight = Parameter(counted((5, 3), dtype))
    assert local(weight) is weight
    assert spec_of(weight) is None
    assert whole(weight, None) is weight
    full = torch.zeros(5, 3)
    assert part(full, weight) is full
    value = torch.tensor(2.0)
    assert sum_over_shards(value, weight) is value
