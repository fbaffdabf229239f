"""The verbs as one chain, what a verb may read, the cards, and what a wrong setting is told."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from pydantic import Field, ValidationError
from torch import Tensor

import pico
from keeptune.cards import CARD_KEYS, card
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Batch, Context, Method, State
from keeptune.methods.ewc import EWC
from keeptune.methods.joint import Joint
from keeptune.methods.lwf import LwF
from keeptune.methods.plain import Plain
from keeptune.methods.replay import Replay
from keeptune.methods.task_lora import TaskLoRA
from keeptune.methods.wise import WiSE
from pencil import Softmax, context, examples

# -- the chain ------------------------------------------------------------------------------------


class Writes(Method):
    """Writes down which of its verbs is called."""

    tag: str = "a"
    log: ClassVar[list[str]] = []

    def _write(self, verb: str) -> None:
        self.log.append(f"{self.tag}.{verb}")
        self._evidence[verb] = self._evidence.get(verb, 0) + 1

    def begin_task(self, ctx: Context) -> None:
        self._write("begin_task")

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        self._write("data")
        return dataset.select([*range(len(dataset)), 0]) if self.tag == "a" else dataset

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        self._write("loss")
        return torch.tensor({"a": 1.0, "b": 2.0}[self.tag]) if self.tag != "c" else None

    def gradients(self, ctx: Context) -> None:
        self._write("gradients")

    def after_step(self, ctx: Context) -> None:
        self._write("after_step")

    def end_task(self, ctx: Context) -> None:
        self._write("end_task")

    def serve(self, ctx: Context, task: str | None) -> None:
        self._write("serve")


class Second(Writes):
    tag: str = "b"

    @classmethod
    def name(cls) -> str:
        return "second"


class Third(Writes):
    tag: str = "c"

    @classmethod
    def name(cls) -> str:
        return "third"


@pytest.fixture
def ctx() -> Context:
    Writes.log.clear()
    return context(Softmax([[0.0, 0.0]]), examples((0, 0), (0, 1)))


def test_every_verb_runs_in_the_order_written(ctx: Context) -> None:
    chain = Chain([Second(), Writes()])
    chain.begin_task(ctx)
    chain.data(ctx, ctx.dataset)
    chain.loss(ctx, {}, None)
    chain.gradients(ctx)
    chain.after_step(ctx)
    chain.end_task(ctx)
    chain.serve(ctx, None)
    verbs = ["begin_task", "data", "loss", "gradients", "after_step", "end_task", "serve"]
    assert Writes.log == [f"{tag}.{verb}" for verb in verbs for tag in "ba"]


class Adds(Second):
    traits: ClassVar[frozenset[str]] = frozenset({"structure"})


class Chooses(Third):
    traits: ClassVar[frozenset[str]] = frozenset({"freeze"})


class Isolates(Writes):
    tag: str = "d"
    traits: ClassVar[frozenset[str]] = frozenset({"isolation"})

    @classmethod
    def name(cls) -> str:
        return "fourth"


def test_what_adds_and_freezes_begins_first_and_what_isolates_has_the_last_word(
    ctx: Context,
) -> None:
    chain = Chain([Isolates(), Writes(), Chooses(), Adds()])
    for verb in (chain.begin_task, chain.gradients, chain.after_step, chain.end_task):
        verb(ctx)
    order = {"begin_task": "bcda", "gradients": "abdc", "after_step": "abdc", "end_task": "abdc"}
    assert Writes.log == [f"{tag}.{verb}" for verb, tags in order.items() for tag in tags]


def test_rows_are_piped_and_terms_add(ctx: Context) -> None:
    chain = Chain([Writes(), Second(), Third()])
    assert len(chain.data(ctx, ctx.dataset)) == 3
    total = chain.loss(ctx, {}, None)
    assert total is not None
    assert total.item() == 3.0


def test_no_term_is_none_and_not_a_zero(ctx: Context) -> None:
    assert Chain([Third()]).loss(ctx, {}, None) is None
    assert Chain([]).loss(ctx, {}, None) is None


def test_evidence_starts_anew_with_each_task(ctx: Context) -> None:
    method = Writes()
    chain = Chain([method])
    for _ in range(2):
        chain.begin_task(ctx)
        chain.gradients(ctx)
        assert method.evidence() == {"begin_task": 1, "gradients": 1}


def test_a_chain_is_called_after_its_methods() -> None:
    assert Chain([Replay(), EWC()]).name == "replay + ewc"


def test_a_method_listed_twice_is_refused() -> None:
    with pytest.raises(MethodError, match=r"^The method 'ewc' is listed twice\. Keep one of them"):
        Chain([EWC(strength=1), EWC(strength=2)])


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (EWC(), TaskLoRA(), "structure"),
        (WiSE(), TaskLoRA(), "structure"),
        (Joint(), Replay(), "buffer"),
        (EWC(), Joint(), "restart"),
    ],
)
def test_a_clash_names_both_and_says_what_to_do(one: Method, other: Method, why: str) -> None:
    with pytest.raises(MethodError) as caught:
        Chain([one, other])
    assert str(caught.value) == (
        f"The methods {one.name()!r} and {other.name()!r} cannot run together ({why}). "
        "Remove one of them."
    )


def test_needs_of_a_method_that_is_off_do_not_count() -> None:
    assert Chain([LwF(), EWC()]).needs == {"answers"}
    assert Chain([LwF(strength=0), EWC()]).needs == frozenset()


def test_a_method_without_a_neutral_setting_is_never_off() -> None:
    assert not Writes().is_neutral()
    assert not Joint().is_neutral()
    assert Plain().is_neutral()
    assert EWC(strength=0).is_neutral()
    assert not EWC().is_neutral()


def test_a_method_that_keeps_nothing_needs_no_code() -> None:
    assert Plain().state() == State()
    assert Plain().declared_bytes(context(Softmax([[0.0]]))) == 0


# -- the context ----------------------------------------------------------------------------------


def test_random_numbers_follow_from_seed_task_and_words() -> None:
    def first(*words: object, seed: int = 0, index: int = 0) -> float:
        return float(context(Softmax([[0.0]]), seed=seed, index=index).random(*words).random())

    assert first("a", 1) == first("a", 1)
    assert (
        len({first("a"), first("b"), first("a", 1), first("a", seed=1), first("a", index=1)}) == 5
    )


def test_random_numbers_are_the_same_on_every_machine() -> None:
    # A resumed run on another machine must draw the same rows: these numbers may never change.
    drawn = context(Softmax([[0.0]]), seed=7, index=2).random("replay").integers(1000, size=5)
    assert drawn.tolist() == [481, 79, 180, 455, 280]


def test_random_numbers_leave_the_global_ones_alone() -> None:
    before = np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    context(Softmax([[0.0]])).random("a").random(10)
    assert (np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()) == before


def test_a_tied_weight_is_trained_once() -> None:
    model = pico.causal_lm(16).requires_grad_(True)
    trained = context(model).trainable()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p is model.lm_head.weight for p in trained.values()) == 1
    model.model.norm.requires_grad_(False)
    assert set(trained) - set(context(model).trainable()) == {"model.norm.weight"}


def test_answer_logits_are_those_that_predict_an_answer() -> None:
    logits = torch.arange(2 * 4 * 1.0).view(2, 4, 1)
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]])
    got = context(Softmax([[0.0]])).answer_logits(logits, {"labels": labels})
    # Positions 1 and 2 of the first row predict 5 and 6; position 0 of the second predicts 7.
    assert got.flatten().tolist() == [1.0, 2.0, 4.0]


def test_answer_logits_of_a_classifier_are_its_rows() -> None:
    logits = torch.arange(6.0).view(3, 2)
    got = context(Softmax([[0.0]])).answer_logits(logits, {"labels": torch.tensor([1, -100, 0])})
    assert got.tolist() == [[0.0, 1.0], [4.0, 5.0]]


def test_answer_labels_stand_beside_their_logits() -> None:
    ctx = context(Softmax([[0.0]]))
    text = torch.tensor([[-100, -100, 5, 6], [4, 7, -100, -100]])  # nothing predicts the 4
    assert ctx.answer_labels({"labels": text}).tolist() == [5, 6, 7]
    assert ctx.answer_labels({"labels": torch.tensor([1, -100, 0])}).tolist() == [1, 0]


def test_a_mean_over_answers_is_over_the_whole_step() -> None:
    ctx = context(Softmax([[0.0]]), answers_in_step=4.0)
    parts = [torch.tensor([1.0]), torch.tensor([2.0, 3.0, 6.0])]
    assert sum(ctx.mean_over_answers(part).item() for part in parts) == 3.0


# -- settings -------------------------------------------------------------------------------------


class Bounded(Method):
    """Every kind of bound."""

    neutral: ClassVar[dict[str, Any]] = {"at_least": 0.0}
    at_least: float = Field(2.0, ge=0, description="a")
    above: float = Field(1.0, gt=0, description="b")
    below: int = Field(3, lt=10, description="c")
    must: int = Field(..., le=5, description="d")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"at_least": -1},
            "Bounded.at_least: must be at least 0.0, got -1. "
            "Leave it out for the default, 2.0, or use 0.0 for plain fine-tuning.",
        ),
        (
            {"above": 0},
            "Bounded.above: must be above 0.0, got 0. Leave it out for the default, 1.0.",
        ),
        ({"below": 10}, "Bounded.below: must be below 10, got 10."),
        ({"must": 6}, "Bounded.must: must be at most 5, got 6."),
        ({"above": "much"}, "Bounded.above: input should be a valid number"),
        ({"above": math.inf}, "Bounded.above: input should be a finite number, got inf."),
        ({"above": math.nan}, "Bounded.above: input should be a finite number, got nan."),
        ({"musts": 1}, "Bounded.musts is not a setting. Did you mean 'must'?"),
    ],
)
def test_a_wrong_setting_is_told_in_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MethodError) as caught:
        Bounded(**{"must": 1} | settings)
    assert str(caught.value).startswith(sentence)
    assert "pydantic" not in str(caught.value)


def test_a_setting_that_must_be_given() -> None:
    with pytest.raises(MethodError, match=r"^Bounded\.must must be given\.$"):
        Bounded()  # type: ignore[call-arg]


def test_a_method_without_settings_says_so() -> None:
    with pytest.raises(MethodError, match=r"^Joint\.ratio is not a setting\. It has no settings"):
        Joint(ratio=1)  # type: ignore[call-arg]


def test_every_wrong_setting_is_told_at_once() -> None:
    with pytest.raises(MethodError, match=r"Replay\.ratio: .*Replay\.size: "):
        Replay(ratio=-1, size=0)


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        EWC().strength = 3.0  # type: ignore[misc]


# -- the card -------------------------------------------------------------------------------------


def test_a_card_is_read_from_the_modules_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "What it does, in a line.\n\nNothing here: is a key.\nPaper: Somebody 2020,\n"
        "    https://example.org\nEquation: a = b: c\nCost: none\n"
    )
    monkeypatch.setitem(sys.modules, "carded", ModuleType("carded", text))
    found = card(type(Method)("Carded", (Method,), {"__module__": "carded"}))
    assert found.title == "What it does, in a line."
    assert found.fields == {
        "Paper": "Somebody 2020, https://example.org",
        "Equation": "a = b: c",
        "Cost": "none",
    }


def test_a_real_card() -> None:
    found = card(EWC)
    assert found.title.startswith("Elastic weight consolidation")
    assert tuple(found.fields) == CARD_KEYS
    assert found.fields["Changes"] == "gradients or after_step, end_task"


def test_a_module_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "carded", ModuleType("carded"))
    found = card(type(Method)("Carded", (Method,), {"__module__": "carded"}))
    assert (found.title, found.fields) == ("", {})
