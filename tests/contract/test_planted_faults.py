"""Every clause must catch a method that is wrong in just that way."""

from __future__ import annotations

import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from pydantic import ConfigDict, Field, PrivateAttr
from torch import Tensor

import anchors
import averages
import clauses
import mixtures
import stage
import subspaces
from keeptune import demands, registry
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Batch, Context, Method, State
from keeptune.methods._adapters import FIRST, factors
from keeptune.methods._anchor import Anchored, PathIntegral, Weights
from keeptune.methods._isolate import layers
from keeptune.methods._slow import Slow
from keeptune.methods._writing.before import softened_kl
from keeptune.methods.ema import EMA
from keeptune.methods.ewc import EWC, Estimator
from keeptune.methods.freeze import Freeze
from keeptune.methods.lwf import LwF
from keeptune.methods.mixture import Mixture
from keeptune.methods.olora import OLoRA, overlap_gradient
from keeptune.methods.osf import OSF
from keeptune.methods.packnet import PackNet
from keeptune.methods.progressive import Progressive
from keeptune.methods.replay import Replay
from keeptune.methods.retrieval import Retrieval
from keeptune.methods.si import SI
from keeptune.methods.task_lora import TaskLoRA
from keeptune.methods.wise import WiSE
from partners import MoreRows, Partner, Pull
from stage import Subject

Check = Callable[..., None]


def caught(check: Check, cls: type[Method], words: str, *arguments: Any, **more: Any) -> None:
    """The check fails for this class, and for this reason."""
    with pytest.raises(AssertionError, match=words):
        check(Subject(cls), *arguments, **{"lora": False, **more})


# -- 1 --------------------------------------------------------------------------------------------


class Draws(EWC):
    """Off, but it takes a number from the global generator, and so dropout drops otherwise."""

    def begin_task(self, ctx: Context) -> None:
        torch.rand(1)


class Rounds(WiSE):
    """Off, but its arithmetic rounds: w ← before + 1 · (w − before)."""

    @torch.no_grad()
    def begin_task(self, ctx: Context) -> None:
        self._before = {n: p.detach().clone() for n, p in ctx.trainable().items()}

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        for name, weight in ctx.trainable().items():
            weight.copy_(self._before[name] + self.mix * (weight - self._before[name]))
        self._before.clear()


class Denies(EWC):
    """Equal to plain at its neutral setting, but does not say so."""

    def is_neutral(self) -> bool:
        return False


class Early(Pull):
    """Says that it acts from the second task on, and acts in the first."""

    active_from: ClassVar[int] = 1


@pytest.mark.parametrize(
    ("cls", "lora", "words"),
    [
        (Draws, True, "is not plain"),
        (Rounds, False, "is not plain"),
        (Denies, False, "is_neutral"),
        (Early, False, "task 0 is not plain"),
    ],
)
def test_1_neutral_is_not_plain(cls: type[Method], lora: bool, words: str) -> None:
    caught(clauses.neutral_is_plain, cls, words, lora=lora)


# -- 2 --------------------------------------------------------------------------------------------


class Sleeps(EWC):
    """Its default is far too weak to see."""

    strength: float = Field(1e-9, ge=0, description="weight of the penalty")


class Follows(EWC):
    """Its anchor is the weights themselves, so that its penalty is always 0."""

    def _keep_anchor(self, weights: Weights, name: str) -> None:
        super()._keep_anchor(weights, name)
        self._anchor[name]._parts = {"": weights.owner(name).data.view(-1)}


class StartsOff(EWC):
    """Its default is off."""

    strength: float = Field(0.0, ge=0, description="weight of the penalty")


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Sleeps, "changes the answers by"),
        (Follows, "changes the answers by"),
        (StartsOff, "neutral at its default"),
    ],
)
def test_2_default_changes_nothing(cls: type[Method], words: str) -> None:
    caught(clauses.default_changes_something, cls, words)


# -- 3 --------------------------------------------------------------------------------------------


