"""Every registered method against every clause, and other forms of it against those that run it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

import anchors
import averages
import clauses
import mixtures
import subspaces
from keeptune import registry
from keeptune.method import Method
from keeptune.methods._anchor import Anchored, Travelled
from keeptune.methods._slow import Slow
from keeptune.methods.ewc import EWC
from keeptune.methods.mixture import Mixture
from keeptune.methods.olora import OLoRA
from keeptune.methods.osf import OSF
from keeptune.methods.task_lora import TaskLoRA
from partners import PARTNERS
from stage import Subject

# The stage's model writes noise: little of it is a row, and none of it agrees with an answer.
AT: dict[str, dict[str, Any]] = {
    "pseudo_replay": {"ratio": 1.0},
    "self_rewrite": {"agree": "any", "top_k": 20},
}


def usual(name: str) -> Subject:
    """A method at its default settings, or at those by which the stage can see it."""
    return Subject(registry.get(name), tuple(AT.get(name, {}).items()))


SUBJECTS = [usual(name) for name in registry.names()]
CASES = [
    pytest.param(subject, lora, id=f"{subject.cls.name()}-{'lora' if lora else 'full'}")
    for subject in SUBJECTS
    for lora in (False, True)
    if lora or not clauses.wants_adapter(subject)
]


TEXTS = str(Path(__file__).parent / "texts.txt")


def variant(name: str, *, lora: bool = False, **settings: Any) -> Any:
    """A method at other settings, which take other ways through its code."""
    shown = " ".join(f"{key} {value}" for key, value in settings.items())
    subject = Subject(registry.get(name), tuple(settings.items()))
    return pytest.param(subject, lora, id=f"{name}-{'lora' if lora else 'full'}-{shown}")


VARIANTS = [
    variant("ewc", form="online"),
    variant("ewc", proximal=True),
    variant("ewc", precision="uint8", place="disk"),
    variant("ewc", lora=True, on="effective"),
    variant("ewc", strength=100.0),
    variant("ewc", fisher="signs"),
    variant("si", lora=True, on="effective"),
    variant("si", proximal=True),
    variant("mas", top_k=3),
    variant("l2sp", decoupled=True),
    variant("l2sp", proximal=True),
    variant("l2sp", to="base"),
    variant("hierarchical", lora=True, on="factors"),
    variant("lwf", targets="recorded"),
    variant("lwf", lora=True, targets="recorded", top_k=4),
    variant("kl_base", direction="reverse"),
    variant("kl_base", texts=TEXTS, rows=3),
    variant("kl_base", texts=TEXTS, direction="reverse", temperature=2.0),
    variant("kl_base", lora=True, texts=TEXTS),
    variant("der", size=6, top_k=3),
    variant("der_pp", label_strength=0.0),
    variant("ema", start="slow"),
    variant("wise", mix=(0.9, 0.5, 0.1)),
    variant("wise", mix=0.9, guard=TEXTS, rise=0.01),
    variant("wise", lora=True, mix=0.9, guard=TEXTS, rise=0.01),
    variant("merge", form="dare_ties", start="merged"),
    variant("merge", lora=True, form="slerp"),
    variant("merge", form="task_arithmetic", strength=0.3),
    variant("ilora", lora=True, start="slow", size=6),
    variant("olora", lora=True, strength=0.1, norm_strength=0.1),
    variant("mixture", lora=True, layers=0.0, temperature=0.2),
    variant("gem", margin=0.0),
    variant("freeze", cache=True),
    variant("freeze", cache=True, cache_gb=2e-6),  # room for some rows only
    variant("freeze", layers=0.0, embeddings=False, patterns=("*layers.0.*",)),
    variant("half", share=0.25),
    variant("packnet", prune=0.75, after=0.5),  # prunes before the interruption
    variant("eaft", mask=0.5),
    # Small, so that the policies have to choose.
    variant("replay", policy="reservoir", size=6),
    variant("replay", policy="ring", size=6),
    variant("replay", policy="balanced", size=6),
    variant("replay", policy="herding", size=6),
    variant("replay", lora=True, policy="surprise", size=6),
    variant("replay", lora=True, policy="diversity", size=6),
    variant("replay", count="tokens", repeats=True),
    variant("feature_replay", lora=True, layer=0, size=6),
    variant("feature_replay", module="model.norm", rows=3, strength=0.5),
    variant("pseudo_replay", ratio=0.0, general=0.5, longest=64),
    variant("pseudo_replay", lora=True, ratio=0.5, general=0.3, distil=1.0, probe=4, longest=64),
    variant("task_lora", lora=True, unknown="nearest"),
    variant("task_lora", lora=True, unknown="classifier"),
    variant("retrieval", by="hidden", size=6),
]
SERVING = [case for case in CASES + VARIANTS if case.values[0].cls.serve is not Method.serve]
TOGETHER = [
    ("ewc", "replay"),
    ("ewc", "lwf"),
    ("ilora", "label_smoothing"),
    ("mixture", "replay"),
    ("olora", "replay"),
    ("packnet", "label_smoothing"),
    ("pseudo_replay", "lwf"),
    ("task_lora", "retrieval"),
]
ROUTERS = [Subject(TaskLoRA, (("unknown", kind),)) for kind in ("nearest", "classifier")]
each_case = pytest.mark.parametrize(("subject", "lora"), CASES)
each_form = pytest.mark.parametrize(("subject", "lora"), CASES + VARIANTS)
each_method = pytest.mark.parametrize("name", registry.names())


@each_case
def test_1_neutral_is_plain(subject: Subject, lora: bool) -> None:
    clauses.neutral_is_plain(subject, lora=lora)


@each_form
def test_2_default_changes_something(subject: Subject, lora: bool) -> None:
    clauses.default_changes_something(subject, lora=lora)


@each_form
def test_3_same_seed_same_weights(subject: Subject, lora: bool) -> None:
    clauses.same_seed_same_weights(subject, lora=lora)


@each_form
def test_4_accumulation_is_invisible(subject: Subject, lora: bool) -> None:
    clauses.accumulation_is_invisible(subject, lora=lora)


@each_form
def test_5_goes_on_after_a_task(subject: Subject, lora: bool, tmp_path: Path) -> None:
    clauses.goes_on_after_a_task(subject, tmp_path, lora=lora)


@each_form
def test_5_goes_on_inside_a_task(subject: Subject, lora: bool, tmp_path: Path) -> None:
    clauses.goes_on_inside_a_task(subject, tmp_path, lora=lora)


@pytest.mark.parametrize("partner", PARTNERS)
@each_method
def test_6_works_beside(name: str, partner: type[Method]) -> None:
    subject = usual(name)
    clauses.works_beside(subject, partner, lora=clauses.wants_adapter(subject))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("packnet", "freeze"),
        ("freeze", "replay"),
        ("half", "replay"),
        ("progressive", "label_smoothing"),
    ],
)
def test_6_works_beside_another_method(name: str, other: str) -> None:
    clauses.works_beside(Subject(registry.get(name)), registry.get(other), lora=False)


@pytest.mark.parametrize("pair", TOGETHER, ids="-".join)
def test_6_run_together(pair: tuple[str, str]) -> None:
    one, other = map(usual, pair)
    clauses.run_together(
        one, other, lora=clauses.wants_adapter(one) or clauses.wants_adapter(other)
    )


@pytest.mark.parametrize("pair", [*itertools.combinations(registry.names(), 2)], ids="-".join)
def test_6_clashes_both_ways(pair: tuple[str, str]) -> None:
    clauses.clashes_both_ways(*map(registry.get, pair))


@each_method
def test_7_trains_adapters_and_all_weights(name: str) -> None:
    clauses.trains_adapters_and_all_weights(usual(name))


@each_form
def test_8_leaves_all_as_found(subject: Subject, lora: bool) -> None:
    clauses.leaves_all_as_found(subject, lora=lora)


@pytest.mark.parametrize(("subject", "lora"), SERVING)
def test_8_serving_is_invisible(subject: Subject, lora: bool) -> None:
    clauses.serving_is_invisible(subject, lora=lora)


@each_form
def test_9_declares_its_memory(subject: Subject, lora: bool) -> None:
    clauses.declares_its_memory(subject, lora=lora)


@each_method
def test_10_card_is_complete(name: str) -> None:
    clauses.card_is_complete(registry.get(name))


@each_method
def test_10_settings_are_bounded(name: str) -> None:
    clauses.settings_are_bounded(registry.get(name))


@each_form
def test_11_gives_evidence(subject: Subject, lora: bool, tmp_path: Path) -> None:
    clauses.gives_evidence(subject, tmp_path, lora=lora)


@each_method
def test_12_is_published(name: str) -> None:
    clauses.is_published(registry.get(name))


IN_ORDER = [s for s in SUBJECTS if s.cls.keeps_order]


@pytest.mark.parametrize("subject", IN_ORDER, ids=[s.cls.name() for s in IN_ORDER])
def test_13_keeps_the_order(subject: Subject) -> None:
    clauses.keeps_the_order(subject)


@each_case
def test_14_keeps_no_row(subject: Subject, lora: bool, tmp_path: Path) -> None:
    clauses.keeps_no_row(subject, tmp_path, lora=lora)


ISOLATING = [case for case in CASES if "isolation" in case.values[0].cls.traits]


@pytest.mark.parametrize(("subject", "lora"), ISOLATING)
def test_15_old_answers_stay(subject: Subject, lora: bool) -> None:
    clauses.old_answers_stay(subject, lora=lora)


@each_form
def test_16_is_served_as_it_says(subject: Subject, lora: bool, tmp_path: Path) -> None:
    clauses.is_served_as_it_says(subject, tmp_path, lora=lora)


@pytest.mark.parametrize("subject", ROUTERS, ids=str)
def test_17_routes_by_the_question(subject: Subject) -> None:
    clauses.routes_by_the_question(subject)


ONCE = {case.values[0].cls: case for case in reversed(CASES)}.values()  # on all weights, if it can
STEERED = [case for case in ONCE if case.values[0].cls.steered]
RATIOS = [case for case in STEERED if case.values[0].cls.steered == "ratio"]
STRENGTHS = [case for case in VARIANTS if case.values[0].cls.steered == "strength"]


@pytest.mark.parametrize(("subject", "lora"), STEERED + STRENGTHS)
def test_18_is_steered_as_set(subject: Subject, lora: bool) -> None:
    clauses.is_steered_as_set(subject, lora=lora)


@pytest.mark.parametrize(("subject", "lora"), RATIOS)
def test_18_what_draws_more_rows_does_all_else_as_before(
    subject: Subject, lora: bool, tmp_path: Path
) -> None:
    harder = dataclasses.replace(subject, effort=3.0)
    clauses.accumulation_is_invisible(harder, lora=lora)
    clauses.goes_on_inside_a_task(harder, tmp_path, lora=lora)
    clauses.leaves_all_as_found(harder, lora=lora)
    clauses.declares_its_memory(harder, lora=lora)


# -- methods with a quadratic penalty -------------------------------------------------------------

HOLDING = [s.cls for s in SUBJECTS if issubclass(s.cls, Anchored)]


@pytest.mark.parametrize("cls", HOLDING)
def test_anchors_pull_by_their_formula(cls: type[Anchored]) -> None:
    anchors.pulls_by_its_formula(cls)


@pytest.mark.parametrize("cls", HOLDING)
def test_anchors_step_back_by_their_formula(cls: type[Anchored]) -> None:
    anchors.steps_back_by_its_formula(cls)


@pytest.mark.parametrize("cls", [cls for cls in HOLDING if issubclass(cls, Travelled)])
def test_anchors_follow_the_tasks_own_gradient(cls: type[Anchored]) -> None:
    anchors.follows_the_tasks_own_gradient(cls)


def test_anchors_square_each_example() -> None:
    anchors.squares_each_example(EWC)


# -- methods with slow weights --------------------------------------------------------------------


@pytest.mark.parametrize("cls", [s.cls for s in SUBJECTS if issubclass(s.cls, Slow)])
def test_averages_follow_by_their_formula(cls: type[Slow]) -> None:
    averages.follows_by_its_formula(cls)


# -- methods that keep new updates out of old directions ------------------------------------------


def test_olora_pulls_off_the_earlier_adapters() -> None:
    subspaces.pulls_off_the_earlier_adapters(OLoRA)


def test_osf_keeps_the_old_subspace() -> None:
    subspaces.keeps_the_old_subspace(OSF)


# -- methods with a gate over experts -------------------------------------------------------------


def test_mixture_keeps_old_experts_and_their_shares() -> None:
    mixtures.keeps_old_experts_and_their_shares(Mixture)


# -- pairs that are meant to run together ---------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "lora"),
    [("ilora", "label_smoothing", True), ("olora", "replay", True), ("ema", "ewc", False)],
)
def test_a_pair_runs_together_and_both_act(one: str, other: str, lora: bool) -> None:
    clauses.works_beside(Subject(registry.get(one)), registry.get(other), lora=lora)
