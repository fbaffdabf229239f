"""What the family's penalty does with any anchor and importance: by hand on few numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keeptune.errors import MethodError
from keeptune.method import Context, State
from keeptune.methods._anchor.importance import Weighted
from keeptune.methods._anchor.penalty import Anchored, is_measured, sum_of_sizes, sum_of_squares
from keeptune.methods.ewc import EWC
from keeptune.methods.l2sp import L2SP
from pencil import Softmax, context, examples


class Held(Weighted):
    """A method whose anchor and importance are given."""

    def take(self, ctx: Context, importance: dict[str, Tensor]) -> None:
        """Anchor the present weights, by these importances."""
        weights = self._weights(ctx)
        for name, one in importance.items():
            self._keep_anchor(weights, name)
            self._keep_importance(name, one)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def held(anchor: Tensor, importance: Tensor, **settings: Any) -> Held:
    """A method that holds the only weight of a model for pencil and paper."""
    method = Held(**settings)
    tensors = {"anchor/weight": anchor[None], "importance/weight": importance[None]}
    method.restore(context(Softmax([[0.0] * len(anchor)])), State(tensors, {"strength": 0.0}))
    return method


def gradient_of(model: Softmax) -> list[float]:
    assert model.weight.grad is not None
    return list(model.weight.grad[0].tolist())


# -- when, and how large --------------------------------------------------------------------------


def test_evidence_is_measured_at_few_steps() -> None:
    steps = [step for step in range(200) if is_measured(step)]
    assert steps == [1, 2, 4, 8, 16, 32, 64, 128, 192]


def test_a_sum_of_squares_neither_overflows_nor_vanishes() -> None:
    assert sum_of_squares(torch.tensor([3.0, 4.0])).item() == 25.0
    assert sum_of_squares(torch.tensor([1e30])).item() == pytest.approx(1e60)
    assert sum_of_squares(torch.tensor([1e-30])).item() == pytest.approx(1e-60)
    assert sum_of_squares(torch.empty(0)).item() == 0.0


def test_a_sum_of_sizes_does_not_overflow_and_shows_what_did() -> None:
    assert sum_of_sizes(torch.tensor([3.0, -4.0])).item() == 7.0
    assert sum_of_sizes(torch.full((4,), -3e38)).item() == pytest.approx(1.2e39)
    assert sum_of_sizes(torch.tensor([1.0, -float("inf")])).item() == float("inf")
    assert math.isnan(sum_of_sizes(torch.tensor([1.0, float("nan")])).item())
    assert sum_of_sizes(torch.empty(0)).item() == 0.0


# -- the strength ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0, 0.5, 1e12, "auto"])
def test_a_strength_is_a_number_or_auto(strength: Any) -> None:
    method = Held(strength=strength)
    assert method.strength == strength
    assert Held(**json.loads(method.model_dump_json())) == method


@pytest.mark.parametrize(
    ("strength", "words"),
    [
        (-1, "Held.strength: must be at least 0"),
        (float("inf"), "Held.strength: .*finite"),
        ("much", "Held.strength: .*'auto'"),
        (None, "Held.strength: .*'auto'"),
    ],
)
def test_another_strength_is_refused_in_words(strength: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words) as caught:
        Held(strength=strength)
    assert f"got {strength!r}" in str(caught.value)
    assert "use 0.0 for plain fine-tuning" in str(caught.value)


def test_only_a_strength_of_0_is_neutral() -> None:
    assert Held(strength=0).is_neutral()
    assert not Held(strength="auto").is_neutral()
    assert not Held().is_neutral()


def test_the_gradient_is_that_of_the_penalty() -> None:
    model = Softmax([[2.0, -1.0]])
    model.weight.grad = tensor(1.0, 1.0)[None]
    held(tensor(0.5, 0.5), tensor(3.0, 0.25), strength=10).gradients(context(model))
    assert gradient_of(model) == [1 + 10 * 3 * 1.5, 1 + 10 * 0.25 * -1.5]


def test_the_gradient_bears_the_trainers_scale() -> None:
    model = Softmax([[2.0]])
    held(tensor(1.0), tensor(3.0), strength=10).gradients(context(model, grad_scale=1024.0))
    assert gradient_of(model) == [10 * 3 * 1024.0]


@pytest.mark.parametrize("proximal", [False, True])
def test_switched_off_it_touches_nothing(proximal: bool) -> None:
    model = Softmax([[2.0]])
    ctx = context(model, step=1, learning_rate=1.0)
    method = held(tensor(1.0), tensor(3.0), strength=0, proximal=proximal)
    method.gradients(ctx)
    method.after_step(ctx)
    assert model.weight.grad is None
    assert model.weight.item() == 2.0
    assert method.evidence() == {}


def test_what_has_no_importance_yet_is_free() -> None:
    model, method = Softmax([[2.0]]), Held()
    method.restore(context(model), State({"anchor/weight": tensor(1.0)[None]}, {"strength": 0.0}))
    method.gradients(context(model, step=1))
    method.after_step(context(model, step=1, learning_rate=1.0))
    assert model.weight.grad is None
    assert not method.evidence().get("gradient_share")


def test_a_weight_that_is_not_trained_now_is_left_alone() -> None:
    model = Softmax([[2.0]])
    method = held(tensor(1.0), tensor(3.0))
    model.other = nn.Parameter(tensor(1.0))
    model.weight.requires_grad_(False)
    method.gradients(context(model, step=1))
    assert model.weight.grad is None


# -- the implicit step ----------------------------------------------------------------------------


def test_the_implicit_step_by_hand() -> None:
    model = Softmax([[3.0, 3.0, 3.0]])
    method = held(tensor(-1.0, -1.0, -1.0), tensor(0.0, 1.0, 3.0), strength=10, proximal=True)
    ctx = context(model, learning_rate=0.1)
    method.gradients(ctx)
    assert model.weight.grad is None, "the gradient stays the task's"
    method.after_step(ctx)
    # c = 0.1 · 10 · Ω = 0, 1, 3; (w + c a) / (1 + c).
    torch.testing.assert_close(model.weight.detach(), tensor(3.0, 1.0, 0.0)[None])


def test_the_implicit_step_is_stable_where_the_gradient_is_not() -> None:
    for strength in (1e3, 1e9, 1e15):
        model = Softmax([[3.0]])
        method = held(tensor(-1.0), tensor(1.0), strength=strength, proximal=True)
        for _ in range(5):
            method.after_step(context(model, learning_rate=0.1))
        assert -1.0 <= model.weight.item() < -0.9


# -- evidence -------------------------------------------------------------------------------------


def test_evidence_by_hand() -> None:
    # Pull 10 · 3 · (2 − 1) = 30, the task's own gradient 10: a share of 30 / 40.
    model = Softmax([[2.0]])
    model.weight.grad = tensor(10.0)[None]
    method = held(tensor(1.0), tensor(3.0), strength=10)
    method.gradients(context(model, step=1))
    assert method.evidence() == pytest.approx(
        {"penalty": 15.0, "task_gradient": 10.0, "gradient_share": 0.75}
    )


def test_pull_and_gradient_are_measured_by_the_sum_of_their_sizes() -> None:
    # Pulls 10 · (3, 1, 0) · (1, −2, 5) = (30, −20, 0): sizes of 50 together, a norm of 36.1.
    model = Softmax([[2.0, -1.0, 6.0]])
    model.weight.grad = tensor(-80.0, 60.0, 10.0)[None]
    method = held(tensor(1.0, 1.0, 1.0), tensor(3.0, 1.0, 0.0), strength=10)
    method.gradients(context(model, step=1))
    assert method.evidence() == pytest.approx(
        {"penalty": 0.5 * 10 * (3 + 4), "task_gradient": 150.0, "gradient_share": 50 / 200}
    )


def test_evidence_is_of_unscaled_gradients() -> None:
    model = Softmax([[2.0]])
    model.weight.grad = tensor(10.0 * 512)[None]
    method = held(tensor(1.0), tensor(3.0), strength=10)
    method.gradients(context(model, step=1, grad_scale=512.0))
    assert method.evidence()["task_gradient"] == pytest.approx(10.0)
    assert method.evidence()["gradient_share"] == pytest.approx(0.75)


def test_evidence_keeps_the_largest_share() -> None:
    model = Softmax([[2.0]])
    method = held(tensor(1.0), tensor(3.0), strength=10)
    for step, own in ((1, 10.0), (2, 90.0), (3, 0.0)):
        model.weight.grad = tensor(own)[None]
        method.gradients(context(model, step=step))
    assert method.evidence()["gradient_share"] == pytest.approx(0.75), "step 3 is not measured"


def test_the_share_of_an_implicit_step_is_what_it_moved() -> None:
    model = Softmax([[5.0]])
    model.weight.grad = tensor(20.0)[None]
    method = held(tensor(-1.0), tensor(1.0), strength=10, proximal=True)
    ctx = context(model, step=1, learning_rate=0.1)
    method.gradients(ctx)
    assert "gradient_share" not in method.evidence()
    with torch.no_grad():
        model.weight.sub_(2.0)  # the optimizer's step
    method.after_step(ctx)
    # 3 → 1: a move of 2 at a learning rate of 0.1 is a pull of 20.
    assert method.evidence()["gradient_share"] == pytest.approx(0.5)


def test_an_implicit_step_is_measured_by_the_sum_of_its_sizes() -> None:
    # c = 0.1 · 10 · Ω = 1, 3: moves of 1 and −6, so at a learning rate of 0.1 a pull of 70.
    model = Softmax([[4.0, -9.0]])
    model.weight.grad = tensor(10.0, -20.0)[None]
    method = held(tensor(1.0, 1.0), tensor(1.0, 3.0), strength=10, proximal=True)
    ctx = context(model, step=1, learning_rate=0.1)
    method.gradients(ctx)
    with torch.no_grad():
        model.weight.sub_(0.1 * model.weight.grad)
    method.after_step(ctx)
    assert method.evidence()["gradient_share"] == pytest.approx(70 / (70 + 30))


def test_without_a_learning_rate_there_is_no_share() -> None:
    model = Softmax([[3.0]])
    method = held(tensor(-1.0), tensor(1.0), proximal=True)
    ctx = context(model, step=1, learning_rate=0.0)
    method.gradients(ctx)
    method.after_step(ctx)
    assert "gradient_share" not in method.evidence()
    assert model.weight.item() == 3.0


# -- an automatic strength ------------------------------------------------------------------------


def pulled(method: Held, model: Softmax, step: int, own: float) -> float:
    """What the method adds to a task gradient at a step."""
    model.weight.grad = tensor(own)[None]
    method.gradients(context(model, step=step))
    return gradient_of(model)[0] - own


def test_an_automatic_strength_by_hand() -> None:
    # Task gradient 60, pull at strength 1: 3 · (2 − 1) = 3. A share of 0.1 makes 0.1 · 60 / 3 = 2.
    model = Softmax([[2.0]])
    method = held(tensor(1.0), tensor(3.0), strength="auto", share=0.1)
    assert pulled(method, model, 0, 60.0) == 0, "nothing is known yet"
    assert pulled(method, model, 1, 60.0) == pytest.approx(2 * 3)
    assert method.evidence()["strength"] == pytest.approx(2.0)
    assert pulled(method, model, 3, 1.0) == pytest.approx(2 * 3), "between measured steps it stays"


def test_a_few_important_weights_do_not_fill_the_share_of_all() -> None:
    # One weight in 101 has nearly all importance: pulls 100 and 100 times 0.1 add up to 110.
    model = Softmax([[2.0] * 101])
    importance = tensor(100.0, *[0.1] * 100)
    method = held(tensor(*[1.0] * 101), importance, strength="auto", share=1.0)
    model.weight.grad = torch.full((1, 101), 2.0, dtype=torch.float64)
    method.gradients(context(model, step=1))
    assert method.evidence()["strength"] == pytest.approx(202 / 110)
    assert method.evidence()["gradient_share"] == pytest.approx(0.5)
    # By squares the strength would be a ninth of it, and the other weights nearly free.
    assert 2 * 101**0.5 / math.hypot(100, 0.1 * 10) == pytest.approx(0.2, abs=0.002)


def test_an_automatic_strength_is_the_least_of_the_first_and_then_stays() -> None:
    model = Softmax([[2.0]])
    method = held(tensor(1.0), tensor(3.0), strength="auto", share=0.5)
    found = [pulled(method, model, step, own) for step, own in ((1, 60.0), (2, 6.0), (4, 600.0))]
    assert found == pytest.approx([30.0, 3.0, 3.0])
    assert pulled(method, model, 64, 0.6) == pytest.approx(3.0), "after step 32 it is settled"


def test_an_automatic_strength_is_found_anew_in_each_task() -> None:
    model = Softmax([[2.0]])
    method = held(tensor(1.0), tensor(3.0), strength="auto", share=0.1)
    pulled(method, model, 1, 60.0)
    method.begin_task(context(model, index=1))
    assert pulled(method, model, 0, 60.0) == 0
    assert pulled(method, model, 1, 600.0) == pytest.approx(60.0)


def test_an_automatic_strength_does_not_bear_the_trainers_scale() -> None:
    model = Softmax([[2.0]])
    model.weight.grad = tensor(60.0 * 512)[None]
    method = held(tensor(1.0), tensor(3.0), strength="auto", share=0.1)
    method.gradients(context(model, step=1, grad_scale=512.0))
    assert method.evidence()["strength"] == pytest.approx(2.0)
    assert gradient_of(model)[0] == pytest.approx((60 + 6) * 512)


def test_an_automatic_strength_is_part_of_the_state() -> None:
    model = Softmax([[2.0]])
    method = held(tensor(1.0), tensor(3.0), strength="auto", share=0.1)
    model, other = Softmax([[2.0]]), Held(strength="auto", share=0.1)
    pulled(method, model, 1, 60.0)
    other.restore(context(model), method.state())
    assert pulled(other, model, 3, 1.0) == pytest.approx(6.0)


def test_at_the_anchor_no_strength_can_be_found() -> None:
    model = Softmax([[1.0]])
    method = held(tensor(1.0), tensor(3.0), strength="auto", share=0.1)
    assert pulled(method, model, 1, 60.0) == 0
    assert "strength" not in method.evidence()


def test_an_automatic_strength_works_with_the_implicit_step() -> None:
    model = Softmax([[2.0]])
    method = held(tensor(1.0), tensor(3.0), strength="auto", share=0.1, proximal=True)
    assert pulled(method, model, 1, 60.0) == 0
    with torch.no_grad():
        model.weight.sub_(10.0)  # the optimizer's step: 60 · 1/6
    method.after_step(context(model, step=1, learning_rate=1 / 6))
    # 2 = 0.1 · 60 / 3, and c = 1/6 · 2 · 3 = 1 from −8 towards 1.
    assert model.weight.item() == pytest.approx(-3.5)


@pytest.mark.parametrize("form", ["gradient", "proximal", "decoupled"])
def test_an_automatic_strength_holds_under_adam_in_every_form(form: str) -> None:
    """Adam makes gradients of any size into steps of one: the pull must go with the steps."""
    ends = []
    for share in (None, 0.3):
        model = Softmax([[1.0, 1.0]])
        extra = {} if form == "gradient" else {form: True}
        method = L2SP(strength="auto" if share else 0, **extra)
        method.begin_task(context(model))
        adam = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(1, 101):
            ctx = context(model, step=step, learning_rate=0.01)
            model.weight.grad = torch.tensor([[1e-4, -2e-4]], dtype=torch.float64)
            method.gradients(ctx)
            adam.step()
            method.after_step(ctx)
        ends.append((model.weight.detach() - 1.0).abs().sum().item())
    assert ends[1] < 0.9 * ends[0]
    assert method.evidence()["gradient_share"] > 0.1


# -- what is kept ---------------------------------------------------------------------------------

PRECISIONS = {"float32": 1.0, "bfloat16": 2**-8, "uint8": 0.05}


def net(dtype: torch.dtype) -> nn.Module:
    """Weights of 600 and 3 numbers: more than one block of 256, and less."""
    torch.manual_seed(0)
    return nn.Linear(200, 3).to(dtype)


def taken(model: nn.Module, **settings: Any) -> Held:
    g = torch.Generator().manual_seed(1)
    method = Held(**{"strength": 1.0} | settings)
    method.take(
        context(model),
        {n: torch.rand(p.shape, generator=g) + 0.5 for n, p in model.named_parameters()},
    )
    return method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_declared_bytes_are_those_of_the_state(
    dtype: torch.dtype, precision: str, place: str
) -> None:
    model = net(dtype)
    method = Held(precision=precision, place=place)
    wide = torch.promote_types(dtype, torch.float32)
    method.take(context(model), {n: torch.rand_like(p, dtype=wide) for n, p in each(model)})
    kept = sum(t.nbytes for t in method.state().tensors.values())
    assert method.declared_bytes(context(model)) == kept
    per_weight = {"float32": wide.itemsize, "bfloat16": 2, "uint8": 1}[precision]
    # Three blocks of 256 for the matrix, one for the bias.
    scales = 4 * (3 + 1) if precision == "uint8" else 0
    assert kept == 603 * (dtype.itemsize + per_weight) + scales


def each(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p.detach()) for name, p in model.named_parameters()]


def test_before_the_first_task_ends_nothing_is_declared() -> None:
    assert Held().declared_bytes(context(net(torch.float32))) == 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_a_state_comes_back_bit_for_bit(precision: str, place: str) -> None:
    model = net(torch.float32)
    method = taken(model, precision=precision, place=place)
    other = Held(precision=precision, place=place)
    other.restore(context(model), method.state())
    then, now = method.state(), other.state()
    assert then.values == now.values
    assert then.tensors.keys() == now.tensors.keys()
    for name, one in then.tensors.items():
        assert torch.equal(one, now.tensors[name]), name
    assert other.declared_bytes(context(model)) == method.declared_bytes(context(model))


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@pytest.mark.parametrize(("precision", "error"), PRECISIONS.items())
def test_coarser_importances_pull_nearly_alike(precision: str, error: float, place: str) -> None:
    pulls = []
    for settings in ({}, {"precision": precision, "place": place}):
        model = net(torch.float32)
        method = taken(model, strength=1.0, **settings)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        method.gradients(context(model))
        pulls.append(torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None]))
    exact, coarse = pulls
    if precision == "float32":
        assert torch.equal(exact, coarse)
    assert float(((coarse - exact) / exact).abs().max()) < error


def test_a_kept_anchor_does_not_follow_the_weights() -> None:
    model = Softmax([[2.0]])
    method = Held(strength=1)
    method.take(context(model), {"weight": tensor(3.0)[None]})
    with torch.no_grad():
        model.weight.add_(1.0)
    method.gradients(context(model))
    assert gradient_of(model) == [3.0]


def test_importances_are_no_smaller_than_float32_beside_small_weights() -> None:
    model = net(torch.bfloat16)
    method = Held()
    method.take(context(model), {"bias": torch.tensor([1 + 2**-20] * 3)})
    assert method.state().tensors["importance/bias"].tolist() == [1 + 2**-20] * 3
    assert method.state().tensors["anchor/bias"].dtype == torch.bfloat16


def test_without_importances_all_weights_are_held_alike() -> None:
    class Alike(Anchored):
        """An anchor, and nothing else."""

    model, method = Softmax([[2.0, 5.0]]), Alike(strength=10)
    method.restore(
        context(model), State({"anchor/weight": tensor(1.0, 1.0)[None]}, {"strength": 0.0})
    )
    method.gradients(context(model))
    assert gradient_of(model) == [10.0, 40.0]
    method = Alike(strength=10, proximal=True)
    method.restore(
        context(model), State({"anchor/weight": tensor(1.0, 1.0)[None]}, {"strength": 0.0})
    )
    method.after_step(context(model, learning_rate=0.1))
    torch.testing.assert_close(model.weight.detach(), tensor(1.5, 3.0)[None])


@pytest.mark.parametrize("proximal", [False, True])
def test_a_step_that_overflowed_in_fp16_settles_no_strength(proximal: bool) -> None:
    model = Softmax([[2.0]])
    method = held(tensor(1.0), tensor(3.0), strength="auto", share=0.1, proximal=proximal)
    model.weight.grad = tensor(float("inf"))[None]
    method.gradients(context(model, step=1, grad_scale=65536.0))
    assert method.evidence() == {}
    pulled(method, model, 2, 60.0)
    with torch.no_grad():
        model.weight.sub_(6.0)  # the optimizer's step
    method.after_step(context(model, step=2, learning_rate=0.1))
    assert method.evidence()["strength"] == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_overflow_in_fp16_does_not_touch_the_automatic_strength(bad: float) -> None:
    model = Softmax([[2.0]])
    method = held(tensor(1.0), tensor(3.0), strength="auto", share=0.1)
    for step, own in ((1, 60.0), (2, bad), (3, 60.0)):
        model.weight.grad = tensor(own)[None]
        method.gradients(context(model, step=step, grad_scale=2.0))
    assert gradient_of(model)[0] == pytest.approx(60 + 6)
    assert method.evidence()["gradient_share"] == pytest.approx(1 / 11)


def test_the_implicit_step_overflows_at_no_strength() -> None:
    model = Softmax([[2.0, 2.0]]).float()
    method = Held(strength=1e300, proximal=True)
    one = torch.tensor([[1.0, 1.0]])
    method.restore(
        context(model),
        State(
            {"anchor/weight": one, "importance/weight": torch.tensor([[3.0, 0.0]])},
            {"strength": 0.0},
        ),
    )
    method.after_step(context(model, learning_rate=0.1))
    assert model.weight.tolist() == [[1.0, 2.0]]


def test_a_state_may_hold_weights_that_are_frozen_or_gone() -> None:
    model, method, again = Softmax([[0.0, 0.0]]), EWC(precision="uint8"), EWC(precision="uint8")
    model.other = nn.Parameter(torch.zeros(1))
    method.end_task(context(model, examples((0, 0))))
    model.other.requires_grad_(False)
    again.restore(context(model), method.state())
    assert again.state().tensors.keys() == method.state().tensors.keys()


def test_weights_that_lie_otherwise_in_memory_are_refused() -> None:
    model, method = Softmax([[0.0] * 3] * 2), Held()
    model.weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64).T)
    with pytest.raises(MethodError, match="weight is not contiguous in memory"):
        method.take(context(model), {"weight": torch.ones(2, 3)})


def test_looking_gives_no_weight_a_gradient() -> None:
    model, method = Softmax([[2.0]]), EWC(proximal=True)
    model.unused = nn.Parameter(tensor(1.0))
    method.end_task(context(model))
    model.weight.grad = tensor(1.0)[None]
    method.gradients(context(model, step=1))
    assert model.unused.grad is None
