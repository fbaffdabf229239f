"""SI's path integral by hand, against closed forms, and with everything that may disturb it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from keeptune.chain import Chain
from keeptune.method import Context, Method, State
from keeptune.methods.ewc import EWC
from keeptune.methods.hierarchical import Hierarchical
from keeptune.methods.si import SI
from pencil import Softmax, context

Optimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sgd(rate: float) -> Optimizer:
    return lambda weights: torch.optim.SGD(weights, lr=rate)


def learn(
    strategy: Method | Chain,
    model: Softmax,
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    index: int = 0,
) -> Tensor:
    """One task with a loss of the weights alone; returns the naive −Σ g·Δw, kept in copies."""
    naive = torch.zeros_like(model.weight)
    strategy.begin_task(context(model, index=index))
    for step in range(steps):
        ctx = context(model, index=index, step=step, learning_rate=optimizer.defaults["lr"])
        optimizer.zero_grad()
        loss(model.weight).backward()
        assert model.weight.grad is not None
        own, before = model.weight.grad.clone(), model.weight.detach().clone()
        strategy.gradients(ctx)
        optimizer.step()
        naive -= own * (model.weight.detach() - before)
        strategy.after_step(ctx)
    return naive


def bowl(curvature: Tensor, optimum: Tensor) -> Callable[[Tensor], Tensor]:
    """½ Σ h (w − w*)²."""
    return lambda weight: 0.5 * (curvature * (weight[0] - optimum).square()).sum()


def importance(method: SI, name: str = "weight") -> Tensor:
    return method.state().tensors[f"importance/{name}"]


def step(model: nn.Module, method: SI, **more: Any) -> None:
    """An optimizer's step, the same for every trained weight."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p -= 0.01
    method.after_step(context(model, **more))


def omega(method: SI, name: str = "weight") -> Tensor:
    return method.state().tensors[f"path/{name}"]


# -- the formula ----------------------------------------------------------------------------------


def test_the_path_by_hand() -> None:
    # Gradients 4 and 1, steps −1 and +2 (as a wild optimizer might): ω = 4·1 − 1·2 = 2.
    model, method = Softmax([[5.0]]), SI(damping=1.0)
    method.begin_task(context(model))
    for own, way in ((4.0, -1.0), (1.0, 2.0)):
        model.weight.grad = tensor(own)[None]
        method.gradients(context(model))
        with torch.no_grad():
            model.weight += way
        method.after_step(context(model))
    assert omega(method).tolist() == [[2.0]]
    method.end_task(context(model))
    # From 5 to 6, so d² + ξ = 1 + 1.
    assert importance(method).tolist() == [[1.0]]
    assert method.state().tensors["anchor/weight"].tolist() == [[6.0]]
    assert method.evidence()["importance_sum"] == 1.0