class Unseeded(Replay):
    """Draws with the machine's entropy."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        chosen = np.random.default_rng().permutation(len(dataset))[:5]
        return concatenate_datasets([dataset, dataset.select(chosen)])


class Remembers(MoreRows):
    """Keeps something in the class, so that a second run is another one."""

    calls: ClassVar[list[int]] = []

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        self.calls.append(ctx.index)
        return concatenate_datasets([dataset] * (1 + len(self.calls)))


@pytest.mark.parametrize("cls", [Unseeded, Remembers])
def test_3_same_seed_other_weights(cls: type[Method]) -> None:
    caught(clauses.same_seed_same_weights, cls, "the same seed gave other weights")


# -- 4 --------------------------------------------------------------------------------------------


class PerMicroBatch(LwF):
    """Averages over its micro batch, so that four of them pay four times."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor:
        self._look_back(ctx)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            old = torch.func.functional_call(ctx.model, self._teacher.weights, (), inputs).logits
        new = ctx.answer_logits(outputs.logits, batch)
        return softened_kl(new, ctx.answer_logits(old, batch), self.temperature).mean()


class PenaltyInLoss(EWC):
    """Pays its penalty in `loss`: once for each micro batch."""

    strength: float = Field(100.0, ge=0, description="weight of the penalty")

    def gradients(self, ctx: Context) -> None:
        pass

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        pairs = ((p, n) for n, p in ctx.trainable().items() if n in self._anchor)
        terms = [
            (
                self._importance[n].full(p.device) * (p - self._anchor[n].full(p.device)).square()
            ).sum()
            for p, n in pairs
        ]
        return 0.5 * self.strength * torch.stack(terms).sum() if terms else None


@pytest.mark.parametrize("cls", [PerMicroBatch, PenaltyInLoss])
def test_4_accumulation_shows(cls: type[Method]) -> None:
    caught(clauses.accumulation_is_invisible, cls, "four micro batches differ")


# -- 5 --------------------------------------------------------------------------------------------


class Forgets(EWC):
    """Saves nothing but numbers."""

    def state(self) -> State:
        return State(values=super().state().values)


class Coarse(EWC):
    """Saves half of the digits."""

    def state(self) -> State:
        kept = super().state()
        return State({n: t.half() for n, t in kept.tensors.items()}, kept.values)

    def restore(self, ctx: Context, state: State) -> None:
        exact = {n: t.float() for n, t in state.tensors.items()}
        super().restore(ctx, State(exact, state.values))


class LosesImportance(SI):
    """Saves where the weights were, and not what they matter."""

    def state(self) -> State:
        kept = super().state()
        named = {n: t for n, t in kept.tensors.items() if not n.startswith("importance/")}
        return State(named, kept.values)


class Stream(Partner):
    """Draws from one long stream of numbers whose place is not saved."""

    proof: ClassVar[str] = "drawn"
    _random: random.Random = PrivateAttr(default_factory=lambda: random.Random(0))

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        chosen = self._random.sample(range(len(dataset)), 3)
        self._evidence["drawn"] = sum(chosen)
        return concatenate_datasets([dataset, dataset.select(chosen)])


class Swaps(EWC):
    """Restores importance as anchor."""

    def restore(self, ctx: Context, state: State) -> None:
        super().restore(ctx, state)
        self._anchor, self._importance = self._importance, self._anchor


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Forgets, "another end"),
        (Coarse, "another end"),
        (LosesImportance, "another end|not the same after loading"),
        (Stream, "another end"),
        (Swaps, "not the same after loading"),
    ],
)
def test_5_does_not_go_on_after_a_task(cls: type[Method], words: str, tmp_path: Path) -> None:
    caught(clauses.goes_on_after_a_task, cls, words, tmp_path)


class LosesTeacher(LwF):
    """Saves its old weights between tasks only, when there are none."""

    def state(self) -> State:
        kept = super().state()
        named = {n: t for n, t in kept.tensors.items() if not n.startswith("teacher/")}
        return State(named, kept.values | {"teacher_of": -1})


class LosesBefore(WiSE):
    """Takes the weights in the middle of the task for those before it."""

    def restore(self, ctx: Context, state: State) -> None:
        for weight in self._before.values():
            weight.mul_(0.9)


class LosesPath(SI):
    """Saves no path, which begins anew in the middle of the task."""

    def state(self) -> State:
        kept = super().state()
        named = {n: t for n, t in kept.tensors.items() if not n.startswith("path/")}
        return State(named, kept.values)


class KeepsColumns(WiSE):
    """Keeps its weights column by column, and gets them back row by row."""

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        for name, weight in self._before.items():
            self._before[name] = weight.T.contiguous().T if weight.dim() == 2 else weight


