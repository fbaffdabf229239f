"""EWC by hand on few numbers, and against closed forms: Gaussian and logistic regression."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn

import pico
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Batch, Context, Method, State
from keeptune.methods.ewc import EWC, Estimator, consolidate, fisher_diagonal
from keeptune.methods.wise import WiSE
from pencil import Softmax, context, examples


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fisher_of(model: nn.Module, rows: Dataset, estimator: Estimator = "empirical") -> Tensor:
    """The Fisher of the only weight, over all rows."""
    ctx = context(model, rows)
    (weight,) = ctx.trainable()
    return fisher_diagonal(ctx, ctx.trainable(), range(len(rows)), estimator)[0][weight]


def put(model: Softmax, *values: float) -> None:
    """Move the only row of weights."""
    with torch.no_grad():
        model.weight[0] = tensor(*values)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def settled(anchor: Tensor, importance: Tensor, **settings: Any) -> EWC:
    """The method after a first task with this anchor and Fisher, of one row of weights."""
    method = EWC(**settings)
    tensors = {"anchor/weight": anchor[None], "importance/weight": importance[None]}
    method.restore(context(Softmax([[0.0] * len(anchor)])), State(tensors, {"strength": 0.0}))
    return method


# -- the Fisher -----------------------------------------------------------------------------------


def test_fisher_by_hand() -> None:
    # Two words, three classes, all logits 0: p = 1/3, ∂ log p(y) / ∂w_c = [c = y] − 1/3.
    rows = examples((0, 0), (0, 1), (1, 2))
    want = torch.tensor([[5.0, 5.0, 2.0], [1.0, 1.0, 4.0]], dtype=torch.float64) / 27
    torch.testing.assert_close(fisher_of(Softmax([[0.0] * 3] * 2), rows), want)


def test_fisher_is_the_curvature_where_the_labels_follow_the_model() -> None:
    # Labels in the model's own proportions, 1 : 3. Then F = p (1 − p), the Hessian's diagonal.
    model = Softmax([[0.0, math.log(3.0)]])
    fisher = fisher_of(model, examples((0, 0), (0, 1), (0, 1), (0, 1)))
    torch.testing.assert_close(fisher, tensor(3 / 16, 3 / 16)[None])

    def loss(weight: Tensor) -> Tensor:
        return -(tensor(0.25, 0.75) * torch.log_softmax(weight[0], 0)).sum()

    hessian = torch.autograd.functional.hessian(loss, model.weight)
    assert isinstance(hessian, Tensor)
    torch.testing.assert_close(fisher[0], hessian[0, :, 0].diagonal())


def test_fisher_squares_each_example_before_it_averages() -> None:
    # The two gradients are opposite; of their mean nothing would be left.
    rows = examples((0, 0), (0, 1))
    assert fisher_of(Softmax([[0.0, 0.0]]), rows).tolist() == [[0.25, 0.25]]
    assert fisher_of(Softmax([[0.0, 0.0]]), rows, "batched").tolist() == [[0.0, 0.0]]


def test_the_batched_one_changes_with_what_shares_a_batch() -> None:
    # 64 rows of each label: batches of one label each, or half and half.
    ctx = context(Softmax([[0.0, 0.0]]), examples(*[(0, 0)] * 64, *[(0, 1)] * 64))
    apart = list(range(128))
    mixed = [row for pair in zip(range(64), range(64, 128), strict=True) for row in pair]
    found: dict[Estimator, list[float]] = {"batched": [0.25, 0.0], "empirical": [0.25, 0.25]}
    for estimator, want in found.items():
        got = [
            fisher_diagonal(ctx, ctx.trainable(), rows, estimator)[0]["weight"][0, 0].item()
            for rows in (apart, mixed)
        ]
        assert got == pytest.approx(want), estimator


def test_of_one_row_every_estimator_that_takes_its_label_is_the_same() -> None:
    model, rows = Softmax([[0.0, 1.0, -2.0]]), examples((0, 1))
    want = fisher_of(model, rows)
    for estimator in ("signs", "batched"):
        torch.testing.assert_close(fisher_of(model, rows, estimator), want)


def test_fisher_leaves_the_model_as_it_was() -> None:
    model = Softmax([[0.0, 0.0]]).train()
    fisher_of(model, examples((0, 0)))
    assert model.training
    assert model.weight.grad is None
    assert model.weight.requires_grad


def test_what_has_no_list_of_all_answers_is_refused() -> None:
    model = pico.causal_lm()
    rows = Dataset.from_dict({"input_ids": [[7, 8, 9]], "labels": [[-100, 8, 9]]})
    with pytest.raises(MethodError, match="Use `fisher: sampled`"):
        EWC(fisher="exact").end_task(context(model, rows))


def test_no_more_rows_are_taken_than_asked() -> None:
    rows = examples(*[(0, i % 2) for i in range(20)])
    for asked, taken in ((5, 5), (20, 20), (99, 20)):
        method = EWC(examples=asked)
        method.end_task(context(Softmax([[0.0, 0.0]]), rows))
        assert method.evidence()["fisher_rows"] == taken


# -- logistic regression --------------------------------------------------------------------------


class Logistic(nn.Module):
    """p(1 | x) = σ(w·x), as two classes with the logits 0 and w·x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(len(weight), 1, bias=False, dtype=weight.dtype)
        self.linear.weight.data = weight[None].clone()

    def forward(self, x: Tensor) -> Any:
        logit = self.linear(x)
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(logit), logit], 1))


