"""One pass over the head against autograd, and reading answers off models that differ."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

import pico
from keeptune import head_pass
from keeptune.answers import Answers, Head
from keeptune.head_pass import CrossEntropy
from keeptune.reading import find_head, positions, read
from pencil import Softmax, context, stack, texts

HEADS = {
    "plain": (1.0, math.inf, False),
    "scaled, bias": (0.25, math.inf, True),
    "capped": (2.0, 5.0, True),
}


def total(answers: Answers, labels: Tensor, weight: Any) -> Tensor:
    answers.add(CrossEntropy(labels), weight)
    found = answers.total()
    assert found is not None
    return found


def ingredients(bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(11, 6), (13, 6), (13,)][: 2 + bias]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float) -> Any:
    z = F.linear(hidden, weight, bias) * scale
    return z if cap == math.inf else cap * torch.tanh(z / cap)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("room", [1, 60, 2**20])
def test_loss_and_gradients_are_autograds_at_any_size_of_a_chunk(
    kind: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_pass, "CHUNK", room)
    scale, cap, bias = HEADS[kind]
    inputs = [t.requires_grad_() for t in ingredients(bias)]
    hidden, weight, *rest = inputs
    labels, weights = torch.arange(11) % 13, torch.linspace(0, 1, 11, dtype=torch.float64)
    head = Head(weight, rest[0] if rest else None, scale, cap)
    got = total(Answers(hidden, head), labels, weights)
    z = logits_of(hidden, weight, head.bias, scale, cap)
    want = (F.cross_entropy(z, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(got, want)
    # A factor on the loss, as micro batches and fp16 put there.
    pairs = zip(
        torch.autograd.grad(3 * got, inputs), torch.autograd.grad(3 * want, inputs), strict=True
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


def test_from_logits_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_pass, "CHUNK", 60)
    logits = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(7)
    got = total(Answers(logits), labels, 0.5)
    want = 0.5 * F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(got, want)
    (mine,) = torch.autograd.grad(got, logits)
    torch.testing.assert_close(mine, torch.autograd.grad(want, logits)[0])


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = ingredients(bias=False)
    loss = total(Answers(hidden.requires_grad_(), Head(weight)), torch.arange(11), 1.0)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bfloat16_is_as_near_as_autograd_is() -> None:
    exact = [t.requires_grad_() for t in ingredients(bias=False)]
    rounded = [t.to(torch.bfloat16).requires_grad_() for t in ingredients(bias=False)]
    labels = torch.arange(11)
    want = torch.autograd.grad(F.cross_entropy(F.linear(*exact), labels), exact)
    loss = total(Answers(rounded[0], Head(rounded[1])), labels, 1 / 11)
    for mine, theirs in zip(torch.autograd.grad(loss, rounded), want, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_a_micro_batch_without_answers_is_0_and_still_reaches_every_weight() -> None:
    hidden, weight = (t.requires_grad_() for t in ingredients(bias=False))
    loss = total(Answers(hidden[:0], Head(weight)), torch.arange(0), 1.0)
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


def test_a_second_backward_is_an_error_and_not_another_number() -> None:
    hidden, weight = (t.requires_grad_() for t in ingredients(bias=False))
    loss = total(Answers(hidden, Head(weight)), torch.arange(11), 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises((RuntimeError, TypeError)):
        loss.backward()


def test_the_values_are_told() -> None:
    hidden, weight = ingredients(bias=False)
    answers, seen = Answers(hidden, Head(weight)), []
    answers.add(CrossEntropy(torch.arange(11)), 0.5, seen.append)
    answers.total()
    torch.testing.assert_close(
        seen[0], F.cross_entropy(F.linear(hidden, weight), torch.arange(11), reduction="none")
    )


def test_memory_does_not_grow_with_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    inside = head_pass.Work.turn

    def watched(self: Any, span: slice, logits: Tensor) -> None:
        sizes.append(logits.numel())
        inside(self, span, logits)

    monkeypatch.setattr(head_pass.Work, "turn", watched)
    monkeypatch.setattr(head_pass, "CHUNK", 4096)
    for answers, vocabulary in ((50, 64), (500, 64), (500, 1024)):
        sizes.clear()
        hidden = torch.zeros(answers, 2, requires_grad=True)
        head = Head(torch.zeros(vocabulary, 2))
        total(Answers(hidden, head), torch.zeros(answers, dtype=torch.long), 1.0)
        assert max(sizes) <= 4096


# -- reading them off a model ---------------------------------------------------------------------

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.125},
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
}
ROWS = texts([6, 7, 8, 9, 3], [9, 8, 7, 6, 5], answer_from=2)


def build(kind: str, **more: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**SIZES | MODELS[kind] | more)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20)  # so that a cap can be seen
    return model.eval()


def said_twice(model: nn.Module) -> tuple[Answers, Tensor]:
    """The answers read off, and the model's own logits there."""
    ctx = context(model, ROWS)
    batch = stack(list(ROWS))
    return ctx.read(batch), ctx.answer_logits(ctx.outputs(batch).logits, batch)


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_model_does_to_its_logits_is_found_out(kind: str) -> None:
    answers, want = said_twice(build(kind))
    assert answers.head is not None, "the logits were made"
    torch.testing.assert_close(answers.logits(slice(None)), want, rtol=1e-4, atol=1e-4)


