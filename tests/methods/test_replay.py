"""Replay: which rows come back, how many, and never those of the present task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

import pico
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods import _measure
from keeptune.methods.replay import Replay, amount_to_replay
from keeptune.tokens import collate
from pencil import Softmax, context, examples, texts


def task(number: int, rows: int) -> Dataset:
    """Rows that say which task they are of: the label."""
    return examples(*[(word, number) for word in range(rows)])


def stream(method: Replay, sizes: Sequence[int], seed: int = 0) -> list[list[tuple[int, int]]]:
    """What each task is trained on, as (word, task) pairs."""
    trained = []
    for index, size in enumerate(sizes):
        rows = task(index, size)
        ctx = context(Softmax([[0.0]]), rows, task=f"t{index}", index=index, seed=seed)
        method._evidence.clear()
        method.begin_task(ctx)
        trained.append([(r["input_ids"][0], r["labels"]) for r in method.data(ctx, rows)])
        method.end_task(ctx)
    return trained


@pytest.mark.parametrize(
    ("new", "ratio", "old"), [(100, 0.2, 20), (10, 0.25, 2), (7, 1.0, 7), (3, 0.1, 0), (4, 2.5, 10)]
)
def test_amount_to_replay(new: int, ratio: float, old: int) -> None:
    assert amount_to_replay(new, ratio) == old


def test_a_task_gets_its_own_rows_and_some_of_each_earlier_task() -> None:
    method = Replay(ratio=0.5)
    first, second, third = stream(method, [40, 20, 60])
    assert first == [(word, 0) for word in range(40)]
    assert second[:20] == [(word, 1) for word in range(20)]
    assert len(second) == 30
    assert {label for _, label in second[20:]} == {0}
    assert len(third) == 90
    assert {label for _, label in third[60:]} == {0, 1}
    evidence = method.evidence()
    assert evidence["rows_replayed"] == 30
    assert sum(evidence["rows_by_task"].values()) == 30
    assert evidence["rows_new"] == 60
    assert evidence["rows_short"] == 0
    assert evidence["rows_kept"] == 60


def test_strengthened_it_adds_the_mean_loss_of_further_old_rows() -> None:
    """Of words that are one class each, so that the gradient is softmax − label, by hand."""
    model = Softmax(np.zeros((6, 2)))
    method = Replay(ratio=0.5)
    ctx = context(model, examples((0, 1), (1, 1)), task="t0", index=0)
    method.end_task(ctx)
    ctx = context(model, examples((4, 0)), task="t1", index=1, rows_in_step=6)
    model.weight.grad = torch.zeros_like(model.weight)
    method.gradients(ctx)
    assert not model.weight.grad.any(), "as it is set it adds nothing"
    Chain([method]).hold(3.0)
    # (3 − 1) · 0.5 / 1.5 = 2/3 of a step of 6 rows are 4, of which 2 are kept.
    method.gradients(ctx)
    each = 2 / 3 * torch.tensor([0.5, -0.5]) / 2
    wanted = torch.zeros(6, 2).double()
    wanted[:2] = each.double()
    torch.testing.assert_close(model.weight.grad, wanted, atol=1e-7, rtol=1e-6)
    assert method.evidence()["rows_replayed_more"] == 2
    # No more rows than the step has, however hard; they weigh the more.
    Chain([method]).hold(100.0)
    model.weight.grad.zero_()
    ctx.rows_in_step = 1
    method.gradients(ctx)
    assert method.evidence()["rows_replayed_more"] == 3
    assert float(model.weight.grad.abs().sum()) == pytest.approx(99 * 0.5 / 1.5)


def test_no_row_is_replayed_twice_in_one_task() -> None:
    _, second = stream(Replay(ratio=1.0), [30, 30])
    assert len(set(second)) == 60


def test_a_shortfall_is_reported_not_repeated() -> None:
    method = Replay(ratio=1.0, size=5)
    _, second = stream(method, [30, 20])
    assert len(second) == 25
    assert method.evidence()["rows_short"] == 15


def test_no_more_rows_are_kept_than_size() -> None:
    method = Replay(ratio=1.0, size=7)
    stream(method, [30, 20, 50])
    assert len(method.state().tensors["tasks"]) == 7


def test_the_seed_decides_which_rows_come() -> None:
    runs = [stream(Replay(ratio=0.5), [40, 40], seed=seed)[1] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_tokens_and_labels_of_a_text_come_back_as_they_were() -> None:
    method = Replay(ratio=1.0)
    old, new = texts([7, 8, 9], [9, 8, 7]), texts([1, 2, 3, 4], [5, 6, 7, 8])
    method.end_task(context(Softmax([[0.0]]), old))
    rows = method.data(context(Softmax([[0.0]]), new, index=1), new)
    assert sorted(r["input_ids"] for r in rows.select([2, 3])) == [[7, 8, 9], [9, 8, 7]]
    assert {tuple(r["labels"]) for r in rows.select([2, 3])} == {(-100, 8, 9), (-100, 8, 7)}


def test_the_ratio_is_to_the_tasks_own_rows_whatever_else_is_mixed_in() -> None:
    method = Replay(ratio=0.5)
    method.end_task(context(Softmax([[0.0]]), task(0, 40)))
    ctx = context(Softmax([[0.0]]), task(1, 10), index=1)
    assert len(method.data(ctx, task(1, 30))) == 30 + 5


def test_columns_that_a_trainer_added_do_not_get_in_the_way() -> None:
    method = Replay(ratio=1.0)
    rows = task(0, 3).add_column("prompt", ["a", "b", "c"])
    method.end_task(context(Softmax([[0.0]]), rows))
    assert len(method.data(context(Softmax([[0.0]]), rows, index=1), rows)) == 6


# -- settings beside the ratio --------------------------------------------------------------------


def test_the_ratio_may_count_tokens() -> None:
    method = Replay(ratio=0.5, count="tokens")
    old, new = texts(*[[7, 8, 9]] * 20), texts(*[[1, 2, 3, 4, 5, 6]] * 10)
    method.end_task(context(Softmax([[0.0]]), old))
    assert len(method.data(context(Softmax([[0.0]]), new, index=1), new)) == 10 + 10
    assert method.evidence()["tokens_short"] == 0


def test_a_shortfall_of_tokens_is_reported() -> None:
    method = Replay(ratio=1.0, count="tokens", size=2)
    rows = texts(*[[7, 8, 9]] * 5)
    method.end_task(context(Softmax([[0.0]]), rows))
    assert len(method.data(context(Softmax([[0.0]]), rows, index=1), rows)) == 5 + 2
    assert method.evidence()["tokens_short"] == 15 - 6


def test_with_repeats_nothing_is_short() -> None:
    method = Replay(ratio=1.0, size=5, repeats=True)
    _, second = stream(method, [30, 20])
    assert len(second) == 40
    evidence = method.evidence()
    assert evidence["rows_short"] == 0
    assert evidence["rows_repeated"] == 20 - len(set(second[20:]))


def test_tasks_can_be_weighed_against_each_other() -> None:
    method = Replay(ratio=1.0, task_weights={"t0": 0.0})
    third = stream(method, [10, 10, 10])[2]
    assert {label for _, label in third[10:]} == {1}
    assert method.evidence()["rows_by_task"] == {"t1": 10}


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(MethodError, match=r"Replay\.task_weights: must be at least 0.*, got -1"):
        Replay(task_weights={"billing": -1})


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(MethodError, match=r"Replay\.policy: .*'herding'.*got 'newest'"):
        Replay(policy="newest")  # type: ignore[arg-type]


# -- what the model makes of the rows -------------------------------------------------------------

ROWS = [[7, 8, 9, 10], [11, 12], [13, 14, 15], [16, 17, 18, 19, 20], [21, 22, 23]]


def text_context(rows: Sequence[list[int]] = ROWS, **more: Any) -> Context:
    labels = [[-100, *row[1:]] for row in rows]
    dataset = Dataset.from_dict({"input_ids": list(rows), "labels": labels})
    return Context(pico.causal_lm(), "t0", 0, dataset, collate=collate(pico.tokenizer()), **more)


def test_the_loss_of_a_row_is_the_mean_over_its_answer() -> None:
    ctx = text_context()
    found = _measure.losses(ctx)
    for row, loss in zip(ROWS, found, strict=True):
        logits = ctx.model(torch.tensor([row])).logits[0, :-1].detach()
        assert loss == pytest.approx(
            float(F.cross_entropy(logits, torch.tensor(row[1:]))), rel=1e-4
        )


def test_the_loss_of_a_classifiers_row_is_that_of_its_class() -> None:
    model = Softmax([[0.0, 1.0], [2.0, 0.0]])
    rows = examples((0, 1), (1, 1))
    want = F.cross_entropy(model.weight.detach(), torch.tensor([1, 1]), reduction="none")
    assert _measure.losses(context(model, rows)) == pytest.approx(want.numpy())


def test_the_features_of_a_row_are_its_mean_last_hidden_state() -> None:
    ctx = text_context()
    found = _measure.features(ctx)
    for row, feature in zip(ROWS, found, strict=True):
        states = ctx.model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1]
        assert feature == pytest.approx(states[0].mean(0).detach().numpy(), abs=1e-5)


def test_rows_of_a_model_without_hidden_states_are_refused() -> None:
    with pytest.raises(MethodError, match=r"Softmax is no transformers model.*Use another policy"):
        Replay(policy="herding").end_task(context(Softmax([[0.0]])))


@pytest.mark.parametrize("policy", ["surprise", "herding", "diversity"])
def test_looking_at_the_rows_leaves_the_model_as_it_was(policy: Any) -> None:
    ctx = text_context()
    ctx.model.train()
    before = torch.get_rng_state()
    Replay(policy=policy, size=2).end_task(ctx)
    assert torch.equal(torch.get_rng_state(), before)
    assert ctx.model.training
    assert all(p.requires_grad and p.grad is None for p in ctx.model.parameters())


def test_surprise_keeps_the_rows_of_the_highest_loss() -> None:
    ctx = text_context()
    method = Replay(policy="surprise", size=2, ratio=1.0)
    method.end_task(ctx)
    mixed = method.data(ctx, ctx.dataset)
    worst = np.argsort(_measure.losses(ctx))[-2:]
    assert sorted(mixed[5:]["input_ids"]) == sorted(ROWS[row] for row in worst)