def numbers(x: Tensor, y: Tensor) -> Dataset:
    """Rows of real numbers."""
    return Dataset.from_dict({"x": x.tolist(), "labels": y.tolist()})


def stage(model: nn.Module, x: Tensor, y: Tensor, **more: Any) -> Context:
    def collate(rows: list[dict[str, Any]]) -> Batch:
        inputs = torch.tensor([row["x"] for row in rows], dtype=torch.float64)
        return {"x": inputs, "labels": torch.tensor([row["labels"] for row in rows])}

    ctx = context(model, numbers(x, y), **more)
    ctx.collate = collate
    return ctx


def logistic(n: int) -> tuple[Context, Tensor, Tensor, Tensor]:
    """A regression on `n` random rows with its inputs, labels and p(1 | x)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    y = torch.randint(2, (n,), generator=g)
    weight = tensor(1.0, -2.0, 0.5)
    return stage(Logistic(weight), x, y), x, y, torch.sigmoid(x @ weight)


def test_logistic_regression_has_its_closed_forms() -> None:
    ctx, x, y, p = logistic(50)
    want: dict[Estimator, Tensor] = {
        "exact": ((p * (1 - p))[:, None] * x.square()).mean(0),
        "empirical": ((y - p)[:, None] * x).square().mean(0),
    }
    for estimator, fisher in want.items():
        got, how = fisher_diagonal(ctx, ctx.trainable(), range(50), estimator)
        torch.testing.assert_close(got["linear.weight"][0], fisher)
        assert how == "hooks"


def test_the_sampled_fisher_approaches_the_exact_one() -> None:
    for n in (64, 1024, 8192):
        ctx, x, _, p = logistic(n)
        got, _ = fisher_diagonal(ctx, ctx.trainable(), range(n), "sampled")
        exact = ((p * (1 - p))[:, None] * x.square()).mean(0)
        # (y − p)² with y drawn from p has the variance p (1 − p) (1 − 2p)².
        variance = ((p * (1 - p) * (1 - 2 * p).square())[:, None] * x**4).sum(0) / n**2
        errors = (got["linear.weight"][0] - exact) / variance.sqrt()
        assert float(errors.abs().max()) < 3, "in standard errors"


# -- linear-Gaussian regression -------------------------------------------------------------------

SIGMA = 0.5


class Linear(nn.Module):
    """y ~ N(w·x, σ²), from w = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.linear(x))


