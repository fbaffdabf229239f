"""Pseudo-rehearsal: what is mixed in, what it weighs, and whose answers are held on to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

import pico
from keeptune.errors import MethodError
from keeptune.method import Context, Method, State
from keeptune.methods._writing.before import softened_kl
from keeptune.methods._writing.stock import Stock
from keeptune.methods._writing.whole_rows import Form, Row
from keeptune.methods.joint import Joint
from keeptune.methods.pseudo_replay import CHATS, PseudoReplay
from keeptune.methods.replay import Replay
from pencil import Softmax, examples
from pencil import context as without_text
from scribe import Scribe, context, rows, says

TOKENIZER = pico.tokenizer(chat=True)
OLD, NEW = rows(("1+1=", "2"), ("2+2=", "4")), rows(("a+b=", "ab"), ("b+a=", "ba"))


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text))


def scribe(*texts: list[int]) -> Scribe:
    """A model that writes one of these, by the token in which they first differ."""

    def rule(so_far: list[int]) -> Any:
        going = [t for t in texts if t[: len(so_far)] == so_far and len(t) > len(so_far)]
        return says(*(t[len(so_far)] for t in going)) if going else says(3)

    return Scribe(rule)


def texts_of(task: str, data: Dataset) -> list[list[int]]:
    """Whole texts, by hand: the task in words, the question, |, the answer, |."""
    found = []
    for row in data:
        cut = row["labels"].count(-100)
        head = [*ids(f"Example of {task}:"), *row["input_ids"][:cut]]
        found.append([*head, *ids("|"), *row["input_ids"][cut:], *ids("|")])
    return found


def after_a_task(method: PseudoReplay, model: Any) -> None:
    """Show it the first task."""
    ctx = context(model, OLD)
    method.begin_task(ctx)
    method.data(ctx, OLD)
    method.end_task(ctx)


def second(model: Any) -> Context:
    return context(model, NEW, task="t1", index=1)


def test_the_first_task_is_learned_as_rows_and_as_whole_texts() -> None:
    method, ctx = PseudoReplay(), context(scribe(), OLD)
    method.begin_task(ctx)
    mixed = method.data(ctx, OLD)
    texts = texts_of("t0", OLD)
    assert mixed["input_ids"] == [*OLD["input_ids"], *texts]
    assert mixed["labels"] == [*OLD["labels"], *texts]
    assert method.evidence()["rows_generated"] == 0
    assert method.evidence()["rows_as_texts"] == 2


def test_before_the_second_task_rows_of_the_first_are_written_and_mixed_in() -> None:
    model, method = scribe(*texts_of("t0", OLD)), PseudoReplay(ratio=1.0)
    after_a_task(method, model)
    ctx = second(model)
    method.begin_task(ctx)
    mixed = method.data(ctx, NEW)
    written = mixed.select([2, 3])
    assert sorted(written["input_ids"]) == sorted(OLD["input_ids"])
    assert mixed["input_ids"][:2] == NEW["input_ids"]
    assert mixed["input_ids"][4:6] == texts_of("t1", NEW)
    assert mixed["input_ids"][6:] == texts_of("t0", written)
    shown = method.evidence()
    assert (shown["rows_generated"], shown["rows_by_task"]) == (2, {"t0": 2})
    assert (shown["rows_short"], shown["rows_new"], shown["rows_as_texts"]) == (0, 2, 4)


def test_the_share_of_each_task_is_even_and_a_shortfall_is_told() -> None:
    model = scribe(*texts_of("t0", OLD), *texts_of("t1", NEW))
    method = PseudoReplay(ratio=0.75)
    after_a_task(method, model)
    ctx = second(model)
    method.begin_task(ctx)
    method.data(ctx, NEW)
    method.end_task(ctx)
    third = rows(*((f"{i}", "x") for i in range(8)))
    ctx = context(model, third, task="t2", index=2)
    method.begin_task(ctx)
    method.data(ctx, third)
    # Three of six each, and a task has only two rows to write.
    assert method.evidence()["rows_by_task"] == {"t0": 2, "t1": 2}
    assert method.evidence()["rows_short"] == 2


def test_chats_of_its_own_need_no_task_before() -> None:
    turns = [4, *ids("user\n"), *ids("Why is it?"), 5, *ids("\n"), 4, *ids("assistant\n")]
    chat = [*turns, *ids("So."), 5]
    method = PseudoReplay(ratio=0.0, general=0.5)
    ctx = context(scribe(chat), OLD)
    method.begin_task(ctx)
    mixed = method.data(ctx, OLD)
    assert mixed["input_ids"][2:] == [chat]
    assert mixed["labels"][2:] == [[-100] * len(turns) + [*ids("So."), 5]]
    assert method.evidence()["rows_by_task"] == {CHATS: 1}


def test_rows_too_long_for_a_text_are_learned_only_as_rows() -> None:
    data = rows(("1+1=", "2"), ("1" * 30, "2"))
    method = PseudoReplay(longest=len(texts_of("t0", OLD)[0]))
    ctx = context(scribe(), data)
    method.begin_task(ctx)
    assert method.data(ctx, data)["input_ids"][2:] == texts_of("t0", data)[:1]
    assert method.state().values["longest"] == {"t0": len(texts_of("t0", OLD)[0])}


def learned(method: PseudoReplay, model: Any) -> tuple[Context, Any]:
    """The second task's context and one batch of all it is trained on."""
    ctx = second(model)
    method.begin_task(ctx)
    mixed = method.data(ctx, NEW)
    batch = ctx.batch(list(mixed))
    ctx.answers_in_step = float((batch["labels"][:, 1:] != -100).sum())
    return ctx, batch


