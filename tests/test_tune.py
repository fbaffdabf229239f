"""Tuning: what is searched, what is held out, and that a kill changes no trial."""

from __future__ import annotations

import builtins
import io
import json
import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import pico
import runs
from keeptune import engines, inputs
from keeptune.bargains import Trial, chosen, knee, objectives
from keeptune.board import Board
from keeptune.cli import app
from keeptune.disk import locked
from keeptune.errors import DataError, FolderError, KeeptuneError, RecipeError
from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.jobs import Job, run_job
from keeptune.recipe import load_recipe, parse_recipe
from keeptune.results import load
from keeptune.rows import leaked, read_rows
from keeptune.search import Range, default_ranges, own_values, read_search
from keeptune.stream import Task
from keeptune.tune import Tuned, plan, tune
from keeptune.validation import hold_out, sampled


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pico.tiny_folder(tmp_path)
    for task in range(2):
        pico.write_rows(tmp_path / f"train{task}.jsonl", pico.questions(task, 10))
        pico.write_rows(tmp_path / f"eval{task}.jsonl", pico.questions(task, 3))
    return tmp_path


def recipe(home: Path, **changes: Any) -> Path:
    """Two tasks, of each of which three training rows are evaluation rows too."""
    values: dict[str, Any] = {
        "model": "tiny",
        "adapter": "none",
        "tasks": [
            {"name": f"t{i}", "train": f"train{i}.jsonl", "eval": f"eval{i}.jsonl"} for i in (0, 1)
        ],
        "methods": [{"replay": {"ratio": 0.5}}, {"ewc": {"strength": 7}}],
        "trainer": {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01},
    }
    file = home / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, **changes}))
    return file


# -- what is held out -----------------------------------------------------------------------------


def task(train: int = 10, evaluation: int = 3, **more: Any) -> Task:
    rows = (read_rows(pico.questions(0, n)) for n in (train, evaluation))
    return Task("t", *rows, **more)


def texts(rows: Any) -> list[str]:
    return [row["prompt"] for row in rows.rows]


@pytest.mark.parametrize("name", "abcdefghijklmnopqrst")
def test_what_is_held_out_is_neither_trained_on_nor_evaluated(name: str) -> None:
    whole = replace(task(), name=name)
    held = hold_out(whole, 0.3)
    assert len(held.eval) == 3
    assert leaked(held.train, held.eval) == leaked(whole.eval, held.eval) == 0
    assert texts(held.train) == [t for t in texts(whole.train) if t not in texts(held.eval)]
    assert len({whole.train.sha256, held.train.sha256, held.eval.sha256}) == 3


def test_rows_and_name_decide_and_nothing_else() -> None:
    held = [texts(hold_out(replace(task(40), name=name), 0.2).eval) for name in "aab"]
    assert held[0] == held[1] != held[2]


def test_a_score_that_does_not_fit_is_the_usual_one() -> None:
    choices = [{"prompt": f"{i}?", "choices": ["a", "b"], "answer": "a"} for i in range(3)]
    train = read_rows(pico.questions(0, 8))
    assert hold_out(Task("t", train, read_rows(choices), "choice"), 0.5).score == "exact_match"
    assert hold_out(task(score="token_f1"), 0.3).score == "token_f1"


def test_too_few_rows_and_recall_are_refused() -> None:
    with pytest.raises(DataError, match="has 0 of 3 training rows that are no evaluation rows"):
        hold_out(task(3), 0.3)
    with pytest.raises(DataError, match="has 1 of 1 training rows"):
        hold_out(Task("t", read_rows(pico.questions(1, 1)), read_rows(pico.questions(0, 3))), 0.3)
    with pytest.raises(RecipeError, match="is scored on recall"):
        hold_out(task(recall=True), 0.3)


def test_a_guard_is_asked_some_of_its_rows() -> None:
    some = sampled(Guard("g", read_rows(pico.questions(0, 20))), 0.25)
    assert some.rows is not None
    assert len(some.rows) == 5
    assert sampled(Guard("arc_easy", None), 0.25).rows is None
    one = sampled(Guard("g", read_rows(pico.questions(0, 1))), 0.25)
    assert one.size == 1


