"""When looks are taken, and what is done about what they show, without model or trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import runs
from keeptune import lines, watchlog
from keeptune.changes import Earlier, change
from keeptune.errors import RecipeError
from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.lines import Probe
from keeptune.recipe_parts import BudgetRecipe, WatchRecipe
from keeptune.records import Example
from keeptune.rows import read_rows
from keeptune.stream import Task, TaskStream
from keeptune.watch import Pace, Watch
from keeptune.watchlog import Look

N = 400


class Clock:
    """Seconds that only pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def asked(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i}:", "completion": f" {i}"} for i in range(n)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    info = runs.info(["a", "b"], ["g", "h"], n=N)
    return runs.fabricate(tmp_path / "run", info, R=[[0.5, 0.5]] * 3, G=[[0.5, 0.5]] * 3)


STREAM = TaskStream(
    [Task(name, read_rows(asked(N)), read_rows(asked(N)), "exact_match") for name in "ab"]
)
GUARDS = [Guard(name, read_rows(asked(N)), "exact_match") for name in "gh"]


def watch(folder: RunFolder, index: int = 1, **settings: object) -> Watch:
    asked_for = WatchRecipe.model_validate({"max_overhead": 1.0, "every": 10, **settings})
    chosen = lines.watched(asked_for, None, STREAM, GUARDS, index, seed=0)
    return Watch(asked_for, chosen, Earlier(folder), STREAM[index].name, index, Clock())


def scorer(
    folder: RunFolder, changed: Callable[[Probe, list[float]], Sequence[float]]
) -> Callable[[Probe], list[Example]]:
    """Scores as before, but for what `changed` makes of them."""
    before_task = Earlier(folder)

    def score(probe: Probe) -> list[Example]:
        before = before_task(probe)
        scores = changed(probe, [e.score for e in before])
        return [e.model_copy(update={"score": s}) for e, s in zip(before, scores, strict=True)]

    return score


def fallen(name: str, share: float) -> Callable[[Probe, list[float]], list[float]]:
    """A guard or task loses a share of its right answers."""

    def change(probe: Probe, scores: list[float]) -> list[float]:
        if probe.item.name != name:
            return scores
        right = [i for i, s in enumerate(scores) if s]
        lost = set(right[: round(share * len(right))])
        return [0.0 if i in lost else s for i, s in enumerate(scores)]

    return change


def noisy(seed: int, share: float = 0.4) -> Callable[[Probe, list[float]], list[float]]:
    """As many answers turn right as turn wrong, other ones in each look."""
    rng = np.random.default_rng(seed)

    def change(probe: Probe, scores: list[float]) -> list[float]:
        right = np.mean(scores)
        odds = [share * (1 - right if s else right) for s in scores]
        return [1 - s if rng.random() < p else s for s, p in zip(scores, odds, strict=True)]

    return change


# -- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("each", "share"), [(0.5, 0.1), (3.0, 0.1), (20.0, 0.25), (0.1, 1.0)])
def test_looks_keep_to_their_share_of_the_time(each: float, share: float) -> None:
    clock = Clock()
    pace = Pace(10, share, clock)
    pace.start()
    taken = []
    for step in range(1, 1001):
        clock.now += 0.2
        if pace.allows(step, 1000):
            with pace.look():
                clock.now += each
            taken.append(step)
            # The first look's length is not known before.
            assert pace.overhead <= share + 1e-9 or len(taken) == 1
    assert pace.overhead == pytest.approx(len(taken) * each / (200 + len(taken) * each))
    assert pace.overhead <= share
    assert all(step % 10 == 0 for step in taken)
    # Where there is time, none is left out.
    assert len(taken) == 100 or (len(taken) + 2) * each > share * (200 + (len(taken) + 2) * each)


