"""Advice: every rule leads somewhere, no case is without an answer, and no answer breaks a word."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pico
from keeptune import advising, engines
from keeptune.advice import RULES, Asked, Rule, fitting, limits
from keeptune.board import Board
from keeptune.chain import Chain
from keeptune.cli import app
from keeptune.engines import Ends
from keeptune.jobs import Job, run_job
from keeptune.pilot import Size, pilot_recipe
from keeptune.privacy import refusal
from keeptune.recipe import load_recipe, parse_recipe
from keeptune.recipe_checks import check_recipe
from keeptune.sizing import Sizer, Speed
from keeptune.strategies import read_strategies

ROOT = Path(__file__).parents[1]
SPEED = Speed(1e9, 1e9, 1e9)
YES_OR_NO = (True, False)


def cases() -> Iterator[Asked]:
    for rows, private, known, classifies, adapted in itertools.product(*[YES_OR_NO] * 5):
        for tasks, keep in itertools.product((1, 3, 40), ("tasks", "base", "both")):
            yield Asked(rows, private, known, tasks, keep, classifies, adapted)  # type: ignore[arg-type]


# -- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_names_methods_that_run_together_and_evidence_that_is_there(rule: Rule) -> None:
    Chain(rule.methods())
    for place in rule.evidence:
        assert (ROOT / place).is_file()
        assert any(name in (ROOT / place).read_text("utf-8") for name in rule.strategy)
    assert all(rule.sources())
    recipe = parse_recipe(
        {"model": "demo", "tasks": [{"name": "t", "train": "t.jsonl", "eval": "e.jsonl"}]}
    )
    (strategy,) = read_strategies(rule.words, recipe)
    assert strategy.methods == [(m.name(), m.model_dump(mode="json")) for m in rule.methods()]


def test_no_strategy_is_listed_twice() -> None:
    seen = [(rule.words, rule.trained) for rule in RULES]
    assert len(seen) == len(set(seen))


def test_every_case_has_an_answer_that_breaks_nothing() -> None:
    for asked in cases():
        found = fitting(asked)
        assert found, asked
        for rule in found:
            classes = [type(m) for m in rule.methods()]
            traits = frozenset().union(*(c.traits for c in classes))
            if asked.private or not asked.rows:
                assert "buffer" not in traits
                assert refusal(rule.methods(), "strict") is None
            if not asked.known:
                assert "isolation" not in traits
                assert all(c.served != "per task" for c in classes)
            assert asked.adapted or all("adapter" not in c.needs for c in classes)
            assert asked.classifies or all("classifier" not in c.needs for c in classes)


def test_what_keeps_all_that_was_asked_comes_first() -> None:
    found = fitting(Asked(keep="base"))
    kept = [rule.keeps in ("both", "base") for rule in found]
    assert kept == sorted(kept, reverse=True)
    assert fitting(Asked(known=True))[0].name == "task_lora"
    assert fitting(Asked())[0].name == "replay+lwf"


def test_a_planted_rule_that_keeps_rows_is_left_out_of_private_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = Rule({"ilora": {}}, "both", "keeps rows")
    monkeypatch.setattr("keeptune.advice.RULES", (planted, *RULES))
    assert planted in fitting(Asked())
    assert planted not in fitting(Asked(private=True))
    assert planted not in fitting(Asked(rows=False))


# -- prices and limits ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizer() -> Sizer:
    return Sizer(pico.causal_lm().config, None, {}, longest=16)


def test_what_is_beyond_a_limit_comes_last_and_says_so(sizer: Sizer) -> None:
    free = advising.advise(sizer, Asked(adapted=False, keep="tasks"), SPEED)
    slow = max(one.time for one in free)
    found = advising.advise(sizer, Asked(adapted=False, keep="tasks", slower=slow - 0.01), SPEED)
    assert {one.rule.words for one in found} == {one.rule.words for one in free}
    assert [bool(one.beyond) for one in found] == sorted(bool(one.beyond) for one in found)
    assert found[-1].beyond == "time"
    none = limits(found, Asked(memory=1.0))
    assert all("memory" in one.beyond for one in none)


def test_time_is_that_of_a_step_times_the_rows(sizer: Sizer) -> None:
    found = advising.advise(sizer, Asked(adapted=False, tasks=2), SPEED)
    by_name = {one.rule.name: one for one in found}
    assert by_name["replay"].time == pytest.approx(1.3)
    assert by_name["replay"].step == pytest.approx(1.0)
    assert by_name["joint"].time == pytest.approx(2.0)
    assert by_name["half"].time < 1


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(advising, "measure_speed", lambda case: SPEED)
    pico.tiny_folder(tmp_path)
    for task, name in enumerate(("train", "test")):
        pico.write_rows(tmp_path / f"{name}.jsonl", pico.questions(task, 8))
    values = {
        "model": "tiny",
        "tasks": [{"name": "t", "train": "train.jsonl", "eval": "test.jsonl"}],
        "seed": 3,
    }
    Path("r.yaml").write_text(json.dumps(values))
    return tmp_path


def advise(*words: str, answers: str | None = None) -> Any:
    return CliRunner().invoke(app, ["advise", *words], input=answers)


def test_recipes_that_are_written_are_ready_to_run(home: Path) -> None:
    done = advise("r.yaml", "--private", "--tasks", "3", "--top", "9", "--write", "new")
    assert done.exit_code == 0, done.output
    paths = sorted(Path("new").glob("*.yaml"))
    assert len(paths) > 2
    for path in paths:
        recipe = load_recipe(path)
        check_recipe(recipe)
        assert recipe.privacy == "strict"
        assert recipe.seed == 3
        assert str(path) in done.output
    dry = CliRunner().invoke(app, ["run", str(paths[0]), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not Path("runs").exists()


def test_what_is_not_said_is_assumed_and_shown(home: Path) -> None:
    done = advise("r.yaml")
    assert "assumed: May old training rows be kept? yes" in done.output
    assert "How many tasks are to come, those listed included? 1" in done.output
    assert "1. replay(ratio=0.3)+lwf" in done.output
    assert "price " in done.output
    assert "studies/conflict.md" in done.output
    shown = done.output[done.output.index("model: tiny") : done.output.index("\nPlain training")]
    Path("printed.yaml").write_text(shown)
    assert load_recipe("printed.yaml").strategy == [("replay", {"ratio": 0.3}), ("lwf", {})]


def test_a_terminal_is_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.cli_advise._asks", lambda: True)
    done = advise("--top", "1", answers="tiny\nn\nn\ny\n5\ntasks\n")
    assert done.exit_code == 0, done.output
    assert "Which model" in done.output
    assert "1. task_lora" in done.output


def test_a_recipe_that_is_strict_says_what_may_be_kept(home: Path) -> None:
    done = advise("r.yaml", "--set", "privacy=strict", "--keep-rows", "--top", "20")
    assert "replay" not in done.output.replace("pseudo_replay", "")


def test_a_classifier_needs_no_data_to_be_advised_on(home: Path) -> None:
    done = advise("--model", "tiny", "--kind", "classification", "--adapter", "none", "--no-rows")
    assert done.exit_code == 0, done.output
    assert "seq_star" in done.output
    assert "pseudo_replay" not in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Give a recipe, or --model"),
        (("r.yaml", "--keep", "all"), "--keep all: give tasks, base or both."),
        (("--model", "gone/there/now"), "is not there"),
        (("no.yaml",), "there is no such recipe file"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(home: Path, words: Any, said: str) -> None:
    done = advise(*words)
    assert done.exit_code != 0
    assert said in str(done.exception)


def test_a_strategy_beyond_memory_is_shown_as_such(home: Path) -> None:
    done = advise("r.yaml", "--memory", "0.000001")
    assert "more memory than there is" in done.output


# -- the pilot ------------------------------------------------------------------------------------


def many(home: Path, count: int) -> None:
    pico.write_rows(home / "train.jsonl", pico.questions(0, count))


def test_a_pilot_learns_and_scores_different_training_rows_and_no_others(home: Path) -> None:
    many(home, 40)
    recipe = load_recipe("r.yaml", ["watch={every: 5}"])
    short = pilot_recipe(recipe, Path("p"), Size(rows=30, steps=2))
    parts = [Path(getattr(short.tasks[0], part)).read_text() for part in ("train", "eval")]
    learned, scored = ({json.loads(line)["prompt"] for line in text.splitlines()} for text in parts)
    assert (len(learned), len(scored)) == (20, 10)
    assert not learned & scored
    assert learned | scored <= {row["prompt"] for row in pico.questions(0, 40)}
    assert short.trainer["max_steps"] == 2
    assert short.validation is None
    again = pilot_recipe(recipe, Path("q"), Size(rows=30, steps=2))
    assert Path(again.tasks[0].eval).read_text() == parts[1]


def test_what_is_to_be_known_by_heart_is_scored_on_what_was_learned(home: Path) -> None:
    many(home, 20)
    recipe = load_recipe("r.yaml", ["tasks.0.recall=true", "tasks.0.eval=train.jsonl"])
    short = pilot_recipe(recipe, Path("p"), Size())
    parts = [Path(getattr(short.tasks[0], part)).read_text() for part in ("train", "eval")]
    assert parts[0] == parts[1]


def test_too_few_rows_are_said(home: Path) -> None:
    done = advise("r.yaml", "--pilot")
    assert "has 8 training rows" in str(done.exception)
    assert "needs at least 16" in str(done.exception)


def test_a_pilot_needs_data(home: Path) -> None:
    assert "give a recipe that names them" in str(advise("--model", "tiny", "--pilot").exception)


def in_this_process(jobs: Sequence[Job], board: Board) -> Ends:
    for job in jobs:
        board.started(job)
        yield job, run_job(job)


def test_a_pilot_runs_ranks_and_is_run_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "choose", lambda name, at_once: in_this_process)
    many(home, 16)
    words = ("r.yaml", "--top", "1", "--pilot", "--steps", "1", "--seeds", "1", "--private")
    done = advise(*words)
    assert done.exit_code == 0, done.output
    assert "distinguishable" in done.output or "1 plain" in done.output
    runs = {path: path.stat().st_mtime_ns for path in Path("runs/r-pilot").glob("*/run.json")}
    assert len(runs) == 2
    assert not Path("runs/r-pilot/data").exists()
    assert advise(*words).exit_code == 0
    assert runs == {path: path.stat().st_mtime_ns for path in runs}
