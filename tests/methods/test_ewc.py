"""EWC's formulas by hand on few numbers, and against two closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from keeptune.method import State
from keeptune.methods.ewc import EWC, consolidate, empirical_fisher, is_measured
from pencil import Softmax, context, examples


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_fisher_by_hand() -> None:
    # Two words, three classes, all logits 0: p = 1/3, ∂ log p(y) / ∂w_c = [c = y] − 1/3.
    rows = examples((0, 0), (0, 1), (1, 2))
    fisher, used = empirical_fisher(context(Softmax([[0.0] * 3] * 2), rows), 256)
    assert used == 3
    want = torch.tensor([[5.0, 5.0, 2.0], [1.0, 1.0, 4.0]], dtype=torch.float64) / 27
    torch.testing.assert_close(fisher["weight"], want)


def test_fisher_is_the_curvature_where_the_labels_follow_the_model() -> None:
    # Labels in the model's own proportions, 1 : 3. Then F = p (1 − p), the Hessian's diagonal.
    model = Softmax([[0.0, torch.log(tensor(3.0)).item()]])
    fisher, _ = empirical_fisher(context(model, examples((0, 0), (0, 1), (0, 1), (0, 1))), 256)
    torch.testing.assert_close(fisher["weight"], tensor(3 / 16, 3 / 16)[None])

    def loss(weight: Tensor) -> Tensor:
        return -(tensor(0.25, 0.75) * torch.log_softmax(weight[0], 0)).sum()

    hessian = torch.autograd.functional.hessian(loss, model.weight)
    assert isinstance(hessian, Tensor)
    torch.testing.assert_close(fisher["weight"][0], hessian[0, :, 0].diagonal())


def test_fisher_squares_each_example_before_it_averages() -> None:
    # The two gradients are opposite; of their mean nothing would be left.
    fisher, _ = empirical_fisher(context(Softmax([[0.0, 0.0]]), examples((0, 0), (0, 1))), 256)
    torch.testing.assert_close(fisher["weight"], tensor(0.25, 0.25)[None])


def test_fisher_uses_no_more_rows_than_asked() -> None:
    rows = examples(*[(0, i % 2) for i in range(20)])
    assert empirical_fisher(context(Softmax([[0.0, 0.0]]), rows), 5)[1] == 5


def test_fisher_leaves_the_model_as_it_was() -> None:
    model = Softmax([[0.0, 0.0]]).train()
    empirical_fisher(context(model, examples((0, 0))), 5)
    assert model.training
    assert model.weight.grad is None


def test_two_quadratic_terms_become_one_by_hand() -> None:
    anchor, total = tensor(1.0, 5.0, 2.0), tensor(3.0, 0.0, 0.0)
    consolidate(anchor, total, tensor(5.0, 7.0, 9.0), tensor(1.0, 2.0, 0.0))
    assert total.tolist() == [4.0, 2.0, 0.0]
    # (3 · 1 + 1 · 5) / 4 = 2; only the new term counts; no term, so any anchor will do.
    assert anchor[:2].tolist() == [2.0, 7.0]


def test_one_term_is_the_sum_of_all_terms_up_to_a_constant() -> None:
    g = torch.Generator().manual_seed(0)
    points, weights = torch.randn(4, 3, generator=g), torch.rand(4, 3, generator=g)
    anchor, total = points[0].clone(), weights[0].clone()
    for point, weight in zip(points[1:], weights[1:], strict=True):
        consolidate(anchor, total, point, weight)
    tries = torch.randn(5, 3, generator=g)
    terms = torch.stack([(weights * (w - points).square()).sum() for w in tries])
    one = torch.stack([(total * (w - anchor).square()).sum() for w in tries])
    torch.testing.assert_close(one - one[0], terms - terms[0], atol=1e-4, rtol=1e-4)


def anchored(method: EWC, anchor: Tensor, fisher: Tensor) -> EWC:
    """The method after a first task with this anchor and Fisher."""
    ctx = context(Softmax([[0.0]]))
    method.restore(ctx, State({"anchor/weight": anchor, "fisher/weight": fisher}))
    return method


def test_the_gradient_is_that_of_the_penalty() -> None:
    model = Softmax([[2.0, -1.0]])
    anchor, fisher = tensor(0.5, 0.5)[None], tensor(3.0, 0.25)[None]
    penalty = 0.5 * 10.0 * (fisher * (model.weight - anchor).square()).sum()
    (want,) = torch.autograd.grad(penalty, model.weight)
    model.weight.grad = tensor(1.0, 1.0)[None]
    anchored(EWC(strength=10.0), anchor, fisher).gradients(context(model))
    torch.testing.assert_close(model.weight.grad, 1.0 + want)
    assert (model.weight.grad - 1.0).tolist() == [[10 * 3 * 1.5, 10 * 0.25 * -1.5]]


def test_the_gradient_bears_the_trainers_scale() -> None:
    model = Softmax([[2.0]])
    method = anchored(EWC(strength=10.0), tensor(1.0)[None], tensor(3.0)[None])
    method.gradients(context(model, grad_scale=1024.0))
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[10 * 3 * 1024.0]]


def test_evidence_by_hand() -> None:
    # Pull 10 · 3 · (2 − 1) = 30, the task's own gradient 10: a share of 30 / 40.
    model = Softmax([[2.0]])
    model.weight.grad = tensor(10.0)[None]
    method = anchored(EWC(strength=10.0), tensor(1.0)[None], tensor(3.0)[None])
    method.gradients(context(model, step=1))
    assert method.evidence() == pytest.approx({"penalty": 15.0, "gradient_share": 0.75})


def test_evidence_is_measured_at_few_steps() -> None:
    assert [step for step in range(200) if is_measured(step)] == [1, 2, 4, 8, 16, 32, 64, 128, 192]


def quadratic_tasks(curvature: list[float], optimum: list[float]) -> list[float]:
    """Where each task h_k/2 (w − a_k)² ends, learned after those before it, with F_k = h_k."""
    model, method, ends = Softmax([[0.0]]), EWC(strength=1.0), []
    anchor, total = tensor(0.0)[None], tensor(0.0)[None]
    ctx = context(model)
    for h, a in zip(curvature, optimum, strict=True):
        if total > 0:
            anchored(method, anchor, total)
        for _ in range(300):
            model.weight.grad = h * (model.weight.detach() - a)
            method.gradients(ctx)
            with torch.no_grad():
                model.weight.sub_(model.weight.grad, alpha=0.1)
        consolidate(anchor, total, model.weight.detach(), tensor(h)[None])
        ends.append(model.weight.item())
    return ends


def test_with_the_true_curvature_two_tasks_end_at_the_joint_optimum() -> None:
    # What minimises the sum of both losses is the mean of a_k weighted by h_k.
    assert quadratic_tasks([1.0, 4.0], [3.0, -1.0]) == pytest.approx([3.0, (3 - 4) / 5])


def test_a_third_task_is_pulled_to_where_each_task_ended() -> None:
    # The paper's sum of terms: each F_k pulls to the weights after task k, here 3 and −1/5.
    _, second, third = quadratic_tasks([1.0, 4.0, 2.0], [3.0, -1.0, 0.5])
    assert third == pytest.approx((1 * 3.0 + 4 * second + 2 * 0.5) / 7)


def test_a_task_end_keeps_weights_and_fisher() -> None:
    model, method = Softmax([[0.0, 0.0]]), EWC()
    rows = examples((0, 0), (0, 1))
    method.end_task(context(model, rows))
    kept = method.state().tensors
    assert kept["anchor/weight"].tolist() == [[0.0, 0.0]]
    assert kept["fisher/weight"].tolist() == [[0.25, 0.25]]
    with torch.no_grad():
        model.weight.add_(8.0)
    assert kept["anchor/weight"].tolist() == [[0.0, 0.0]]
    method.end_task(context(model, rows, index=1))
    kept = method.state().tensors
    torch.testing.assert_close(kept["anchor/weight"], tensor(4.0, 4.0)[None])
    torch.testing.assert_close(kept["fisher/weight"], tensor(0.5, 0.5)[None])
    assert method.evidence() == {
        "fisher_rows": 2,
        "extra_forward_rows": 2,
        "extra_backward_rows": 2,
        "fisher_sum": pytest.approx(1.0),
    }


def test_evidence_does_not_depend_on_the_order_after_a_reload() -> None:
    # 1 + 1 + 2⁵³ rounds to another number than 2⁵³ + 1 + 1.
    sizes = {"weight": 2.0**53, "second": 1.0, "third": 1.0}
    sums = set()
    for order in (list(sizes), list(sizes)[::-1]):
        model, method = Softmax([[0.0]]), EWC()
        model.second, model.third = (nn.Parameter(tensor(0.0)) for _ in range(2))
        state = {f"fisher/{name}": torch.full((1, 1), sizes[name]).double() for name in order}
        state |= {f"anchor/{name}": torch.zeros(1, 1).double() for name in order}
        method.restore(context(model), State(state))
        method.end_task(context(model))
        sums.add(method.evidence()["fisher_sum"])
    assert len(sums) == 1


def test_switched_off_it_takes_no_fisher() -> None:
    method = EWC(strength=0)
    method.end_task(context(Softmax([[0.0, 0.0]]), examples((0, 0))))
    assert method.state().tensors == {}


def test_a_weight_without_a_gradient_is_pulled_too() -> None:
    model = Softmax([[2.0]])
    model.unused = nn.Parameter(tensor(4.0))
    fisher = {"anchor/weight": tensor(2.0)[None], "fisher/weight": tensor(1.0)[None]}
    fisher |= {"anchor/unused": tensor(1.0), "fisher/unused": tensor(2.0)}
    method = EWC(strength=1.0)
    method.restore(context(model), State(fisher))
    method.gradients(context(model))
    assert model.unused.grad is not None
    assert model.unused.grad.tolist() == [6.0]