def both_sides(batch: Batch, logits: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
    """The expectation over y of a Gaussian, exact for squares: half at μ + σ, half at μ − σ."""
    mean = logits[:, 0]
    for y in (mean.detach() + SIGMA, mean.detach() - SIGMA):
        yield 0.5**0.5 * -(y - mean).square() / (2 * SIGMA**2)


def regression(task: int) -> tuple[Tensor, Tensor]:
    """Eight rows: the first four have the first input only, the others the second only.

    So XᵀX is diagonal, and the diagonal Fisher is all there is.
    """
    g = torch.Generator().manual_seed(task)
    size = torch.randn(8, generator=g, dtype=torch.float64)
    x = torch.stack([size * (torch.arange(8) < 4), size * (torch.arange(8) >= 4)], 1)
    return x, torch.randn(8, generator=g, dtype=torch.float64)


def least_squares(*tasks: int) -> Tensor:
    """The posterior mean of w after these tasks, under a flat prior."""
    x, y = (torch.cat(parts) for parts in zip(*map(regression, tasks), strict=True))
    mean: Tensor = torch.linalg.solve(x.T @ x, x.T @ y)
    return mean


def learn_in_turn(method: EWC, tasks: int) -> list[Tensor]:
    """Where each task ends: gradient descent on −log p of all its rows, plus the method's pull."""
    model, ends = Linear(), []
    weight = model.linear.weight
    for task in range(tasks):
        x, y = regression(task)
        ctx = stage(model, x, y, index=task)
        method.begin_task(ctx)
        for _ in range(1500):
            weight.grad = ((weight.detach() @ x.T - y) @ x) / SIGMA**2
            method.gradients(ctx)
            with torch.no_grad():
                weight.sub_(weight.grad, alpha=0.01)
        method.end_task(ctx)
        ends.append(weight.detach()[0].clone())
    return ends


@pytest.fixture
def gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fisher: exact` go through all answers of a Gaussian instead of all classes."""
    monkeypatch.setattr("keeptune.methods.ewc.all_labels", both_sides)


@pytest.mark.usefixtures("gaussian")
def test_the_fisher_of_a_gaussian_is_the_inputs_second_moment() -> None:
    x, y = regression(0)
    ctx = stage(Linear(), x, y)
    fisher, _ = fisher_diagonal(ctx, ctx.trainable(), range(8), "exact")
    torch.testing.assert_close(fisher["linear.weight"][0], (x.T @ x).diagonal() / (8 * SIGMA**2))


@pytest.mark.usefixtures("gaussian")
@pytest.mark.parametrize("form", ["separate", "online"])
def test_a_strength_of_the_number_of_rows_is_bayes_for_two_tasks(form: str) -> None:
    first, second = learn_in_turn(EWC(strength=8, fisher="exact", form=form, normalise=False), 2)
    torch.testing.assert_close(first, least_squares(0))
    torch.testing.assert_close(second, least_squares(0, 1))


@pytest.mark.usefixtures("gaussian")
def test_one_running_term_is_bayes_for_any_number_of_tasks() -> None:
    ends = learn_in_turn(EWC(strength=8, fisher="exact", form="online", normalise=False), 4)
    for task, end in enumerate(ends):
        torch.testing.assert_close(end, least_squares(*range(task + 1)))


@pytest.mark.usefixtures("gaussian")
def test_separate_terms_count_the_oldest_task_again() -> None:
    # The second term pulls to where task 2 ended, which task 1 had a part in (Huszár 2018).
    first, second, third = learn_in_turn(EWC(strength=8, fisher="exact"), 3)
    h = torch.stack([(regression(task)[0] ** 2).sum(0) for task in range(3)])
    alone = least_squares(2)
    torch.testing.assert_close(third, (h[0] * first + h[1] * second + h[2] * alone) / h.sum(0))
    assert not torch.allclose(third, least_squares(0, 1, 2))


# -- the two forms --------------------------------------------------------------------------------


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


ENDS = [(0.0, 0.0), (1.0, -0.5), (-2.0, 0.3), (0.2, 2.0)]
ROWS = [examples((0, 0), (0, 1)), examples((0, 0)), examples((0, 1)), examples((0, 0), (0, 0))]


def after_tasks(method: EWC, count: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    """Let `count` tasks end at given weights; returns those and the Fisher of each."""
    model = Softmax([[0.0, 0.0]])
    ends, fishers = [tensor(*end) for end in ENDS[:count]], []
    for task, end in enumerate(ENDS[:count]):
        put(model, *end)
        method.end_task(context(model, ROWS[task], index=task))
        fishers.append(fisher_of(model, ROWS[task])[0])
    return ends, fishers


def pull_at(method: EWC, *weights: float) -> Tensor:
    """What the method adds to the gradient at these weights."""
    model = Softmax([weights])
    method.gradients(context(model, index=9))
    return gradient_of(model.weight)[0]


def test_the_separate_form_is_the_sum_of_all_tasks_terms() -> None:
    method = EWC(strength=10)
    ends, fishers = after_tasks(method)
    for weights in ((3.0, -1.0), (0.0, 0.1)):
        terms = [10 * f * (tensor(*weights) - end) for f, end in zip(fishers, ends, strict=True)]
        torch.testing.assert_close(pull_at(method, *weights), torch.stack(terms).sum(0))


@pytest.mark.parametrize("normalise", [True, False, None])
def test_the_online_form_by_hand(normalise: bool | None) -> None:
    method = EWC(strength=10, form="online", decay=0.5, normalise=normalise)
    ends, fishers = after_tasks(method)
    if normalise is not False:
        fishers = [f / f.mean() for f in fishers]
    total = tensor(0.0, 0.0)
    for fisher in fishers:
        total = 0.5 * total + fisher
    torch.testing.assert_close(pull_at(method, 3.0, -1.0), 10 * total * (tensor(3, -1) - ends[-1]))


def test_a_decay_of_0_knows_the_last_task_only() -> None:
    method = EWC(strength=10, form="online", decay=0, normalise=False)
    ends, fishers = after_tasks(method)
    want = 10 * fishers[-1] * (tensor(3, -1) - ends[-1])
    torch.testing.assert_close(pull_at(method, 3.0, -1.0), want)


@pytest.mark.parametrize(("normalise", "is_scaled"), [(True, True), (False, False), (None, False)])
def test_the_separate_form_is_normalised_on_request(
    normalise: bool | None, is_scaled: bool
) -> None:
    method = EWC(strength=10, normalise=normalise)
    ends, (fisher,) = after_tasks(method, 1)
    scale = float(fisher.mean()) if is_scaled else 1.0
    want = 10 * fisher / scale * (tensor(3, -1) - ends[0])
    torch.testing.assert_close(pull_at(method, 3.0, -1.0), want)


def test_the_mean_is_that_over_all_weights_together() -> None:
    # One word of the second weight is never seen: its zeros count, and it stays at 0.
    model = Softmax([[0.0, 0.0], [0.0, 0.0]])
    model.unused = nn.Parameter(tensor(1.0, 1.0, 1.0, 1.0))
    method = EWC(normalise=True)
    method.end_task(context(model, examples((0, 0))))
    kept = method.state().tensors
    # Two weights of 0.25, six of 0.
    assert kept["importance/weight"].tolist() == [[4.0, 4.0], [0.0, 0.0]]
    assert kept["importance/unused"].tolist() == [0.0] * 4


def test_a_fisher_of_zeros_is_not_normalised_and_holds_nothing() -> None:
    model = Softmax([[0.0]])  # one class, so it is certain
    method = EWC(strength=1.0, form="online")
    method.end_task(context(model))
    assert method.state().tensors["importance/weight"].tolist() == [[0.0]]
    assert pull_at(method, 3.0).tolist() == [0.0]


# -- the penalty and the implicit step ------------------------------------------------------------


def test_the_gradient_is_that_of_the_penalty() -> None:
    model = Softmax([[2.0, -1.0]])
    anchor, fisher = tensor(0.5, 0.5), tensor(3.0, 0.25)
    penalty = 0.5 * 10.0 * (fisher * (model.weight - anchor).square()).sum()
    (want,) = torch.autograd.grad(penalty, model.weight)
    model.weight.grad = tensor(1.0, 1.0)[None]
    settled(anchor, fisher, strength=10.0).gradients(context(model))
    torch.testing.assert_close(model.weight.grad, 1.0 + want)
    assert (model.weight.grad - 1.0).tolist() == [[10 * 3 * 1.5, 10 * 0.25 * -1.5]]


def quadratic_tasks(
    curvature: list[float], optimum: list[float], *, rate: float = 0.1, **settings: Any
) -> list[float]:
    """Where each task h_k/2 (w − a_k)² ends, learned after those before it, with F_k = h_k."""
    model, method, ends = Softmax([[0.0]]), EWC(**{"strength": 1.0} | settings), []
    anchor, total = tensor(0.0), tensor(0.0)
    ctx = context(model, learning_rate=rate)
    for h, a in zip(curvature, optimum, strict=True):
        if total > 0:
            method = settled(anchor, total, **{"strength": 1.0} | settings)
        for _ in range(300):
            model.weight.grad = h * (model.weight.detach() - a)
            method.gradients(ctx)
            with torch.no_grad():
                model.weight.sub_(model.weight.grad, alpha=rate)
            method.after_step(ctx)
        consolidate(anchor, total, model.weight.detach()[0], tensor(h))
        ends.append(model.weight.item())
    return ends


@pytest.mark.parametrize("proximal", [False, True])
def test_with_the_true_curvature_two_tasks_end_at_the_joint_optimum(proximal: bool) -> None:
    # What minimises the sum of both losses is the mean of a_k weighted by h_k.
    ends = quadratic_tasks([1.0, 4.0], [3.0, -1.0], proximal=proximal)
    assert ends == pytest.approx([3.0, (3 - 4) / 5])


@pytest.mark.parametrize("proximal", [False, True])
def test_a_third_task_is_pulled_to_where_each_task_ended(proximal: bool) -> None:
    # The paper's sum of terms: each F_k pulls to the weights after task k, here 3 and −1/5.
    _, second, third = quadratic_tasks([1.0, 4.0, 2.0], [3.0, -1.0, 0.5], proximal=proximal)
    assert third == pytest.approx((1 * 3.0 + 4 * second + 2 * 0.5) / 7)


def test_an_implicit_step_by_hand() -> None:
    model = Softmax([[5.0, 5.0]])
    model.weight.grad = tensor(0.0, 0.0)[None]
    method = settled(tensor(1.0, 1.0), tensor(3.0, 0.0), strength=10, proximal=True)
    ctx = context(model, step=1, learning_rate=0.1)
    method.gradients(ctx)
    assert model.weight.grad.tolist() == [[0.0, 0.0]], "the gradient stays the task's"
    method.after_step(ctx)
    # c = 0.1 · 10 · 3 = 3: (5 + 3 · 1) / (1 + 3); the other has no importance.
    torch.testing.assert_close(model.weight.detach(), tensor(2.0, 5.0)[None])


def test_the_implicit_step_is_bounded_where_the_gradient_diverges() -> None:
    ends = {}
    for proximal in (False, True):
        *_, ends[proximal] = quadratic_tasks(
            [1.0, 1.0], [3.0, -1.0], strength=1e12, proximal=proximal
        )
    assert ends[True] == pytest.approx(3.0, abs=1e-9)
    assert not abs(ends[False]) < 1e100


# -- the strength ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "words"),
    [
        (-1, "must be at least 0"),
        ("much", "'auto'"),
        (None, "'auto'"),
        ([1], "'auto'"),
        (float("nan"), "finite"),
        ("inf", "finite"),
    ],
)
def test_a_strength_that_is_none_is_refused_in_one_sentence(strength: Any, words: str) -> None:
    with pytest.raises(MethodError) as caught:
        EWC(strength=strength)
    text = str(caught.value)
    assert text.startswith("EWC.strength: ")
    assert text.count("EWC.strength") == 1
    assert words in text
    assert f"got {strength!r}. Leave it out for the default, 'auto', or use 0.0" in text


@pytest.mark.parametrize("strength", [0, 2, 0.5, 1e12, "auto"])
def test_a_strength_is_a_number_or_auto(strength: Any) -> None:
    method = EWC(strength=strength)
    assert method.strength == strength
    assert EWC(**json.loads(method.model_dump_json())) == method


def test_an_automatic_strength_is_the_stated_share_of_the_tasks_gradient() -> None:
    # After a task at 0 with F = 1/4; then at w the pull at strength 1 is |w| / 4 · √2.
    model, method = Softmax([[0.0, 0.0]]), EWC(strength="auto", share=0.2)
    ctx = context(model, examples((0, 0), (0, 1)))
    method.begin_task(ctx)
    method.end_task(ctx)
    method.begin_task(context(model, index=1))
    found = []
    for step, own, w in (
        (0, 9.0, 0.0),
        (1, 1.0, 0.1),
        (2, 1.0, 0.8),
        (3, 1.0, 9.0),
        (4, 1.0, 0.4),
        (32, 1.0, 1.6),
        (64, 1.0, 8.0),
    ):
        put(model, w, w)
        model.weight.grad = tensor(own, own)[None]
        method.gradients(context(model, index=1, step=step))
        pull = float((model.weight.grad - own)[0, 0])
        found.append(pull / (w / 4) if w else pull)
    # λ = 0.2 · own / (w / 4) at steps 1, 2, 4 and 32, and the least so far holds.
    assert found == pytest.approx([0.0, 8.0, 1.0, 1.0, 1.0, 0.5, 0.5])
    assert method.evidence()["strength"] == pytest.approx(0.5)
    again = EWC(strength="auto", share=0.2)
    again.restore(context(model), method.state())
    assert pull_at(again, 4.0, 4.0).tolist() == pytest.approx([0.5, 0.5])


# -- what is kept ---------------------------------------------------------------------------------


def test_a_task_end_keeps_weights_and_fisher() -> None:
    model, method = Softmax([[0.0, 0.0]]), EWC()
    rows = examples((0, 0), (0, 1))
    method.end_task(context(model, rows))
    kept = method.state().tensors
    assert kept["anchor/weight"].tolist() == [[0.0, 0.0]]
    assert kept["importance/weight"].tolist() == [[0.25, 0.25]]
    with torch.no_grad():
        model.weight.add_(8.0)
    assert method.state().tensors["anchor/weight"].tolist() == [[0.0, 0.0]]
    method.end_task(context(model, rows, index=1))
    kept = method.state().tensors
    torch.testing.assert_close(kept["anchor/weight"], tensor(4.0, 4.0)[None])
    torch.testing.assert_close(kept["importance/weight"], tensor(0.5, 0.5)[None])
    assert method.evidence() == {
        "fisher_rows": 2,
        "fisher_by": "loop",
        "extra_forward_rows": 2,
        "extra_backward_rows": 2,
        "importance_sum": pytest.approx(1.0),
        "bytes_per_weight": 16.0,
    }


def test_evidence_by_hand() -> None:
    # Pull 10 · 3 · (2 − 1) = 30, the task's own gradient 10: a share of 30 / 40.
    model = Softmax([[2.0]])
    model.weight.grad = tensor(10.0)[None]
    method = settled(tensor(1.0), tensor(3.0), strength=10.0)
    method.gradients(context(model, step=1))
    assert method.evidence() == pytest.approx(
        {"penalty": 15.0, "task_gradient": 10.0, "gradient_share": 0.75}
    )


def test_evidence_does_not_depend_on_the_order_after_a_reload() -> None:
    # 1 + 1 + 2⁵³ rounds to another number than 2⁵³ + 1 + 1.
    sizes = {"weight": 2.0**53, "second": 1.0, "third": 1.0}
    sums = set()
    for order in (list(sizes), list(sizes)[::-1]):
        model, method = Softmax([[0.0]]), EWC()
        model.second, model.third = (nn.Parameter(torch.zeros(1, 1).double()) for _ in range(2))
        state = {f"importance/{name}": torch.full((1, 1), sizes[name]).double() for name in order}
        state |= {f"anchor/{name}": torch.zeros(1, 1).double() for name in order}
        method.restore(context(model), State(state, {"strength": 0.0}))
        method.end_task(context(model))
        sums.add(method.evidence()["importance_sum"])
    assert len(sums) == 1


PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "uint8": 1 + 4 / 256}
WIDE, CLASSES = 128, 4


class Picture(nn.Module):
    """A layer of 512 weights: two blocks of 256."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, CLASSES, bias=False, dtype=dtype)
        g = torch.Generator().manual_seed(3)
        self.linear.weight.data = torch.randn(CLASSES, WIDE, generator=g).to(dtype) / 8

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.linear(x.to(self.linear.weight.dtype)))


def shown(model: nn.Module, index: int = 0) -> Context:
    g = torch.Generator().manual_seed(index)
    return stage(
        model, torch.randn(9, WIDE, generator=g), torch.randint(4, (9,), generator=g), index=index
    )


def three_tasks(
    dtype: torch.dtype, settings: dict[str, Any], stops: set[int]
) -> tuple[EWC, Tensor]:
    """Learn tasks of six steps; at these steps the method is saved, and another one goes on."""
    model, method = Picture(dtype), EWC(**settings)
    weight = model.linear.weight
    for task in range(3):
        ctx = shown(model, task)
        method.begin_task(ctx)
        for step in range(6):
            if step in stops:
                old, method = method, EWC(**settings)
                method.begin_task(ctx)
                method.restore(ctx, old.state())
                method._evidence.update(old.evidence())
                assert same(method.state(), old.state())
            ctx.step = step
            weight.grad = torch.full_like(weight, (-1.0) ** step)
            method.gradients(ctx)
            with torch.no_grad():
                weight.sub_(weight.grad, alpha=0.01)
        method.end_task(ctx)
    return method, weight.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", ["separate", "online"])
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@pytest.mark.parametrize("precision", PER_WEIGHT)
def test_it_goes_on_bit_for_bit_between_tasks_and_inside_one(
    precision: str, place: str, form: str, dtype: torch.dtype
) -> None:
    settings = {"precision": precision, "place": place, "form": form, "strength": "auto"}
    method, weights = three_tasks(dtype, settings, set())
    again, others = three_tasks(dtype, settings, {0, 3})
    assert same(method.state(), again.state())
    assert torch.equal(weights, others)
    assert method.evidence() == again.evidence()
    importance = max(4, dtype.itemsize) if precision == "float32" else PER_WEIGHT[precision]
    assert method.evidence()["bytes_per_weight"] == dtype.itemsize + importance


@pytest.mark.parametrize("precision", PER_WEIGHT)
def test_what_it_keeps_does_not_grow_with_the_tasks(precision: str) -> None:
    model, method = Picture(torch.float32), EWC(precision=precision)
    for task in range(3):
        method.end_task(shown(model, task))
        kept = sum(t.nbytes for t in method.state().tensors.values())
        assert kept == method.declared_bytes(shown(model)) == 512 * (4 + PER_WEIGHT[precision])


def same(one: State, other: State) -> bool:
    """Whether two states are equal bit for bit."""
    return (
        one.values == other.values
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())
    )


def test_switched_off_it_takes_no_fisher() -> None:
    method = EWC(strength=0)
    method.end_task(context(Softmax([[0.0, 0.0]]), examples((0, 0))))
    assert method.state().tensors == {}
    assert method.evidence() == {}


# -- weights that come, go, or have no gradient ---------------------------------------------------


def test_a_weight_without_a_gradient_is_pulled_too() -> None:
    model = Softmax([[2.0]])
    model.unused = nn.Parameter(tensor(4.0))
    kept = {"anchor/weight": tensor(2.0)[None], "importance/weight": tensor(1.0)[None]}
    kept |= {"anchor/unused": tensor(1.0), "importance/unused": tensor(2.0)}
    method = EWC(strength=1.0)
    method.restore(context(model), State(kept, {"strength": 0.0}))
    method.gradients(context(model))
    assert gradient_of(model.unused).tolist() == [6.0]


def test_a_weight_that_is_frozen_now_is_left_alone_and_not_forgotten() -> None:
    model, method = Softmax([[0.0, 0.0]]), EWC(strength=1.0)
    model.other = nn.Parameter(tensor(0.0))
    rows = examples((0, 0), (0, 1))
    method.end_task(context(model, rows))
    model.weight.requires_grad_(False)
    put(model, 8.0, 8.0)
    ctx = context(model, rows, index=1, step=1)
    method.begin_task(ctx)
    method.gradients(ctx)
    assert model.weight.grad is None
    method.end_task(ctx)
    kept = method.state().tensors
    assert kept["importance/weight"].tolist() == [[0.25, 0.25]]
    assert kept["anchor/weight"].tolist() == [[0.0, 0.0]]
    model.weight.requires_grad_(True)
    method.gradients(context(model, index=2))
    assert gradient_of(model.weight).tolist() == [[2.0, 2.0]]


def test_a_weight_that_comes_later_is_held_from_its_first_task_on() -> None:
    model, method = Softmax([[0.0, 0.0]]), EWC(strength=1.0)
    model.weight.requires_grad_(False)
    model.other = nn.Parameter(tensor(0.0))
    rows = examples((0, 0), (0, 1))
    method.end_task(context(model, rows))
    model.weight.requires_grad_(True)
    put(model, 5.0, 5.0)
    method.gradients(context(model, rows, index=1, step=1))
    assert model.weight.grad is None, "no task has made it matter yet"
    method.end_task(context(model, rows, index=1))
    assert pull_at(method, 9.0, 9.0).tolist() == [1.0, 1.0]


# -- adapters -------------------------------------------------------------------------------------


def adapted() -> tuple[nn.Module, Context]:
    """A classifier with LoRA and a head that is trained whole; rows of four tokens."""
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "down_proj"])
    model = pico.adapted(pico.classifier(3), config)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 100, (5, 4), generator=g).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": [0, 1, 2, 1, 0]})
    return model, context(model, rows)


@pytest.mark.parametrize("estimator", ["empirical", "sampled", "exact", "signs", "batched"])
def test_on_effective_weights_the_fisher_is_that_of_the_merged_model(estimator: Estimator) -> None:
    model, ctx = adapted()
    method = EWC(on="effective", fisher=estimator)
    method.end_task(ctx)
    merged = model.merge_and_unload()  # type: ignore[operator]
    held = {
        name.removeprefix("importance/"): t
        for name, t in method.state().tensors.items()
        if name.startswith("importance/")
    }
    assert len(held) == 2 * 2 + 1, "q_proj and down_proj of two layers, and the head"
    dense = dict(merged.named_parameters())
    names = {name: f"{name}.weight" for name in held if "score" not in name}
    (head,) = held.keys() - names.keys()
    names[head] = "score.weight"
    merged.requires_grad_(True)
    want, _ = fisher_diagonal(
        context(merged, ctx.dataset),
        {name: dense[there] for name, there in names.items()},
        ctx.random("fisher").permutation(5).tolist(),
        estimator,
    )
    for name, fisher in held.items():
        largest = float(want[name].max())
        torch.testing.assert_close(fisher, want[name], atol=2e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize("on", ["factors", "effective"])
def test_on_an_adapter_all_that_is_trained_is_pulled_by_the_penaltys_gradient(on: str) -> None:
    model, ctx = adapted()
    method = EWC(on=on, strength=1e4)
    method.end_task(ctx)
    kept = method.state().tensors
    trained = ctx.trainable()
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1)
    method.gradients(ctx)

    def value(name: str) -> Tensor:
        if name in trained:
            return trained[name]
        module: Any = model.get_submodule(f"base_model.model.{name}")
        a, b = module.lora_A.default.weight, module.lora_B.default.weight
        product: Tensor = module.scaling["default"] * b @ a
        return product

    held = [name.removeprefix("anchor/") for name in kept if name.startswith("anchor/")]
    penalty = sum(
        (0.5e4 * kept[f"importance/{n}"] * (value(n) - kept[f"anchor/{n}"]).square()).sum()
        for n in held
    )
    assert isinstance(penalty, Tensor)
    want = torch.autograd.grad(penalty, list(trained.values()))
    assert any("score" in name for name in trained)
    for (name, p), gradient in zip(trained.items(), want, strict=True):
        assert gradient.any(), name
        largest = float(gradient.abs().max())
        torch.testing.assert_close(gradient_of(p), gradient, atol=1e-5 * largest, rtol=1e-4)


def test_what_moves_the_weights_at_a_tasks_end_does_so_before_they_are_anchored() -> None:
    for wise_first in (True, False):
        model, ewc = Softmax([[1.0, 0.0]]), EWC(strength=1.0)
        pair: list[Method] = [WiSE(mix=0.5), ewc]
        chain, ctx = Chain(pair if wise_first else pair[::-1]), context(model)
        chain.begin_task(ctx)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[5.0, 4.0]]))
        chain.end_task(ctx)
        assert model.weight.tolist() == [[3.0, 2.0]]
        anchor = ewc._anchor["weight"].block(0, 2, model.weight.device)
        assert anchor.tolist() == [3.0, 2.0]