def test_the_share_is_kept_over_an_interruption() -> None:
    clock = Clock()
    first = Pace(1, 0.5, clock)
    first.start()
    clock.now = 10.0
    with first.look():
        clock.now = 18.0
    kept = first.state()
    second = Pace(1, 0.5, clock)
    clock.now = 1000.0  # nothing ran
    second.restore(kept)
    second.start()
    assert second.overhead == pytest.approx(8 / 18)
    clock.now += 5.0
    assert not second.allows(7, 100)
    clock.now += 1.0
    assert second.allows(8, 100)


def test_there_is_a_look_at_the_end_of_a_task() -> None:
    pace = Pace(10, 1.0, Clock())
    assert [s for s in range(1, 26) if pace.allows(s, 25)] == [10, 20, 25]


# -- noise and drops ------------------------------------------------------------------------------


def last(found: Watch, score: Callable[[Probe], list[Example]], steps: int = 100) -> list[Look]:
    looks = [found.after_step(step, steps, score) for step in range(1, steps + 1)]
    return [look for look in looks if look is not None]


def test_noise_is_not_acted_on(folder: RunFolder) -> None:
    ended = 0
    for seed in range(12):
        found = watch(folder, on_drop="stop")
        last(found, scorer(folder, noisy(seed)))
        ended += found.ended
    assert ended == 0


@pytest.mark.parametrize("name", ["g", "h", "a"])
def test_a_planted_drop_is_acted_on(folder: RunFolder, name: str) -> None:
    found = watch(folder, on_drop="stop")
    (look,) = last(found, scorer(folder, fallen(name, 0.8)))
    assert found.ended
    assert (look.step, look.action) == (10, "stop")
    assert [p.name for p in look.points if p.is_below] == [name]


def test_a_drop_of_what_is_learned_now_is_no_reason(folder: RunFolder) -> None:
    found = watch(folder, on_drop="stop")
    assert len(last(found, scorer(folder, fallen("b", 1.0)))) == 10
    assert not found.ended


def test_a_drop_inside_the_line_is_allowed(folder: RunFolder) -> None:
    found = watch(folder, items=N, on_drop="stop", lines={"g": 45.0, "past_tasks": 45})
    last(found, scorer(folder, fallen("g", 0.8)))  # 40 points
    assert not found.ended
    last(found, scorer(folder, fallen("h", 0.8)))
    assert found.fallen == ["h"]


def test_a_warning_is_given_once_for_each_line(folder: RunFolder) -> None:
    found = watch(folder)
    looks = last(found, scorer(folder, fallen("g", 0.8)), steps=30)
    assert [look.action for look in looks] == ["warn", "", ""]
    assert all(any(p.is_below for p in look.points) for look in looks)
    (look,) = last(found, scorer(folder, fallen("a", 0.8)), steps=10)
    assert look.action == "warn"
    assert not found.ended


def test_a_rollback_goes_to_the_last_look_inside(folder: RunFolder) -> None:
    found = watch(folder, on_drop="rollback")
    same = scorer(folder, lambda probe, scores: scores)
    for step in (10, 20):
        found.after_step(step, 100, same)
    look = found.after_step(30, 100, scorer(folder, fallen("g", 0.8)))
    assert look is not None
    assert (look.action, look.back_to, found.ended) == ("rollback", 20, True)
    assert found.after_step(40, 100, same) is None


def test_what_is_known_survives_an_interruption(folder: RunFolder) -> None:
    found = watch(folder, on_drop="rollback")
    found.after_step(10, 100, scorer(folder, lambda probe, scores: scores))
    found.after_step(20, 100, scorer(folder, fallen("g", 0.8)))
    again = watch(folder, on_drop="rollback")
    again.restore(found.state())
    assert (again.ended, again.good_step, again.fallen) == (True, 10, ["g"])


# -- samples --------------------------------------------------------------------------------------


