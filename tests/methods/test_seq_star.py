"""SEQ*: cosines by hand, which rows may move, and a linear head that says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

import pico
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods.seq_star import SeqStar, cosines
from keeptune.tokens import collate
from keeptune.trainers import build_trainer
from pencil import context, texts

IDS = torch.tensor([[6, 7, 8], [9, 10, 11], [12, 13, 14]])


def labelled(*classes: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[6 + c, 7, 8] for c in classes], "labels": classes})


def begin(model: Any, method: SeqStar, index: int) -> Context:
    """The task with the classes 2 · index and 2 · index + 1, of six."""
    ctx = context(model, labelled(2 * index, 2 * index + 1), task=f"t{index}", index=index)
    method.begin_task(ctx)
    return ctx


def head(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = inner.classifier if hasattr(inner, "classifier") else inner.score
    return found.modules_to_save["default"] if hasattr(found, "modules_to_save") else found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits.clone()


def step(ctx: Context, method: SeqStar) -> None:
    """One step of SGD, after which somebody else moves all trained weights."""
    ctx.model(input_ids=IDS).logits.square().sum().backward()
    method.gradients(ctx)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.sub_(0.1 * weight.grad)
            weight.mul_(0.9)
            weight.grad = None
    method.after_step(ctx)


def test_cosines_by_hand() -> None:
    features = torch.tensor([[3.0, 4.0]])
    rows = torch.tensor([[2.0, 0.0], [0.0, -5.0], [6.0, 8.0]])
    torch.testing.assert_close(cosines(features, rows), torch.tensor([[0.6, -0.8, 1.0]]))


@pytest.mark.parametrize("bert", [False, True])
def test_in_training_logits_are_cosines_over_the_temperature(bert: bool) -> None:
    model, method = pico.classifier(6, bert=bert), SeqStar(temperature=0.1)
    plain: list[Tensor] = []
    seen = head(model).register_forward_pre_hook(lambda module, args: plain.append(args[0]))
    begin(model, method, 0)
    got = logits(model)
    seen.remove()
    assert got.abs().max() <= 10.0
    features = plain[0] if bert else plain[0][:, -1]
    torch.testing.assert_close(got, cosines(features, head(model).weight) / 0.1)


@pytest.mark.parametrize("bert", [False, True])
def test_the_head_that_is_served_has_the_same_order_of_classes(bert: bool) -> None:
    model, method = pico.classifier(6, bert=bert), SeqStar()
    for index in range(2):
        ctx = begin(model, method, index)
        step(ctx, method)
        trained = logits(model)
        method.end_task(ctx)
        assert torch.equal(logits(model).argsort(-1), trained.argsort(-1))
    torch.testing.assert_close(head(model).weight.norm(dim=-1), torch.full((6,), 1 / 100))
    assert all(p.requires_grad for p in model.parameters())
    if bert:
        assert not head(model).bias.any()


def test_the_first_task_moves_everything_and_the_later_ones_new_rows_only() -> None:
    model, method = pico.classifier(6).train(), SeqStar()
    assert all(p.requires_grad for p in begin(model, method, 0).model.parameters())
    method.end_task(context(model))
    body = {n: p.detach().clone() for n, p in model.named_parameters() if "score" not in n}
    for index in (1, 2):
        before = head(model).weight.detach().clone()
        ctx = begin(model, method, index)
        assert list(ctx.trainable()) == ["score.weight"]
        for _ in range(3):
            step(ctx, method)
        method.end_task(ctx)
        after, old = head(model).weight.detach(), 2 * index
        assert torch.equal(after[:old], before[:old])
        assert not torch.isclose(after[old:], before[old:]).all(1).any()
    assert all(torch.equal(p, body[n]) for n, p in model.named_parameters() if n in body)
    frozen = sum(t.numel() for t in body.values())
    assert method.evidence() == {
        "cosine_batches": 6, "classes_new": 2, "classes_held": 4, "weights_frozen": frozen,
    }  # fmt: skip


def test_short_rows_turn_as_many_times_faster_under_adam() -> None:
    turned = []
    for rate in (1.0, 100.0):
        model, method = pico.classifier(6), SeqStar(rate=rate)
        ctx = begin(model, method, 0)
        weight = head(model).weight
        before = weight.detach().clone()
        optimizer = torch.optim.Adam([weight], lr=1e-6)
        model(input_ids=IDS).logits[:, 0].sum().backward()
        optimizer.step()
        assert ctx.trainable()
        after = weight.detach()[0].double()
        turned.append(1 - torch.cosine_similarity(after, before[0].double(), dim=0))
    angles = [float((2 * t).sqrt()) for t in turned]
    assert angles[1] == pytest.approx(100 * angles[0], rel=0.02)


def test_old_rows_have_no_gradient() -> None:
    model, method = pico.classifier(6), SeqStar()
    method.end_task(begin(model, method, 0))
    ctx = begin(model, method, 1)
    model(input_ids=IDS).logits.square().sum().backward()
    method.gradients(ctx)
    assert not head(model).weight.grad[:2].any()
    assert head(model).weight.grad[2:].any()


def test_under_lora_the_copy_of_the_head_is_trained() -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")
    model, method = pico.adapted(pico.classifier(6), config), SeqStar()
    method.end_task(begin(model, method, 0))
    ctx = begin(model, method, 1)
    assert len(ctx.trainable()) == 1
    before = head(model).weight.detach().clone()
    step(ctx, method)
    assert torch.equal(head(model).weight[:2], before[:2])
    assert not torch.equal(head(model).weight[2:], before[2:])


def test_a_task_without_new_classes_is_refused() -> None:
    model, method = pico.classifier(6), SeqStar()
    method.end_task(begin(model, method, 0))
    with pytest.raises(MethodError, match="learned every class of task 't1' before"):
        method.begin_task(context(model, labelled(1, 0), task="t1", index=1))


def test_a_model_without_a_head_is_refused() -> None:
    model = pico.classifier(6)
    model.score.requires_grad_(False)
    with pytest.raises(MethodError, match="found no trained linear layer with 6 rows"):
        SeqStar().begin_task(context(model, labelled(0)))


def test_a_language_model_is_refused_before_anything_runs(tmp_path: Any) -> None:
    tokenizer = pico.tokenizer()
    with pytest.raises(MethodError, match=r"'seq_star' needs a sequence classifier, but Llama"):
        build_trainer(
            "causal_lm", pico.causal_lm(16), tokenizer, texts([6, 7]), [SeqStar()],
            {"output_dir": str(tmp_path), "seed": 0}, collate(tokenizer),
        )  # fmt: skip
