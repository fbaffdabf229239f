"""MAS by hand on few numbers, and on a linear map."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn

import pico
from keeptune.errors import MethodError
from keeptune.method import Batch, Context, State
from keeptune.methods.mas import MAS
from pencil import Softmax, context, examples, texts


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def importances(method: MAS) -> dict[str, Tensor]:
    """What is kept, by weight."""
    kept = method.state().tensors
    return {n.removeprefix("importance/"): t for n, t in kept.items() if n.startswith("imp")}


class Linear(nn.Module):
    """Logits Wx [3] of x [4], at each position if there are several."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(4, 3, bias=bias, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.linear(x))


def stage(model: nn.Module, x: Tensor, labels: Any, **more: Any) -> Context:
    """A context with rows of real numbers."""

    def collate(rows: list[dict[str, Any]]) -> Batch:
        inputs = torch.tensor([row["x"] for row in rows], dtype=torch.float64)
        return {"x": inputs, "labels": torch.tensor([row["labels"] for row in rows])}

    ctx = context(model, Dataset.from_dict({"x": x.tolist(), "labels": labels}), **more)
    ctx.collate = collate
    return ctx


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the importance -------------------------------------------------------------------------------


def test_importance_by_hand() -> None:
    # ∂ Σ_c w_c² / ∂w_c = 2 w_c in the rows that have the word: two of three, and one.
    model, method = Softmax([[1.0, -3.0], [0.5, 0.0]]), MAS()
    method.end_task(context(model, examples((0, 0), (0, 1), (1, 1))))
    want = torch.stack([2 / 3 * tensor(2.0, 6.0), 1 / 3 * tensor(1.0, 0.0)])
    torch.testing.assert_close(importances(method)["weight"], want)


def test_a_linear_map_has_its_closed_form() -> None:
    # ∂ ‖Wx‖² / ∂W_ij = 2 (Wx)_i x_j, in absolute values before the mean over rows.
    model, x, method = Linear(), numbers(20, 4), MAS()
    method.end_task(stage(model, x, [0] * 20))
    answers = x @ model.linear.weight.detach().T
    want = (2 * answers[:, :, None] * x[:, None, :]).abs().mean(0)
    torch.testing.assert_close(importances(method)["linear.weight"], want)
    assert method.evidence()["importance_by"] == "hooks"


def test_opposite_rows_do_not_cancel() -> None:
    # x and −x have the same gradient; (1, 1) and (1, −1) have opposite ones in half the weights.
    model = Linear()
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(3, 4))
    method, x = MAS(), torch.tensor([[1.0, 1, 0, 0], [1, -1, 0, 0]], dtype=torch.float64)
    method.end_task(stage(model, x, [0, 0]))
    want = [[2.0, 2.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0], [0.0] * 4]
    assert importances(method)["linear.weight"].tolist() == want


def test_labels_are_not_looked_at() -> None:
    found = []
    for labels in ([0, 1, 2], [2, 2, 0]):
        method = MAS()
        method.end_task(stage(Linear(bias=True), numbers(3, 4), labels))
        found.append(importances(method))
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    assert sorted(found[0]) == ["linear.bias", "linear.weight"]


def test_of_a_language_model_labels_tell_only_where_the_answer_stands() -> None:
    model, x = Linear(), numbers(2, 4, 4)  # two rows of four positions
    where = [[-100, -100, 1, 1], [-100, 1, -100, -100]]
    method = MAS()
    method.end_task(stage(model, x, where))
    other = MAS()
    other.end_task(stage(model, x, [[y if y < 0 else 2 for y in row] for row in where]))
    kept = importances(method)["linear.weight"]
    assert torch.equal(kept, importances(other)["linear.weight"])
    # Position 1 predicts label 2, and so on; a row's positions are summed before the absolute.
    answers = x @ model.linear.weight.detach().T
    each = 2 * answers[..., None] * x[:, :, None, :]
    want = ((each[0, 1] + each[0, 2]).abs() + each[1, 0].abs()) / 2
    torch.testing.assert_close(kept, want)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_only_the_largest_logits_count_with_top_k(k: int) -> None:
    model, x = Linear(), numbers(6, 4)
    method = MAS(top_k=k)
    method.end_task(stage(model, x, [0] * 6))
    answers = x @ model.linear.weight.detach().T
    floor = answers.sort(1, descending=True).values[:, min(k, 3) - 1 :][:, :1]
    answers = answers * (answers >= floor)
    want = (2 * answers[:, :, None] * x[:, None, :]).abs().mean(0)
    torch.testing.assert_close(importances(method)["linear.weight"], want)


