"""Retrieval: BM25 and cosines by hand, what is put before a question and what is not."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch

import pico
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods.retrieval import Retrieval
from pencil import context, examples, texts

FIRST, SECOND = texts([6, 7, 30], [8, 9, 31], answer_from=2), texts([6, 10, 28], answer_from=2)


def learned(method: Retrieval, *more: Any) -> Context:
    """A memory that holds both tasks."""
    model = pico.causal_lm(32)
    for index, rows in enumerate((FIRST, SECOND, *more)):
        ctx = context(model, rows, task=f"t{index}", index=index)
        method.begin_task(ctx)
        method.end_task(ctx)
    return ctx


def test_bm25_by_hand() -> None:
    method = Retrieval()
    ctx = learned(method)
    method._make_index(ctx)
    # Three rows of three tokens: |r| / mean |r| = 1. Token 6 is in two of them, token 7 in one.
    share = 1 / (1 + 1.5)
    idf = {n: math.log(1 + (3 - n + 0.5) / (n + 0.5)) for n in (1, 2)}
    wanted = [(idf[2] + idf[1]) * share, 0.0, idf[2] * share]
    got = method._similar(ctx, [6, 7])
    # bm25s leaves out the factor 2.5, which is the same for all rows.
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), atol=1e-6, rtol=1e-5)


def test_the_most_similar_rows_come_before_the_question_the_best_one_last() -> None:
    method = Retrieval()
    ctx = learned(method)
    assert method.prompt(ctx, [6, 7], 100) == [6, 10, 28, 6, 7, 30, 6, 7]
    assert Retrieval(top=1).prompt(ctx, [6, 7], 100) == [6, 7]
    one = Retrieval(top=1)
    assert one.prompt(learned(one), [6, 7], 100) == [6, 7, 30, 6, 7]


def test_rows_without_a_common_word_stay_out() -> None:
    method = Retrieval()
    ctx = learned(method)
    assert method.prompt(ctx, [15, 16], 100) == [15, 16]
    assert method.prompt(ctx, [8], 100) == [8, 9, 31, 8]


def test_only_whole_rows_go_where_there_is_room() -> None:
    method = Retrieval()
    ctx = learned(method)
    assert method.prompt(ctx, [6, 7], 7) == [6, 7, 30, 6, 7]
    assert method.prompt(ctx, [6, 7], 4) == [6, 7]
    few = Retrieval(tokens=3)
    assert few.prompt(learned(few), [6, 7], 100) == [6, 7, 30, 6, 7]


def test_of_a_known_task_only_its_own_rows_are_looked_up() -> None:
    method = Retrieval()
    ctx = learned(method)
    method.serve(ctx, "t1")
    assert method.prompt(ctx, [6, 7], 100) == [6, 10, 28, 6, 7]
    method.serve(ctx, "t0")
    assert method.prompt(ctx, [6, 7], 100) == [6, 7, 30, 6, 7]
    for unknown in (None, "never seen"):
        method.serve(ctx, unknown)
        assert method.prompt(ctx, [6, 7], 100) == [6, 10, 28, 6, 7, 30, 6, 7]


def test_hidden_similarity_is_the_cosine_of_centred_means() -> None:
    method = Retrieval(by="hidden", top=1)
    ctx = learned(method)
    method._make_index(ctx)
    rows = [[6, 7, 30], [8, 9, 31], [6, 10, 28]]
    with torch.no_grad():
        means = torch.stack(
            [
                ctx.model(input_ids=torch.tensor([r]), output_hidden_states=True)
                .hidden_states[-1][0]
                .mean(0)
                for r in [*rows, [8, 9]]
            ]
        )
    apart = means - means[:3].mean(0)
    wanted = torch.cosine_similarity(apart[:3], apart[3:])
    got = torch.tensor(method._similar(ctx, [8, 9]))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    assert method.prompt(ctx, [8, 9], 100) == [8, 9, 31, 8, 9]


def test_evidence_says_whether_it_helped_and_what_it_added() -> None:
    method = Retrieval()
    learned(method)
    assert method.evidence() == {
        "questions_helped": 1.0,
        "tokens_added": 6.0,
        "rows_kept": 3,
        "rows_by_task": {"t0": 2, "t1": 1},
    }


def test_a_new_row_is_found_by_the_next_question() -> None:
    method = Retrieval(top=1)
    ctx = learned(method)
    method.prompt(ctx, [6, 7], 100)
    model = ctx.model
    ctx = context(model, texts([20, 21, 22], answer_from=2), task="t2", index=2)
    method.begin_task(ctx)
    method.end_task(ctx)
    assert method.prompt(ctx, [20], 100) == [20, 21, 22, 20]


def test_switched_off_it_keeps_nothing() -> None:
    method = Retrieval(top=0)
    ctx = learned(method)
    assert method.is_neutral()
    assert method.prompt(ctx, [6, 7], 100) == [6, 7]
    assert len(method._buffer) == 0
    assert method.evidence() == {}


def test_a_classifier_is_refused() -> None:
    with pytest.raises(MethodError, match="a classifier is trained here"):
        Retrieval().begin_task(context(pico.classifier(2), examples((6, 0))))


def test_without_bm25s_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MethodError, match=r"pip install 'keeptune\[retrieval\]'"):
        Retrieval()
    Retrieval(by="hidden")


def test_what_a_task_changes_in_the_model_is_seen_in_the_rows_too() -> None:
    method = Retrieval(by="hidden", top=1)
    ctx = learned(method)
    method.serve(ctx, "t0")
    method.prompt(ctx, [6, 7], 100)
    before = method._index
    method.serve(ctx, "t0")
    assert method._index is before
    method.serve(ctx, "t1")  # in which another method may have put other weights in place
    assert method._index is None
