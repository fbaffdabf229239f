"""KL to the base model: who the teacher is, in which direction, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import pico
from keeptune import processes
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods.kl_base import KLBase
from pencil import Softmax, added, context, stack, texts
from rehearsed_rows import flat, moved

ROWS = texts([6, 7, 8, 9], [9, 8, 7, 6], answer_from=2)
DIRECTIONS = ("forward", "reverse")


def begun(method: KLBase, model: nn.Module, index: int = 0) -> Context:
    """The start of a task."""
    ctx = context(model, ROWS, index=index, tokenizer=pico.tokenizer())
    ctx.collate = padded
    method.begin_task(ctx)
    method.data(ctx, ROWS)
    ctx.answers_in_step = 4.0
    return ctx


def kl(one: Tensor, other: Tensor, direction: str, t: float = 1.0) -> Tensor:
    """T² KL between logits of the base model and of the present one."""
    p, q = (one / t).log_softmax(-1), (other / t).log_softmax(-1)
    if direction == "reverse":
        p, q = q, p
    return t * t * (p.exp() * (p - q)).sum(-1)


def logits(ctx: Context) -> Tensor:
    batch = stack(list(ROWS))
    with torch.no_grad():
        return ctx.answer_logits(ctx.outputs(batch).logits, batch)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_under_lora_the_teacher_is_the_model_without_it(direction: str) -> None:
    model = pico.adapted(pico.causal_lm(16))  # its adapter says something already
    method = KLBase(strength=2.0, direction=direction, temperature=2.0)
    ctx = begun(method, model)
    with model.disable_adapter():
        base = logits(ctx)
    want = 2.0 * kl(base, logits(ctx), direction, 2.0).mean()
    assert added(method, ctx, ROWS).item() == pytest.approx(want.item(), rel=1e-4)
    assert want > 1e-3
    assert method.declared_bytes(ctx) == 24, "it holds weights"


def test_it_leaves_adapters_as_they_were() -> None:
    model = pico.adapted(pico.causal_lm(16))
    ctx = begun(method := KLBase(), model)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    model.train()
    added(method, ctx, ROWS)
    assert [p.requires_grad for p in model.parameters()] == before
    assert model.training


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_with_all_weights_trained_the_base_stays_the_base(direction: str) -> None:
    model, method = pico.causal_lm(16), KLBase(direction=direction)
    base = logits(begun(method, model))
    for index in range(2):
        ctx = begun(method, model, index)
        moved(model)
        want = kl(base, logits(ctx), direction).mean()
        assert added(method, ctx, ROWS).item() == pytest.approx(want.item(), rel=1e-4)
        method.end_task(ctx)
    weights = sum(p.nbytes for p in model.parameters())
    assert method.declared_bytes(ctx) == weights + 24


@pytest.fixture
def lines(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("0123456789\n\nabcab\na\n")
    return str(path)


def by_hand(model: Any, base: Any, method: KLBase) -> Tensor:
    """The gradient of the mean KL over both texts, which all are drawn."""
    model.zero_grad()
    values = []
    for text in ("0123456789", "abcab"):
        ids = torch.tensor([pico.tokenizer()(text)["input_ids"][: method.length]])
        with torch.no_grad():
            old = base(ids).logits[0, :-1]
        t = method.temperature
        values.append(kl(old, model(ids).logits[0, :-1], method.direction, t))
    (method.strength * torch.cat(values).mean()).backward()
    return flat(model)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_on_texts_of_ones_own(direction: str, lines: str) -> None:
    model, base = pico.causal_lm(32), pico.causal_lm(32)
    method = KLBase(strength=3.0, direction=direction, texts=lines, length=6, top_k=32)
    ctx = begun(method, model)
    moved(model)
    want = by_hand(model, base, method)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    method.gradients(ctx)
    assert (flat(model) - want).norm() < 3e-3 * want.norm()
    assert method.evidence()["answers"] == 5 + 4
    assert method.loss(ctx, {}, None) is None
    # Forward, the base model's answers are enough; reverse, its weights are needed.
    copies = sum(p.nbytes for p in model.parameters())
    assert (method.declared_bytes(ctx) < copies) == (direction == "forward")


def padded(rows: list[dict[str, Any]]) -> Any:
    longest = max(len(row["input_ids"]) for row in rows)
    more = [longest - len(row["input_ids"]) for row in rows]
    pairs = list(zip(rows, more, strict=True))
    return {
        "input_ids": torch.tensor([r["input_ids"] + [0] * m for r, m in pairs]),
        "labels": torch.tensor([r["labels"] + [-100] * m for r, m in pairs]),
        "attention_mask": torch.tensor([[1] * (longest - m) + [0] * m for _, m in pairs]),
    }


def test_texts_that_are_not_there_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(MethodError, match=r"KLBase\.texts: .*nowhere.*cannot be read"):
        begun(KLBase(texts="nowhere.txt"), pico.causal_lm(16))
    with pytest.raises(MethodError, match="no text of two tokens"):
        begun(KLBase(texts=str(empty)), pico.causal_lm(16))
    with pytest.raises(MethodError, match="has no tokenizer"):
        KLBase(texts=str(empty)).begin_task(context(pico.causal_lm(16)))


def test_sharded_weights_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "DTensor", nn.Parameter)
    with pytest.raises(MethodError, match="'kl_base' cannot run a second model while FSDP"):
        KLBase().begin_task(context(Softmax([[0.0]])))


def test_off_it_has_no_term() -> None:
    ctx = begun(method := KLBase(strength=0), pico.causal_lm(16))
    assert method.loss(ctx, {}, None) is None
    assert method.declared_bytes(ctx) == 24


def test_weights_that_learn_in_a_later_task_are_of_the_base_too() -> None:
    model, method = pico.causal_lm(16), KLBase()
    ups = [model.model.layers[i].mlp.up_proj for i in (0, 1)]
    base, g = None, torch.Generator().manual_seed(0)
    for index, part in enumerate(ups):
        model.requires_grad_(False)
        part.requires_grad_(True)
        ctx = begun(method, model, index)
        base = logits(ctx) if base is None else base
        with torch.no_grad():
            part.weight.add_(torch.randn(part.weight.shape, generator=g))
        want = kl(base, logits(ctx), "forward").mean()
        assert added(method, ctx, ROWS).item() == pytest.approx(want.item(), rel=1e-4)
        method.end_task(ctx)


def test_texts_that_came_after_the_base_had_answered_are_refused(lines: str) -> None:
    model, method = pico.causal_lm(), KLBase(texts=lines, rows=2)
    begun(method, model)
    Path(lines).write_text("0123456789\nabcab\nnewer\n")
    with pytest.raises(MethodError, match=r"1 of 3 texts in .* were not there when"):
        begun(method, model, 1)


def test_biases_that_stay_without_the_adapter_are_refused() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", bias="all")
    with pytest.raises(MethodError, match="asks the model without its adapter, where trained bia"):
        begun(KLBase(), pico.adapted(pico.causal_lm(16), config))
