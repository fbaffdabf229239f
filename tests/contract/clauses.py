"""What every method must do: one function per clause, which fails with a sentence.

Each takes a `Subject`, so that a method of another package can be put through it as well, and each
has a planted fault in `test_planted_faults.py` that it must catch.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

import keeptune
import runs
import served
import stage
import traces
from keeptune import registry
from keeptune.cards import CARD_KEYS, card
from keeptune.chain import Chain
from keeptune.checks import CHECKS
from keeptune.errors import MethodError
from keeptune.folder import RunFolder
from keeptune.method import Context, Method
from keeptune.recipe import load_recipe
from keeptune.records import Evidence, MethodInfo, TaskEvidence
from partners import Merger, Shrink
from stage import Subject

ROOT = Path(__file__).parents[2]
VERBS = ("begin_task", "data", "loss", "gradients", "after_step", "end_task", "serve")
SLACK = 64  # bytes of counters that a card need not mention


def wants_adapter(subject: Subject) -> bool:
    """Whether it can only train an adapter."""
    return "adapter" in subject.cls.needs


def is_floor(subject: Subject) -> bool:
    """Whether it has no verb at all: plain fine-tuning itself."""
    return all(getattr(subject.cls, verb) is getattr(Method, verb) for verb in VERBS)


def neutral_is_plain(subject: Subject, *, lora: bool) -> None:
    """1: at the neutral setting it is plain fine-tuning bit for bit; a method that has none is
    plain until the task from which it acts.
    """
    plain, cls = stage.run(lora=lora, classes=subject.classes), subject.cls
    if cls.neutral or is_floor(subject):
        off = subject.neutral
        assert off.make().is_neutral(), f"is_neutral() is False at {cls.neutral}"
        got = stage.run((off,), lora=lora)
        tasks = stage.TASKS
    else:
        got, tasks = stage.run((subject,), lora=lora), cls.active_from
    for task in range(tasks):
        assert stage.same(got.weights[task], plain.weights[task]), f"task {task} is not plain"


def default_changes_something(subject: Subject, *, lora: bool) -> None:
    """2: at the default setting it changes what is learned, by more than rounding."""
    plain = stage.run(lora=lora, classes=subject.classes)
    got = stage.run((subject,), lora=lora)
    if is_floor(subject):
        assert stage.same(got.weights[-1], plain.weights[-1]), "the floor is not plain"
        return
    assert not subject.make().is_neutral(), "it is neutral at its default setting"
    share = stage.distance(got, plain) / float(plain.logits.norm())
    assert share > 1e-3, f"it changes the answers by {share:.1g} of their size"


def same_seed_same_weights(subject: Subject, *, lora: bool) -> None:
    """3: the same seed gives the same weights, bit for bit; another seed gives others."""
    first = stage.run((subject,), lora=lora)
    torch.rand(3)  # what ran before must not matter
    second = stage.run.__wrapped__((subject,), lora=lora)
    other = stage.run((subject,), lora=lora, seed=1)
    assert stage.same(first.weights[-1], second.weights[-1]), "the same seed gave other weights"
    assert not stage.same(first.weights[-1], other.weights[-1]), "the seed does nothing"


def accumulation_is_invisible(subject: Subject, *, lora: bool) -> None:
    """4: one batch or four micro batches are the same, measured against the method's effect."""
    steady = {"lora": True, "dropout": 0} if lora else {"lora": False}
    plain = stage.run(**steady, classes=subject.classes)
    whole = stage.run((subject,), **steady)
    cut = stage.run((subject,), cut=4, **steady)
    effect = stage.distance(whole, plain)
    if is_floor(subject):
        effect = float(whole.logits.norm())
    error = stage.distance(whole, cut)
    assert effect > 100 * error, f"four micro batches differ by {error:.1g}, effect {effect:.1g}"


def goes_on_after_a_task(subject: Subject, folder: Path, *, lora: bool) -> None:
    """5: saved after task 2, loaded into fresh objects, it ends as the uninterrupted run."""
    whole = stage.run((subject,), lora=lora)
    half, lost = stage.continued(subject, folder, lora=lora)
    assert not lost, f"not the same after loading: {lost}"
    assert stage.same(half.weights[-1], whole.weights[-1]), "another end after loading"
    assert half.evidence[-1] == whole.evidence[-1], "other evidence after loading"


def goes_on_inside_a_task(subject: Subject, folder: Path, *, lora: bool) -> None:
    """5: saved in the middle of task 3 and loaded, it ends as the uninterrupted run; also on GPUs,
    which round products of a matrix by how it is laid out.
    """
    whole = stage.run((subject,), lora=lora)
    half = stage.interrupted(subject, folder, lora=lora)
    assert not whole.strided, f"loading lays these out anew: {sorted(whole.strided)}"
    assert stage.same(half.weights[-1], whole.weights[-1]), "another end after an interruption"
    assert half.evidence[-1] == whole.evidence[-1], "other evidence after an interruption"