def test_the_loss_becomes_the_sum_of_two_means() -> None:
    model, method = pico.causal_lm().train(), PseudoReplay(ratio=1.0, strength=0.7)
    after_a_task(method, scribe(*texts_of("t0", OLD)))
    ctx, batch = learned(method, scribe(*texts_of("t0", OLD)))
    ctx.model = model
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    losses = F.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none")
    there = batch["labels"][:, 1:] != -100
    trainers = losses[there].mean()
    term = method.loss(ctx, batch, pico_outputs(logits))
    assert term is not None
    rows_part, texts_part = there.clone(), there.clone()
    rows_part[4:], texts_part[:4] = False, False
    want = losses[rows_part].mean() + 0.7 * losses[texts_part].mean()
    assert (trainers + term).item() == pytest.approx(want.item(), rel=1e-5)
    # Row by row it is the same: nothing depends on what else is in a micro batch.
    parts = 0.0
    for i in range(len(logits)):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        part = method.loss(ctx, one, pico_outputs(logits[i : i + 1]))
        assert part is not None
        parts += part.item()
    assert parts == pytest.approx(term.item(), rel=1e-4)


def pico_outputs(logits: Any) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(logits=logits)


def test_distillation_holds_on_to_the_written_rows_only() -> None:
    writer, model = scribe(*texts_of("t0", OLD)), pico.causal_lm().train()
    method = PseudoReplay(ratio=1.0, strength=0.0, distil=0.5, temperature=3.0)
    method._longest["t0"] = 40  # without strength no text is learned, but this model can write
    ctx, batch = learned(method, writer)
    ctx.model = model
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        assert method.loss(ctx, batch, pico_outputs(before)).abs() < 1e-6  # type: ignore[union-attr]
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.manual_seed(1)))
        logits = model(**inputs).logits
    term = method.loss(ctx, batch, pico_outputs(logits))
    there = batch["labels"][:, 1:] != -100
    there[:2] = False  # the new rows
    kl = softened_kl(logits[:, :-1][there], before[:, :-1][there], 3.0).sum()
    answers = (batch["labels"][:, 1:] != -100).sum()
    assert term is not None
    assert term.item() == pytest.approx((0.5 * kl / answers).item(), rel=1e-4)
    assert method.evidence()["kl"] == pytest.approx((kl / (2 * there.sum())).item(), rel=1e-4)
    assert model.training


def test_what_was_written_is_gone_when_the_task_has_ended() -> None:
    writer, method = scribe(*texts_of("t0", OLD)), PseudoReplay(ratio=1.0)
    after_a_task(method, writer)
    ctx, _ = learned(method, writer)
    assert [len(some) for some in kept(method).values()] == [2]
    while_learned = method.declared_bytes(ctx)
    method.end_task(ctx)
    assert kept(method) == {}
    assert method.declared_bytes(ctx) < while_learned / 2
    assert set(method.state().values["longest"]) == {"t0", "t1"}


def kept(method: PseudoReplay) -> dict[str, list[Row]]:
    """The written rows in its state."""
    stock = Stock()
    stock.restore(State(method.state().tensors, method.state().values["stock"]))
    return stock.rows(OLD)


def test_a_resumed_task_has_the_rows_of_the_run_that_was_stopped() -> None:
    method = PseudoReplay(ratio=1.0)
    after_a_task(method, scribe(*texts_of("t0", OLD)))
    ctx, _ = learned(method, scribe(*texts_of("t0", OLD)))
    again = PseudoReplay(ratio=1.0)
    ctx = second(scribe())  # another model, that can write nothing
    again.begin_task(ctx)
    again.restore(ctx, State(method.state().tensors, method.state().values))
    assert again.data(ctx, NEW)["input_ids"] == method.data(ctx, NEW)["input_ids"]


def test_copies_are_counted_when_the_task_ends() -> None:
    writer, method = scribe(*texts_of("t0", OLD)), PseudoReplay(probe=6)
    after_a_task(method, writer)
    shown = method.evidence()
    assert (shown["probe_texts"], shown["probe_rows"], shown["probe_copies"]) == (6, 6, 6)


def test_switched_off_it_writes_nothing() -> None:
    off = PseudoReplay(ratio=0, general=0)
    ctx = context(scribe(), OLD)
    assert off.is_neutral()
    assert off.data(ctx, OLD) is OLD
    assert off.loss(ctx, {}, None) is None
    assert not PseudoReplay(ratio=0, general=0.1).is_neutral()


@pytest.mark.parametrize(
    ("method", "ctx", "words"),
    [
        (PseudoReplay(), without_text(Softmax([[0.0]]), examples((0, 0))), "a classifier writes"),
        (PseudoReplay(), context(scribe(), OLD, tokenizer=None), "needs its tokenizer"),
        (
            PseudoReplay(general=0.1),
            context(scribe(), OLD, tokenizer=pico.tokenizer()),
            "no chat template",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(method: Method, ctx: Context, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        method.begin_task(ctx)


def test_it_runs_beside_replay_and_not_where_the_old_model_is_gone() -> None:
    assert not PseudoReplay.excludes & Replay.traits
    assert PseudoReplay.excludes & Joint.traits
    assert Form.of("t0", TOKENIZER).mark == ids("|")
