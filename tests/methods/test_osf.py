"""Old directions by hand: what is taken out of gradients, what is put back, and what may move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import pico
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods import _subspace
from keeptune.methods._subspace import Old, strongest
from keeptune.methods.osf import OSF
from pencil import Softmax, context


def test_the_strongest_directions_by_hand() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    u, s, v = strongest(weight, 0.5)
    assert s.tolist() == [3.0]
    assert u.abs().tolist() == [[1.0], [0.0]]
    assert v.abs().tolist() == [[0.0], [1.0], [0.0], [0.0]]


def test_a_gradient_and_a_weight_by_hand() -> None:
    first = torch.tensor([[1.0], [0.0]])
    old = Old(first, first, torch.tensor([5.0]))
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    old.free(gradient)
    assert gradient.tolist() == [[0.0, 0.0], [0.0, 4.0]]
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    old.put_back(weight)
    assert weight.tolist() == [[5.0, 0.0], [0.0, 4.0]]


def test_what_is_held_is_computed_with_all_bits_whatever_training_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matmul: Any = torch.backends.cuda.matmul
    was, seen = matmul.fp32_precision, []

    def noted(values: Tensor) -> Tensor:
        seen.append(matmul.fp32_precision)
        return values

    monkeypatch.setattr(_subspace, "wide", noted)
    matmul.fp32_precision = "tf32"
    try:
        u, s, v = strongest(torch.eye(2), 0.5)
        old = Old(u, v, s)
        old.free(torch.ones(2, 2))
        old.put_back(torch.ones(2, 2))
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = was
    assert seen == ["ieee"] * 3


def test_one_side_alone_is_held_at_its_value() -> None:
    first = torch.tensor([[1.0], [0.0]])
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    Old(first, None, torch.tensor([[7.0, 8.0]])).put_back(value)
    assert value.tolist() == [[7.0, 8.0], [3.0, 4.0]]
    Old(None, first, torch.tensor([[0.0], [-1.0]])).put_back(value)
    assert value.tolist() == [[0.0, 8.0], [-1.0, 4.0]]


def test_what_is_put_back_once_stays_when_put_back_again() -> None:
    g = torch.Generator().manual_seed(0)
    u, s, v = strongest(torch.randn(6, 8, generator=g, dtype=torch.float64), 0.5)
    value = torch.randn(6, 8, generator=g, dtype=torch.float64)
    old = Old(u, v, s)
    old.put_back(value)
    again = value.clone()
    old.put_back(again)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(u.T @ value, s[:, None] * v.T)
    torch.testing.assert_close(value @ v, u * s)


def moved(method: OSF, model: nn.Module, index: int = 0) -> Context:
    """One step that moves every trained weight at random."""
    ctx = context(model, index=index)
    method.begin_task(ctx)
    g = torch.Generator().manual_seed(index)
    for weight in ctx.trainable().values():
        weight.grad = torch.randn(weight.shape, generator=g)
    method.gradients(ctx)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=g))
    method.after_step(ctx)
    return ctx


def test_under_lora_the_product_stays_in_the_old_directions() -> None:
    model: Any = pico.adapted(pico.causal_lm(16))
    method = OSF(ratio=0.5, grow=0)

    def effective() -> dict[str, torch.Tensor]:
        return {
            name: (m.get_base_layer().weight + m.get_delta_weight("default")).detach().double()
            for name, m in model.named_modules()
            if hasattr(m, "get_delta_weight")
        }

    for index in range(2):
        before = effective()
        moved(method, model, index)
        for name, now in effective().items():
            u, _, v = strongest(before[name], 0.5)
            change = now - before[name]
            assert (u.T @ change @ v).norm() < 1e-5 * change.norm()
        assert method.evidence()["gradient_share"] > 0
        method.end_task(context(model))


def test_the_head_and_embeddings_are_free() -> None:
    model, method = pico.causal_lm(16), OSF()
    ctx = context(model)
    method.begin_task(ctx)
    held = {name.rsplit("/", 1)[0] for name in method.state().tensors}
    assert len(held) == 14  # 7 matrices in each of 2 layers
    assert not any("embed" in name or "head" in name or "norm" in name for name in held)


@pytest.mark.parametrize(("index", "share"), [(0, 0.25), (2, 0.75), (9, 0.99)])
def test_more_is_held_with_each_task_but_never_all(index: int, share: float) -> None:
    model, method = pico.causal_lm(16), OSF(ratio=0.25, grow=0.25)
    method.begin_task(context(model, index=index))
    (held,) = {
        len(t) for n, t in method.state().tensors.items() if "q_proj" in n and n.endswith("kept")
    }
    assert held == int(share * 32) < 32


def test_memory_is_that_of_two_bases_while_a_task_is_trained() -> None:
    model, method = pico.causal_lm(16), OSF(ratio=0.5, grow=0)
    ctx = context(model)
    method.begin_task(ctx)
    shapes = [m.weight.shape for m in model.model.modules() if isinstance(m, nn.Linear)]
    want = sum(4 * (min(s) // 2) * (s[0] + s[1] + 1) for s in shapes)
    assert method.declared_bytes(ctx) == want
    method.end_task(ctx)
    assert method.declared_bytes(ctx) == 0


def test_evidence_is_the_share_of_the_gradient_that_was_taken_out() -> None:
    model, method = pico.causal_lm(16), OSF(ratio=0.5, grow=0)
    moved(method, model)
    shapes = [m.weight.shape for m in model.model.modules() if isinstance(m, nn.Linear)]
    left = sum((out - min(out, ins) // 2) * (ins - min(out, ins) // 2) for out, ins in shapes)
    share = (1 - left / sum(out * ins for out, ins in shapes)) ** 0.5
    assert method.evidence()["gradient_share"] == pytest.approx(share, rel=0.02)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(MethodError, match="directions of linear layers, but none is trained"):
        OSF().begin_task(context(Softmax([[1.0]])))


@pytest.mark.parametrize("lora", [False, True])
def test_the_head_of_a_classifier_is_free(lora: bool) -> None:
    model: Any = pico.classifier(4)
    if lora:
        model = pico.adapted(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    ctx = context(model)
    held = dict(_subspace.old_directions(ctx, 0.5))
    assert len(held) == (28 if lora else 14)
    assert not any("score" in name for name in held)
    assert any("score" in name for name in ctx.trainable())