def works_beside(subject: Subject, partner: type[Method], *, lora: bool) -> None:
    """6: beside a partner, in both orders, both act; switched off, only the partner does: of
    one that comes after its partner, which shows most.
    """
    mate = Subject(partner)
    for chain in ((subject, mate), (mate, subject)):
        order = _order(chain)
        both = stage.run(chain, lora=lora, tasks=2)
        alone = stage.run((mate,), lora=lora, tasks=2, classes=subject.classes)
        assert torch.isfinite(both.logits).all(), f"{order}: answers are not numbers"
        if is_floor(subject):
            assert stage.same(both.weights[-1], alone.weights[-1]), f"{order}: not the partner"
            continue
        mine = stage.run((subject,), lora=lora, tasks=2)
        assert stage.distance(both, mine) > 0, f"{order}: {partner.__name__} did nothing"
        assert stage.distance(both, alone) > 0, f"{order}: {subject.cls.__name__} did nothing"
        _proves(subject, [values[chain.index(subject)] for values in both.evidence])
        if subject.cls.neutral and chain[0] is mate:
            pair = tuple(s.neutral if s is subject else s for s in chain)
            off = stage.run(pair, lora=lora, tasks=2)
            assert stage.same(off.weights[-1], alone.weights[-1]), f"{order}: off is not off"


def _order(chain: tuple[Subject, Subject]) -> str:
    return " then ".join(s.cls.__name__ for s in chain)


def run_together(one: Subject, other: Subject, *, lora: bool) -> None:
    """6: two methods of the registry act in one strategy, in both orders, each as it does alone."""
    for chain in ((one, other), (other, one)):
        both = stage.run(chain, lora=lora)
        assert torch.isfinite(both.logits).all(), f"{_order(chain)}: answers are not numbers"
        for place, subject in enumerate(chain):
            alone = stage.run((subject,), lora=lora)
            assert stage.distance(both, alone) > 0, f"{_order(chain)}: only {subject.cls.__name__}"
            _proves(subject, [values[place] for values in both.evidence])


def clashes_both_ways(one: type[Method], other: type[Method]) -> None:
    """6: two methods run together in both orders or in none, refused with one sentence."""
    said = []
    for pair in ((one, other), (other, one)):
        try:
            Chain([cls() for cls in pair])
        except MethodError as error:
            said.append(str(error))
    assert len(said) in (0, 2), f"refused in one order only: {said}"
    for sentence in said:
        assert repr(one.name()) in sentence, f"{one.name()} is not named: {sentence}"
        assert repr(other.name()) in sentence, f"{other.name()} is not named: {sentence}"
        assert "Remove one of them." in sentence, f"what to do is not said: {sentence}"


def trains_adapters_and_all_weights(subject: Subject) -> None:
    """7: LoRA and full weights; under LoRA the base stays; what cannot be done is refused."""
    assert not stage.run((subject,), lora=True).base_moved, "weights that are not trained moved"
    if not wants_adapter(subject):
        assert torch.isfinite(stage.run((subject,)).logits).all(), "answers are not numbers"
        return
    with pytest.raises(MethodError) as caught:
        stage.run((subject,))
    said = str(caught.value)
    assert subject.cls.name() in said, f"it does not say who refuses: {said}"
    assert "adapter: {kind: lora" in said, f"it does not say what to do: {said}"


def leaves_all_as_found(subject: Subject, *, lora: bool) -> None:
    """8: the verbs inside a task leave requires_grad, train mode and random numbers alone."""
    disturbed = stage.run((subject,), lora=lora).disturbed
    assert not disturbed, f"{sorted(set(disturbed))}"


def serving_is_invisible(subject: Subject, *, lora: bool) -> None:
    """8: whether the model answers between the tasks changes nothing of what is learned."""
    silent, served = (stage.run((subject,), lora=lora, served=served) for served in (False, True))
    assert stage.same(silent.weights[-1], served.weights[-1]), "answering changed the learning"
    assert silent.evidence == served.evidence, "answering changed the evidence"


def declares_its_memory(subject: Subject, *, lora: bool) -> None:
    """9: the bytes it declares are those of its state, in a task and after it; none are hidden."""
    for when, declared, kept, held in stage.run((subject,), lora=lora).memory:
        assert abs(declared - kept) <= SLACK, f"{when}: declares {declared} bytes, keeps {kept}"
        assert held <= declared + SLACK, f"{when}: declares {declared} bytes, holds {held}"


