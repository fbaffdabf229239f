"""The hierarchical penalty: layer weights by hand, one general task, effective weights."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from keeptune.methods.hierarchical import Hierarchical, layer_weights
from keeptune.methods.si import SI
from pencil import context


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- layer weights --------------------------------------------------------------------------------


def test_layer_weights_by_hand() -> None:
    # Norms 1, 2, 4: softmax of 1/4, 1/2, 1.
    powers = [math.exp(0.25), math.exp(0.5), math.exp(1.0)]
    want = tensor(*powers) / sum(powers)
    torch.testing.assert_close(layer_weights(tensor(1.0, 2.0, 4.0), 1.0), want)


def test_a_temperature_by_hand() -> None:
    # softmax of 1/6 and 1/2.
    got = layer_weights(tensor(1.0, 3.0), 2.0)
    torch.testing.assert_close(got[0], tensor(1 / (1 + math.exp(1 / 3)))[0])
    flat = layer_weights(tensor(1.0, 3.0), 1e6)
    torch.testing.assert_close(flat, tensor(0.5, 0.5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("unit", [1e-15, 1e-6, 1.0, 1e12])
def test_layer_weights_do_not_depend_on_the_unit_of_importance(unit: float) -> None:
    # Norms of 1 and 100: softmax of 1/100 and 1.
    got = layer_weights(tensor(1.0, 100.0) * unit, 1.0)
    torch.testing.assert_close(got[0], tensor(1 / (1 + math.exp(0.99)))[0])


def test_no_layer_takes_all_among_many() -> None:
    norms = torch.ones(210, dtype=torch.float64)
    norms[7] = 1e6
    alpha = layer_weights(norms, 1.0)
    assert float(alpha.max() / alpha.min()) == pytest.approx(math.e, rel=1e-5)


def test_the_softmax_of_the_bare_norms_would_saturate_or_see_nothing() -> None:
    assert float(torch.softmax(tensor(1.0, 100.0), 0)[0]) < 1e-40
    bare = torch.softmax(tensor(1e-6, 1e-4), 0)
    assert float(bare[1] - bare[0]) < 1e-4


def test_without_any_importance_all_layers_are_alike() -> None:
    assert layer_weights(tensor(0.0, 0.0), 1.0).tolist() == [0.5, 0.5]


# -- one task, and those after it -----------------------------------------------------------------


class Two(nn.Module):
    """Two layers of one and two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(tensor(0.0))
        self.two = nn.Parameter(tensor(0.0, 0.0))


def walk(method: Hierarchical | SI, model: nn.Module, index: int, ways: dict[str, Tensor]) -> None:
    """One task of one step, with a gradient that is the way turned round: ω = way²."""
    ctx = context(model, index=index)
    method.begin_task(ctx)
    for name, p in model.named_parameters():
        p.grad = -ways[name]
    method.gradients(ctx)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(ways[name])
    method.after_step(ctx)
    method.end_task(ctx)


FIRST = {"one": tensor(1.0), "two": tensor(3.0, 2.0)}