def test_no_more_rows_are_taken_than_asked() -> None:
    rows = examples(*[(0, i % 2) for i in range(20)])
    for asked, taken in ((5, 5), (20, 20), (99, 20)):
        method = MAS(examples=asked)
        method.end_task(context(Softmax([[1.0, 1.0]]), rows))
        assert method.evidence()["importance_rows"] == taken


def test_the_model_is_left_as_it_was() -> None:
    model = Linear(bias=True).train()
    model.linear.bias.requires_grad_(False)
    method = MAS()
    method.end_task(stage(model, numbers(3, 4), [0, 1, 2]))
    assert model.training
    assert model.linear.weight.grad is None
    assert model.linear.weight.requires_grad
    assert not model.linear.bias.requires_grad
    assert list(importances(method)) == ["linear.weight"]


@pytest.mark.parametrize(("setting", "value"), [("top_k", 0), ("examples", 0), ("strength", -1)])
def test_a_setting_out_of_range_is_refused_by_its_name(setting: str, value: Any) -> None:
    with pytest.raises(MethodError, match=rf"MAS\.{setting}: must be at least .*, got {value}"):
        MAS(**{setting: value})


# -- over tasks -----------------------------------------------------------------------------------


def after(method: MAS, *ends: float) -> MAS:
    """The method after tasks that end at these weights, each with an importance of 2 |w|."""
    model = Softmax([[0.0]])
    for index, end in enumerate(ends):
        with torch.no_grad():
            model.weight.fill_(end)
        method.end_task(context(model, index=index))
    return method


def pull_at(method: MAS, weight: float) -> float:
    """What the method adds to the gradient there."""
    model = Softmax([[weight]])
    method.gradients(context(model, index=9))
    assert model.weight.grad is not None
    return model.weight.grad.item()


def test_importances_add_up_and_the_anchor_is_the_last_end() -> None:
    method = after(MAS(strength=10), 3.0, -1.0, 0.5)
    assert method.state().tensors["anchor/weight"].item() == 0.5
    assert importances(method)["weight"].item() == 2 * (3 + 1 + 0.5)
    assert pull_at(method, 2.0) == pytest.approx(10 * 9 * 1.5)


def test_the_papers_strength_is_half_of_ours() -> None:
    # The paper adds λ Σ Ω (w − w*)², whose gradient has a factor of 2.
    paper, weight = 5.0, tensor(2.0).requires_grad_()
    (want,) = torch.autograd.grad((paper * 6 * (weight - 3).square()).sum(), weight)
    assert pull_at(after(MAS(strength=2 * paper), 3.0), 2.0) == pytest.approx(want.item())


def test_an_implicit_step_by_hand_and_at_any_strength() -> None:
    # Ω = 6 around 3: (9 + c · 3) / (1 + c) with c = 0.5 · strength · 6.
    for strength, want in ((1.0, 4.5), (1e12, 3.0)):
        model = Softmax([[9.0]])
        method = after(MAS(strength=strength, proximal=True), 3.0)
        ctx = context(model, index=1, learning_rate=0.5)
        method.gradients(ctx)
        assert model.weight.grad is None
        method.after_step(ctx)
        assert model.weight.item() == pytest.approx(want)


def test_an_automatic_strength_is_the_stated_share() -> None:
    # Pull at strength 1: 6 · (4 − 3); the task's gradient is 30, and a tenth of it is 3.
    model, method = Softmax([[4.0]]), after(MAS(strength="auto", share=0.1), 3.0)
    model.weight.grad = tensor(30.0)[None]
    method.gradients(context(model, index=1, step=1))
    assert model.weight.grad.item() == pytest.approx(33.0)
    assert method.evidence()["strength"] == pytest.approx(0.5)


def test_evidence_by_hand() -> None:
    method = after(MAS(), 3.0, -1.0)
    assert method.evidence() == {
        "importance_rows": 1,
        "importance_by": "loop",
        "extra_forward_rows": 1,
        "extra_backward_rows": 1,
        "importance_sum": pytest.approx(8.0),
        "bytes_per_weight": 16.0,
    }


