"""Feature replay: what is kept, what it is put into, and which weights must stay below it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

import pico
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._features import as_batch, mask_of, of_each_row, without_inputs
from keeptune.methods.feature_replay import FeatureReplay
from keeptune.methods.joint import Joint
from keeptune.methods.merge import Merge
from keeptune.tokens import collate
from pencil import context, examples

TEXTS = [[7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18]]
NEW = [[20, 21, 22, 23], [24, 25, 26, 27]]


def text_context(model: nn.Module, rows: list[list[int]], index: int = 0) -> Context:
    labels = [[-100, -100, *row[2:]] for row in rows]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": labels})
    return Context(model, f"t{index}", index, dataset, collate=collate(pico.tokenizer()))


def learned(method: FeatureReplay, model: nn.Module) -> Context:
    """A method that has kept a task's features, and a context inside the next task."""
    ctx = text_context(model, TEXTS)
    method.begin_task(ctx)
    method.end_task(ctx)
    ctx = text_context(model, NEW, index=1)
    method.begin_task(ctx)
    return ctx


def zero_gradients(ctx: Context) -> dict[str, nn.Parameter]:
    for weight in ctx.trainable().values():
        weight.grad = torch.zeros_like(weight)
    return ctx.trainable()


def mean_loss(ctx: Context, rows: list[list[int]]) -> Tensor:
    batch = ctx.batch(list(text_context(ctx.model, rows).dataset))
    logits = ctx.answer_logits(ctx.outputs(batch).logits, batch)
    return F.cross_entropy(logits, ctx.answer_labels(batch))


# -- by hand --------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """y = top · (bottom · x): what enters `top` is one vector a row."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Linear(1, 2, bias=False)
        self.top = nn.Linear(2, 2, bias=False)
        self.bottom.weight.data = torch.tensor([[1.0], [2.0]])
        self.top.weight.data = torch.tensor([[0.5, 0.0], [0.0, 0.25]])

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.top(self.bottom(input_ids.float())))


def test_the_gradient_is_that_of_old_features_by_hand() -> None:
    model = TwoLayers()
    method = FeatureReplay(module="top", rows=1, strength=3.0)
    ctx = context(model, examples((2, 1)))
    method.end_task(ctx)
    assert method._buffer.extras([0])["features"].tolist() == [[2.0, 4.0]]
    ctx = context(model, examples((5, 0)), index=1)
    method.begin_task(ctx)
    assert list(ctx.trainable()) == ["top.weight"]
    model.top.weight.grad = torch.ones(2, 2)
    method.gradients(ctx)
    # logits = [0.5 · 2, 0.25 · 4] = [1, 1], so p = [½, ½]; the class is 1.
    want = 1 + 3.0 * torch.tensor([[0.5 * 2, 0.5 * 4], [-0.5 * 2, -0.5 * 4]])
    torch.testing.assert_close(model.top.weight.grad, want)
    assert model.bottom.weight.grad is None
    assert method.evidence() == {"rows_kept": 1, "rows_rehearsed": 1, "weights_frozen": 2}
    method.end_task(ctx)
    assert len(ctx.trainable()) == 2


def test_tokens_that_are_there_are_kept_and_laid_out_again() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    kept = of_each_row(states, mask)
    assert [rows.tolist() for rows in kept] == [[[0, 1], [2, 3], [4, 5]], [[6, 7]]]
    line = torch.cat([torch.from_numpy(rows) for rows in kept])
    laid = as_batch(line, mask)
    assert laid.tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [0, 0], [0, 0]]]
    vectors = of_each_row(states[:, 0], mask)
    assert [rows.tolist() for rows in vectors] == [[[0, 1]], [[6, 7]]]
    assert as_batch(torch.cat([torch.from_numpy(v) for v in vectors]), mask).shape == (2, 2)


# -- a language model -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("lora", [False, True])
def test_it_is_replay_as_long_as_the_layers_below_stay(layer: int, lora: bool) -> None:
    model: Any = pico.causal_lm()
    model = pico.adapted(model) if lora else model
    method = FeatureReplay(layer=layer, rows=3)
    ctx = learned(method, model)
    weights = zero_gradients(ctx)
    method.gradients(ctx)
    want = torch.autograd.grad(mean_loss(ctx, TEXTS), list(weights.values()))
    for (name, weight), gradient in zip(weights.items(), want, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient, rtol=0.01, atol=1e-4, msg=name)


def test_what_lies_below_is_frozen_in_later_tasks_and_freed_between() -> None:
    model = pico.adapted(pico.causal_lm())
    method, before = FeatureReplay(layer=1), set(text_context(model, TEXTS).trainable())
    ctx = learned(method, model)
    left = set(ctx.trainable())
    assert {name for name in before if ".layers.1." in name} == left
    method.end_task(ctx)
    assert set(ctx.trainable()) == before


def test_an_embedding_that_is_the_head_too_is_frozen() -> None:
    ctx = learned(FeatureReplay(layer=0), pico.causal_lm())
    assert "model.embed_tokens.weight" not in ctx.trainable()