def test_samples_are_fixed_by_the_seed(folder: RunFolder) -> None:
    settings = WatchRecipe(items=16)

    def ids(seed: int, index: int = 1) -> list[list[int]]:
        chosen = lines.watched(settings, None, STREAM, GUARDS, index, seed)
        return [list(probe.ids) for line in chosen for probe in line.probes]

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)
    assert all(len(one) == len(set(one)) == 16 for one in ids(0))
    # A task is asked the same when it is learned and later.
    assert ids(0, index=0)[0] == ids(0, index=1)[1]


def test_a_name_of_a_group_is_all_of_its_guards_together() -> None:
    guards = [Guard(name, read_rows(asked(40))) for name in ("capitals", "continents", "mine")]
    settings = WatchRecipe(items=30, lines={"facts": 2.0})
    chosen = lines.watched(settings, None, STREAM, guards, 0, 0)
    assert [line.name for line in chosen] == ["a", "facts", "mine"]
    assert [line.size for line in chosen] == [30, 30, 30]
    assert len(chosen[1].probes) == 2
    assert chosen[1].allowed == pytest.approx(0.02)
    listed = WatchRecipe(guards=["mine"], tasks="none")
    chosen = lines.watched(listed, None, STREAM, guards, 1, 0)
    assert [line.name for line in chosen] == ["b", "mine"]


def test_what_is_strengthened_for_a_budget_is_held_to_it() -> None:
    budget = BudgetRecipe.model_validate({"g": 3.0, "past_tasks": 2.0})
    settings = WatchRecipe.model_validate(
        {"on_drop": "strengthen", "lines": {"g": 50.0, "h": 7.0, "past_tasks": 50.0}}
    )

    def shown(settings: WatchRecipe) -> list[tuple[str, int, float | None]]:
        chosen = lines.watched(settings, budget, STREAM, GUARDS, 1, 0)
        return [(line.name, line.probes[0].before, line.allowed) for line in chosen]

    assert shown(settings) == [
        ("b", 1, None), ("a", 1, 0.02), ("g", 0, 0.03), ("h", 1, pytest.approx(0.07)),
    ]  # fmt: skip
    warned = settings.model_copy(update={"on_drop": "warn"})
    assert [line[1:] for line in shown(warned)[1:3]] == [(1, 0.5), (1, 0.5)]


def test_a_controlled_watch_ends_nothing_and_tells_each_line_once(folder: RunFolder) -> None:
    found = watch(folder, on_drop="strengthen")
    assert found.start(30).effort == 1.0
    looks = last(found, scorer(folder, fallen("g", 0.8)), steps=30)
    assert [look.action for look in looks] == ["strengthen", "", ""]
    efforts = [look.effort or 0.0 for look in looks]
    assert 1 < efforts[0] < efforts[1] < efforts[2]
    again = watch(folder, on_drop="strengthen")
    again.restore(found.state())
    same = scorer(folder, lambda probe, scores: scores)
    after = [w.after_step(40, 100, same) for w in (found, again)]
    assert after[0] == after[1]
    assert after[0] is not None
    assert 1 < (after[0].effort or 0) < efforts[2]


def test_halves_have_every_row_once() -> None:
    line = lines.held(BudgetRecipe(past_tasks=1.0), STREAM, GUARDS, 1)[1]
    one, two = lines.halves(line, seed=3)
    ids = [[i for probe in half.probes for i in probe.ids] for half in (one, two)]
    assert sorted(ids[0] + ids[1]) == list(range(N))
    assert abs(len(ids[0]) - len(ids[1])) <= 1


def test_a_budget_compares_guards_with_the_beginning_and_tasks_with_their_own_end() -> None:
    budget = BudgetRecipe.model_validate({"g": 1.0, "past_tasks": 2.0})
    found = lines.held(budget, STREAM, GUARDS, 1)
    shown = [(line.name, line.role, line.probes[0].before, line.allowed) for line in found]
    assert shown == [
        ("b", "learning", 1, None),
        ("g", "guard", 0, 0.01),
        ("past tasks", "task", 1, 0.02),
    ]