class LosesCount(Partner):
    """Its evidence counts the steps, and the count is not saved."""

    proof: ClassVar[str] = "steps"
    _steps: int = PrivateAttr(0)

    def begin_task(self, ctx: Context) -> None:
        self._steps = 0

    def after_step(self, ctx: Context) -> None:
        self._steps += 1

    def evidence(self) -> dict[str, Any]:
        return {"steps": self._steps}


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (LosesTeacher, "another end"),
        (LosesBefore, "another end"),
        (LosesPath, "other evidence"),
        (LosesCount, "other evidence"),
        (KeepsColumns, "lays these out anew"),
    ],
)
def test_5_does_not_go_on_inside_a_task(cls: type[Method], words: str, tmp_path: Path) -> None:
    caught(clauses.goes_on_inside_a_task, cls, words, tmp_path)


# -- 6 --------------------------------------------------------------------------------------------


class DropsRows(Replay):
    """Adds to the task's own rows and so drops what a method before it added."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        return super().data(ctx, ctx.dataset)


class Overwrites(Partner):
    """Replaces the gradients instead of adding to them."""

    proof: ClassVar[str] = "always"

    def gradients(self, ctx: Context) -> None:
        self._evidence["always"] = 1
        for parameter in ctx.trainable().values():
            parameter.grad = parameter.detach().clone()


class Alone(Partner):
    """Does nothing once another method has added rows."""

    proof: ClassVar[str] = "always"

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        self._evidence["always"] = 1
        if len(dataset) > len(ctx.dataset):
            return dataset
        return concatenate_datasets([dataset, dataset.select(range(5, 8))])


class ShyProof(EWC):
    """Loses its evidence when more rows than its own are trained on."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        object.__setattr__(self, "_evidence", {} if len(dataset) > stage.ROWS else self._evidence)
        return dataset

    def evidence(self) -> dict[str, Any]:
        return {}


class NotOff(EWC):
    """Off, but it sorts the rows that a method before it added."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        return dataset if len(dataset) == stage.ROWS else dataset.select(range(1, len(dataset)))


@pytest.mark.parametrize(
    ("cls", "partner", "words"),
    [
        (DropsRows, MoreRows, "MoreRows then DropsRows: MoreRows did nothing"),
        (Overwrites, Pull, "Pull then Overwrites: Pull did nothing"),
        (Alone, MoreRows, "MoreRows then Alone: Alone did nothing"),
        (ShyProof, MoreRows, "its proof gradient_share is nan"),
        (NotOff, MoreRows, "MoreRows then NotOff: off is not off"),
    ],
)
def test_6_does_not_work_beside(cls: type[Method], partner: type[Method], words: str) -> None:
    caught(clauses.works_beside, cls, words, partner)


class OneWay(Chain):
    """Looks for clashes with the methods before only."""

    def _check_clashes(self) -> None:
        for index, one in enumerate(self.methods):
            for other in self.methods[:index]:
                if one.excludes & other.traits:
                    raise MethodError(f"{one.name()!r} and {other.name()!r}. Remove one of them.")


class Mumbles(Chain):
    """Refuses without saying what to do."""

    def _check_clashes(self) -> None:
        names = " and ".join(repr(m.name()) for m in self.methods)
        raise MethodError(f"The methods {names} clash.")


class Nameless(Chain):
    """Refuses without saying whom."""

    def _check_clashes(self) -> None:
        raise MethodError("Methods clash. Remove one of them.")


@pytest.mark.parametrize(
    ("chain", "words"),
    [(OneWay, "one order only"), (Mumbles, "what to do"), (Nameless, "is not named")],
)
def test_6_a_clash_is_refused_badly(
    chain: type[Chain], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clauses, "Chain", chain)
    with pytest.raises(AssertionError, match=words):
        clauses.clashes_both_ways(WiSE, TaskLoRA)


# -- 7 --------------------------------------------------------------------------------------------


class Thaws(Partner):
    """Trains the base model under LoRA."""

    def begin_task(self, ctx: Context) -> None:
        ctx.model.requires_grad_(True)


class SilentNeed(TaskLoRA):
    """Needs an adapter and does not say so."""

    needs: ClassVar[frozenset[str]] = frozenset()


def test_7_trains_what_it_must_not() -> None:
    with pytest.raises(AssertionError, match="weights that are not trained moved"):
        clauses.trains_adapters_and_all_weights(Subject(Thaws))


def test_7_breaks_on_full_weights() -> None:
    with pytest.raises(AttributeError):
        clauses.trains_adapters_and_all_weights(Subject(SilentNeed))


def test_7_full_weights_are_refused_unclearly(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        if not hasattr(self.model, "peft_config"):
            raise MethodError("task_lora: an adapter is needed.")

    monkeypatch.setattr(demands, "_require_adapter", refuse)
    with pytest.raises(AssertionError, match="does not say what to do"):
        clauses.trains_adapters_and_all_weights(Subject(TaskLoRA))


# -- 8 --------------------------------------------------------------------------------------------


class Freezes(Partner):
    """Stops training the first weight."""

    def after_step(self, ctx: Context) -> None:
        next(ctx.model.parameters()).requires_grad_(False)


class StaysInEval(Partner):
    """Measures in eval mode and stays there."""

    def end_task(self, ctx: Context) -> None:
        ctx.model.eval()


class DrawsTorch(Partner):
    """Uses torch's global generator."""

    def gradients(self, ctx: Context) -> None:
        torch.rand(1)


