"""What a penalty holds: ΔW = s·BA against plain algebra and autograd, and its proximal step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keeptune.errors import MethodError
from keeptune.methods._anchor.weights import Effective, Weights, blocks, step_factors_back
from pencil import context


class Net(nn.Module):
    """Layers of each kind that an adapter may or may not be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.second = nn.Linear(4, 2)
        self.turned = Conv1D(2, 4)
        self.picture = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        drawn = self.picture(hidden[..., None])[..., 0]
        total: Tensor = self.second(hidden) + self.turned(hidden) + drawn
        return total


def adapted(*targets: str, rank: int = 2, **settings: Any) -> PeftModel:
    """A net with LoRA on these layers, all numbers random, s = 3/2 at rank 2."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank, lora_alpha=3, target_modules=list(targets or ("first", "second")), **settings
    )
    model = get_peft_model(Net(), config)
    assert isinstance(model, PeftModel)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight)
    return model


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


# -- the weights themselves -----------------------------------------------------------------------


def test_blocks_cover_all_once_and_begin_where_an_importance_can_be_read() -> None:
    values = torch.empty(2 * 1024 * 256 + 5)
    spans = list(blocks(values))
    assert [i for span in spans for i in (span.start, span.stop)] == [
        0, 262144, 262144, 524288, 524288, 524293,
    ]  # fmt: skip
    assert list(blocks(torch.empty(0))) == []


def test_plain_weights_are_views_by_name() -> None:
    model = Net()
    model.norm.requires_grad_(False)
    weights = Weights(context(model))
    assert weights.names() == [n for n in dict(model.named_parameters()) if "norm" not in n]
    with torch.no_grad():
        weights.value("first.weight")[5] = 7.0
    assert model.first.weight[1, 2] == 7.0
    assert weights.shape("first.weight") == (4, 3)
    assert weights.shaped("first.weight", torch.zeros(12)).shape == (4, 3)
    assert weights.owners("first.weight") == [weights.owner("first.weight")]


def test_a_penalty_adds_to_the_gradient_itself() -> None:
    model = Net()
    weights = Weights(context(model))
    model.first.bias.grad = torch.ones(4)
    kept = model.first.bias.grad
    weights.room("first.bias").add_(2.0)
    weights.spread("first.bias", torch.empty(0))
    assert kept.tolist() == [3.0] * 4


def test_a_weight_without_a_gradient_gets_one_of_zeros() -> None:
    model = Net()
    weights = Weights(context(model))
    assert weights.room("first.weight").tolist() == [0.0] * 12
    assert gradient_of(model.first.weight).shape == (4, 3)


def test_a_gradient_laid_out_otherwise_is_still_added_to() -> None:
    model = Net()
    model.first.weight.grad = torch.arange(12.0).view(3, 4).T
    Weights(context(model)).room("first.weight")[1] += 100.0
    assert gradient_of(model.first.weight)[0].tolist() == [0.0, 104.0, 8.0]


def test_the_implicit_step_by_hand_and_at_any_strength() -> None:
    model = Net()
    weights = Weights(context(model))
    model.first.bias.data = torch.tensor([3.0, 3.0, 3.0, 3.0])
    c = torch.tensor([0.0, 1.0, 3.0, 1e30])
    with torch.no_grad():
        weights.step_back("first.bias", slice(0, 4), torch.full((4,), -1.0), c)
    # (w + c a) / (1 + c): 3, (3 − 1) / 2, (3 − 3) / 4, −1.
    assert model.first.bias.tolist() == [3.0, 1.0, 0.0, -1.0]


# -- effective weights ----------------------------------------------------------------------------


def test_without_adapters_effective_weights_are_the_weights() -> None:
    ctx = context(Net())
    assert Effective(ctx).names() == Weights(ctx).names()
    assert Effective(ctx).modules == {}


def test_a_module_is_named_by_what_it_adapts_and_its_factors_are_not() -> None:
    model = adapted(modules_to_save=["norm"])
    weights = Effective(context(model))
    assert list(weights.modules) == ["first", "second"]
    assert not any("lora" in name for name in weights.names())
    others = [name for name in weights.names() if name not in weights.modules]
    assert len(others) == 2, "the trained copy of the norm, as it is"
    assert all("norm" in name for name in others)
    assert weights.shape("first") == (4, 3)
    assert weights.owners("first") == list(weights.factors("first"))
    assert list(weights.spans("first")) == [slice(0, 12)]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_the_value_is_what_merging_would_add(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    weights = Effective(context(model))
    before = model.get_base_model().first.get_base_layer().weight.clone()
    value = weights.shaped("first", weights.value("first"))
    model.merge_adapter()
    after = model.get_base_model().first.get_base_layer().weight
    torch.testing.assert_close(value, after - before)


def test_a_changed_value_is_not_the_weights() -> None:
    weights = Effective(context(adapted()))
    before = [p.clone() for p in weights.owners("first")]
    weights.value("first").fill_(9.0)
    assert all(map(torch.equal, before, weights.owners("first")))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_chain_rule_is_that_of_autograd(rank: int) -> None:
    model = adapted(rank=rank)
    weights = Effective(context(model))
    a, b = weights.factors("first")
    g = torch.Generator().manual_seed(1)
    anchor, importance = torch.randn(4, 3, generator=g), torch.rand(4, 3, generator=g)
    effective = weights.scaling("first") * (b @ a)
    penalty = 0.5 * (importance * (effective - anchor).square()).sum()
    want = torch.autograd.grad(penalty, (a, b))
    a.grad = torch.ones_like(a)
    room = weights.room("first")
    room += (importance * (effective - anchor)).detach().view(-1)
    weights.spread("first", room)
    torch.testing.assert_close(gradient_of(a), 1 + want[0])
    torch.testing.assert_close(gradient_of(b), want[1])


def test_parts_are_the_same_shares_apart() -> None:
    model = adapted()
    weights = Effective(context(model))
    a, b = weights.factors("second")
    pull = torch.arange(8.0)
    (of_a, share_a), (of_b, share_b) = weights.parts("second", pull)
    assert of_a is a
    assert of_b is b
    torch.testing.assert_close(share_a, (1.5 * b.T @ pull.view(2, 4)).view(-1))
    torch.testing.assert_close(share_b, (1.5 * pull.view(2, 4) @ a.T).view(-1))
    assert a.grad is None, "looking adds nothing"


def test_weights_beside_the_modules_are_as_they_are() -> None:
    model = adapted(modules_to_save=["norm"])
    weights = Effective(context(model))
    (name,) = [n for n in weights.names() if n.endswith("weight")]
    weights.room(name).add_(1.0)
    weights.spread(name, torch.zeros(4))
    assert gradient_of(weights.owner(name)).tolist() == [1.0] * 4
    (part,) = weights.parts(name, torch.full((4,), 2.0))
    assert part[1].tolist() == [2.0] * 4
    assert list(weights.spans(name)) == [slice(0, 4)]
    with torch.no_grad():
        weights.step_back(name, slice(0, 4), torch.full((4,), 5.0), torch.full((4,), 1.0))
    assert weights.value(name).tolist() == [3.0] * 4


def test_an_adapter_that_is_not_trained_is_not_held() -> None:
    model = adapted()
    model.get_base_model().second.requires_grad_(False)
    assert list(Effective(context(model)).modules) == ["first"]


def test_a_second_adapter_that_is_not_active_is_left_alone() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first"]))
    weights = Effective(context(model))
    assert weights.factors("first")[0].shape == (2, 3)


# -- what is refused ------------------------------------------------------------------------------


def two_active() -> PeftModel:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first"]))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: adapted("second", use_dora=True), "second is Linear"),
        (lambda: adapted("picture"), "picture is Conv1d"),
        (lambda: adapted("turned", fan_in_fan_out=True), "turned is Linear"),
        (two_active, r"first is Linear with the adapters \['default', 'other'\]"),
    ],
    ids=["dora", "convolution", "conv1d", "two adapters"],
)
def test_what_has_no_plain_update_is_refused(make: Any, where: str) -> None:
    with pytest.raises(MethodError, match=rf"one plain LoRA adapter.* {where}.*`on: factors`\."):
        Effective(context(make()))


# -- the proximal step on factors -----------------------------------------------------------------


def penalty(a: Tensor, b: Tensor, s: float, anchor: Tensor, weight: Tensor) -> float:
    return float(0.5 * (weight * (s * (b @ a) - anchor).square()).sum())


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (2, 3, 7), (4, 6, 5), (8, 3, 2)])
@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_on_factors_never_raises_the_penalty(
    shape: tuple[int, int, int], strength: float, sparse: bool
) -> None:
    rank, into, out = shape
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        s = (0.1, 1.0, 16.0)[seed % 3]
        a = torch.randn(rank, into, generator=g, dtype=torch.float64)
        b = torch.randn(out, rank, generator=g, dtype=torch.float64) * (seed % 4 != 0)
        anchor = torch.randn(out, into, generator=g, dtype=torch.float64)
        # Importances are far apart: e⁻⁶ to e⁶, and some are 0.
        weight = strength * torch.randn(out, into, generator=g, dtype=torch.float64).mul(3).exp()
        if sparse:
            weight *= torch.rand(out, into, generator=g) < 0.5
        # At the anchor itself only rounding is left.
        floor = float(weight.sum()) * (1e-14 * max(1.0, s * float(a.norm() * b.norm()))) ** 2
        before = penalty(a, b, s, anchor, weight)
        for _ in range(3):
            step_factors_back(a, b, s, anchor, weight)
            after = penalty(a, b, s, anchor, weight)
            assert after <= before * (1 + 1e-12) + floor, f"seed {seed}: {before} to {after}"
            before = after


def test_one_number_of_each_by_hand() -> None:
    # s = 2, A = 1, B = 3, D = 4, c = 1: 2·3·1 − 4 = 2. B ← 3 − 2·2 / (1 + 4) = 2.2; then
    # 2·2.2 − 4 = 0.4 and A ← 1 − 2·2.2·0.4 / (1 + 4·2.2²).
    a, b = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    step_factors_back(a, b, 2.0, torch.tensor([[4.0]]), torch.tensor([[1.0]]))
    assert b.item() == pytest.approx(2.2)
    assert a.item() == pytest.approx(1 - 1.76 / 20.36)


def test_a_small_step_is_the_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, anchor = (torch.randn(*n, generator=g).double() for n in ((2, 4), (3, 2), (3, 4)))
    weight = 1e-7 * torch.rand(3, 4, generator=g).double()
    old_a, old_b = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = 0.5 * (weight * (1.5 * (old_b @ old_a) - anchor).square()).sum()
    want = torch.autograd.grad(value, (old_a, old_b))
    step_factors_back(a, b, 1.5, anchor, weight)
    torch.testing.assert_close(a - old_a.detach(), -want[0], rtol=1e-5, atol=1e-13)
    torch.testing.assert_close(b - old_b.detach(), -want[1], rtol=1e-5, atol=1e-13)


def test_a_huge_strength_leads_to_the_anchor() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, generator=g).double(), torch.randn(3, 2, generator=g).double()
    anchor = torch.randn(3, 2, generator=g).double() @ torch.randn(2, 4, generator=g).double()
    weight = torch.full((3, 4), 1e12, dtype=torch.float64)
    start = float((b @ a - anchor).norm())
    for _ in range(2000):
        step_factors_back(a, b, 1.0, anchor, weight)
    assert float((b @ a - anchor).norm()) < 1e-3 * start


def test_the_effective_proximal_step_moves_the_factors() -> None:
    weights = Effective(context(adapted()))
    a, b = weights.factors("first")
    anchor = weights.value("first") * 0.5
    old = float((weights.value("first") - anchor).norm())
    (span,) = weights.spans("first")
    weights.step_back("first", span, anchor, torch.full((12,), 10.0))
    assert float((weights.value("first") - anchor).norm()) < old
    assert a.requires_grad
    assert b.requires_grad