def test_switched_off_it_keeps_nothing() -> None:
    method = after(MAS(strength=0), 3.0)
    assert method.state().tensors == {}
    assert method.evidence() == {}


# -- what is kept ---------------------------------------------------------------------------------

PER_WEIGHT = {"float32": 8.0, "bfloat16": 2.0, "uint8": 1 + 4 / 12}


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@pytest.mark.parametrize("precision", PER_WEIGHT)
def test_it_goes_on_bit_for_bit_from_its_state(precision: str, place: str) -> None:
    settings = {"precision": precision, "place": place, "strength": 7.0}
    model, method, again = Linear(), MAS(**settings), MAS(**settings)
    method.end_task(stage(model, numbers(6, 4), [0] * 6))
    ctx = stage(model, numbers(6, 4, seed=2), [0] * 6, index=1)
    again.restore(ctx, method.state())
    pulls: list[Tensor] = []
    ends: list[State] = []
    for one in (method, again):
        with torch.no_grad():
            model.linear.weight.add_(numbers(3, 4, seed=3))
        model.linear.weight.grad = None
        one.gradients(ctx)
        assert model.linear.weight.grad is not None
        pulls.append(model.linear.weight.grad)
        one.end_task(ctx)
        ends.append(one.state())
        with torch.no_grad():
            model.linear.weight.sub_(numbers(3, 4, seed=3))
    assert torch.equal(*pulls)
    assert all(torch.equal(t, ends[1].tensors[name]) for name, t in ends[0].tensors.items())
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert method.evidence()["bytes_per_weight"] == pytest.approx(8 + PER_WEIGHT[precision])
    kept = sum(t.nbytes for t in ends[0].tensors.values())
    assert kept == method.declared_bytes(ctx) == round(12 * (8 + PER_WEIGHT[precision]))


def test_an_unseen_word_is_free() -> None:
    model, method = Softmax([[1.0], [1.0]]), MAS(strength=1.0)
    method.end_task(context(model, examples((0, 0))))
    with torch.no_grad():
        model.weight.add_(1.0)
    method.gradients(context(model, index=1))
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[2.0], [0.0]]


def test_weights_that_are_frozen_or_new_are_free() -> None:
    model, method = Softmax([[1.0]]), MAS()
    model.weight.requires_grad_(False)
    model.other = nn.Parameter(tensor(1.0))
    method.end_task(context(model))
    assert list(importances(method)) == ["other"]
    model.weight.requires_grad_(True)
    model.other.requires_grad_(False)
    ctx = context(model, index=1, step=1)
    method.gradients(ctx)
    assert model.weight.grad is None
    assert model.other.grad is None


# -- language models and adapters -----------------------------------------------------------------


def naive(ctx: Context, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """One backward per row, as the equation says."""
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for i in range(len(ctx.dataset)):
        batch = ctx.batch([ctx.dataset[i]])
        answers = ctx.answer_logits(ctx.model(input_ids=batch["input_ids"]).logits, batch)
        found = torch.autograd.grad(answers.square().sum(), list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            total[name] += gradient.abs() / len(ctx.dataset)
    return total


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, one in want.items():
        largest = float(one.max())
        torch.testing.assert_close(got[name], one, atol=1e-5 * largest, rtol=1e-4)


def test_a_language_model_with_tied_weights_is_as_its_equation_says() -> None:
    model = pico.causal_lm()
    ctx = context(model, texts([7, 8, 9, 10], [20, 8, 8, 21], answer_from=2))
    method = MAS()
    method.end_task(ctx)
    assert method.evidence()["importance_by"] == "hooks"
    assert_near(importances(method), naive(ctx, ctx.trainable()))


def test_on_effective_weights_it_is_the_merged_models() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"])
    model = pico.adapted(pico.causal_lm(), config)
    ctx = context(model, texts([7, 8, 9, 10], [20, 8, 8, 21], answer_from=2))
    method = MAS(on="effective")
    method.end_task(ctx)
    held = importances(method)
    assert len(held) == 4
    merged = model.merge_and_unload()
    merged.requires_grad_(True)
    dense = dict(merged.named_parameters())
    want = naive(context(merged, ctx.dataset), {name: dense[f"{name}.weight"] for name in held})
    assert_near(held, want)


def test_a_state_of_before_its_first_end_is_empty() -> None:
    method = MAS(strength="auto")
    method.begin_task(context(Softmax([[1.0]])))
    assert method.state() == State({}, {"strength": 0.0})
