"""What a person asks to be forgotten is in no byte of a run folder, and the run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

import pico
from keeptune import report, state
from keeptune.chain import Chain
from keeptune.cli import app
from keeptune.disk import finish_replacing, locked, new_folder, verify
from keeptune.errors import DataError, FolderError, KeeptuneError, RecipeError
from keeptune.folder import RunFolder
from keeptune.forgetting import FORGOTTEN, forget
from keeptune.method import Method
from keeptune.methods.gem import GEM
from keeptune.methods.replay import Replay
from keeptune.recipe import parse_recipe
from keeptune.records import Cell, Example, Routes
from keeptune.rows import Shape
from keeptune.runs import learn
from keeptune.runs import run as run_recipe
from keeptune.tokens import encode
from keeptune.where import parse
from pencil import Softmax, context
from runs import info

PERSON = "Jane Doe"
TOKENIZER = pico.tokenizer()
TASKS = ("mail", "notes")
ROWS = 14
RECIPE = "model: demo\ntasks: [{name: mail, train: a.jsonl, eval: b.jsonl}]\n"


def row(task: str, number: int) -> dict[str, str]:
    who = PERSON if number % 5 == 0 else f"Someone {number}"
    return {"prompt": f"{task}: {who} said {number}", "completion": " yes"}


def tokenised(task: str) -> Dataset:
    encoded = [encode(row(task, number), Shape.COMPLETION, TOKENIZER, 99) for number in range(ROWS)]
    return Dataset.from_dict(
        {"input_ids": [ids for ids, _ in encoded], "labels": [labels for _, labels in encoded]}
    )


def methods() -> list[Method]:
    return [Replay(size=12), GEM(size=9)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.kept.BLOCK", 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run folder with two states and one in the middle of a task, which no run made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keeptune.kept.BLOCK", 4)
        path = tmp_path_factory.mktemp("made") / "run"
        run = RunFolder.create(path, info(TASKS, ()), RECIPE)
        chain = Chain(methods())
        for index, task in enumerate(TASKS):
            ctx = context(
                Softmax([[0.0]]),
                tokenised(task),
                task=task,
                index=index,
                folder=path / "state" / "files",
            )
            chain.end_task(ctx)
            save(path / "state" / f"task-{index + 1:03d}", chain)
        save(path / "state" / "progress" / "002-000000007", chain)
        for stage in range(3):
            for index, task in enumerate(TASKS):
                examples = [example(task, number, stage) for number in range(10)]
                cell = Cell(name=task, score=0.5, unit="share", n=10, examples=examples)
                run.write_cell(stage, "task", index, cell)
        shutil.rmtree(path / "state" / "files")
        report.write([path])
        yield path


def save(path: Path, chain: Chain) -> None:
    with new_folder(path) as files:
        state.write_json(files / "scheduler.json", {})
        state.write_methods(files, chain)


def example(task: str, number: int, stage: int = 0) -> Example:
    asked = row(task, number)
    return Example(
        id=number,
        prompt=asked["prompt"],
        expected=asked["completion"],
        answer="no",
        score=(number + stage) % 2,
    )


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def traces(path: Path, words: str) -> list[str]:
    """The files in which the words are, as text or as token ids."""
    ids = TOKENIZER(words, add_special_tokens=False)["input_ids"]
    needles = [words.encode()] + [np.array(ids, t).tobytes() for t in ("<u2", "<i4", "<i8")]
    return [
        str(file.relative_to(path))
        for file in sorted(path.rglob("*"))
        if file.is_file() and any(needle in file.read_bytes() for needle in needles)
    ]


def kept(path: Path) -> dict[str, list[list[int]]]:
    """The rows of every buffer in every state."""
    found = {}
    for folder in (*path.glob("state/task-*"), *path.glob("state/progress/*")):
        verify(folder)
        own = methods()
        state.read_methods(folder, Chain(own), context(Softmax([[0.0]])))
        replay, gem = own
        assert isinstance(replay, Replay)
        assert isinstance(gem, GEM)
        for name, buffer in {"replay": replay._buffer, **gem._buffers}.items():
            rows = buffer.examples(list(range(len(buffer))))
            found[f"{folder.name} {name}"] = [r["input_ids"].tolist() for r in rows]
    return found


def is_persons(ids: list[int]) -> bool:
    return PERSON in TOKENIZER.decode(ids)


def test_no_byte_of_a_person_is_left(run: Path) -> None:
    before, everywhere = kept(run), traces(run, PERSON)
    assert any(name.endswith(".arrow") for name in everywhere)
    assert any(name.startswith("rows/") for name in everywhere)
    assert "report.html" in everywhere
    done = forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER)
    assert traces(run, PERSON) == []
    assert traces(run, "Someone 3")
    expected = {name: [r for r in rows if not is_persons(r)] for name, rows in before.items()}
    removed = sum(map(len, before.values())) - sum(map(len, expected.values()))
    assert sum(n for n, _ in done.rows.values()) == removed > 0
    ended = {name: rows for name, rows in expected.items() if name.startswith("task-")}
    assert kept(run) == ended, "the others are as they were, in their order"
    assert done.begins_again
    assert list((run / "state" / "progress").iterdir()) == []
    assert done.left == []
    assert not (run / "state" / "files").exists()


def test_results_keep_their_scores(run: Path) -> None:
    folder = RunFolder(run)
    scores = folder.matrix("task")
    done = forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER)
    assert done.examples == {f"rows/{s:03d}/task-{t:03d}.json": 2 for s in range(3) for t in (0, 1)}
    assert (folder.matrix("task") == scores).all()
    cell = folder.cell(1, "task", 0)
    assert cell is not None
    assert cell.examples[0].prompt == cell.examples[5].answer == FORGOTTEN
    assert cell.examples[1] == example("mail", 1, 1)
    assert RunFolder(run).info.forget_requests == 1
    assert forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER).nothing


def test_a_dry_run_counts_and_writes_nothing(run: Path) -> None:
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    would = forget(run, [f"text={PERSON}"], dry_run=True, tokenizer=TOKENIZER)
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
    done = forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER)
    assert (would.rows, would.examples) == (done.rows, done.examples)


def test_a_task_needs_no_tokenizer(run: Path) -> None:
    done = forget(run, ["task=mail"])
    assert done.rows["task-002, gem"][0] == 9
    assert all("notes" in TOKENIZER.decode(ids) for rows in kept(run).values() for ids in rows)
    assert {file[-8:] for file in done.examples} == {"000.json"}


def test_rows_of_a_file_are_found_again(run: Path) -> None:
    file = run.parent / "rows.jsonl"
    Dataset.from_list([row("mail", 3), row("notes", 4)]).to_json(file)
    forget(run, [f"rows={file}"], tokenizer=TOKENIZER)
    for words in ("mail: Someone 3", "notes: Someone 4"):
        found = traces(run, words)
        assert not any(name.startswith("state") for name in found), found
    assert traces(run, "notes: Someone 3")
    cell = RunFolder(run).cell(0, "task", 0)
    assert cell is not None
    assert cell.examples[3].prompt == FORGOTTEN


def test_a_task_in_its_middle_goes_on_when_it_has_no_such_row(run: Path) -> None:
    middle = run / "state" / "progress" / "002-000000007"
    before = kept(run)
    done = forget(run, ["text=no such words"], tokenizer=TOKENIZER)
    assert not done.begins_again
    assert kept(run) == before
    verify(middle)


def test_all_conditions_must_hold(run: Path) -> None:
    forget(run, ["regex=Doe said 1?0", "task=notes"], tokenizer=TOKENIZER)
    texts = {TOKENIZER.decode(r).split(" yes")[0] for rows in kept(run).values() for r in rows}
    assert not any(t.startswith("notes") and t.endswith(("said 0", "said 10")) for t in texts)
    assert any(t.startswith("mail: Jane Doe said") for t in texts)


class Killed(BaseException):
    """Nothing runs after it."""


def killed_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """End at the `number`th rename or removal, and let nothing be mended after it."""
    calls = [0]

    def until(original: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] >= number:
                raise Killed
            return original(*args, **kwargs)

        return counted

    patch.setattr(Path, "replace", until(Path.replace))
    patch.setattr(Path, "unlink", until(Path.unlink))
    patch.setattr(shutil, "rmtree", until(shutil.rmtree))


@pytest.mark.parametrize("number", [2, 5, 9, 12, 14, 15, 16, 17, 18, 19, 20])
def test_a_killed_call_loses_nothing_and_the_next_does_the_rest(run: Path, number: int) -> None:
    before = kept(run)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(number, patch)
        with pytest.raises(Killed):
            forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER)
    # A run that goes on instead does this first.
    for parent in (run / "state", run / "state" / "progress"):
        finish_replacing(parent)
    now = kept(run)
    assert {n for n in before if n.startswith("task-")} <= set(now) <= set(before)
    for name, rows in now.items():
        assert rows in (before[name], [r for r in before[name] if not is_persons(r)])
    forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER)
    assert traces(run, PERSON) == []
    assert [p.name for p in (run / "state").iterdir() if p.name[:5] in (".old-", ".new-")] == []


def test_a_copy_that_a_user_keeps_of_a_state_stays(run: Path) -> None:
    for name in ("old-task-002", "new-task-002", "old-task-009"):
        (run / "state" / name).mkdir()
        (run / "state" / name / "mine").touch()
    forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER)
    assert len(list((run / "state").glob("*-task-*/mine"))) == 3


def test_where_questions_were_routed_to_is_no_result_with_texts(run: Path) -> None:
    RunFolder(run).write_routes(1, Routes(tasks={"mail": {"mail": 3}}))
    before = (run / "rows" / "001" / "routes.json").read_bytes()
    assert forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER).examples
    assert (run / "rows" / "001" / "routes.json").read_bytes() == before


def test_what_other_files_hold_is_said(run: Path) -> None:
    (run / "logs").mkdir()
    (run / "logs" / "notes.txt").write_text("Ask JANE\n doe.")
    done = forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER)
    assert done.left == ["logs/notes.txt"]


def test_halves_that_a_kill_left_are_removed(run: Path) -> None:
    half = run / "state" / ".task-003.999999.tmp"
    half.mkdir()
    (half / "a").write_text(PERSON)
    (run / "state" / "files").mkdir()
    (run / "state" / "files" / "b.arrow").write_text(PERSON)
    (run / "rows" / ".task-000.json.1.tmp").write_text(PERSON)
    forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER)
    assert traces(run, PERSON) == []


def test_a_damaged_state_gets_no_new_hash(run: Path) -> None:
    file = next((run / "state" / "task-001").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FolderError, match="is damaged"):
        forget(run, [f"text={PERSON}"], tokenizer=TOKENIZER)


def test_a_folder_in_use_is_left_alone(run: Path) -> None:
    with locked(run), pytest.raises(FolderError, match="Another process"):
        forget(run, ["task=mail"])


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ([], "give --where, such as --where text=WORDS"),
        (["Jane"], "'Jane' is no condition: it must be task=NAME"),
        (["text="], "'text=' is no condition"),
        (["txt=a"], "Did you mean 'text'"),
        (["regex=("], "is no regular expression of Python"),
        (["rows=gone.jsonl"], "there is no file gone.jsonl"),
    ],
)
def test_bad_conditions_are_refused_in_one_sentence(conditions: list[str], words: str) -> None:
    with pytest.raises(KeeptuneError) as caught:
        parse(conditions)
    assert words in str(caught.value)
    assert isinstance(caught.value, RecipeError | DataError)


def test_a_task_that_is_none_is_refused(run: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no task 'mial'\. Did you mean 'mail'"):
        forget(run, ["task=mial"])


def test_a_run_of_objects_says_how(run: Path) -> None:
    folder = RunFolder(run)
    folder.info = folder.info.model_copy(update={"model": {"source": "object"}})
    folder.save_info()
    with pytest.raises(FolderError, match=r"Call keeptune\.forget with `tokenizer`"):
        forget(run, ["text=a"])


def test_the_command_says_what_was_removed_and_what_was_not(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keeptune.models.load_tokenizer", lambda *a, **k: TOKENIZER)
    words = ["forget", str(run), "--where", "task=mail", "--where", f"text={PERSON}"]
    tried = CliRunner().invoke(app, [*words, "--dry-run"])
    assert "task-001, replay: 2 of 12 rows would be removed" in tried.output
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert "rows/000/task-000.json: texts of 2 examples replaced" in done.output
    assert "The weights still hold what they learned" in done.output
    again = CliRunner().invoke(app, words)
    assert "No row and no example is meant." in again.output


def test_words_are_found_whatever_their_case_and_white_space() -> None:
    where = parse(["text=Jane  Doe"])
    assert where.of_text("JANE\ndoe")
    assert not where.of_text("JaneDoe")


# -- a real run -----------------------------------------------------------------------------------


def file_of(home: Path, task: str, numbers: Sequence[int]) -> str:
    path = home / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row(task, number)) + "\n" for number in numbers))
    return str(path)


def recipe(home: Path, tasks: Sequence[str]) -> Any:
    return parse_recipe(
        {
            "model": str(home / "tiny"),
            "adapter": "none",
            "tasks": [
                {
                    "name": task,
                    "train": str(home / f"{task}.jsonl"),
                    "eval": str(home / "other.jsonl"),
                }
                for task in tasks
            ],
            "methods": [{"replay": {"ratio": 1.0}}],
            "trainer": {"max_steps": 2, "per_device_train_batch_size": 4},
            "out": str(home / "run"),
        }
    )


def test_a_run_that_forgot_goes_on_without_the_rows(tmp_path: Path) -> None:
    pico.tiny_folder(tmp_path)
    file_of(tmp_path, "other", [1, 2, 3])
    file_of(tmp_path, "mail", range(ROWS))
    new = file_of(tmp_path, "notes", [1, 2, 3, 4])
    path = run_recipe(recipe(tmp_path, ["mail"])).path
    assert any(name.endswith(".arrow") for name in traces(path, PERSON))
    done = forget(path, [f"text={PERSON}"])
    assert done.rows == {"task-001, replay": (3, ROWS)}
    assert traces(path, PERSON) == []
    file_of(tmp_path, "mail", [n for n in range(ROWS) if n % 5])
    folder = learn(path, new, name="notes", eval=str(tmp_path / "other.jsonl"))
    assert folder.info.status == "done"
    assert folder.evidence()[1].methods[0].values["rows_by_task"] == {"mail": 4}
    assert folder.evidence()[1].methods[0].values["bytes_on_disk"] > 0
    assert not (path / "state" / "files").exists()
    assert traces(path, PERSON) == []


def test_data_may_lack_rows_only_after_forgetting(tmp_path: Path) -> None:
    pico.tiny_folder(tmp_path)
    file_of(tmp_path, "other", [1, 2, 3])
    file_of(tmp_path, "mail", range(ROWS))
    new = file_of(tmp_path, "notes", [1, 2, 3, 4])
    path = run_recipe(recipe(tmp_path, ["mail"])).path
    file_of(tmp_path, "mail", [n for n in range(ROWS) if n % 5])
    with pytest.raises(DataError, match="train rows of task 'mail' changed"):
        learn(path, new, name="notes", eval=new)
    assert forget(path, ["text=no such words"]).nothing
    file_of(tmp_path, "other", [1, 2])
    with pytest.raises(DataError, match="rows of task 'mail' changed"):
        learn(path, new, name="notes", eval=new)
