"""Columns by hand: what one says, what it reads, and that none depends on a later one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pico
from keeptune import state
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import ADDED, Context
from keeptune.methods._isolate.columns import Column, Columns
from keeptune.methods.freeze import Freeze
from keeptune.methods.packnet import PackNet
from keeptune.methods.progressive import Progressive
from pencil import context

IDS = torch.tensor([[6, 7, 8, 9, 10]])


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.clone()


def learn(model: Any, method: Progressive, index: int) -> Context:
    """A task that moves the trained weights somewhere of its own."""
    ctx = context(model, task=f"t{index}", index=index)
    method.begin_task(ctx)
    g = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.add_(0.3 * torch.randn(weight.shape, generator=g))
    method.end_task(ctx)
    return ctx


def stream(tasks: int, *, lora: bool = False) -> tuple[Any, Progressive, list[Tensor]]:
    model: Any = pico.adapted(pico.causal_lm(16)) if lora else pico.causal_lm(16)
    method, after = Progressive(rank=3), []
    for index in range(tasks):
        learn(model, method, index)
        after.append(answers(model))
    return model, method, after


def test_a_column_by_hand() -> None:
    column = Column(depth=1, width=2, rank=1, before=1)
    with torch.no_grad():
        for weight, value in (
            (column.down, [[[1.0, 2.0]]]), (column.own, [[[0.5]]]), (column.read, [[[3.0]]]),
            (column.lateral, [[[0.1]]]), (column.scale, [2.0]),
        ):  # fmt: skip
            weight.copy_(torch.tensor(value))
    hidden, last, other = (
        torch.tensor([[[1.0, -1.0]]]),
        torch.tensor([[[4.0]]]),
        [torch.ones(1, 1, 1)],
    )
    # 4 + max(1 - 2 + 0.5 · 4 + 0.1 · max(3 · 2 · 1, 0), 0)
    assert column.state(0, hidden, last, other).item() == pytest.approx(5.6)
    # 4 + max(1 - 2 + 0.5 · 4 + 0.1 · max(-3 · 2 · 1, 0), 0)
    assert column.state(0, hidden, last, [-other[0]]).item() == pytest.approx(5.0)
    with torch.no_grad():
        column.own.fill_(-1.0)
    assert column.state(0, hidden, last, other).item() == 4.0


def test_what_the_last_layer_becomes() -> None:
    columns = Columns(depth=2, width=2, rank=1)
    ctx = context(columns)  # any module with a parameter has a device
    ctx.model = torch.nn.Linear(1, 1)
    column = columns.add(ctx)
    with torch.no_grad():
        column.down.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        column.up.copy_(torch.tensor([[1.0], [-2.0]]))
    columns.answering = [0]
    hidden = [torch.tensor([[[3.0, 3.0]]]), torch.tensor([[[6.0, 6.0]]])]
    # each state is normed to (1, 1), so the column holds 1 + 1; times rms 6, times B
    torch.testing.assert_close(columns(hidden), torch.tensor([[[12.0, -24.0]]]))


@pytest.mark.parametrize("lora", [False, True])
def test_a_new_column_says_nothing_at_first(lora: bool) -> None:
    model: Any = pico.adapted(pico.causal_lm(16)) if lora else pico.causal_lm(16)
    base = answers(model)
    Progressive().begin_task(ctx := context(model))
    assert torch.equal(answers(model), base)
    assert all(name.startswith(f"{ADDED}.columns.0.") for name in ctx.trainable())


@pytest.mark.parametrize("lora", [False, True])
def test_every_task_is_answered_as_right_after_it_was_learned(lora: bool) -> None:
    model, method, after = stream(4, lora=lora)
    for index in (0, 2, 1, 3):
        method.serve(context(model), f"t{index}")
        assert torch.equal(answers(model), after[index])
    assert len({tuple(a.flatten().tolist()) for a in after}) == 4


def test_an_older_columns_states_do_not_depend_on_a_later_one() -> None:
    model, _, _ = stream(3)
    columns = getattr(model, ADDED)
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(2, 5, 32, generator=g) for _ in range(2)]
    before = columns.states(hidden, 3)
    with torch.no_grad():
        for weight in columns.columns[2].parameters():
            weight.add_(1.0)
    after = columns.states(hidden, 3)
    assert all(torch.equal(one, other) for one, other in zip(before[:2], after[:2], strict=True))
    assert not torch.equal(before[2], after[2])
    alone = columns.states(hidden, 1)
    assert torch.equal(alone[0], before[0])


def test_a_later_column_reads_all_earlier_ones() -> None:
    model, method, after = stream(3)
    columns = getattr(model, ADDED)
    method.serve(context(model), "t2")
    for earlier in (0, 1):
        with torch.no_grad():
            columns.columns[earlier].down.add_(1.0)
            assert not torch.equal(answers(model), after[2])
            columns.columns[earlier].down.sub_(1.0)


def test_for_an_unknown_task_the_mean_of_all_columns_is_served() -> None:
    model, method, _ = stream(2)
    said = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: said.append(args[0]))
    for task in ("t0", "t1", None):
        method.serve(context(model), task)
        answers(model)
    handle.remove()
    torch.testing.assert_close(said[2], (said[0] + said[1]) / 2)


def test_before_any_task_the_model_answers() -> None:
    model = pico.causal_lm(16)
    base = answers(model)
    Progressive().serve(context(model), None)
    assert torch.equal(answers(model), base)


def test_evidence_counts_what_columns_cost() -> None:
    model = pico.causal_lm(16)
    every, depth, width, rank = sum(p.numel() for p in model.parameters()), 2, 32, 3
    method, sizes = Progressive(rank=rank), []
    for index in range(3):
        learn(model, method, index)
        own = depth * rank * (width + rank) + width * rank
        own += bool(index) * depth * (rank * rank + index * rank * rank + 1)
        sizes.append(own)
        shown = method.evidence()
        assert shown["way_back"] > 0
        assert shown["parameters"] == own
        assert shown["cost_share"] == sum(sizes) / every


@pytest.mark.parametrize("lora", [False, True])
def test_columns_come_back_with_the_models_own_tensors(lora: bool) -> None:
    model, method, after = stream(2, lora=lora)
    saved = {n: t.detach().clone() for n, t in state.own_tensors(model).items()}
    fresh: Any = pico.adapted(pico.causal_lm(16)) if lora else pico.causal_lm(16)
    again = Progressive(rank=3)
    again.restore(ctx := context(fresh, index=1), method.state())
    state.put_tensors(fresh, saved)
    for index in range(2):
        again.serve(ctx, f"t{index}")
        assert torch.equal(answers(fresh), after[index])


def test_a_bert_has_columns_too() -> None:
    model = pico.classifier(bert=True)
    base = answers(model)
    learn(model, Progressive(), 0)
    assert not torch.equal(answers(model), base)


def test_it_is_refused_beside_what_makes_no_sense_with_it() -> None:
    for other in (PackNet(), Freeze()):
        with pytest.raises(MethodError, match=r"cannot run together.*Remove one of them"):
            Chain([Progressive(), other])
