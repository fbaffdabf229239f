"""Sums of gradients per example, shared by two processes: whole weights, and sharded ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_examples import assert_near, every_weight, labelled, stage, texts
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pico
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._anchor.examples import Sums, batched_sums, example_sums, sign_sums
from keeptune.methods._anchor.objectives import all_labels, log_likelihood, sampled
from keeptune.methods._anchor.shards import part

# An odd number, so that the last batches find one process without a row.
ROWS = range(5)


def everything(ctx: Context) -> dict[str, Sums]:
    weights = ctx.trainable()
    return {
        "exact": example_sums(ctx, weights, ROWS, log_likelihood, "square", batch=2)[0],
        "one row": example_sums(ctx, weights, [1], log_likelihood, "absolute")[0],
        "sampled": example_sums(ctx, weights, ROWS, sampled(ctx), "square")[0],
        "batched": batched_sums(ctx, weights, ROWS, log_likelihood, batch=2),
    }


def sharded() -> nn.Module:
    model = pico.causal_lm()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check(rank: int, meeting: str, want: dict[str, Sums], want_labels: Sums) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    ctx = stage(pico.causal_lm(), texts())
    for name, got in everything(ctx).items():
        assert_near(got, want[name])
    # Signs of single rows are exact.
    assert_near(sign_sums(ctx, ctx.trainable(), ROWS, log_likelihood, batch=1), want["exact"])
    check_shards(want)
    check_all_labels(want_labels)
    distributed.destroy_process_group()


def check_shards(want: dict[str, Sums]) -> None:
    ctx = stage(sharded(), texts())
    parameters = every_weight(ctx.model)

    def own(sums: Sums) -> Sums:
        return {name: part(values, parameters[name]) for name, values in sums.items()}

    for name, got in everything(ctx).items():
        assert_near(got, own(want[name]), 1e-4)
    # One process has no row, and yet the other finds the gradient.
    one = sign_sums(ctx, parameters, [1], log_likelihood)
    assert_near(one, example_sums(ctx, parameters, [1], log_likelihood, "square")[0], 1e-4)
    # Each has one row, and they share a gradient: (g ± h)².
    got = sign_sums(ctx, parameters, [1, 2], log_likelihood, batch=1)
    both = batched_sums(ctx, parameters, [1, 2], log_likelihood, batch=2)
    apart, _ = example_sums(ctx, parameters, [1, 2], log_likelihood, "square")
    plus = {name: 2 * values for name, values in both.items()}
    minus = {name: 2 * apart[name] - values for name, values in plus.items()}
    name = "model.norm.weight"
    assert any(torch.allclose(got[name], ways[name], rtol=1e-3) for ways in (plus, minus))
    frozen = parameters[name].requires_grad_(False)
    with pytest.raises(MethodError, match="FSDP gives no gradients of frozen weights"):
        example_sums(ctx, {name: frozen}, ROWS, log_likelihood, "square")


def check_all_labels(want: Sums) -> None:
    model = fully_shard(pico.classifier(3), mesh=init_device_mesh("cpu", (2,)))
    ctx = stage(model, labelled())
    got, _ = example_sums(ctx, ctx.trainable(), ROWS, all_labels, "square")
    assert_near(got, {n: part(want[n], p) for n, p in model.named_parameters()}, 1e-4)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    want = everything(stage(pico.causal_lm(), texts()))
    ctx = stage(pico.classifier(3), labelled())
    labels, _ = example_sums(ctx, ctx.trainable(), ROWS, all_labels, "square")
    multiprocessing.spawn(check, (f"file://{tmp_path}/meeting", want, labels), nprocs=2)
