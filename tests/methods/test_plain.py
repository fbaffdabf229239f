"""Plain fine-tuning: nothing at all."""

from __future__ import annotations

import torch

from keeptune.chain import Chain
from keeptune.methods.plain import Plain
from pencil import Softmax, context, examples


def test_it_does_nothing() -> None:
    model, method = Softmax([[1.0, 2.0]]), Plain()
    before = model.weight.detach().clone()
    rows = examples((0, 1))
    ctx = context(model, rows)
    chain = Chain([method])
    chain.begin_task(ctx)
    assert chain.data(ctx, rows) is rows
    assert chain.loss(ctx, {}, None) is None
    chain.gradients(ctx)
    chain.after_step(ctx)
    chain.end_task(ctx)
    chain.serve(ctx, None)
    assert torch.equal(model.weight, before)
    assert method.state().tensors == {}
    assert method.evidence() == {}


def test_it_is_always_neutral() -> None:
    assert Plain().is_neutral()
    assert Chain([Plain()]).name == Chain([]).name == "plain"
