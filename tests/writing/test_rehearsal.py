"""What is thrown away of what a model writes, chats, and rows known by their keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

import pico
from keeptune.errors import MethodError
from keeptune.methods._writing.chats import Turns
from keeptune.methods._writing.keys import keys, keys_of
from keeptune.methods._writing.mixture import weights_of
from keeptune.methods._writing.rehearsal import (
    TRIES,
    Sieve,
    Verdict,
    copies,
    harvest,
    of_chats,
    of_task,
    written,
)
from keeptune.methods._writing.sampling import Written
from keeptune.methods._writing.whole_rows import Row
from scribe import Scribe, context, rows, says

TOKENIZER = pico.tokenizer(chat=True)
SIEVE = Sieve(longest=40, perplexity=50.0, top_k=2)


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text))


def numbered(good: Sequence[int]) -> object:
    """Attempts of which only these numbers give rows, each another one."""

    def attempt(numbers: Sequence[int]) -> list[Verdict]:
        return [Row([n], [n]) if n in good else "unparsed" for n in numbers]

    return attempt


def test_it_goes_on_until_there_are_enough() -> None:
    found = harvest(3, numbered([0, 4, 5, 6]), set())  # type: ignore[arg-type]
    assert [row.input_ids for row in found.rows] == [[0], [4], [5]]
    assert found.counts["unparsed"] == 3


def test_it_gives_up_after_four_texts_a_row() -> None:
    found = harvest(3, numbered([11, 12]), set())  # type: ignore[arg-type]
    assert [row.input_ids for row in found.rows] == [[11]]
    assert found.counts["written"] == 3 * TRIES


def test_what_is_there_already_is_thrown_away() -> None:
    known = {(1,)}
    found = harvest(2, lambda numbers: [Row([n // 2], [0]) for n in numbers], known)
    assert [row.input_ids for row in found.rows] == [[0], [2]]
    assert found.counts["copies"] == 4
    assert known == {(0,), (1,), (2,)}


def test_texts_that_do_not_end_or_surprise_are_refused() -> None:
    assert SIEVE.refuses(Written([5], 0.1, ended=False)) == "unfinished"
    assert SIEVE.refuses(Written([5, 6], 2 * math.log(50.5), ended=True)) == "perplexing"
    assert SIEVE.refuses(Written([5, 6], 2 * math.log(49.5), ended=True)) is None


def test_rows_of_a_task_by_a_model_that_knows_them() -> None:
    text = ids("Example of t0:1+1=|2|")
    model = Scribe(lambda so_far: says(text[len(so_far)] if len(so_far) < len(text) else 3))
    ctx = context(model)
    attempt = of_task(ctx, "t0", len(text), SIEVE)
    (row,) = attempt([0])
    assert row == Row(ids("1+1=2"), [-100] * 4 + ids("2"))
    # One token less and no text is whole.
    assert of_task(ctx, "t0", len(text) - 1, SIEVE)([0]) == ["unfinished"]
    other = context(model, rows(("7", "8")))
    got, shown = written(other, (3, {"t0": attempt}))
    assert [r.input_ids for r in got["t0"]] == [ids("1+1=2")]
    assert shown["rows_generated"] == 1
    assert (shown["rows_short"], shown["texts_copies"]) == (2, shown["texts_written"] - 1)
    assert shown["rows_by_task"] == {"t0": 1}
    # Its answer has no EOS, so it is no row of the task, which has one.
    assert copies(ctx, 5, attempt) == {"probe_texts": 5, "probe_rows": 5, "probe_copies": 0}


def test_copies_are_counted() -> None:
    end = [*ids("Example of t0:1+1=|2"), 2, *ids("|")]
    model = Scribe(lambda so_far: says(end[len(so_far)] if len(so_far) < len(end) else 3))
    ctx = context(model)
    assert copies(ctx, 3, of_task(ctx, "t0", len(end), SIEVE))["probe_copies"] == 3
    assert written(ctx, (1, {"t0": of_task(ctx, "t0", len(end), SIEVE)}))[0] == {"t0": []}


# -- chats ----------------------------------------------------------------------------------------

START, END = 4, 5  # <|im_start|> and <|im_end|>


def test_the_places_where_a_chat_template_lets_people_speak() -> None:
    turns = Turns.of(TOKENIZER, "m")
    assert turns.head == [START, *ids("user\n")]
    assert turns.between == [END, *ids("\n"), START, *ids("assistant\n")]
    assert turns.end == [END]
    row = turns.row(ids("Why?"), ids("So."))
    assert row.input_ids == [*turns.head, *ids("Why?"), *turns.between, *ids("So."), END]
    assert row.labels == [-100] * (len(row.input_ids) - 4) + [*ids("So."), END]
    assert [turns.asked([*ids("Why?"), last]) for last in (END, 2, 9)] == [True, True, False]


def test_no_template_no_chat() -> None:
    with pytest.raises(MethodError, match=r"'m' asks the model for chats.*`general: 0`"):
        Turns.of(pico.tokenizer(), "m")
    silent = pico.tokenizer(chat=True)
    silent.chat_template = "hello{% if add_generation_prompt %}QUESTION{% endif %}"
    with pytest.raises(MethodError, match="cannot see in the chat template where a turn ends"):
        Turns.of(silent, "m")


def chatting(question: str, answer: str) -> Scribe:
    """Asks this, and answers that."""
    turns = Turns.of(TOKENIZER, "m")
    text = [*turns.prompt(ids(question)), *ids(answer), END]
    return Scribe(lambda so_far: says(text[len(so_far)] if len(so_far) < len(text) else 3))


@pytest.mark.parametrize(
    ("question", "answer", "verdict"),
    [("Why is it?", "So.", None), ("Why", "So.", "short"), ("Why is it?", "", "short"),
     ("w" * 50, "So.", "unfinished"), ("Why is it?", "w" * 50, "unfinished")],
)  # fmt: skip
def test_a_chat_of_its_own(question: str, answer: str, verdict: str | None) -> None:
    turns = Turns.of(TOKENIZER, "m")
    (found,) = of_chats(context(chatting(question, answer)), turns, SIEVE)([0])
    assert found == (verdict or turns.row(ids(question), ids(answer)))


# -- keys and weights -----------------------------------------------------------------------------


def test_a_row_is_known_by_its_key_on_either_side_of_the_padding() -> None:
    some = [[5, 6, 7], [7, 6, 5], [5, 6], [5, 6, 7, 7], [0, 5, 6]]
    own = keys_of([Row(row, row) for row in some], torch.device("cpu"))
    assert len(own.unique()) == len(some)
    right = {
        "input_ids": torch.tensor([[5, 6, 7, 0, 0], [5, 6, 9, 9, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]),
    }
    left = {key: value.flip(1) for key, value in right.items()}
    left["input_ids"] = torch.tensor([[0, 0, 5, 6, 7], [9, 9, 9, 5, 6]])
    assert keys(right).tolist() == keys(left).tolist() == own[[0, 2]].tolist()
    assert not keys_of([], torch.device("cpu")).numel()


def test_weights_make_one_mean_of_two() -> None:
    answers, tokens = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0, 9.0])
    a, t = weights_of(2, 3, 0.25)
    got = (a * answers.sum() + t * tokens.sum()) / 5
    assert got.item() == pytest.approx(2.0 + 0.25 * 5.0)
    assert weights_of(4, 0, 0.25)[0] == 1.0