def test_the_penalty_by_hand() -> None:
    # ξ = 1, so Ω = way² / (way² + 1): 1/2; 9/10 and 4/5.
    model, method = Two(), Hierarchical(strength=10.0, damping=1.0)
    walk(method, model, 0, FIRST)
    norms = tensor(0.5, math.hypot(0.9, 0.8))
    alpha = torch.softmax(norms / norms.max(), 0)
    kept = method.state().tensors
    torch.testing.assert_close(kept["importance/one"], alpha[0] * tensor(0.5))
    torch.testing.assert_close(kept["importance/two"], alpha[1] * tensor(0.9, 0.8))
    assert kept["anchor/two"].tolist() == [3.0, 2.0]
    assert method.evidence()["largest_layer_weight"] == pytest.approx(float(alpha[1]))
    assert method.evidence()["layers"] == 2
    assert method.evidence()["negative_share"] == 0.0
    ctx = context(model, index=1)
    method.begin_task(ctx)
    with torch.no_grad():
        model.two.add_(tensor(1.0, -2.0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    method.gradients(ctx)
    assert model.two.grad is not None
    torch.testing.assert_close(model.two.grad, 10 * alpha[1] * tensor(0.9, -1.6))


def test_only_the_first_task_is_recorded() -> None:
    model, method = Two(), Hierarchical(damping=1.0)
    walk(method, model, 0, FIRST)
    kept = {name: t.clone() for name, t in method.state().tensors.items()}
    for index in (1, 2):
        walk(method, model, index, {"one": tensor(5.0), "two": tensor(1.0, 1.0)})
        assert method.state().tensors.keys() == kept.keys(), "no path"
        for name, one in method.state().tensors.items():
            assert torch.equal(one, kept[name]), f"{name} after task {index}"


def test_in_one_layer_it_is_si_after_the_first_task() -> None:
    model, other = Two(), Two()
    del model.two, other.two
    hierarchical, si = Hierarchical(damping=1.0), SI(damping=1.0)
    walk(hierarchical, model, 0, FIRST)
    walk(si, other, 0, FIRST)
    one, two = hierarchical.state().tensors, si.state().tensors
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_switched_off_it_keeps_nothing() -> None:
    model, method = Two(), Hierarchical(strength=0)
    walk(method, model, 0, FIRST)
    assert method.state().tensors == {}


def test_tiny_importances_are_weighed_like_large_ones() -> None:
    alphas = []
    for size in (1.0, 1e-11):
        model, method = Two(), Hierarchical(damping=1.0)
        ctx = context(model)
        method.begin_task(ctx)
        # Ω = 1e-6 and 1e-4 of the size, from gradients that small and steps of ±1 and back.
        model.one.grad, model.two.grad = tensor(-1e-6 * size), tensor(-1e-4 * size, 0.0)
        method.gradients(ctx)
        with torch.no_grad():
            model.one.add_(1)
            model.two.add_(1)
        method.after_step(ctx)
        method.end_task(ctx)
        alphas.append(method.evidence()["largest_layer_weight"])
    assert alphas == pytest.approx([1 / (1 + math.exp(-0.99))] * 2)


# -- under LoRA -----------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


def lora() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"])
    model = get_peft_model(Net(), config)
    assert isinstance(model, PeftModel)
    return model.double().train()


def steps(method: Hierarchical | SI, model: PeftModel, index: int) -> None:
    g = torch.Generator().manual_seed(index)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    method.begin_task(context(model, index=index))
    for step in range(4):
        ctx = context(model, index=index, step=step, learning_rate=0.02)
        optimizer.zero_grad()
        model(torch.randn(6, 4, generator=g, dtype=torch.float64)).square().mean().backward()
        method.gradients(ctx)
        optimizer.step()
        method.after_step(ctx)
    method.end_task(context(model, index=index))


def test_by_default_the_update_is_held_and_not_its_factors() -> None:
    model, method = lora(), Hierarchical()
    steps(method, model, 0)
    kept = method.state().tensors
    assert {n: tuple(t.shape) for n, t in kept.items()} == {
        "anchor/first": (5, 4),
        "importance/first": (5, 4),
        "anchor/second": (3, 5),
        "importance/second": (3, 5),
    }
    assert method.evidence()["layers"] == 2
    ctx = context(model)
    assert method.declared_bytes(ctx) == sum(t.nbytes for t in kept.values()) == 2 * 8 * 35


def test_it_is_si_on_the_update_with_weights_for_layers() -> None:
    one, two = lora(), lora()
    method, si = Hierarchical(temperature=0.5), SI(on="effective")
    steps(method, one, 0)
    steps(si, two, 0)
    got, plain = method.state().tensors, si.state().tensors
    layers = [plain[f"importance/{name}"] for name in ("first", "second")]
    alpha = layer_weights(torch.stack([one.norm() for one in layers]), 0.5)
    torch.testing.assert_close(got["importance/first"], alpha[0] * layers[0])
    torch.testing.assert_close(got["importance/second"], alpha[1] * layers[1])


@pytest.mark.parametrize("proximal", [False, True])
def test_the_update_moves_less_in_later_tasks(proximal: bool) -> None:
    ways = []
    for strength in (0.0, 1e6):
        model = lora()
        method = Hierarchical(strength=1e-9)
        steps(method, model, 0)
        held = Hierarchical(strength=strength, proximal=proximal)
        held.restore(context(model), method.state())
        start = method.state().tensors["anchor/first"]
        steps(held, model, 1)
        layer = model.get_base_model().first
        ways.append(float((layer.get_delta_weight("default").detach() - start).norm()))
        assert not layer._forward_hooks, "later tasks are not watched"
    assert ways[1] < 0.9 * ways[0]


def test_factors_can_be_held_instead() -> None:
    model, method = lora(), Hierarchical(on="factors")
    steps(method, model, 0)
    shapes = sorted(tuple(t.shape) for n, t in method.state().tensors.items() if "importance" in n)
    assert shapes == [(2, 4), (2, 5), (3, 2), (5, 2)]
    assert method.evidence()["layers"] == 4
