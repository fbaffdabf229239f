"""Many runs: which they are, that none is run twice, and what becomes of one that fails."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import runs
from keeptune import registry
from keeptune.board import Board
from keeptune.compare import compare, plan, task_orders
from keeptune.disk import locked
from keeptune.errors import FolderError, RecipeError
from keeptune.failures import failure, write_failure
from keeptune.jobs import Job
from keeptune.recipe import Recipe, parse_recipe
from keeptune.strategies import read_strategies

ROWS = [{"prompt": f"{i} and 1 are", "completion": f" {i + 1}"} for i in range(4)]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        rows = [{**row, "prompt": name + row["prompt"]} for row in ROWS]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"name": n, "train": f"{n}.jsonl", "eval": f"{n}.jsonl"} for n in ("a", "b", "c")]
    methods = [{"ewc": {"strength": 7}}]
    return parse_recipe({"model": "demo", "tasks": tasks, "methods": methods, "seed": 4})


OUT = Path("out")


def names(jobs: Sequence[Job]) -> list[str]:
    return [job.folder.name.rpartition("-")[0] for job in jobs]


def methods(job: Job) -> list[Any]:
    return [method for entry in job.recipe["methods"] for method in entry.items()]


# -- strategies -----------------------------------------------------------------------------------


def test_settings_come_from_the_words_then_the_recipe_then_the_defaults(recipe: Recipe) -> None:
    text = "plain, replay(ratio=1e-1, policy='reservoir')+ewc,ewc(strength=3)"
    plain, both, ewc = read_strategies(text, recipe)
    assert plain.methods == [("plain", {})]
    assert [name for name, _ in both.methods] == ["replay", "ewc"]
    assert both.methods[0][1]["ratio"] == 0.1
    assert both.methods[0][1]["size"] == registry.get("replay").model_fields["size"].default
    assert both.methods[1][1]["strength"] == 7
    assert ewc.methods[0][1]["strength"] == 3
    assert ewc.words == "ewc(strength=3)"


@pytest.mark.parametrize("name", registry.names())
def test_settings_that_are_filled_in_give_the_same_method(name: str, recipe: Recipe) -> None:
    required = {"seq_star": "(classes=[a, b])"} if name == "seq_star" else {}
    try:
        (strategy,) = read_strategies(name + required.get(name, ""), recipe)
    except RecipeError:
        pytest.skip("has no default for every setting")
    ((_, settings),) = strategy.methods
    assert registry.build(name, settings).model_dump(mode="json") == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plain,ewcc", "--methods ewcc: There is no method 'ewcc'. Did you mean 'ewc'?"),
        ("ewc(strenth=1)", "EWC.strenth is not a setting. Did you mean 'strength'?"),
        ("ewc(strength=-1)", "EWC.strength: must be at least 0.0, got -1."),
        ("ewc(3)", "--methods ewc(3): '3' is no setting; write ewc(key=value)."),
        ("ewc(strength=3", "write methods as in plain,replay+ewc,ewc(strength=10)"),
        ("plain,,ewc", "write methods as in"),
        ("", "--methods '': write methods as in"),
        ("ewc(strength=[)", "--methods ewc(strength=[): "),
        ("replay+replay", "The method 'replay' is listed twice. Keep one of them."),
        ("task_lora+merge", "cannot run together"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(recipe: Recipe, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        read_strategies(text, recipe)
    assert said in str(refused.value)


def test_all_that_is_wrong_is_said_at_once(recipe: Recipe) -> None:
    with pytest.raises(RecipeError) as refused:
        read_strategies("ewcc,plain,replay(ratio=-1)", recipe)
    assert len(str(refused.value).splitlines()) == 2


# -- the plan -------------------------------------------------------------------------------------


def test_all_combinations_are_planned(recipe: Recipe) -> None:
    jobs = plan(recipe, OUT, methods="plain,replay+ewc", seeds="2", orders=2)
    assert names(jobs) == [
        f"{strategy}-seed{seed}{order}"
        for strategy in ("plain", "replay+ewc")
        for order in ("", "-order1")
        for seed in (4, 5)
    ]
    assert len({job.folder for job in jobs}) == 8
    assert jobs[1].title == "plain, seed 5, order 0"
    assert [t["name"] for t in jobs[0].recipe["tasks"]] == ["a", "b", "c"]
    assert [t["name"] for t in jobs[2].recipe["tasks"]] != ["a", "b", "c"]
    assert jobs[4].recipe["out"] == str(jobs[4].folder)
    assert parse_recipe(jobs[4].recipe).strategy[1][1]["strength"] == 7


def test_without_a_list_it_is_plain_and_the_recipes_own(recipe: Recipe) -> None:
    assert names(plan(recipe, OUT)) == ["plain-seed4", "ewc-seed4"]


def test_a_folder_is_named_by_what_is_run_in_it(recipe: Recipe) -> None:
    (first,) = plan(recipe, OUT, methods="ewc")
    again = plan(recipe, OUT, methods="plain,ewc(strength=7),ewc", seeds="4,4")
    assert [job.folder for job in again[1:]] == [first.folder]
    slower = parse_recipe({**recipe.model_dump(mode="json"), "eval_batch_size": 2})
    assert plan(slower, OUT, methods="ewc")[0].folder == first.folder
    other = [
        plan(recipe, OUT, methods="ewc(strength=8)"),
        plan(recipe, OUT, methods="ewc", seeds="5,"[:1]),
        plan(
            parse_recipe({**recipe.model_dump(mode="json"), "max_length": 99}), OUT, methods="ewc"
        ),
    ]
    assert other[1][0].folder == first.folder, "the first of five seeds"
    assert first.folder not in {other[0][0].folder, other[2][0].folder}
    Path("b.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert plan(recipe, OUT, methods="ewc")[0].folder != first.folder


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ("0", r"--seeds 0: give how many, such as 3 \(then 4 to 6\)"),
        ("-1", "--seeds -1: give how many"),
        ("1,x", "--seeds 1,x: give how many"),
        ("", "--seeds : give how many"),
        ("1,4294967296", "a seed is less than 4294967296"),
    ],
)
def test_seeds_that_cannot_be_are_refused(recipe: Recipe, seeds: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan(recipe, OUT, methods="plain", seeds=seeds)


def test_orders_are_different_and_always_the_same() -> None:
    every = task_orders(3, 6)
    assert every[0] == [0, 1, 2]
    assert sorted(every) == [list(way) for way in itertools.permutations(range(3))]
    assert task_orders(3, 4) == every[:4]
    assert len({tuple(way) for way in task_orders(9, 30)}) == 30


@pytest.mark.parametrize(
    ("tasks", "count", "said"),
    [
        (1, 2, "--orders 2: 1 task can be put into 1 order; give a number from 1 to 1"),
        (3, 7, "--orders 7: 3 tasks can be put into 6 orders; give a number from 1 to 6"),
        (3, 0, "--orders 0"),
    ],
)
def test_more_orders_than_there_are_are_refused(tasks: int, count: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        task_orders(tasks, count)


def test_data_that_cannot_be_read_are_refused_before_any_run(recipe: Recipe) -> None:
    Path("c.jsonl").unlink()
    Path("b.jsonl").write_text("{")
    with pytest.raises(RecipeError) as refused:
        plan(recipe, OUT, methods="plain")
    assert len(str(refused.value).splitlines()) >= 2
    assert not OUT.exists()


# -- the runs -------------------------------------------------------------------------------------


class Engine:
    """Makes up each run; those whose folder's name holds a word of `fails` fail."""

    def __init__(self, *fails: str) -> None:
        self.fails = fails
        self.done: list[str] = []

    def __call__(self, jobs: Sequence[Job], board: Board) -> Iterator[tuple[Job, str | None]]:
        for job in jobs:
            board.started(job)
            self.done.append(job.folder.name)
            if any(word in job.folder.name for word in self.fails):
                yield job, "the loss is not a number"
                continue
            info = runs.info(
                [task["name"] for task in job.recipe["tasks"]],
                methods=[runs.EWC] if "ewc" in job.folder.name else [],
                seed=job.recipe["seed"],
            )
            runs.fabricate(job.folder, info)
            board.looked(job)
            yield job, None


