"""Which methods for which case: one table of rules, each with its reason and its evidence.

What a rule may break is asked of the methods' own traits; only what speaks for it is written here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from keeptune import registry
from keeptune.cards import card
from keeptune.method import Method
from keeptune.sizing import Need

Keep = Literal["tasks", "base", "both"]


@dataclass(frozen=True)
class Asked:
    """What a user says about the case.

    Attributes:
        rows: Whether old training rows may be kept.
        private: Whether rows are private: no method may keep them, and no result shows them.
        known: Whether it is known which task a question is of.
        tasks: How many tasks are to come, the first one included.
        keep: What must not be lost: earlier tasks, what the base model can do, or both.
        classifies: Whether the model is a sequence classifier.
        adapted: Whether LoRA is trained, and not all weights.
        memory: Bytes on a device, if there is a limit.
        slower: How many times plain training's time it may take, if there is a limit.
    """

    rows: bool = True
    private: bool = False
    known: bool = False
    tasks: int = 2
    keep: Keep = "both"
    classifies: bool = False
    adapted: bool = True
    memory: float | None = None
    slower: float | None = None


@dataclass(frozen=True)
class Rule:
    """One strategy and what speaks for it; the better one stands first.

    Attributes:
        strategy: Methods with the settings that are not their defaults.
        keeps: What it was seen to keep.
        reason: Why, with the numbers of the evidence.
        evidence: Studies of this repository; empty where there is only the paper.
        trained: "lora" or "all" where it is for one of them only.
        most: Tasks up to which it is sensible.
        model: "text" where it is for language models only.
    """

    strategy: dict[str, dict[str, Any]]
    keeps: Keep
    reason: str
    evidence: tuple[str, ...] = ()
    trained: Literal["any", "lora", "all"] = "any"
    most: int = 10**6
    model: Literal["any", "text"] = "any"

    @property
    def words(self) -> str:
        """As `keeptune compare --methods` takes it."""
        parts = []
        for name, settings in self.strategy.items():
            inside = ", ".join(f"{key}={value}" for key, value in settings.items())
            parts.append(f"{name}({inside})" if settings else name)
        return "+".join(parts)

    @property
    def name(self) -> str:
        """For people and files."""
        return "+".join(self.strategy)

    def methods(self) -> list[Method]:
        """The strategy, built."""
        return [registry.build(name, settings) for name, settings in self.strategy.items()]

    def sources(self) -> list[str]:
        """Studies of this repository, then the methods' papers."""
        papers = [card(registry.get(name)).fields["Paper"] for name in self.strategy]
        measured = self.evidence or ("not measured here",)
        return [*measured, *(re.split(r",? https|;", paper)[0] for paper in papers)]


SMOLLM, CONFLICT = "studies/smollm.md", "studies/conflict.md"
DIGITS, REHEARSAL = "studies/digits.md", "studies/rehearsal_digits.md"
LABELS, LOWRANK = "studies/rehearsal.md", "studies/lowrank.md"
DEMO = "README.md"

