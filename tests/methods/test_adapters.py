"""Bottlenecks by hand: what one adds and where, whose answer, and what they cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pico
from keeptune import state
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import ADDED
from keeptune.methods._isolate import layers
from keeptune.methods._isolate.bottlenecks import Bottleneck, Bottlenecks, feed_forward
from keeptune.methods.adapters import Adapters
from keeptune.methods.freeze import Freeze
from keeptune.methods.packnet import PackNet
from pencil import context, learn

IDS = torch.tensor([[6, 7, 8, 9, 10]])


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.clone()


def build(*, lora: bool) -> Any:
    return pico.adapted(pico.causal_lm(16)) if lora else pico.causal_lm(16)


def stream(tasks: int, *, lora: bool = False) -> tuple[Any, Adapters, list[Tensor]]:
    model, method, after = build(lora=lora), Adapters(rank=3), []
    for index in range(tasks):
        learn(model, method, index)
        after.append(answers(model))
    return model, method, after


def test_a_bottleneck_by_hand() -> None:
    part = Bottleneck(depth=2, width=2, rank=1)
    with torch.no_grad():
        part.down[1] = torch.tensor([[1.0, 2.0]])
        part.shift[1] = 0.5
        part.up[1] = torch.tensor([[3.0], [-1.0]])
        part.offset[1] = torch.tensor([0.1, 0.2])
    # max(1 + 2 · 1 + 0.5, 0) = 3.5
    torch.testing.assert_close(part(1, torch.tensor([1.0, 1.0])), torch.tensor([10.6, -3.3]))
    # max(1 - 2 · 1 + 0.5, 0) = 0
    torch.testing.assert_close(part(1, torch.tensor([1.0, -1.0])), torch.tensor([0.1, 0.2]))


def test_it_stands_behind_the_feed_forward_part() -> None:
    model: Any = pico.causal_lm(16)
    seen: list[Tensor] = []
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: seen.append(out))
    learn(model, Adapters(rank=3), 0)
    (own,) = getattr(model, ADDED)
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: seen.append(out))
    answers(model)
    torch.testing.assert_close(seen[1], seen[0] + own(1, seen[0]))


@pytest.mark.parametrize("lora", [False, True])
def test_where_the_feed_forward_part_is(lora: bool) -> None:
    model: Any = build(lora=lora)
    _, stack = layers(model, "adapters")
    assert feed_forward(stack, 1) is stack[1].mlp
    bert: Any = pico.classifier(bert=True)
    _, stack = layers(bert, "adapters")
    assert feed_forward(stack, 1) is bert.bert.encoder.layer[1].output.dense


@pytest.mark.parametrize("lora", [False, True])
def test_a_new_adapter_says_nothing_at_first(lora: bool) -> None:
    model = build(lora=lora)
    base = answers(model)
    Adapters().begin_task(ctx := context(model))
    assert torch.equal(answers(model), base)
    assert all(name.startswith(f"{ADDED}.parts.0.") for name in ctx.trainable())


@pytest.mark.parametrize("lora", [False, True])
def test_every_task_is_answered_as_right_after_it_was_learned(lora: bool) -> None:
    model, method, after = stream(4, lora=lora)
    for index in (0, 2, 1, 3):
        method.serve(context(model), f"t{index}")
        assert torch.equal(answers(model), after[index])
    assert len({tuple(a.flatten().tolist()) for a in after}) == 4


def test_tasks_do_not_depend_on_each_other() -> None:
    model, method, after = stream(3)
    with torch.no_grad():
        for number in (0, 2):
            for weight in getattr(model, ADDED).parts[number].parameters():
                weight.add_(1.0)
    method.serve(context(model), "t1")
    assert torch.equal(answers(model), after[1])


def test_for_an_unknown_task_the_mean_is_added() -> None:
    model, method, _ = stream(2)
    said: list[Tensor] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: said.append(out))
    for task in ("t0", "t1", None):
        method.serve(context(model), task)
        answers(model)
    torch.testing.assert_close(said[2], (said[0] + said[1]) / 2)


def test_before_any_task_the_model_answers() -> None:
    model = pico.causal_lm(16)
    base = answers(model)
    Adapters().serve(context(model), None)
    assert torch.equal(answers(model), base)


def test_the_first_weights_follow_from_seed_and_task() -> None:
    drawn = []
    for seed, index in ((0, 0), (0, 0), (1, 0), (0, 1)):
        model = pico.causal_lm(16)
        torch.rand(1)
        Adapters(rank=3).begin_task(context(model, seed=seed, index=index))
        drawn.append(getattr(model, ADDED).parts[0].down.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_evidence_counts_what_adapters_cost() -> None:
    model = pico.causal_lm(16)
    every, depth, width, rank = sum(p.numel() for p in model.parameters()), 2, 32, 3
    own, method = depth * (2 * rank * width + rank + width), Adapters(rank=rank)
    for index in range(3):
        learn(model, method, index)
        shown = method.evidence()
        assert shown["way_back"] > 0
        assert shown["parameters"] == own
        assert shown["parameters_of_all"] == own * (index + 1)
        assert shown["cost_share"] == own / every


@pytest.mark.parametrize("lora", [False, True])
def test_adapters_come_back_with_the_models_own_tensors(lora: bool) -> None:
    model, method, after = stream(2, lora=lora)
    saved = {n: t.detach().clone() for n, t in state.own_tensors(model).items()}
    fresh = build(lora=lora)
    again = Adapters(rank=3)
    again.restore(ctx := context(fresh, index=1), method.state())
    state.put_tensors(fresh, saved)
    for index in range(2):
        again.serve(ctx, f"t{index}")
        assert torch.equal(answers(fresh), after[index])


def test_a_copy_of_the_model_keeps_its_own_adapters() -> None:
    model, _, after = stream(1)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        getattr(model, ADDED).parts[0].up.zero_()
    assert torch.equal(answers(twin), after[0])
    assert not torch.equal(answers(model), after[0])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for saving in (False, True):
        model, _, _ = stream(1)
        if saving:
            model.activation_checkpointing_enable()
        model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad for p in getattr(model, ADDED).parameters()])
    for one, other in zip(*found, strict=True):
        assert one.norm() > 0
        torch.testing.assert_close(one, other)


def test_a_bert_has_adapters_too() -> None:
    model = pico.classifier(bert=True)
    base = answers(model)
    learn(model, Adapters(), 0)
    assert not torch.equal(answers(model), base)


def test_it_is_refused_where_it_makes_no_sense() -> None:
    for other in (PackNet(), Freeze()):
        with pytest.raises(MethodError, match=r"cannot run together.*Remove one of them"):
            Chain([Adapters(), other])
    with pytest.raises(MethodError, match=r"'adapters' needs a model made of layers"):
        Adapters().begin_task(context(nn.Linear(2, 2)))


def test_a_feed_forward_part_may_give_more_than_its_values() -> None:
    parts = Bottlenecks()
    parts.parts.append(Bottleneck(1, 4, 2))
    parts.answering = [0]
    with torch.no_grad():
        parts.parts[0].offset.fill_(1.0)
    scores = torch.ones(3)
    values, more = parts._behind(0, nn.Identity(), (), (torch.zeros(2, 4), scores))
    assert torch.equal(values, torch.ones(2, 4))
    assert more is scores