def done(jobs: Sequence[Job], engine: Engine) -> tuple[Any, str]:
    shown = io.StringIO()
    return compare(jobs, OUT, Board(shown), engine), shown.getvalue()


def test_nothing_is_run_twice_and_more_methods_add_runs(recipe: Recipe) -> None:
    engine = Engine()
    came, shown = done(plan(recipe, OUT, methods="plain", seeds="2"), engine)
    assert (len(came.done), came.failed, came.page) == (2, [], OUT / "comparison.html")
    assert shown.startswith("2 runs\nplain, seed 4: finished in ")
    before = list(engine.done)
    came, shown = done(plan(recipe, OUT, methods="plain,ewc", seeds="2"), engine)
    assert shown.startswith("4 runs, 2 finished before\n")
    assert [name.split("-")[0] for name in engine.done[len(before) :]] == ["ewc", "ewc"]
    assert len(came.done) == 4
    done(plan(recipe, OUT, methods="plain,ewc", seeds="2"), engine)
    assert len(engine.done) == 4


def test_a_run_that_fails_is_shown_and_tried_again(recipe: Recipe) -> None:
    jobs = plan(recipe, OUT, methods="plain,ewc", seeds="2")
    came, shown = done(jobs, Engine("ewc-seed5"))
    assert [(job.folder, said) for job, said in came.failed] == [
        (jobs[3].folder, "the loss is not a number")
    ]
    assert failure(jobs[3].folder) == "the loss is not a number"
    assert "warning: ewc, seed 5: failed: the loss is not a number" in shown
    page = came.page.read_text("utf-8")
    assert "the loss is not a number" in page
    assert jobs[3].folder.name in page
    again = Engine("ewc-seed5")
    done(jobs, again)
    assert again.done == [jobs[3].folder.name]


def test_without_any_finished_run_there_is_no_page(recipe: Recipe) -> None:
    came, _ = done(plan(recipe, OUT, methods="plain"), Engine("plain"))
    assert (came.page, came.done, len(came.failed)) == (None, [], 1)


def test_a_folder_that_another_command_is_at_work_in_is_refused(recipe: Recipe) -> None:
    OUT.mkdir()
    with locked(OUT), pytest.raises(FolderError, match="Another process is at work in out"):
        done(plan(recipe, OUT, methods="plain"), Engine())


def test_a_failure_is_one_line_with_its_details_under_it(tmp_path: Path) -> None:
    assert write_failure(tmp_path / "run", "a\nb", "Traceback") == "a; b"
    assert failure(tmp_path / "run") == "a; b"
    assert (tmp_path / "run" / "error.txt").read_text() == "a; b\nTraceback"
    assert failure(tmp_path) is None