def test_a_perplexity_may_rise_by_a_share(folder: RunFolder) -> None:
    guards = [Guard("text", read_rows([{"text": str(i)} for i in range(9)]), "perplexity")]
    (line,) = lines.held(BudgetRecipe.model_validate({"text": 0.02}), STREAM, guards, 0)[1:]
    assert line.allowed == pytest.approx(np.log(1.02))
    now = [example(i, 1.0 + 0.01 * i, 10.0) for i in range(9)]
    before = [example(i, 1.0, 10.0) for i in range(9)]
    found = change(now, before, line, 0.9)
    assert found.value == pytest.approx(-0.04)
    assert found.low < found.value < found.high < 0


def example(i: int, score: float, weight: float) -> Example:
    return Example(id=i, prompt="", expected="", answer="", score=score, weight=weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"watch": {"guards": ["gg"]}}, "watch.guards names 'gg', which is no guard here. Did"),
        ({"watch": {"lines": {"facts": 1}}}, "watch.lines names 'facts', which is no guard here."),
        ({"watch": {"guards": ["g"], "lines": {"h": 1}}}, "watch.lines names 'h'"),
        ({"budget": {"wiki": 0.1}}, "Allowed: g, h, lm, past_tasks."),
        ({"budget": {"lm": 1}}, "a task of lm-eval"),
    ],
)
def test_names_that_no_guard_has_are_refused(settings: dict[str, object], words: str) -> None:
    watch = WatchRecipe.model_validate(settings["watch"]) if "watch" in settings else None
    budget = BudgetRecipe.model_validate(settings["budget"]) if "budget" in settings else None
    with pytest.raises(RecipeError) as caught:
        lines.refuse_unknown(watch, budget, STREAM, [*GUARDS, Guard("lm", None)])
    assert words in str(caught.value)


def test_a_guard_is_not_taken_for_a_setting_of_the_budget() -> None:
    guards = [Guard(name, read_rows(asked(40))) for name in ("blocks", "g")]
    budget = BudgetRecipe.model_validate({"blocks": 3, "g": 1.0})
    with pytest.raises(RecipeError) as caught:
        lines.refuse_unknown(None, budget, STREAM, guards)
    assert str(caught.value) == (
        "budget.blocks is a setting of the budget, and a guard is called 'blocks' too. Give the "
        "guard another name."
    )
    # Where the budget does not speak of it, nothing is mistaken.
    lines.refuse_unknown(None, BudgetRecipe.model_validate({"g": 1.0}), STREAM, guards)


def test_few_rows_are_looked_at_but_not_judged_and_bear_no_budget() -> None:
    few = Guard("few", read_rows(asked(7)), "exact_match")
    line = lines.watched(WatchRecipe(), None, STREAM, [few], 0, 0)[-1]
    assert (line.name, line.size, line.allowed) == ("few", 7, None)
    budget = BudgetRecipe.model_validate({"few": 1.0})
    with pytest.raises(RecipeError, match=r"at least 16 evaluation rows.* 'few' \(7\)"):
        lines.refuse_unknown(None, budget, STREAM, [few])


# -- what is kept ---------------------------------------------------------------------------------


def test_looks_that_are_to_come_again_are_taken_out(folder: RunFolder) -> None:
    for index in (0, 1):
        found = watch(folder, index)
        for step in (0, 10, 20):
            same = scorer(folder, lambda probe, scores: scores)
            look = found.start(30) if not step else found.after_step(step, 30, same)
            assert look is not None
            watchlog.add(folder, look)
    with (folder.path / watchlog.FILE).open("a") as file:
        file.write('{"task": "b", "st')  # torn by a kill
    watchlog.cut(folder, 1, 10)
    assert [(k.index, k.step) for k in watchlog.looks(folder)] == [
        (0, 0), (0, 10), (0, 20), (1, 0), (1, 10),
    ]  # fmt: skip
    assert (folder.path / watchlog.FILE).read_bytes().endswith(b"}\n")
    watchlog.cut(folder, 0, -1)
    assert watchlog.looks(folder) == []