def test_a_recipe_holds_out_and_says_all_problems_at_once(home: Path) -> None:
    held = load_recipe(recipe(home), ["validation=0.3"])
    tasks, _ = inputs.read_sources(held)
    assert [(len(t.train), len(t.eval)) for t in tasks] == [(7, 3), (7, 3)]
    for i in (0, 1):
        pico.write_rows(home / f"train{i}.jsonl", pico.questions(i, 3))
    with pytest.raises(RecipeError) as refused:
        inputs.read_sources(held)
    assert len(str(refused.value).splitlines()) == 2
    with pytest.raises(RecipeError, match="validation"):
        load_recipe(recipe(home), ["validation=1.0"])


# -- what is searched -----------------------------------------------------------------------------


def ranges(home: Path, *words: str, **changes: Any) -> list[Range]:
    file = recipe(home, **changes)
    return read_search(words, file, [], load_recipe(file))


def test_strengths_and_ratios_are_searched_without_a_word(home: Path) -> None:
    assert ranges(home) == [
        Range("methods.0.replay.ratio", 0.02, 1.0, True, False),
        Range("methods.1.ewc.strength", 0.07, 700.0, True, False),
    ]


def test_usual_ranges_stay_inside_what_a_setting_may_be(home: Path) -> None:
    methods = ["osf", {"lwf": {"strength": 0}}, "l2sp", "task_lora"]
    found = default_ranges(
        parse_recipe({**yaml.safe_load(recipe(home).read_text()), "methods": methods})
    )
    by_key = {one.key: one for one in found}
    assert by_key["methods.0.osf.ratio"].high == 0.99
    assert by_key["methods.1.lwf.strength"].low == 0.01, "around the default, where it is 0"
    assert not any("l2sp" in key for key in by_key), "its strength is no number"


def test_words_name_settings(home: Path) -> None:
    found = ranges(
        home,
        "trainer.learning_rate = 1e-5..1e-3:log",
        "methods.0.replay.size=5..50",
        "methods.0.replay.ratio=0..1",
        "trainer.num_train_epochs=1..3",
    )
    assert [(one.is_log, one.is_whole) for one in found] == [
        (True, False), (False, True), (False, False), (False, True),
    ]  # fmt: skip
    assert str(found[0]) == "trainer.learning_rate=1e-05..0.001:log"
    both = ranges(home, "default", "trainer.learning_rate=1e-5..1e-3:log")
    assert [one.key.rpartition(".")[2] for one in both] == ["ratio", "strength", "learning_rate"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("methods.1.ewc.strength", "write KEY=LOW..HIGH"),
        ("methods.1.ewc.strength=5", "write KEY=LOW..HIGH"),
        ("methods.1.ewc.strength=a..b", "write KEY=LOW..HIGH"),
        ("methods.1.ewc.strength=9..3", "9 is not below 3; give the smaller first"),
        ("methods.1.ewc.strength=3..3", "3 is not below 3"),
        ("methods.1.ewc.strength=0..3:log", "must begin above 0, got 0"),
        ("methods.1.ewc.strenth=1..3", "Did you mean 'strength'?"),
        ("methods.1.ewc.strength=-1..3", "must be at least 0"),
        ("methods.7.ewc.strength=1..3", "is no position in this list"),
        ("trainer.learning_rat=1e-5..1e-3", "Did you mean"),
        ("model=1..3", "model is no number, so that it has no range"),
        ("tasks.0.name=1..3", "tasks.0.name is no number"),
    ],
)
def test_what_cannot_be_searched_is_said(home: Path, word: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        ranges(home, word)
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"--search {word.partition('=')[0]}")


def test_nothing_to_search_and_nothing_to_lose_are_said(home: Path) -> None:
    with pytest.raises(RecipeError, match="No method of this recipe has a setting with a usual"):
        ranges(home, methods=[])
    with pytest.raises(RecipeError, match="is given twice; keep one"):
        ranges(home, "trainer.learning_rate=1e-5..1e-3", "trainer.learning_rate=1e-5..1e-2")
    one = yaml.safe_load(recipe(home).read_text())["tasks"][:1]
    with pytest.raises(
        RecipeError, match="has one task and no guard, so that nothing could be lost"
    ):
        plan(recipe(home, tasks=one))


def test_without_optuna_it_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(KeeptuneError, match=r"needs Optuna: pip install 'keeptune\[tune\]'"):
        plan(recipe(home))


def test_the_recipes_own_settings_are_a_trial_where_they_lie_inside(home: Path) -> None:
    loaded = load_recipe(recipe(home))
    assert own_values(ranges(home), loaded) == [0.5, 7.0]
    assert own_values(ranges(home, "methods.1.ewc.strength=8..9"), loaded) is None
    assert own_values(ranges(home, "trainer.warmup_steps=1..9"), loaded) is None


