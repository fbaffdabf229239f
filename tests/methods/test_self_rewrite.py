"""Self-rewriting: which answers are taken, and what becomes of a row."""

from __future__ import annotations

from typing import Any

import pytest

import pico
from keeptune.errors import MethodError
from keeptune.method import State
from keeptune.methods._writing.agreement import Agree, agrees, final_number
from keeptune.methods._writing.rewriting import ASKED
from keeptune.methods._writing.stock import Stock
from keeptune.methods.self_rewrite import SelfRewrite
from pencil import Softmax, examples
from pencil import context as without_text
from scribe import Scribe, context, rows, says

TOKENIZER = pico.tokenizer(chat=True)
DATA = rows(("1+1=", "2"), ("2+2=", "4"), ("3+3=", "6"))
EOS, END = 2, 5


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text))


@pytest.mark.parametrize(
    ("rewritten", "reference", "how", "yes"),
    [
        ("It is Paris, of course.", "Paris", "contains", True),
        ("It is Parisian.", "Paris", "contains", False),
        ("new york CITY", "New York", "contains", True),
        ("york new", "New York", "contains", False),
        ("anything", "", "contains", False),
        ("So 2 and 3 make 5.", "1 + 4 = 5", "final", True),
        ("5 it is, not 6", "5", "final", False),
        ("1,234.0", "1234", "final", True),
        ("The answer is blue", "Thinking.\nblue", "final", True),
        ("The answer is red", "Thinking.\nblue", "final", False),
        ("x", "blue", "any", True),
        (" \n", "blue", "any", False),
    ],
)
def test_what_agrees(rewritten: str, reference: str, how: Agree, yes: bool) -> None:
    assert agrees(rewritten, reference, how) is yes


def test_the_final_number() -> None:
    assert [final_number(t) for t in ("a 1 b 2.5", "-3", "no", "1,000")] == [2.5, -3, None, 1000]


def rewriting(*answers: str) -> Scribe:
    """A model that gives these answers to the requests to rewrite rows of `DATA`, in order."""
    by_request = {
        tuple(request(f"{i}+{i}=", str(2 * i))): [*ids(answer), END]
        for i, answer in enumerate(answers, 1)
    }

    def rule(so_far: list[int]) -> Any:
        for asked, answer in by_request.items():
            at = len(so_far) - len(asked)
            if tuple(so_far[: len(asked)]) == asked and at < len(answer):
                return says(answer[at])
        return says(3 if any(len(so_far) > len(a) for a in by_request) else 9)

    return Scribe(rule)


def request(question: str, answer: str) -> list[int]:
    text = ASKED.format(question=question, answer=answer)
    return [4, *ids(f"user\n{text}"), 5, *ids("\n"), 4, *ids("assistant\n")]


def test_answers_that_agree_are_taken_and_the_others_stay() -> None:
    method, ctx = SelfRewrite(), context(rewriting("It is 2.", "five", "6"), DATA)
    method.begin_task(ctx)
    got = method.data(ctx, DATA)
    assert got["input_ids"][0] == [*ids("1+1="), *ids("It is 2."), EOS]
    assert got["labels"][0] == [-100] * 4 + [*ids("It is 2."), EOS]
    assert got["input_ids"][1:] == DATA["input_ids"][1:]
    assert got["labels"][1:] == DATA["labels"][1:]
    assert method.evidence() == {
        "rows_rewritten": 1,
        "rows_offered": 3,
        "share_rewritten": pytest.approx(1 / 3),
        "rows_unfinished": 0,
        "rows_disagreeing": 1,
        "rows_same": 1,
    }


def test_an_answer_that_does_not_end_is_not_taken() -> None:
    method, ctx = SelfRewrite(longest=3), context(rewriting("It is 2.", "4!", "6"), DATA)
    method.begin_task(ctx)
    got = method.data(ctx, DATA)
    assert got["input_ids"][1] == [*ids("2+2="), *ids("4!"), EOS]
    assert method.evidence()["rows_unfinished"] == 1


def test_a_share_of_the_rows_and_rows_of_other_methods() -> None:
    method = SelfRewrite(ratio=0.4, agree="any")
    ctx = context(rewriting("It is 2.", "four", "a six"), DATA)
    method.begin_task(ctx)
    others = rows(("other", "9"), ("1+1=", "3"))
    from datasets import concatenate_datasets

    got = method.data(ctx, concatenate_datasets([DATA, others]))
    assert got["input_ids"][3:] == others["input_ids"]
    changed = [a != b for a, b in zip(got["input_ids"], DATA["input_ids"], strict=False)]
    assert sum(changed) == method.evidence()["rows_offered"] == 1


def test_a_resumed_task_has_the_same_rows_and_an_ended_one_keeps_none() -> None:
    method, ctx = SelfRewrite(), context(rewriting("It is 2.", "five", "a 6"), DATA)
    method.begin_task(ctx)
    got = method.data(ctx, DATA)
    again, other = SelfRewrite(), context(rewriting("no", "no", "no"), DATA)
    again.restore(other, State(method.state().tensors, method.state().values))
    assert again.data(other, DATA)["input_ids"] == got["input_ids"]
    method.end_task(ctx)
    assert method.declared_bytes(ctx) < 64
    stock = Stock()
    stock.restore(method.state())
    assert stock.rows(DATA) == {}


def test_the_base_model_writes_below_its_adapter() -> None:
    seen: list[bool] = []
    model: Any = pico.adapted(pico.causal_lm(context=2048))
    (layer,) = [m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj")]
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.disable_adapters))
    for writer, want in (("base", True), ("before", False)):
        seen.clear()
        method, ctx = SelfRewrite(writer=writer, longest=2), context(model, DATA)  # type: ignore[arg-type]
        method.begin_task(ctx)
        layer.lora_A["default"].requires_grad_(False)  # as another method freezes it
        method.data(ctx, DATA)
        assert set(seen) == {want}
        assert not layer.lora_A["default"].weight.requires_grad
        assert layer.lora_B["default"].weight.requires_grad


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(MethodError, match=r"there is no base model below\. Use 'before'"):
        SelfRewrite(writer="base").begin_task(context(pico.causal_lm(), DATA))
    with pytest.raises(MethodError, match="a classifier writes no text"):
        SelfRewrite().begin_task(without_text(Softmax([[0.0]]), examples((0, 0))))


def test_switched_off_it_asks_nothing() -> None:
    assert SelfRewrite(ratio=0).is_neutral()
    assert SelfRewrite(ratio=0).data(context(rewriting(), DATA), DATA) is DATA