@pytest.mark.parametrize("rate", [0.1, 0.03, 0.01])
def test_on_a_quadratic_the_importance_is_half_the_curvature_as_steps_shrink(rate: float) -> None:
    # With gradient flow ω = L(start) − L(end) = h/2 d², so that the paper's c Ω (w − w*)² with
    # c = 1 is the loss itself. With steps of η: h / (2 − η h).
    curvature = tensor(0.5, 1.0, 4.0)
    model, method = Softmax([[1.0, -3.0, 0.5]]), SI(damping=1e-12)
    loss = bowl(curvature, tensor(0.0, 2.0, 0.25))
    learn(method, model, loss, sgd(rate)(model.parameters()), int(20 / rate))
    method.end_task(context(model))
    torch.testing.assert_close(
        importance(method)[0], curvature / (2 - rate * curvature), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(importance(method)[0], curvature / 2, rtol=3 * rate, atol=0)


def test_with_the_paper_s_strength_two_quadratic_tasks_end_at_the_joint_optimum() -> None:
    # c = 1 is strength 2. The optimum of h/2 (w − a)² summed: the mean of a weighted by h.
    model, method = Softmax([[0.0]]), SI(strength=2.0, damping=1e-12)
    optimizer = sgd(1e-2)(model.parameters())
    learn(method, model, bowl(tensor(1.0), tensor(3.0)), optimizer, 1500)
    method.end_task(context(model))
    learn(method, model, bowl(tensor(4.0), tensor(-1.0)), optimizer, 500, index=1)
    assert model.weight.item() == pytest.approx((3 - 4) / 5, abs=5e-3)


def test_damping_bounds_what_hardly_moved() -> None:
    model, method = Softmax([[0.0]]), SI(damping=0.5)
    method.begin_task(context(model))
    model.weight.grad = tensor(-1.0)[None]
    method.gradients(context(model))
    with torch.no_grad():
        model.weight += 1e-3
    method.after_step(context(model))
    method.end_task(context(model))
    assert importance(method).item() == pytest.approx(1e-3 / 0.5, rel=1e-5)


def test_what_is_below_0_is_set_to_0_and_reported() -> None:
    # The first weight goes down its gradient, the second up: ω = 3 and −1.
    model, method = Softmax([[0.0, 0.0]]), SI(damping=1.0)
    method.begin_task(context(model))
    model.weight.grad = tensor(3.0, 1.0)[None]
    method.gradients(context(model))
    with torch.no_grad():
        model.weight += tensor(-1.0, 1.0)[None]
    method.after_step(context(model))
    method.end_task(context(model))
    assert importance(method).tolist() == [[1.5, 0.0]]
    assert method.evidence()["negative_share"] == pytest.approx(1 / 4)


def test_importance_adds_up_over_tasks_and_each_path_starts_anew() -> None:
    model, method = Softmax([[0.0]]), SI(strength=1e-9, damping=1.0)
    for index, way in enumerate((1.0, 2.0, -3.0)):
        method.begin_task(context(model, index=index))
        assert "path/weight" not in method.state().tensors
        # A gradient against the way: ω = |way|, Ω = |way| / (way² + 1).
        model.weight.grad = tensor(-1.0 if way > 0 else 1.0)[None]
        method.gradients(context(model, index=index))
        with torch.no_grad():
            model.weight += way
        method.after_step(context(model, index=index))
        method.end_task(context(model, index=index))
    assert importance(method).item() == pytest.approx(1 / 2 + 2 / 5 + 3 / 10)
    assert method.state().tensors["anchor/weight"].item() == 0.0


# -- the task's own gradient, and the optimizer's own step ----------------------------------------


class Noise(Method):
    """Another method, which edits gradients and weights."""

    traits: ClassVar[frozenset[str]] = frozenset()

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        for p in ctx.trainable().values():
            assert p.grad is not None
            p.grad.mul_(-2).add_(1.0)

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        for p in ctx.trainable().values():
            p.mul_(0.98)


class Clip(Method):
    """What the trainer does next: the gradient is made shorter before the optimizer's step."""

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        nn.utils.clip_grad_norm_(ctx.model.parameters(), 0.1)


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize(
    "others",
    [
        lambda si: [si],
        lambda si: [si, Noise()],
        lambda si: [Noise(), si],
        lambda si: [si, EWC(strength=50.0)],
        lambda si: [EWC(strength=50.0), si],
        lambda si: [Clip(), si, Noise()],
        lambda si: [Hierarchical(strength=300.0), si],
        lambda si: [si, Hierarchical(strength=300.0, proximal=True)],
    ],
    ids=[
        "alone",
        "before noise",
        "after noise",
        "before ewc",
        "after ewc",
        "between",
        "after hierarchical",
        "before hierarchical",
    ],
)
def test_the_path_is_the_naive_sum_of_the_tasks_own_gradient_and_the_real_step(
    others: Callable[[SI], list[Method]], proximal: bool
) -> None:
    method = SI(strength=30.0, damping=0.01, proximal=proximal)
    chain = Chain(others(method))
    model = Softmax([[0.3, -0.2, 0.9]])
    total = torch.zeros(1, 3, dtype=torch.float64)
    for index, optimum in enumerate((tensor(1.0, 2.0, -1.0), tensor(-1.0, 0.0, 1.0))):
        start = model.weight.detach().clone()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        curvature = tensor(1.0, 3.0, 0.2)
        naive = learn(chain, model, bowl(curvature, optimum), optimizer, 25, index=index)
        torch.testing.assert_close(omega(method), naive)
        assert naive.abs().min() > 1e-4, "there is something to compare"
        total += naive.clamp(min=0) / ((model.weight.detach() - start).square() + 0.01)
        chain.end_task(context(model, index=index))
        torch.testing.assert_close(importance(method), total)
    assert method.evidence()["gradient_share"] > 0, "the second task was held"


def test_gradients_are_watched_after_all_micro_batches_and_unscaled() -> None:
    model, method = Softmax([[0.0]]), SI()
    method.begin_task(context(model))
    optimizer = sgd(0.5)(model.parameters())
    for part in (2.0, 4.0):
        (1024.0 * part * model.weight).sum().backward()
    method.gradients(context(model, grad_scale=1024.0))
    assert model.weight.grad is not None
    assert model.weight.grad.item() == 6 * 1024, "the trainer's own gradient stays scaled"
    model.weight.grad /= 1024
    optimizer.step()
    method.after_step(context(model, grad_scale=1024.0))
    assert omega(method).item() == 6 * 3


def test_a_task_that_failed_leaves_no_path() -> None:
    model, method = Softmax([[0.0]]), SI()
    method.begin_task(context(model))
    model.weight.grad = tensor(1.0)[None]
    method.gradients(context(model))
    method.begin_task(context(model))
    assert "path/weight" not in method.state().tensors


def test_the_path_of_bf16_weights_is_added_up_in_float32() -> None:
    model, method = Softmax([[0.0]]).bfloat16(), SI()
    method.begin_task(context(model))
    with torch.no_grad():
        model.weight.fill_(1.0)
    method.state().tensors["anchor/weight"].fill_(0.004)
    model.weight.grad = torch.full_like(model.weight, 2.0)
    method.gradients(context(model))
    anchor = torch.tensor(0.004).bfloat16().item()
    assert omega(method).dtype == torch.float32
    assert omega(method).item() == pytest.approx(2 * (1 - anchor), rel=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_overflowed_in_fp16_is_left_out(bad: float) -> None:
    model, method = Softmax([[0.0, 0.0]]), SI()
    method.begin_task(context(model))
    # A scale can fall to 1 and is a scale still.
    for own, scale in (((2.0, 1.0), 8.0), ((bad, 1.0), 1.0), ((2.0, 1.0), 4.0)):
        model.weight.grad = tensor(*own)[None] * scale
        method.gradients(context(model, grad_scale=scale, may_overflow=True))
        if not torch.isfinite(model.weight.grad).all():
            continue  # the trainer takes no step and calls no `after_step`
        with torch.no_grad():
            model.weight -= 0.5 * tensor(*own)[None]
        method.after_step(context(model, grad_scale=scale, may_overflow=True))
    assert omega(method).tolist() == [[2 * 2.0 * 1.0, 2 * 1.0 * 0.5]]


def test_a_weight_that_the_loss_does_not_know_is_of_no_importance() -> None:
    model, method = Softmax([[0.0]]), SI()
    model.unused = nn.Parameter(tensor(4.0))
    learn(method, model, bowl(tensor(1.0), tensor(1.0)), sgd(0.1)(model.parameters()), 3)
    assert "path/unused" not in method.state().tensors
    method.end_task(context(model))
    assert importance(method, "unused").tolist() == [0.0]


def test_small_weights_have_a_path_in_float32() -> None:
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    method = SI()
    method.begin_task(context(model))
    for _ in range(3):
        model.weight.grad = torch.tensor([[1.0, 2**-9]], dtype=torch.bfloat16)
        method.gradients(context(model))
        with torch.no_grad():
            model.weight -= 2**-6
        method.after_step(context(model))
    assert omega(method).dtype == torch.float32
    assert omega(method).tolist() == [[3 * 2**-6, 3 * 2**-15]]


def test_switched_off_it_keeps_nothing() -> None:
    model, method = Softmax([[0.0]]), SI(strength=0)
    learn(method, model, bowl(tensor(1.0), tensor(1.0)), sgd(0.1)(model.parameters()), 3)
    method.end_task(context(model))
    assert method.state().tensors == {}


# -- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4])
def test_restored_in_the_middle_of_a_task_it_ends_as_if_nothing_had_happened(step: int) -> None:
    loss, ends = bowl(tensor(1.0, 2.0), tensor(1.0, -1.0)), []
    for stopped in (False, True):
        model, method = Softmax([[0.0, 0.0]]), SI(strength=5.0)
        optimizer = sgd(0.1)(model.parameters())
        learn(method, model, bowl(tensor(3.0, 1.0), tensor(2.0, 2.0)), optimizer, 5)
        method.end_task(context(model))
        method.begin_task(context(model, index=1))
        for done in range(7):
            if stopped and done == step:
                kept = {n: t.clone() for n, t in method.state().tensors.items()}
                state = State(kept, dict(method.state().values))
                here = model.weight.detach().clone()
                method = SI(strength=5.0)
                # A fresh process begins the task before it reads the state.
                with torch.no_grad():
                    model.weight.fill_(7.0)
                method.begin_task(context(model, index=1))
                with torch.no_grad():
                    model.weight.copy_(here)
                method.restore(context(model, index=1), state)
            optimizer.zero_grad()
            loss(model.weight).backward()
            method.gradients(context(model, index=1, step=done))
            optimizer.step()
            method.after_step(context(model, index=1, step=done))
        method.end_task(context(model, index=1))
        ends.append((model.weight.detach().clone(), method.state().tensors))
    (whole, state_whole), (half, state_half) = ends
    assert torch.equal(whole, half)
    for name, one in state_whole.items():
        assert torch.equal(one, state_half[name]), name


def test_declared_bytes_are_anchor_importance_and_path() -> None:
    model, method = nn.Linear(30, 10), SI()
    ctx, bytes_ = context(model), 4 * 310

    def kept() -> int:
        total = sum(t.nbytes for t in method.state().tensors.values())
        assert method.declared_bytes(ctx) == total
        return total

    assert kept() == 0
    for index, want in enumerate((2, 3)):
        method.begin_task(ctx)
        assert kept() == (want - 1) * bytes_
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        method.gradients(ctx)
        method.after_step(ctx)
        assert kept() == want * bytes_, f"task {index}"
        method.end_task(ctx)
        assert kept() == 2 * bytes_


# -- effective weights ----------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers; the first is used twice, the second on [B, T, i] inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(self.first(x).tanh()).tanh())
        return out


def lora(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"], **settings)
    model = get_peft_model(Net(), config)
    assert isinstance(model, PeftModel)
    model.double()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return model.train()


def dense(model: PeftModel) -> dict[str, Tensor]:
    """W of each layer with the adapter merged in, ready for autograd."""
    out = {}
    for name in ("first", "second"):
        layer = getattr(model.get_base_model(), name)
        update = layer.get_delta_weight("default")
        out[f"{name}.weight"] = (layer.get_base_layer().weight + update).detach().requires_grad_()
        out[f"{name}.bias"] = layer.get_base_layer().bias.detach()
    return out


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_on_effective_weights_the_path_is_that_of_the_dense_matrix(cut: int, scale: float) -> None:
    model, method = lora(), SI(on="effective", damping=0.01)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    g = torch.Generator().manual_seed(1)
    net = Net().double()
    want: dict[str, Tensor] = {}
    start = dense(model)
    method.begin_task(context(model))
    for step in range(5):
        x = torch.randn(6, 5, 4, generator=g, dtype=torch.float64)
        y = torch.randn(6, 5, 3, generator=g, dtype=torch.float64)
        before = dense(model)
        loss = (torch.func.functional_call(net, before, (x,)) - y).square().mean()
        names = [n for n in before if n.endswith("weight")]
        gradients = torch.autograd.grad(loss, [before[n] for n in names])
        optimizer.zero_grad()
        for x_part, y_part in zip(x.chunk(cut), y.chunk(cut), strict=True):
            part = (model(x_part) - y_part).square().mean() / cut
            (part * scale).backward()
        method.gradients(context(model, step=step, grad_scale=scale, may_overflow=True))
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= scale
        optimizer.step()
        method.after_step(context(model, step=step, grad_scale=scale, may_overflow=True))
        after = dense(model)
        for name, own in zip(names, gradients, strict=True):
            want[name] = want.get(name, 0) - own * (after[name] - before[name]).detach()
    for name, one in want.items():
        torch.testing.assert_close(omega(method, name.removesuffix(".weight")), one)
    method.end_task(context(model))
    end = dense(model)
    for name, one in want.items():
        way = (end[name] - start[name]).detach()
        torch.testing.assert_close(
            importance(method, name.removesuffix(".weight")),
            one.clamp(min=0) / (way.square() + 0.01),
        )


def test_effective_weights_are_watched_only_while_their_task_is_learned() -> None:
    model, method = lora(), SI(on="effective")
    layer = model.get_base_model().first
    method.begin_task(context(model))
    method.begin_task(context(model))
    assert len(layer._forward_hooks) == 1
    method.end_task(context(model))
    assert not layer._forward_hooks


def test_passes_that_are_not_training_leave_no_trace() -> None:
    model, method = lora(), SI(on="effective")
    x = torch.ones(2, 4, dtype=torch.float64)
    method.begin_task(context(model))
    model.eval()
    model(x).sum().backward()
    model.train()
    with torch.no_grad():
        model(x)
    method.gradients(context(model))
    method.after_step(context(model))
    assert "path/first" not in method.state().tensors


def test_an_effective_step_that_overflowed_is_left_out() -> None:
    model, method = lora(), SI(on="effective")
    x = torch.ones(2, 4, dtype=torch.float64)
    method.begin_task(context(model))
    (model(x).sum() * float("inf")).backward()
    method.gradients(context(model, grad_scale=8.0, may_overflow=True))
    model.zero_grad()
    (8 * model(x).sum()).backward()
    method.gradients(context(model, grad_scale=8.0, may_overflow=True))
    step(model, method, grad_scale=8.0, may_overflow=True)
    assert torch.isfinite(omega(method, "first")).all()
    assert omega(method, "first").any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_the_path(reentrant: bool) -> None:
    paths = []
    for checkpointed in (False, True):
        model, method = lora(), SI(on="effective")
        x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
        method.begin_task(context(model))
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        else:
            out = model(x)
        out.square().sum().backward()
        method.gradients(context(model))
        step(model, method)
        paths.append(omega(method, "first"))
    assert torch.equal(*paths)
    assert paths[0].any()


def test_passes_of_other_methods_are_no_part_of_the_path() -> None:
    paths = []
    for other in (False, True):
        model, method = lora(), SI(on="effective")
        x = torch.ones(2, 4, dtype=torch.float64)
        method.begin_task(context(model))
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
            method.gradients(context(model))
            if other:  # after SI has looked, in training mode, as `agem` and others do
                kept = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
                model(x + 1).sum().backward()
                for parameter, gradient in kept.items():
                    parameter.grad = gradient
            step(model, method)
        paths.append(omega(method, "first"))
    assert torch.equal(*paths)