class DrawsNumpy(Partner):
    """Uses numpy's global generator."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        np.random.rand()
        return dataset


class DrawsPython(Partner):
    """Uses Python's global generator."""

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> None:
        random.random()


class StaysFrozen(Freeze):
    """Does not give free what it froze for the task."""

    def end_task(self, ctx: Context) -> None:
        pass


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Freezes, "after_step changed requires_grad"),
        (StaysFrozen, "end_task changed requires_grad"),
        (StaysInEval, "end_task changed train mode"),
        (DrawsTorch, "gradients changed torch's global random numbers"),
        (DrawsNumpy, "data changed numpy's global random numbers"),
        (DrawsPython, "loss changed Python's global random numbers"),
    ],
)
def test_8_does_not_leave_all_as_found(cls: type[Method], words: str) -> None:
    caught(clauses.leaves_all_as_found, cls, words)


class KeepsServing(EMA):
    """Goes on from the weights that answered."""

    def begin_task(self, ctx: Context) -> None:
        self._fast.clear()


class ServesStep(Partner):
    """Shrinks the weights a little whenever the model answers."""

    @torch.no_grad()
    def serve(self, ctx: Context, task: str | None) -> None:
        for parameter in ctx.trainable().values():
            parameter.mul_(0.9)


@pytest.mark.parametrize("cls", [KeepsServing, ServesStep])
def test_8_answering_changes_the_learning(cls: type[Method]) -> None:
    caught(clauses.serving_is_invisible, cls, "answering changed the learning")


# -- 9 --------------------------------------------------------------------------------------------


class Modest(EWC):
    """Declares half of what it keeps."""

    def declared_bytes(self, ctx: Context) -> int:
        return super().declared_bytes(ctx) // 2


class Careless(WiSE):
    """Declares a copy that it keeps only in the middle of a task."""

    def declared_bytes(self, ctx: Context) -> int:
        return sum(p.nbytes for p in ctx.trainable().values())


class Hides(EWC):
    """Keeps a copy of the model that is not in its state."""

    _copy: list[Tensor] = PrivateAttr(default_factory=list)

    def begin_task(self, ctx: Context) -> None:
        self._copy = [p.detach().clone() for p in ctx.model.parameters()]


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Modest, "after task 0: declares .* keeps"),
        (Careless, "after task 0: declares .* keeps 0"),
        (Hides, "in the middle of task 0: declares 0 bytes, holds"),
    ],
)
def test_9_declares_other_memory(cls: type[Method], words: str) -> None:
    caught(clauses.declares_its_memory, cls, words)


# -- 10 -------------------------------------------------------------------------------------------


def in_module(monkeypatch: pytest.MonkeyPatch, card: str, *bases: type[Method]) -> type[Method]:
    """A method whose module has this card."""
    module = ModuleType("carded", card)
    monkeypatch.setitem(sys.modules, "carded", module)
    return type(Method)("Carded", bases or (Method,), {"__module__": "carded"})


def card_of(name: str) -> str:
    """The card of one of keeptune's own methods."""
    return str(sys.modules[registry.get(name).__module__].__doc__)