# -- what is chosen -------------------------------------------------------------------------------


def test_the_knee_is_furthest_from_the_line_between_the_ends() -> None:
    # ends (0, 1) and (10, 0): x/10 + y is 1, 1.4, 1.3, 1
    assert knee([(0, 1.0), (6, 0.8), (9, 0.4), (10, 0)]) == 1
    # nothing beyond the line: the end that keeps most
    assert knee([(10, 0.0), (5, 0.1), (0, 1.0)]) == 2
    assert knee([(0.1, 0.7), (0.3, 0.2)]) == 0
    assert knee([(0.3, 0.2)]) == 0


def trial(number: int, learned: float | None, kept: float | None, said: str = "") -> Trial:
    return Trial(number, {}, learned, kept, "", said)


def test_beaten_and_failed_trials_are_not_on_the_front() -> None:
    every = [
        trial(0, 0.1, -0.1),
        trial(1, None, None, "no"),
        trial(2, 0.2, -0.1),
        trial(3, 0.3, -0.5),
    ]
    found = chosen(every)
    assert [t.is_front for t in found] == [False, False, True, True]
    assert [t.number for t in found if t.is_knee] == [2]
    assert chosen(every[1:2]) == every[1:2]


def test_what_is_learned_and_kept_by_hand(tmp_path: Path) -> None:
    R = [[0.2, 0.1], [0.7, 0.1], [0.5, 0.5]]
    G = [[0.6, 10.0], [0.6, 10.0], [0.4, 20.0]]
    info = runs.info(runs.TASKS[:2], ("capitals", "old news"))
    folder = runs.fabricate(tmp_path / "run", info, R=R, G=G)
    learned, kept = objectives(load(folder))
    assert learned == pytest.approx((0.5 + 0.4) / 2, abs=0.01)
    assert kept == pytest.approx((-0.2 - 0.2 - np.log(2)) / 3, abs=0.01)


# -- trials ---------------------------------------------------------------------------------------


class Engine:
    """Makes up each run, or runs it in this process; some fail, one is a stop, one a kill."""

    def __init__(self, *fails: int, stop: int = -1, kill: int = -1, is_real: bool = False) -> None:
        self.fails, self.stop, self.kill, self.is_real = fails, stop, kill, is_real
        self.began: list[str] = []

    def __call__(self, jobs: Sequence[Job], board: Board) -> Iterator[tuple[Job, str | None]]:
        for job in jobs:
            number = len(self.began)
            if number == self.stop:
                raise KeyboardInterrupt
            self.began.append(job.folder.name)
            board.started(job)
            said = "the loss is not a number" if number in self.fails else self.run(job)
            if number == self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            yield job, said

    def run(self, job: Job) -> str | None:
        """A strong penalty keeps more and learns less."""
        if self.is_real:
            return run_job(job)
        methods = parse_recipe(job.recipe).strategy
        weight = math.log10(1 + dict(methods)["ewc"]["strength"]) / 4
        R = [[0.2, 0.2], [0.8 - 0.3 * weight, 0.2], [0.3 + 0.2 * weight, 0.8 - 0.3 * weight]]
        runs.fabricate(job.folder, runs.info(["t0", "t1"], []), R=R)
        return None


def search(home: Path, count: int, engine: Engine, out: str = "out", at_once: int = 1) -> Tuned:
    planned = plan(recipe(home), share=0.3)
    return tune(planned, count, home / out, Board(io.StringIO()), engine, at_once)


def settings(done: Tuned) -> list[dict[str, float]]:
    return [t.settings for t in done.trials]


def test_a_stopped_search_goes_on_as_if_it_had_not_been(home: Path) -> None:
    whole = search(home, 4, Engine(), "whole")
    first = Engine(stop=2)
    with pytest.raises(KeyboardInterrupt):
        search(home, 4, first)
    second = Engine()
    done = search(home, 4, second)
    assert settings(done) == settings(whole)
    own = {"methods.0.replay.ratio": 0.5, "methods.1.ewc.strength": 7.0}
    assert done.trials[0].settings == own
    assert len({*first.began, *second.began}) == len(first.began + second.began) == 4
    again = Engine()
    assert search(home, 4, again) == done
    assert again.began == []
    assert settings(search(home, 5, again))[:4] == settings(done)
    assert len(again.began) == 1