RULES = (
    Rule(
        {"task_lora": {}}, "both",
        "one adapter for each task, and the task's name picks it: nothing of an old task can be "
        "lost, and without an adapter the base model is as it was; four tasks ended at 83 % where "
        "replay had 54 and plain 25",
        (LOWRANK,),
    ),
    Rule(
        {"replay": {"ratio": 0.3}, "lwf": {}}, "both",
        "old rows keep the tasks and old answers the base model: in the demo earlier tasks ended "
        "at 32 and 39 % where plain had 6 and 5, and the capitals at 27 % (plain 6, before 38)",
        (DEMO, CONFLICT), "lora",
    ),
    Rule(
        {"replay": {"ratio": 0.3}, "l2sp": {}}, "both",
        "replay kept 12 points more of the tasks than plain and nothing of the guards, l2sp 29 "
        "points more of the guards; measured one by one, not yet together",
        (SMOLLM,), "all",
    ),
    Rule(
        {"replay": {"ratio": 0.3}}, "tasks",
        "16 (LoRA) and 12 (all weights) points more of the tasks than plain, most of any method "
        "that was compared with it there but joint training; of rows that are alike one for twenty "
        "new ones does as well as four",
        (SMOLLM, LABELS, REHEARSAL, CONFLICT),
    ),
    Rule(
        {"der_pp": {}}, "tasks",
        "on digits 9 to 14 points above replay with as many kept rows, at twice the time",
        (REHEARSAL,),
    ),
    Rule(
        {"gem": {}}, "tasks",
        "on digits best of all from 50 kept rows on, and the dearest: its steps grow with the "
        "tasks",
        (REHEARSAL,), most=5,
    ),
    Rule(
        {"joint": {}}, "tasks",
        "the ceiling, 96 % of the tasks where plain keeps 34, if all rows may be kept and trained "
        "on again with each task",
        (SMOLLM,), most=5,
    ),
    Rule(
        {"packnet": {}}, "tasks",
        "each task owns weights that no later task changes, in one adapter of fixed size, of which "
        "each has half of what is left: four tasks ended at 40 %, the third alone at 21",
        (LOWRANK,), trained="lora", most=4,
    ),
    Rule(
        {"adapters": {}}, "both",
        "a small module for each task beside a model that stays as it is",
        trained="all",
    ),
    Rule(
        {"lwf": {}}, "both",
        "the new rows are answered as before where they need not change: three labelling tasks "
        "ended at 61 % (plain 29, old rows at best 57), 85 % of the guards (plain 45) and chats as "
        "they were; of facts contradicted later it kept most of the capitals (47 %, plain 33)",
        (LABELS, CONFLICT),
    ),
    Rule(
        {"ewc": {}}, "both",
        "with LoRA it keeps 7 points more of the tasks and 14 of the guards than plain, without a "
        "row",
        (SMOLLM,), "lora",
    ),
    Rule(
        {"si": {}}, "both",
        "with all weights the best of the penalties for the tasks (10 points above plain), and 17 "
        "points more of the guards, which three seeds could not tell from chance",
        (SMOLLM, DIGITS), "all",
    ),
    Rule(
        {"pseudo_replay": {"distil": 1.0}, "ewc": {}}, "both",
        "the model writes rows of its old tasks itself, so that none is kept; for labels, intents "
        "and dialogues, not for facts: alone it ended three labelling tasks at 50 % (plain 29), "
        "which three seeds could not tell from chance",
        (LABELS,), model="text",
    ),
    Rule(
        {"seq_star": {}}, "tasks",
        "a classifier whose later tasks change nothing but the rows of their own classes",
        trained="all",
    ),
    Rule(
        {"l2sp": {}}, "base",
        "of the guards 11 (LoRA) and 29 (all weights) points more than plain, at little cost in "
        "learning with all weights",
        (SMOLLM,),
    ),
    Rule(
        {"wise": {}}, "base",
        "half of the way back to the old weights after each task: kept all of the capitals, and "
        "learned less",
        (CONFLICT,),
    ),
    Rule(
        {"inc_lora": {}}, "tasks",
        "each task trains a new adapter on top of the frozen ones before it; one model for all",
        trained="lora", most=5,
    ),
    Rule(
        {"half": {}}, "base",
        "each task trains another half of the weights; costs less than plain",
        trained="all",
    ),
    Rule(
        {"ema": {}}, "both",
        "a moving average of the weights answers; nearly free",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """One strategy for a case.

    Attributes:
        rule: The strategy and why.
        need: What it needs.
        time: Its time for a task's rows, in times of plain training.
        step: Its time for a step, likewise.
        beyond: Which limits it breaks, in words; empty when it fits.
    """

    rule: Rule
    need: Need
    time: float
    step: float
    beyond: str = ""


def fitting(asked: Asked) -> list[Rule]:
    """The rules that break nothing that was said, the best one first.

    Those that keep all that must be kept come before those that keep a part of it.
    """
    fit = [rule for rule in RULES if _bears(rule, asked)]
    return sorted(fit, key=lambda rule: rule.keeps not in ("both", asked.keep))


def _bears(rule: Rule, asked: Asked) -> bool:
    """Whether a strategy breaks nothing; a method says itself what it does and needs."""
    if asked.tasks > rule.most or (asked.classifies and rule.model == "text"):
        return False
    if rule.trained == ("all" if asked.adapted else "lora"):
        return False
    classes = [registry.get(name) for name in rule.strategy]
    return all(_allowed(cls, asked) for cls in classes)


def _allowed(cls: type[Method], asked: Asked) -> bool:
    keeps_rows = "buffer" in cls.traits
    by_name = "isolation" in cls.traits or cls.served == "per task"
    return not (
        (keeps_rows and (asked.private or not asked.rows))
        or (by_name and not asked.known)
        or ("adapter" in cls.needs and not asked.adapted)
        or ("classifier" in cls.needs and not asked.classifies)
    )


def limits(advice: Sequence[Advice], asked: Asked) -> list[Advice]:
    """Put what fits into memory and time first; what does not says so."""
    found = []
    for one in advice:
        beyond = []
        if asked.memory is not None and one.need.memory > asked.memory:
            beyond.append("memory")
        if asked.slower is not None and one.time > asked.slower:
            beyond.append("time")
        found.append(replace(one, beyond=" and ".join(beyond)))
    return sorted(found, key=lambda one: bool(one.beyond))
