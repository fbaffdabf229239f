"""Every registered method against every clause."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import clauses
from keeptune import registry
from keeptune.method import Method
from partners import PARTNERS
from stage import Subject

SUBJECTS = [Subject(registry.get(name)) for name in registry.names()]
CASES = [
    pytest.param(subject, lora, id=f"{subject.cls.name()}-{'lora' if lora else 'full'}")
    for subject in SUBJECTS
    for lora in (False, True)
    if lora or not clauses.wants_adapter(subject)
]
each_case = pytest.mark.parametrize(("subject", "lora"), CASES)
each_method = pytest.mark.parametrize("name", registry.names())


@each_case
def test_1_neutral_is_plain(subject: Subject, lora: bool) -> None:
    clauses.neutral_is_plain(subject, lora=lora)


@each_case
def test_2_default_changes_something(subject: Subject, lora: bool) -> None:
    clauses.default_changes_something(subject, lora=lora)


@each_case
def test_3_same_seed_same_weights(subject: Subject, lora: bool) -> None:
    clauses.same_seed_same_weights(subject, lora=lora)


@each_case
def test_4_accumulation_is_invisible(subject: Subject, lora: bool) -> None:
    clauses.accumulation_is_invisible(subject, lora=lora)


@each_case
def test_5_goes_on_after_a_task(subject: Subject, lora: bool, tmp_path: Path) -> None:
    clauses.goes_on_after_a_task(subject, tmp_path, lora=lora)


@each_case
def test_5_goes_on_inside_a_task(subject: Subject, lora: bool, tmp_path: Path) -> None:
    clauses.goes_on_inside_a_task(subject, tmp_path, lora=lora)


@pytest.mark.parametrize("partner", PARTNERS)
@each_method
def test_6_works_beside(name: str, partner: type[Method]) -> None:
    subject = Subject(registry.get(name))
    clauses.works_beside(subject, partner, lora=clauses.wants_adapter(subject))


@pytest.mark.parametrize("pair", [*itertools.combinations(registry.names(), 2)], ids="-".join)
def test_6_clashes_both_ways(pair: tuple[str, str]) -> None:
    clauses.clashes_both_ways(*map(registry.get, pair))


@each_method
def test_7_trains_adapters_and_all_weights(name: str) -> None:
    clauses.trains_adapters_and_all_weights(Subject(registry.get(name)))


@each_case
def test_8_leaves_all_as_found(subject: Subject, lora: bool) -> None:
    clauses.leaves_all_as_found(subject, lora=lora)


@each_case
def test_9_declares_its_memory(subject: Subject, lora: bool) -> None:
    clauses.declares_its_memory(subject, lora=lora)


@each_method
def test_10_card_is_complete(name: str) -> None:
    clauses.card_is_complete(registry.get(name))


@each_method
def test_10_settings_are_bounded(name: str) -> None:
    clauses.settings_are_bounded(registry.get(name))


@each_case
def test_11_gives_evidence(subject: Subject, lora: bool, tmp_path: Path) -> None:
    clauses.gives_evidence(subject, tmp_path, lora=lora)


@each_method
def test_12_is_published(name: str) -> None:
    clauses.is_published(registry.get(name))