def card_is_complete(cls: type[Method]) -> None:
    """10: the card has every key, and names the verbs that the method really has."""
    found = card(cls)
    assert found.title.endswith("."), f"the card has no title: {found.title!r}"
    missing = [key for key in CARD_KEYS if not found.fields.get(key)]
    assert not missing, f"the card lacks {missing}"
    changes = found.fields["Changes"].replace(",", " ").split()
    claimed = {word for word in changes if word in VERBS}
    own = {verb for verb in VERBS if getattr(cls, verb) is not getattr(Method, verb)}
    assert claimed <= own, f"the card claims {sorted(claimed - own)}, which it does not have"
    assert bool(claimed) == bool(own), f"the card claims nothing, but it has {sorted(own)}"


def settings_are_bounded(cls: type[Method]) -> None:
    """10: every setting is described and bounded, and each bound's error says all it must."""
    for name, setting in cls.model_fields.items():
        assert setting.description, f"{name} has no description"
        is_number = any(kind in (int, float) for kind in _kinds(setting.annotation))
        bounds = [bad for rule in setting.metadata for bad in _beyond(rule)]
        assert bounds or not is_number, f"{name} has no bound"
        numbers = [(math.inf, "finite"), (math.nan, "")] if is_number else []
        for bad, allowed in [*bounds, *numbers]:
            _refused(cls, name, bad, allowed)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of; not what is inside a literal or a mapping."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    elif get_origin(annotation) not in (Literal, dict):
        for one in inner:
            yield from _kinds(one)


def _beyond(rule: Any) -> list[tuple[Any, str]]:
    """A value just beyond a bound, and the words that say what is allowed."""
    kinds = (("ge", "at least", -1), ("gt", "above", 0), ("le", "at most", 1), ("lt", "below", 0))
    return [
        (getattr(rule, kind) + step, f"{words} {getattr(rule, kind):g}")
        for kind, words, step in kinds
        if getattr(rule, kind, None) is not None
    ]


def _refused(cls: type[Method], name: str, bad: Any, allowed: str) -> None:
    try:
        cls(**{name: bad})
    except MethodError as error:
        said = str(error)
        for part in (f"{cls.__name__}.{name}", allowed, f"got {bad!r}", "Leave it out"):
            assert part in said, f"{part!r} is not in the error: {said}"
        return
    raise AssertionError(f"{name}={bad} is not refused")


def gives_evidence(subject: Subject, folder: Path, *, lora: bool) -> None:
    """11: it proves what it did on each task from `active_from` on, and KT001 agrees."""
    seen = stage.run((subject,), lora=lora)
    evidence = [values[0] for values in seen.evidence]
    assert json.loads(json.dumps(evidence)) == evidence, "evidence that JSON cannot hold"
    if not is_floor(subject):
        _proves(subject, evidence)
    method, cls = subject.make(), subject.cls
    info = MethodInfo(
        name=cls.name(),
        settings=method.model_dump(mode="json"),
        is_neutral=method.is_neutral(),
        proof=cls.proof,
        active_from=cls.active_from,
    )
    names = [f"t{i}" for i in range(stage.TASKS)]
    run = RunFolder.create(folder / "run", runs.info(names, (), [info]), "")
    for index, values in enumerate(evidence):
        shown = [Evidence(name=cls.name(), values=values)]
        run.write_evidence(TaskEvidence(task=names[index], index=index, methods=shown))
    (check,) = [c for c in CHECKS if c.code == "KT001"]
    assert check.run(run) is None, check.run(run)


def keeps_no_row(subject: Subject, folder: Path, *, lora: bool) -> None:
    """14: unless it says that it keeps old rows, none of a task that has ended is in its state."""
    if "buffer" in subject.cls.traits:
        return
    stage.interrupted(subject, folder, lora=lora)
    ended = [row["input_ids"] for task in range(stage.TASKS - 1) for row in stage.rows(task)]
    hits = traces.found(folder, (p for ids in ended for p in traces.tokens(ids)))
    assert not hits, f"a row of an earlier task is in {hits[0]}"


def _proves(subject: Subject, evidence: list[dict[str, Any]]) -> None:
    proof = subject.cls.proof
    first = subject.cls.active_from
    assert proof, "it names no proof"
    assert first < stage.TASKS - 1, f"it need not show anything but from task {first} on"
    for task, values in enumerate(evidence):
        if task >= first:
            shown = values.get(proof, math.nan)
            assert shown > 0, f"its proof {proof} is {shown} on task {task}"