CHANGES = "Changes: gradients or after_step, end_task"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Equation:", "Formula:", r"the card lacks \['Equation'\]"),
        (CHANGES, "Changes:", r"the card lacks \['Changes'\]"),
        (CHANGES, "Changes: loss, end_task", r"claims \['loss'\]"),
        (CHANGES, "Changes: nothing", "the card claims nothing"),
        ("earlier tasks.", "earlier tasks", "has no title"),
    ],
)
def test_10_the_card_is_not_complete(
    old: str, new: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = card_of("ewc")
    assert old in card
    clauses.card_is_complete(in_module(monkeypatch, card, EWC))
    with pytest.raises(AssertionError, match=words):
        clauses.card_is_complete(in_module(monkeypatch, card.replace(old, new, 1), EWC))


class Undescribed(Method):
    strength: float = Field(1.0, ge=0)


class Unbounded(Method):
    strength: float = Field(1.0, description="weight")


class UnboundedAtTimes(Method):
    """A number that may be left out has no bound; a literal and a switch need none."""

    precision: Literal["float32", "int8"] = Field("float32", description="how exact")
    times: Literal[1, 2] = Field(1, description="how often")
    fast: bool = Field(True, description="how fast")
    strength: int | None = Field(None, description="weight")


class Endless(Method):
    model_config = ConfigDict(allow_inf_nan=True)
    strength: float = Field(1.0, ge=0, description="weight")


class Curt(Method):
    """Its error does not say what was got."""

    strength: float = Field(1.0, ge=0, description="weight")

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except MethodError:
            raise MethodError("Curt.strength: must be at least 0. Leave it out.") from None


class Lenient(Method):
    """Names a bound and does not keep it."""

    strength: float = Field(1.0, ge=0, description="weight")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{k: max(v, 0.0) for k, v in settings.items()})


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Undescribed, "strength has no description"),
        (Unbounded, "strength has no bound"),
        (UnboundedAtTimes, "strength has no bound"),
        (Endless, "strength=inf is not refused"),
        (Curt, "'got -1' is not in the error"),
        (Lenient, "strength=-1 is not refused"),
    ],
)
def test_10_a_setting_is_not_bounded(cls: type[Method], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        clauses.settings_are_bounded(cls)


# -- 11 -------------------------------------------------------------------------------------------


class Shows(Partner):
    """Shows what `shown` says as its proof."""

    proof: ClassVar[str] = "effect"
    shown: ClassVar[dict[str, Any]] = {}

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        return dataset

    def evidence(self) -> dict[str, Any]:
        return self.shown


class Unproven(Shows):
    proof: ClassVar[str] = ""


class Silent(Shows):
    shown: ClassVar[dict[str, Any]] = {"other": 1.0}


class Zero(Shows):
    shown: ClassVar[dict[str, Any]] = {"effect": 0}


class Undefined(Shows):
    shown: ClassVar[dict[str, Any]] = {"effect": math.nan}


class KeyedByNumber(Shows):
    shown: ClassVar[dict[str, Any]] = {"effect": 1, "rows": {0: 5}}


class Excused(Silent):
    """Excuses itself from showing anything until after the stream."""

    active_from: ClassVar[int] = 99


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Unproven, "it names no proof"),
        (Silent, "its proof effect is nan on task 1"),
        (Zero, "its proof effect is 0 on task 1"),
        (Undefined, "JSON|is nan"),
        (KeyedByNumber, "evidence that JSON cannot hold"),
        (Excused, "from task 99"),
    ],
)
def test_11_gives_no_evidence(cls: type[Method], words: str, tmp_path: Path) -> None:
    caught(clauses.gives_evidence, cls, words, tmp_path)


# -- 12 -------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what must be there for EWC."""
    for name in ("tests/methods/test_ewc.py", "recipes/ewc.yaml", "docs/methods/ewc.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clauses.ROOT / name, tmp_path / name)
    return tmp_path


def test_12_the_tree_is_right_before_a_fault(tree: Path) -> None:
    clauses.is_published(EWC, tree)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tests/methods/test_ewc.py", None, "there is no .*test_ewc.py"),
        ("tests/methods/test_ewc.py", "def helper(): ...", "has no test"),
        ("recipes/ewc.yaml", None, "there is no .*ewc.yaml"),
        ("docs/methods/ewc.md", None, "there is no .*ewc.md"),
        (
            "recipes/ewc.yaml",
            "{model: demo, tasks: [{name: a, train: a.jsonl, eval: b.jsonl}], methods: [replay]}",
            r"runs \['replay'\]",
        ),
    ],
)
def test_12_a_file_is_missing_or_empty(tree: Path, name: str, text: str | None, words: str) -> None:
    (tree / name).unlink() if text is None else (tree / name).write_text(text)
    with pytest.raises(AssertionError, match=words):
        clauses.is_published(EWC, tree)


def test_12_not_registered(tree: Path) -> None:
    with pytest.raises(AssertionError, match="is not registered"):
        clauses.is_published(Shows, tree)


