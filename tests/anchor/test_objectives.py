"""What is differentiated per example, by hand; the estimators that are not exact; choices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_examples import assert_near, every_weight, labelled, one_by_one, stage, texts
from torch import Tensor
from torch.nn import functional as F

import pico
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._anchor.examples import batched_sums, choice_sums, example_sums, sign_sums
from keeptune.methods._anchor.objectives import (
    all_labels,
    draw_labels,
    log_likelihood,
    sampled,
    squared_norm,
)
from pencil import Softmax, context, examples


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


LOGITS = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.0, 9.0]], [[0.5, 0.0], [4.0, 4.0], [9.0, 9.0]]])
BATCH = {"labels": torch.tensor([[-100, 1, 0], [-100, -100, 1]])}


def test_a_rows_likelihood_is_the_sum_over_its_answers() -> None:
    (values,) = log_likelihood(BATCH, LOGITS, [0, 1])
    first = (2 - math.log(math.e + math.e**2)) + (3 - math.log(math.e**3 + 1 / math.e))
    torch.testing.assert_close(values, torch.tensor([first, -math.log(2)]))
    (classes,) = log_likelihood({"labels": torch.tensor([1, 0])}, LOGITS[:, 0], [0, 1])
    want = torch.stack([LOGITS[0, 0].log_softmax(0)[1], LOGITS[1, 0].log_softmax(0)[0]])
    torch.testing.assert_close(classes, want)


def test_the_squared_norm_of_the_answers_logits() -> None:
    assert next(iter(squared_norm()(BATCH, LOGITS, [0, 1]))).tolist() == [15.0, 32.0]
    assert next(iter(squared_norm(1)(BATCH, LOGITS, [0, 1]))).tolist() == [13.0, 16.0]
    assert next(iter(squared_norm(9)(BATCH, LOGITS, [0, 1]))).tolist() == [15.0, 32.0]


def test_labels_are_drawn_by_their_probabilities() -> None:
    logits = tensor(0.2, 0.0, 0.3, 0.5).log().expand(4, 4)
    assert draw_labels(logits, tensor(0.0, 0.19, 0.2, 0.999)).tolist() == [0, 0, 2, 3]
    certain = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert draw_labels(certain, tensor(1 - 1e-17, 0.0)).tolist() == [0, 1]
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = draw_labels(logits[:1].float().expand(20_000, 4), uniforms)
    shares = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.0, 0.3, 0.5]), atol=0.01, rtol=0)


def test_a_rows_draw_depends_on_seed_task_and_row_only() -> None:
    logits = torch.zeros(4, 31, 5)
    batch = {"labels": torch.tensor([[-100] + [1] * 30] * 4)}
    model = Softmax([[0.0]])

    def drawn(rows: list[int], **more: int) -> list[float]:
        heights = logits[: len(rows)] + torch.arange(5.0)
        few = {"labels": batch["labels"][: len(rows)]}
        (values,) = sampled(context(model, **more))(few, heights, rows)
        return values.tolist()

    together = drawn([3, 1, 4, 5])
    assert together == pytest.approx([drawn([row])[0] for row in (3, 1, 4, 5)])
    assert len(set(together)) == 4
    assert drawn([3, 1, 4, 5], seed=1) != together
    assert drawn([3, 1, 4, 5], index=1) != together


def test_all_labels_give_the_exact_fisher_by_hand() -> None:
    # Σ_c p_c ([c = k] − p_k)² = p_k (1 − p_k), whatever the true label is.
    rows = examples((0, 0), (0, 1), (1, 1))
    model = Softmax([[0.0, math.log(3.0)], [0.0, 0.0]])
    got, how = example_sums(
        context(model, rows), every_weight(model), range(3), all_labels, "square"
    )
    assert how == "loop"  # a bare weight is used, with no module to look at
    torch.testing.assert_close(
        got["weight"], torch.stack([tensor(6 / 16, 6 / 16), tensor(0.25, 0.25)])
    )


def test_sampled_labels_give_the_exact_fisher_on_average() -> None:
    model = Softmax([[0.0, math.log(3.0)]])
    rows = examples(*[(0, 0)] * 2000)
    got, _ = example_sums(
        ctx := context(model, rows), every_weight(model), range(2000), sampled(ctx), "square"
    )
    torch.testing.assert_close(got["weight"][0] / 2000, tensor(3 / 16, 3 / 16), atol=0.01, rtol=0)


def test_signs_are_right_on_average() -> None:
    model = pico.causal_lm()
    weights = {"norm": model.model.norm.weight, "head": model.lm_head.weight}
    dataset = texts(5, 6, 4, 7)
    exact, _ = example_sums(stage(model, dataset), weights, range(4), log_likelihood, "square")
    draws = [
        sign_sums(stage(model, dataset, seed=seed), weights, range(4), log_likelihood, batch=4)
        for seed in range(300)
    ]
    for name, values in exact.items():
        mean = torch.stack([draw[name] for draw in draws]).mean(0)
        assert float((mean - values).norm() / values.norm()) < 0.1
        assert float(mean.sum() / values.sum()) == pytest.approx(1, abs=0.03)
    again = sign_sums(stage(model, dataset, seed=7), weights, range(4), log_likelihood, batch=4)
    assert all(torch.equal(again[name], draws[7][name]) for name in weights)


def test_signs_of_one_row_a_batch_are_exact() -> None:
    ctx = stage(pico.classifier(3), labelled())
    weights = every_weight(ctx.model)
    exact, _ = example_sums(ctx, weights, range(5), log_likelihood, "square")
    assert_near(sign_sums(ctx, weights, range(5), log_likelihood, batch=1), exact)


def test_signs_of_all_labels_are_right_on_average() -> None:
    model = Softmax([[0.0, math.log(3.0)]])
    rows = examples((0, 0), (0, 1))
    draws = [
        sign_sums(context(model, rows, seed=seed), every_weight(model), range(2), all_labels)
        for seed in range(400)
    ]
    mean = torch.stack([draw["weight"][0] for draw in draws]).mean(0)
    torch.testing.assert_close(mean, 2 * tensor(3 / 16, 3 / 16), atol=0.03, rtol=0)


def test_batches_lose_what_is_opposite_in_them() -> None:
    # The gradients of the three rows are ∓1/2, ±1/2, ∓1/2.
    model = Softmax([[0.0, 0.0]])
    ctx = context(model, examples((0, 0), (0, 1), (0, 0)))
    for batch, want in ((1, 0.75), (2, 0.25), (3, 3 * (0.5 / 3) ** 2)):
        got = batched_sums(ctx, every_weight(model), range(3), log_likelihood, batch=batch)
        torch.testing.assert_close(got["weight"], tensor(want, want)[None])


def with_choices() -> Dataset:
    """Rows of a language model with two or three choices."""
    prompt, answers = [7, 8, 9], [[[10, 11], [12]], [[20], [21, 22], [23]], [[30], [31]]]
    options = [
        [{"input_ids": prompt + a, "labels": [-100] * 3 + a} for a in each] for each in answers
    ]
    first = {key: [row[0][key] for row in options] for key in ("input_ids", "labels")}
    return Dataset.from_dict(first | {"options": options})


def nats(ctx: Context, row: dict[str, Any]) -> Tensor:
    """Log-probability of one row's answer, by torch's own loss."""
    batch = ctx.batch([row])
    labels = batch.pop("labels")[0, 1:]
    return -F.cross_entropy(ctx.model(**batch).logits[0, :-1], labels, reduction="sum")


def test_choices_give_the_exact_fisher() -> None:
    ctx = stage(pico.causal_lm(), with_choices())
    weights = every_weight(ctx.model)
    got, how = choice_sums(ctx, weights, range(3))
    assert how == "hooks"
    values = []
    for row in ctx.dataset:
        for c in range(len(row["options"])):
            chosen = torch.stack([nats(ctx, option) for option in row["options"]])
            predicted = chosen.log_softmax(0)
            values.append(predicted[c].exp().sqrt().detach() * predicted[c])
    assert_near(got, one_by_one(values, weights))


def test_choices_do_not_disturb_the_other_estimators() -> None:
    ctx = stage(pico.causal_lm(), with_choices())
    weights = every_weight(ctx.model)
    got, _ = example_sums(ctx, weights, range(3), log_likelihood, "square")
    want = one_by_one([nats(ctx, row) for row in ctx.dataset], weights)
    assert_near(got, want)


def test_what_cannot_be_had_is_one_sentence() -> None:
    ctx = stage(pico.causal_lm(), texts())
    weights = every_weight(ctx.model)
    with pytest.raises(MethodError, match="exact Fisher goes through every possible answer"):
        example_sums(ctx, weights, range(2), all_labels, "square")
    with pytest.raises(MethodError, match="rows of task 't' have no choices"):
        choice_sums(ctx, weights, range(2))
    with pytest.raises(MethodError, match="rows have no labels"):
        next(iter(log_likelihood({}, LOGITS, [0, 1])))
    assert all(weight.requires_grad for weight in weights.values())


def test_no_rows_give_zeros() -> None:
    ctx = stage(pico.causal_lm(), texts())
    got, _ = example_sums(ctx, every_weight(ctx.model), [], log_likelihood, "square")
    assert not any(values.any() for values in got.values())
    assert example_sums(ctx, {}, range(2), log_likelihood, "square")[0] == {}