def keeps_the_order(subject: Subject) -> None:
    """13: online, a stream's rows are learned in their order, and none in a step before its own."""
    method, model = subject.make(), stage.build_model(lora=True, dropout=0.0)
    for task in range(stage.TASKS):
        rows = stage.rows(task)
        ctx = Context(model, f"t{task}", task, rows, collate=lambda _: {}, online=True)
        ctx.rows_in_step = stage.BATCH
        method.begin_task(ctx)
        trained = method.data(ctx, rows)["input_ids"]
        method.end_task(ctx)
        own, due = {tuple(ids): i for i, ids in enumerate(rows["input_ids"])}, 0
        for begin in range(0, len(trained), stage.BATCH):
            known = due
            for place in (own.get(tuple(ids)) for ids in trained[begin : begin + stage.BATCH]):
                if place == due:
                    due += 1
                elif place is not None:
                    assert place < known, f"row {place} of task {task} comes before its turn"
    assert due == len(rows), f"of task {task} only the first {due} rows come in their order"


def old_answers_stay(subject: Subject, *, lora: bool) -> None:
    """15: what claims isolation: whatever is learned later, beside whom and with which optimizer,
    an earlier task served by its name is answered bit for bit as right after it was learned.
    """
    for other in (None, Shrink, Merger):
        beside = "" if other is None else f" beside {other.__name__}"
        for task, first, later in stage.answers_again(subject, other, lora=lora):
            off = float((first - later).abs().max())
            assert off == 0, f"answers of task {task} moved by {off:.1g}{beside}"


def is_published(cls: type[Method], root: Path = ROOT) -> None:
    """12: registered, exported, with tests, an example recipe and a page."""
    name = cls.name()
    assert name in registry.names(), f"{name} is not registered"
    assert registry.get(name) is cls, f"{name} is another class in the registry"
    assert getattr(keeptune, cls.__name__, None) is cls, f"keeptune does not export {cls.__name__}"
    test = root / f"tests/methods/test_{name}.py"
    assert test.is_file(), f"there is no {test}"
    body = ast.parse(test.read_text("utf-8")).body
    tests = [n for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    assert tests, f"{test} has no test"
    recipe = root / f"recipes/{name}.yaml"
    assert recipe.is_file(), f"there is no {recipe}"
    listed = [listed for listed, _ in load_recipe(recipe).strategy]
    assert name in listed, f"{recipe} runs {listed}"
    page = root / f"docs/methods/{name}.md"
    assert page.is_file(), f"there is no {page}"


def is_steered_as_set(subject: Subject, *, lora: bool) -> None:
    """18: strengthened to twice what it is set to, it learns what it does at twice the setting, bit
    for bit; where that is a ratio of rows, which are mixed before, it learns otherwise.
    """
    cls, every = subject.cls, subject.make().model_dump()
    harder = stage.run((dataclasses.replace(subject, effort=2.0),), lora=lora)
    if cls.steered == "ratio":
        assert stage.distance(harder, stage.run((subject,), lora=lora)) > 0, "it holds no harder"
        return
    names = ["share"] if every[cls.steered] == "auto" else [cls.steered, *cls.neutral]
    doubled = dict(subject.settings) | {name: 2 * every[name] for name in names}
    wanted = stage.run((Subject(cls, tuple(doubled.items())),), lora=lora)
    assert stage.same(harder.weights[-1], wanted.weights[-1]), "it is not as if set to twice"


# -- what is served -------------------------------------------------------------------------------


def is_served_as_it_says(subject: Subject, folder: Path, *, lora: bool) -> None:
    """16: what `serve` sets up is what `served` says, and a model that can be exported is loaded
    again, without keeptune, with the same logits.
    """
    trainer = served.learned(subject, lora=lora)
    ctx, chain = stage.context(trainer, stage.TASKS - 1), trainer.strategy
    seen = {}
    for task in ("t0", "t2", None):
        chain.serve(ctx, task)
        seen[task] = served.logits(trainer)
        if subject.cls.served == "keeptune" or (task is None and served.is_routed(trainer)):
            continue
        again, exact = served.exported(trainer, folder / f"export-{task}")
        apart = float((again - seen[task]).abs().max())
        assert apart <= (0 if exact else 1e-5), f"exported, task {task} is answered otherwise"
    if subject.cls.served == "one model":
        apart = [t for t in seen if not torch.equal(seen[t], seen[None])]
        assert not apart, f"it serves one model, but the tasks {apart} are answered by another"


def routes_by_the_question(subject: Subject) -> None:
    """17: a method that chooses a task for a question chooses by the question: of tasks that have
    words of their own, new questions go to the right one.
    """
    trainer = served.learned(subject, lora=True, apart=True)
    ctx = stage.context(trainer, stage.TASKS - 1)
    for task in range(stage.TASKS):
        asked = served.new_questions(task)
        chosen = trainer.strategy.route(ctx, asked)
        assert chosen is not None, "it chooses no task"
        right = sum(name == f"t{task}" for name in chosen) / len(asked)
        assert right > 0.9, f"{right:.0%} of the questions of task {task} are taken for its own"