def test_the_middle_layer_is_the_default() -> None:
    ctx = learned(FeatureReplay(), pico.causal_lm())
    assert {n.split(".")[2] for n in ctx.trainable() if ".layers." in n} == {"1"}


def test_a_later_step_draws_other_rows_and_the_same_step_the_same() -> None:
    def drawn(step: int) -> Tensor:
        method = FeatureReplay(rows=1)
        ctx = learned(method, pico.causal_lm())
        ctx.step = step
        weights = zero_gradients(ctx)
        method.gradients(ctx)
        return torch.cat([w.grad.flatten() for w in weights.values() if w.grad is not None])

    assert torch.equal(drawn(1), drawn(1))
    assert any(not torch.equal(drawn(1), drawn(step)) for step in range(2, 8))


@pytest.mark.parametrize("bert", [False, True])
def test_classifiers_of_both_kinds(bert: bool) -> None:
    model = pico.classifier(3, bert=bert)
    rows = [row if i else [*row, 19] for i, row in enumerate(TEXTS)]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": [0, 1, 2]})
    ctx = Context(model, "t0", 0, dataset, collate=collate(pico.tokenizer()))
    method = FeatureReplay(rows=3)
    method.begin_task(ctx)
    method.end_task(ctx)
    ctx.index = 1
    method.begin_task(ctx)
    weights = zero_gradients(ctx)
    method.gradients(ctx)
    batch = ctx.batch(list(dataset))
    loss = F.cross_entropy(ctx.outputs(batch).logits, batch["labels"])
    want = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    for (name, weight), gradient in zip(weights.items(), want, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient, rtol=0.01, atol=1e-4, msg=name)


# -- what is kept ---------------------------------------------------------------------------------


def test_no_id_of_a_prompt_is_kept() -> None:
    method = FeatureReplay()
    learned(method, pico.causal_lm())
    ids = {int(i) for row in method._buffer.rows([0, 1, 2], without_inputs(
        text_context(pico.causal_lm(), TEXTS)))["input_ids"] for i in row}  # fmt: skip
    prompts = {i for row in TEXTS for i in row[:2]}
    assert not ids & prompts
    assert ids == {i for row in TEXTS for i in row[2:]} | {1}  # 0 is the padding


def test_two_bytes_a_feature() -> None:
    method = FeatureReplay()
    learned(method, pico.causal_lm())
    tokens, width = sum(map(len, TEXTS)), 32
    features = method.state().tensors["rows/extras/features/values"]
    assert (features.dtype, features.shape) == (torch.float16, (tokens, width))


def test_no_more_rows_are_kept_than_size() -> None:
    method = FeatureReplay(size=2)
    learned(method, pico.causal_lm())
    assert len(method._buffer) == 2


def test_taking_features_down_leaves_the_model_as_it_was() -> None:
    model = pico.causal_lm().train()
    before = torch.get_rng_state()
    learned(FeatureReplay(), model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_row_without_a_mask_is_there_as_a_whole() -> None:
    assert mask_of({"input_ids": torch.zeros(2, 3, dtype=torch.long)}).tolist() == [[1] * 3] * 2


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layer": 2}, r"FeatureReplay\.layer is 2, but the model has the layers 0 to 1\. Give"),
        ({"module": "nowhere"}, r"FeatureReplay\.module: 0 modules of LlamaForCausalLM are called"),
        ({"module": "mlp"}, r"2 modules .* called 'mlp'; they are model\.layers\.0\.mlp, "),
    ],
)
def test_a_place_that_is_not_there_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        learned(FeatureReplay(**settings), pico.causal_lm())


def test_a_model_without_layers_is_asked_for_a_module() -> None:
    with pytest.raises(MethodError, match=r"TwoLayers has no stack .* Set FeatureReplay\.module"):
        FeatureReplay().begin_task(context(TwoLayers(), examples((1, 0))))


def test_with_everything_below_nothing_is_left_to_train() -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], layers_to_transform=0
    )
    model = pico.adapted(pico.causal_lm(), config)
    with pytest.raises(MethodError, match=r"would leave nothing to train.*lower `layer`"):
        learned(FeatureReplay(), model)


def test_weights_below_that_someone_trains_again_are_refused() -> None:
    method, model = FeatureReplay(), pico.causal_lm()
    ctx = learned(method, model)
    model.model.layers[0].requires_grad_(True)
    zero_gradients(ctx)
    with pytest.raises(MethodError, match=r"are trained in task 't1', though it froze them\. "):
        method.gradients(ctx)


def test_features_beyond_float16_are_refused() -> None:
    model = pico.causal_lm()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e8)
    with pytest.raises(MethodError, match=r"beyond the range of float16\. Give another `layer`"):
        learned(FeatureReplay(layer=0), model)


def test_a_method_that_goes_back_to_the_first_weights_is_refused() -> None:
    with pytest.raises(MethodError, match="cannot run together"):
        Chain([FeatureReplay(), Joint()])


def test_a_method_that_puts_the_first_weights_back_is_refused() -> None:
    with pytest.raises(MethodError, match="'feature_replay' and 'merge' cannot run together"):
        Chain([FeatureReplay(), Merge()])