def test_12_another_class_is_registered(tree: Path) -> None:
    other = type(EWC)("EWC", (EWC,), {"__module__": EWC.__module__})
    with pytest.raises(AssertionError, match="another class"):
        clauses.is_published(other, tree)


def test_12_not_exported(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clauses, "keeptune", ModuleType("keeptune"))
    with pytest.raises(AssertionError, match="does not export EWC"):
        clauses.is_published(EWC, tree)


# -- 13 -------------------------------------------------------------------------------------------


class Shuffles(Partner):
    """Learns a stream in an order of its own."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        return dataset.select(ctx.random("order").permutation(len(dataset)))


class PeeksAhead(Partner):
    """Brings rows of the stream back before they have come."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        ahead = [number for i in range(len(dataset)) for number in (i, (i + 5) % len(dataset))]
        return dataset.select(ahead)


class SameStep(Partner):
    """Brings a row back in the step in which it comes."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        return dataset.select([i // 2 for i in range(2 * len(dataset))])


class LeavesOut(Partner):
    """Drops the last row."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        return dataset.select(range(len(dataset) - 1))


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Shuffles, "comes before its turn|only the first"),
        (PeeksAhead, "comes before its turn"),
        (SameStep, "comes before its turn"),
        (LeavesOut, "only the first 9 rows"),
    ],
)
def test_13_a_stream_is_out_of_order(cls: type[Method], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        clauses.keeps_the_order(Subject(cls))


# -- 14 -------------------------------------------------------------------------------------------


class Undeclared(Replay):
    """Keeps rows as replay does, and does not say so."""

    traits: ClassVar[frozenset[str]] = frozenset()


class Listed(Partner):
    """Keeps one row among its values."""

    _row: list[int] = PrivateAttr(default_factory=list)

    def end_task(self, ctx: Context) -> None:
        self._row = list(ctx.dataset[0]["input_ids"])

    def state(self) -> State:
        return State(values={"row": self._row})

    def restore(self, ctx: Context, state: State) -> None:
        self._row = state.values["row"]


@pytest.mark.parametrize("cls", [Undeclared, Listed])
def test_14_keeps_a_row(cls: type[Method], tmp_path: Path) -> None:
    caught(clauses.keeps_no_row, cls, "a row of an earlier task is in", tmp_path)


# -- 15 -------------------------------------------------------------------------------------------


class Decays(PackNet):
    """AdamW moves what earlier tasks own: nothing is put back."""

    def after_step(self, ctx: Context) -> None:
        if not self._pruned:
            super().after_step(ctx)

    def end_task(self, ctx: Context) -> None:
        self._owned.moves = {}
        super().end_task(ctx)


class ServesAll(PackNet):
    """Serves every task with the weights of all."""

    def serve(self, ctx: Context, task: str | None) -> None:
        super().serve(ctx, None)


class OneAdapter(TaskLoRA):
    """Trains the first task's adapter on."""

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        self._adapters[ctx.task] = "task_000"
        ctx.model.set_adapter("task_000")

    def end_task(self, ctx: Context) -> None:
        self._evidence.update(adapters=1)


class TrainsOldColumns(Progressive):
    """A new task trains the columns of earlier ones on."""

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        self._columns(ctx).requires_grad_(True)


class Leaks(Progressive):
    """What a new column says enters the model's first layer, which older columns read."""

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        up = list(self._columns(ctx))[-1].up
        first = layers(ctx.model, "leaks")[1][0]
        first.register_forward_hook(lambda module, inputs, output: output + up.detach().sum())


@pytest.mark.parametrize(
    ("cls", "lora"),
    [
        (Decays, False),
        (ServesAll, False),
        (OneAdapter, True),
        (TrainsOldColumns, False),
        (Leaks, False),
    ],
)
def test_15_old_answers_move(cls: type[Method], lora: bool) -> None:
    caught(clauses.old_answers_stay, cls, "answers of task 0 moved by", lora=lora)


# -- methods with a quadratic penalty -------------------------------------------------------------


class Twice(EWC):
    """Pulls by strength · 2 Ω d, as for a penalty without the half."""

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        super().gradients(ctx)
        super().gradients(ctx)


class Drifts(SI):
    """Its anchor follows the weights from step to step."""

    def gradients(self, ctx: Context) -> None:
        weights = self._weights(ctx)
        for name in weights.names():
            self._keep_anchor(weights, name)
        super().gradients(ctx)


@pytest.mark.parametrize("cls", [Twice, Drifts, Follows])
def test_an_anchor_pulls_otherwise(cls: type[Anchored]) -> None:
    with pytest.raises(AssertionError, match="pulls by"):
        anchors.pulls_by_its_formula(cls)


class NoRate(EWC):
    """Steps back as far at any learning rate."""

    def _move_back(self, weights: Weights, name: str, learning_rate: float) -> None:
        super()._move_back(weights, name, 1.0)


class Explicit(EWC):
    """Takes the penalty's gradient at the old place, which is stable for small strengths only."""

    def _move_back(self, weights: Weights, name: str, learning_rate: float) -> None:
        value = weights.value(name)
        for span in weights.spans(name):
            anchor, importance = self._block(name, span, value.device)
            assert importance is not None
            value[span] -= learning_rate * self._strength * importance * (value[span] - anchor)


@pytest.mark.parametrize("cls", [NoRate, Explicit])
def test_an_implicit_step_is_another(cls: type[Anchored]) -> None:
    with pytest.raises(AssertionError, match="it steps to"):
        anchors.steps_back_by_its_formula(cls)


class LooksLate(SI):
    """Waits for its turn in the list, when others have edited the gradient."""

    def reads_the_step(self, ctx: Context) -> bool:
        return False


class Penalised(SI):
    """Adds its own pull before it looks at the gradient."""

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        Anchored.gradients(self, ctx)
        self._path.before(ctx, self._weights(ctx), self._anchor, {}, 0.0)


class OneStepLate(PathIntegral):
    """Looks at where the weights were before the step, and so adds nothing."""

    def after(self, *_: Any) -> None:
        self._gradient.clear()


class SeesNoStep(SI):
    """Its path has the gradients and not the steps."""

    _path: PathIntegral = PrivateAttr(default_factory=OneStepLate)


@pytest.mark.parametrize("cls", [LooksLate, Penalised, SeesNoStep])
def test_a_path_is_another(cls: type[Anchored]) -> None:
    with pytest.raises(AssertionError, match="its path in task"):
        anchors.follows_the_tasks_own_gradient(cls)


class OfTheMean(EWC):
    """Squares the mean gradient of a batch, in which opposite examples cancel."""

    fisher: Estimator = Field("batched", description="how the Fisher is estimated")


def test_a_fisher_squares_the_mean() -> None:
    with pytest.raises(AssertionError, match="F is"):
        anchors.squares_each_example(OfTheMean)


# -- methods with slow weights --------------------------------------------------------------------


class NeverUpdates(EMA):
    """Its slow weights stay where they began, as in the code that I-LoRA's authors released."""

    def after_step(self, ctx: Context) -> None:
        self._evidence["moved"] = 1.0


class ForgetsAtOnce(EMA):
    """Keeps the share that it should let go."""

    def after_step(self, ctx: Context) -> None:
        hasty = EMA(decay=1 - self.decay)
        hasty._slow = self._slow
        hasty.after_step(ctx)
        self._evidence.update(hasty._evidence)


class StartsAnew(EMA):
    """Begins its average anew with each task."""

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        self._slow.clear()


@pytest.mark.parametrize("cls", [NeverUpdates, ForgetsAtOnce, StartsAnew])
def test_an_average_follows_otherwise(cls: type[Slow]) -> None:
    averages.follows_by_its_formula(EMA)
    with pytest.raises(AssertionError, match="answers with"):
        averages.follows_by_its_formula(cls)


# -- methods that keep new updates out of old directions ------------------------------------------


class Himself(OLoRA):
    """Is held orthogonal to the new adapter itself."""

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        for name, factor in factors(ctx.model, FIRST).items():
            if "lora_A" in name and factor.grad is not None:
                factor.grad += self.strength * overlap_gradient(factor, factor)


class LastOnly(OLoRA):
    """Is held orthogonal to the last task's adapter only."""

    def gradients(self, ctx: Context) -> None:
        frozen, self._frozen = self._frozen, self._frozen[-1:]
        super().gradients(ctx)
        self._frozen = frozen


@pytest.mark.parametrize("cls", [Himself, LastOnly])
def test_a_new_adapter_is_pulled_elsewhere(cls: type[OLoRA]) -> None:
    with pytest.raises(AssertionError, match="is pulled otherwise"):
        subspaces.pulls_off_the_earlier_adapters(cls)


class GradientsOnly(OSF):
    """Leaves the step to the optimizer, as PEFT's adapter does."""

    def after_step(self, ctx: Context) -> None:
        pass


class OneSided(OSF):
    """Keeps the output side only."""

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        for old in self._old.values():
            old.kept, old.v = old.kept[:, None] * old.v.T, None


class DoesNotGrow(OSF):
    """Holds as few directions in the second task as in the first."""

    def begin_task(self, ctx: Context) -> None:
        ctx.index = 0
        super().begin_task(ctx)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (GradientsOnly, "leaks .* task 0"),
        (OneSided, "leaks"),
        (DoesNotGrow, "leaks .* task 1"),
    ],
)
def test_the_old_subspace_is_not_kept(cls: type[OSF], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        subspaces.keeps_the_old_subspace(cls)


# -- methods with a gate over experts -------------------------------------------------------------


class TrainsOldExperts(Mixture):
    """A new task trains the experts of earlier ones on."""

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        for name in self._frozen:
            for factor in factors(ctx.model, name).values():
                factor.requires_grad_(True)


class TrainsBelow(Mixture):
    """Trains what is below the gate as well, so that old words enter it otherwise."""

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        for factor in factors(ctx.model, FIRST).values():
            factor.requires_grad_(True)


class LearnsLast(Mixture):
    """Its gate learns anew with each task, of that task's tokens: all others look like noise."""

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        means = self._router.tensors["means"]
        self._router.tensors["means"] = torch.cat([0 * means[:-1], means[-1:]])
        self._share_out(ctx)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (TrainsOldExperts, "the expert of task 0 has moved"),
        (TrainsBelow, "words of task 0 enter the gate moved by"),
        (LearnsLast, "words of task . go to others"),
    ],
)
def test_a_mixture_does_not_keep_old_tasks(cls: type[Mixture], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        mixtures.keeps_old_experts_and_their_shares(cls)


# -- 16, 17 and what runs together ----------------------------------------------------------------


class Behind(Partner):
    """Answers by slow weights, which it puts in while the model runs: an export has the fast."""

    _slow: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _fast: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        for name, weight in ctx.trainable().items():
            self._slow[name] = 0.9 * self._slow.get(name, weight) + 0.1 * weight

    def serve(self, ctx: Context, task: str | None) -> None:
        if not self._fast:
            self._fast = {name: p.detach().clone() for name, p in ctx.trainable().items()}
            ctx.model.register_forward_pre_hook(lambda *_: self._put(ctx, self._slow))
            ctx.model.register_forward_hook(lambda *_: self._put(ctx, self._fast))

    @torch.no_grad()
    def _put(self, ctx: Context, weights: dict[str, Tensor]) -> None:
        for name, weight in ctx.trainable().items():
            weight.copy_(weights[name])


class Joined(TaskLoRA):
    """Serves an adapter for each task, and says that it serves one model."""

    served: ClassVar[Literal["one model", "per task", "keeptune"]] = "one model"


@pytest.mark.parametrize(
    ("cls", "lora", "words"),
    [(Behind, False, "is answered otherwise"), (Joined, True, "it serves one model, but")],
)
def test_16_serves_otherwise(cls: type[Method], lora: bool, words: str, tmp_path: Path) -> None:
    caught(clauses.is_served_as_it_says, cls, words, tmp_path, lora=lora)


class First(TaskLoRA):
    """Takes every question for one of the first task."""

    unknown: Literal["merge", "nearest", "classifier"] = Field("nearest", description="how")

    def route(self, ctx: Context, prompts: Any) -> list[str]:
        return ["t0" for _ in prompts]


def test_17_routes_by_nothing() -> None:
    with pytest.raises(AssertionError, match="0% of the questions of task 1"):
        clauses.routes_by_the_question(Subject(First))


class Unmoved(LwF):
    """Says that it can be strengthened, and holds as it is set."""

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        self._effort = 1.0
        return super().loss(ctx, batch, outputs)


class UnmovedRatio(Replay):
    """Says so too, and draws no more rows."""

    def gradients(self, ctx: Context) -> None:
        pass


@pytest.mark.parametrize(
    ("cls", "words"), [(Unmoved, "not as if set to twice"), (UnmovedRatio, "holds no harder")]
)
def test_18_holds_no_harder(cls: type[Method], words: str) -> None:
    caught(clauses.is_steered_as_set, cls, words)


class Mute(Retrieval):
    """Keeps rows, and shows none."""

    def prompt(self, ctx: Context, ids: Any, room: int) -> Any:
        return ids


def test_6_only_one_of_two_acts() -> None:
    with pytest.raises(AssertionError, match="only Pull"):
        clauses.run_together(Subject(Pull), Subject(Mute), lora=False)