def test_a_killed_process_leaves_a_journal_that_goes_on(home: Path) -> None:
    planned = plan(recipe(home), share=0.3)
    pid = os.fork()
    if not pid:
        tune(planned, 4, home / "out", Board(io.StringIO()), Engine(kill=2))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    engine = Engine()
    done = search(home, 4, engine)
    assert len(engine.began) == 1, "two were recorded, one was finished and not yet recorded"
    assert settings(done) == settings(search(home, 4, Engine(), "whole"))


def test_trials_look_at_held_out_rows_alone_and_the_knee_is_ready_to_run(home: Path) -> None:
    done = search(home, 2, Engine(is_real=True))
    asked = {r["prompt"] for i in (0, 1) for r in pico.questions(i, 3)}
    for each in done.trials:
        folder = RunFolder(each.folder)
        tasks, _ = inputs.read_sources(load_recipe(folder.path / "recipe.yaml"))
        assert [(d.train_rows, d.eval_rows) for d in folder.info.tasks] == [(7, 3), (7, 3)]
        for i, one in enumerate(tasks):
            cell = folder.cell(2, "task", i)
            assert cell is not None
            assert {e.prompt for e in cell.examples} == set(texts(one.eval))
            assert not asked & set(texts(one.eval))
            assert len({*texts(one.train), *texts(one.eval)}) == 10
    at = next(t for t in done.trials if t.is_knee)
    written = load_recipe(done.recipe)
    assert (written.validation, written.out) == (None, None)
    assert dict(written.strategy)["ewc"]["strength"] == at.settings["methods.1.ewc.strength"]
    assert [len(t.train) for t in inputs.read_sources(written)[0]] == [10, 10]
    table = json.loads((home / "out" / "trials.json").read_text())
    assert [t["is_knee"] for t in table] == [t.is_knee for t in done.trials]
    assert done.page.is_file()


def test_a_trial_that_fails_is_told_and_not_chosen(home: Path) -> None:
    done = search(home, 2, Engine(0))
    assert done.trials[0].said == "the loss is not a number"
    assert [t.is_knee for t in done.trials] == [False, True]
    with pytest.raises(KeeptuneError, match="All 1 trials failed; the last one: the loss is not"):
        search(home, 1, Engine(0), "other")


def test_trials_at_once_are_proposed_together(home: Path) -> None:
    engine = Engine()
    done = search(home, 3, engine, at_once=2)
    assert len({tuple(t.values()) for t in settings(done)}) == 3
    assert settings(search(home, 3, engine, "again", at_once=2)) == settings(done)


def test_the_share_is_the_words_then_the_recipes_then_a_fifth(home: Path) -> None:
    file = recipe(home, validation=0.4)
    assert plan(file).recipe.validation == 0.4
    assert plan(file, share=0.3).recipe.validation == 0.3
    assert plan(recipe(home)).recipe.validation == 0.2


def test_another_search_in_the_same_folder_is_another(home: Path) -> None:
    search(home, 1, Engine())
    planned = plan(recipe(home), search=["methods.1.ewc.strength=1..9"], share=0.3)
    done = tune(planned, 1, home / "out", Board(io.StringIO()), Engine())
    assert list(done.trials[0].settings) == ["methods.1.ewc.strength"]
    with locked(home / "out"), pytest.raises(FolderError, match="Another process is at work"):
        search(home, 1, Engine())


def test_the_command_lists_what_it_would_search(home: Path) -> None:
    done = CliRunner().invoke(app, ["tune", str(recipe(home)), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "methods.1.ewc.strength=0.07..700:log" in done.output
    assert not (home / "runs").exists()


def test_the_command_shows_the_front_and_where_the_recipe_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "choose", lambda *_, **__: Engine(1))
    done = CliRunner().invoke(app, ["tune", str(recipe(home)), "--trials", "2"])
    assert done.exit_code == 0, done.output
    assert "knee" in done.output
    assert "Recipe at the knee: runs/recipe-tune/knee.yaml" in done.output
    assert "trial 1 failed: the loss is not a number" in done.output
    monkeypatch.setattr(engines, "choose", lambda *_, **__: Engine(stop=0))
    done = CliRunner().invoke(app, ["tune", str(recipe(home)), "--trials", "3"])
    assert done.exit_code == 130
    assert "Continue with: keeptune tune recipe.yaml --trials 3" in done.output.replace(
        f"{home}/", ""
    )
