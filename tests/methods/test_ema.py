"""The moving average by hand, which weights answer, and which are trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pico
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Context, Method
from keeptune.methods._slow import follow
from keeptune.methods.ema import EMA
from keeptune.methods.ilora import ILoRA
from keeptune.methods.l2sp import L2SP
from keeptune.methods.packnet import PackNet
from keeptune.methods.wise import WiSE
from pencil import Softmax, context


def test_three_steps_by_hand() -> None:
    slow = [torch.tensor([8.0, 0.0])]
    for fast, want in (([0.0, 8.0], [6.0, 2.0]), ([6.0, 2.0], [6.0, 2.0]), ([2.0, -2.0], [5.0, 1])):
        follow(slow, [torch.tensor(fast)], 0.75)
        assert slow[0].tolist() == want


def test_with_weights_that_stand_still_the_distance_shrinks_by_the_decay() -> None:
    slow, fast = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    for n in range(1, 101):
        follow([slow], [fast], 0.97)
        assert slow.item() == pytest.approx(0.97**n, rel=1e-12)


def step(method: EMA, ctx: Context, by: float) -> None:
    """An optimizer step that moves every weight by this."""
    method.gradients(ctx)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.add_(by)
    method.after_step(ctx)
    ctx.step += 1


def test_small_steps_are_not_lost_in_16_bits() -> None:
    model, method = nn.Linear(1, 1, bias=False).to(torch.bfloat16), EMA(decay=0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ctx = context(model)
    method.begin_task(ctx)
    step(method, ctx, 0.5)
    for _ in range(99):
        step(method, ctx, 0.0)
    (slow,) = method.state().tensors.values()
    assert slow.dtype == torch.float32
    assert slow.item() == pytest.approx(1.5 - 0.5 * 0.999**100, rel=1e-5)
    assert method.declared_bytes(ctx) == 4
    method.serve(ctx, None)
    assert model.weight.item() == torch.tensor(slow.item()).bfloat16().item()
    assert method.declared_bytes(ctx) == 6  # and the fast one, in its 2 bytes


@pytest.mark.parametrize(("start", "want"), [("fast", 4.0), ("slow", 3.0)])
def test_a_later_task_starts_from_fast_or_slow_weights(start: str, want: float) -> None:
    model, method = Softmax([[0.0]]), EMA(decay=0.25, start=start)
    ctx = context(model)
    method.begin_task(ctx)
    step(method, ctx, 4.0)
    method.end_task(ctx)
    method.serve(ctx, None)
    assert model.weight.item() == 3.0
    method.serve(ctx, "t0")  # once more changes nothing
    assert model.weight.item() == 3.0
    method.begin_task(context(model, index=1))
    assert model.weight.item() == want


def test_the_average_goes_on_over_tasks() -> None:
    model, method = Softmax([[0.0]]), EMA(decay=0.5)
    for index, want in enumerate((1.0, 2.5)):
        ctx = context(model, index=index)
        method.begin_task(ctx)
        step(method, ctx, 2.0)
        method.end_task(ctx)
        assert method.state().tensors["slow/weight"].item() == want


def test_others_look_at_the_fast_weights_when_a_task_begins() -> None:
    model = Softmax([[0.0]])
    ema, anchored = EMA(decay=0.5), L2SP(strength=1.0, to="task")
    chain, ctx = Chain([anchored, ema]), context(model)
    chain.begin_task(ctx)
    step(ema, ctx, 2.0)
    chain.end_task(ctx)
    chain.serve(ctx, None)
    assert model.weight.item() == 1.0
    chain.begin_task(context(model, index=1))
    assert anchored.state().tensors["anchor/weight"].item() == 2.0


def test_weights_that_are_trained_from_the_second_task_on_are_followed_from_then() -> None:
    model, method = nn.Linear(1, 1), EMA(decay=0.5)
    for index, trained in enumerate(("weight", "bias")):
        for name, weight in model.named_parameters():
            weight.requires_grad_(name == trained)
            weight.data.fill_(0.0)
        ctx = context(model, index=index)
        method.begin_task(ctx)
        step(method, ctx, 2.0)
    slow = method.state().tensors
    assert {name: t.item() for name, t in slow.items()} == {"slow/weight": 0.5, "slow/bias": 1.0}


def test_under_lora_the_factors_are_followed_and_nothing_else() -> None:
    model, method = pico.adapted(pico.causal_lm(16)), EMA(decay=0.9)
    ctx = context(model)
    method.begin_task(ctx)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(method, ctx, 1.0)
    method.serve(ctx, None)
    for name, weight in model.named_parameters():
        off = 0.1 if "lora_" in name else 0.0
        torch.testing.assert_close(weight, before[name] + off, atol=1e-6, rtol=0)
    assert method.declared_bytes(ctx) == 2 * sum(p.nbytes for p in ctx.trainable().values())


def test_evidence_says_how_far_the_slow_weights_moved_and_lag() -> None:
    model, method = Softmax([[0.0, 3.0]]), EMA(decay=0.75)
    ctx = context(model)
    method.begin_task(ctx)
    step(method, ctx, 4.0)
    method.end_task(ctx)
    shown = method.evidence()
    assert shown["moved"] == pytest.approx(2**0.5)  # 1 in each
    assert shown["distance"] == pytest.approx((18 / (16 + 49)) ** 0.5)


def test_switched_off_it_keeps_nothing_and_serves_the_weights_themselves() -> None:
    model, method = Softmax([[1.0]]), EMA(decay=0.0)
    ctx = context(model)
    method.begin_task(ctx)
    step(method, ctx, 1.0)
    method.serve(ctx, None)
    assert model.weight.item() == 2.0
    assert method.state().tensors == {}


@pytest.mark.parametrize("other", [PackNet(), WiSE()])
@pytest.mark.parametrize("slow", [EMA(), ILoRA()])
def test_what_owns_or_moves_the_weights_at_a_tasks_end_does_not_go_with_it(
    slow: Method, other: Method
) -> None:
    with pytest.raises(MethodError, match=other.name()):
        Chain([slow, other])
