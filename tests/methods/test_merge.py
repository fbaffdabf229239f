"""Merging by hand: signs and means of five numbers, the arc of the unit circle, dense updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pico
from keeptune.errors import MethodError
from keeptune.method import State
from keeptune.methods._factors import low_rank
from keeptune.methods.merge import Merge, merged, slerp
from pencil import Softmax, context

ONE = torch.tensor([4.0, -3.0, 2.0, 1.0, 0.5])
OTHER = torch.tensor([2.0, 5.0, -1.0, 3.0, 0.1])


def test_task_arithmetic_is_the_sum() -> None:
    got = merged([ONE, OTHER], "task_arithmetic", 0.5).tolist()
    assert got == pytest.approx([6.0, 2.0, 1.0, 4.0, 0.6])


def test_ties_on_five_numbers() -> None:
    # Of each the three largest: [4, -3, 2, 0, 0] and [2, 5, 0, 3, 0]; signs of the sums +, +, +, +.
    # The mean of those of that sign: (4 + 2)/2, 5, 2, 3; nothing is left of the last.
    assert merged([ONE, OTHER], "ties", 0.6).tolist() == [3.0, 5.0, 2.0, 3.0, 0.0]


def test_dare_keeps_the_mean_and_draws_the_same_for_a_seed() -> None:
    vectors, many = [torch.ones(40000), 3 * torch.ones(40000)], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        many.append(merged(vectors, "dare", 0.25))
    assert torch.equal(many[0], many[1])
    assert not torch.equal(many[0], many[2])
    assert set(many[0].unique().tolist()) == {0.0, 4.0, 12.0, 16.0}
    assert many[0].mean().item() == pytest.approx(4.0, rel=0.02)


def test_half_way_on_the_unit_circle() -> None:
    half = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    assert half.tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    third = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
    assert third.tolist() == pytest.approx([0.75**0.5, 0.5])


def test_an_arc_between_parallels_is_a_line_and_nothing_moves_to_nothing() -> None:
    assert slerp(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0]), 0.5).tolist() == [2.0, 2.0]
    assert slerp(torch.zeros(2), torch.tensor([4.0, 0.0]), 0.5).tolist() == [2.0, 0.0]


def test_slerp_over_three_goes_by_half_and_a_third() -> None:
    vectors = [torch.tensor(v) for v in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0])]
    found = merged(vectors, "slerp", 0.5)
    # From (√½, √½, 0) a third of the right angle towards the last axis.
    assert found.tolist() == pytest.approx([0.375**0.5, 0.375**0.5, 0.5])


def test_low_rank_is_the_best_of_its_rank() -> None:
    update = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    a, b, error = low_rank(update, 2)
    s = torch.linalg.svdvals(update.double())
    off = (b @ a - update).norm() / update.norm()
    assert error == pytest.approx(float(off), rel=1e-5)
    assert error == pytest.approx(float((s[2:].square().sum() / s.square().sum()).sqrt()))
    assert low_rank(torch.zeros(3, 3), 1)[2] == 0.0


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_rank_above_the_matrix_is_filled_up(shape: tuple[int, int]) -> None:
    update = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()
    a, b, error = low_rank(update, 4)
    assert (a.shape, b.shape, error) == ((4, shape[1]), (shape[0], 4), 0.0)
    torch.testing.assert_close(b @ a, update)


def test_no_update_leaves_an_adapter_that_can_learn() -> None:
    a, b, _ = low_rank(torch.zeros(6, 5), 2)
    assert not b.any()
    torch.testing.assert_close(a.norm(dim=1), torch.full((2,), 3**-0.5).double())


def teach(method: Merge, model: Any, index: int, weights: Any) -> float:
    """A task that ends with these weights; returns the first one that it began with."""
    ctx = context(model, index=index)
    method.begin_task(ctx)
    begun = float(model.weight[0, 0].detach())
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    method.end_task(ctx)
    return begun


def test_vectors_are_from_the_first_weights_and_kept() -> None:
    model, method = Softmax([[1.0, 0.0]]), Merge(form="task_arithmetic", strength=0.5)
    assert teach(method, model, 0, [5.0, 0.0]) == 1.0
    assert model.weight.tolist() == [[5.0, 0.0]]  # one alone is not merged
    teach(method, model, 1, [5.0, 2.0])
    assert model.weight.tolist() == [[5.0, 1.0]]  # 1 + (4 + 4)/2, (0 + 2)/2
    assert method.evidence()["moved"] == 1.0
    assert teach(method, model, 2, [1.0, 4.0]) == 1.0
    assert model.weight.tolist() == [[5.0, 3.0]]
    assert method.declared_bytes(context(model)) == 4 * 2 * 8


def test_a_task_may_start_from_merged_weights() -> None:
    model, method = Softmax([[1.0, 0.0]]), Merge(strength=0.5, start="merged")
    teach(method, model, 0, [5.0, 0.0])
    assert teach(method, model, 1, [5.0, 2.0]) == 5.0
    # A fifth of two is none, but one is kept of each: [4, 0] and [4, 0] of [4, 2].
    assert model.weight.tolist() == [[3.0, 0.0]]
    assert teach(method, model, 2, [1.0, 4.0]) == 3.0


@pytest.mark.parametrize("form", ["task_arithmetic", "dare"])
def test_sums_from_merged_weights_are_refused(form: Any) -> None:
    with pytest.raises(MethodError, match=f"Merge.form {form} adds all vectors up"):
        Merge(form=form, start="merged")


def test_weights_that_only_some_tasks_train_are_merged_and_put_back() -> None:
    model: Any = pico.causal_lm()
    one, other = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj
    first = [part.weight.detach().clone() for part in (one, other)]
    method = Merge(form="task_arithmetic")
    for index, part in enumerate((one, other, one)):
        ctx = context(model, index=index)
        model.requires_grad_(False)
        part.requires_grad_(True)
        method.begin_task(ctx)
        assert all(torch.equal(p.weight, w) for p, w in zip((one, other), first, strict=True))
        with torch.no_grad():
            part.weight.add_(1.0)
        method.end_task(ctx)
        kept = State(*(dict(part) for part in (method.state().tensors, method.state().values)))
        method = Merge(form="task_arithmetic")
        method.restore(ctx, kept)
    for part, was, by in ((one, first[0], 2.0), (other, first[1], 1.0)):
        torch.testing.assert_close(part.weight, was + by)


def updates(model: Any) -> dict[str, Tensor]:
    return {
        name: layer.get_delta_weight("default").detach().clone()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def test_under_lora_whole_updates_are_merged_and_cut() -> None:
    model: Any = pico.adapted(pico.causal_lm(16))
    method = Merge(form="task_arithmetic", strength=0.5, start="first")
    ends = []
    first = updates(model)
    for index in range(2):
        ctx = context(model, index=index)
        method.begin_task(ctx)
        assert all(torch.equal(a, b) for a, b in zip(updates(model).values(), first.values()))  # noqa: B905
        g = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for weight in ctx.trainable().values():
                weight.copy_(torch.randn(weight.shape, generator=g))
        ends.append(updates(model))
        method.end_task(ctx)
    worst = 0.0
    for name, got in updates(model).items():
        want = first[name] + 0.5 * sum(end[name] - first[name] for end in ends)
        s = torch.linalg.svdvals(want.double())
        off = float((got - want).norm() / want.norm())
        assert off == pytest.approx(
            float((s[4:].square().sum() / s.square().sum()) ** 0.5), rel=1e-3
        )
        worst = max(worst, off)
    assert method.evidence()["worst_cut_error"] == pytest.approx(worst, rel=1e-3)


def test_the_random_state_stays_as_it_is() -> None:
    model, method = Softmax([[1.0, 0.0]]), Merge(form="dare")
    before = torch.get_rng_state()
    for index in range(2):
        teach(method, model, index, [5.0, 2.0])
    assert torch.equal(torch.get_rng_state(), before)