def test_a_cap_is_found_in_bfloat16() -> None:
    answers, _ = said_twice(build("Gemma2").to(torch.bfloat16))
    assert answers.head is not None
    assert answers.head.cap == pytest.approx(3.0, rel=1e-6)


class Strange(transformers.LlamaForCausalLM):
    """Adds something to its logits that is no factor and no cap."""

    def forward(self, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        outputs.logits = outputs.logits + 1
        return outputs


def test_a_model_that_does_something_else_gives_logits() -> None:
    model = Strange(build("Llama").config).eval()
    for _ in range(2):  # seen to be strange, it is not tried again
        answers, want = said_twice(model)
        assert answers.head is None
        torch.testing.assert_close(answers.values, want)
        assert find_head(model) is None


def test_lora_is_read_through_and_on_the_head_it_gives_logits() -> None:
    for targets, is_read in (("all-linear", True), (["q_proj", "lm_head"], False)):
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
        answers, want = said_twice(pico.adapted(build("Llama"), config).eval())
        assert (answers.head is not None) == is_read
        torch.testing.assert_close(answers.logits(slice(None)), want, rtol=1e-4, atol=1e-4)


def test_a_classifier_gives_logits() -> None:
    model = Softmax([[0.0, 1.0], [2.0, 0.0]])
    keep = positions(torch.tensor([0, -100]), -100)
    answers = read(model, lambda: model(torch.tensor([[0], [1]])), keep)
    assert answers.values.tolist() == [[0.0, 1.0]]


def test_the_head_is_itself_again_even_after_an_error() -> None:
    model = pico.causal_lm(16)
    keep = torch.ones(1, 3, dtype=torch.bool)

    def fail() -> Any:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        read(model, fail, keep)
    assert "forward" not in vars(model.lm_head)
    assert read(model, lambda: model(torch.ones(1, 3, dtype=torch.long)), keep).head is not None


def test_a_head_that_is_not_called_gives_logits() -> None:
    model = pico.causal_lm(16)
    logits = torch.randn(1, 3, 16)
    keep = torch.ones(1, 3, dtype=torch.bool)
    assert read(model, lambda: SimpleNamespace(logits=logits), keep).head is None


def test_small_gradients_of_float16_are_not_lost() -> None:
    """Each is a probability over thousands of answers, and no loss scale has reached it yet."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 8, generator=g), torch.randn(4096, 8, generator=g) / 4
    labels = torch.randint(4096, (64,), generator=g)
    found = []
    for kind in (torch.float32, torch.float16):
        inputs = [t.detach().clone().to(kind).requires_grad_() for t in (hidden, weight)]
        answers = Answers(inputs[0], Head(inputs[1], None, 1.0, math.inf))
        value = total(answers, labels, torch.full((64,), 1 / 4096))
        (65536 * value).backward()
        found.append([t.grad.float() for t in inputs])
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() < 2e-3 * want.norm()
