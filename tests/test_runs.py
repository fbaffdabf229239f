"""Runs from the outside: what a user does, and every way in which it can go wrong."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import SafetensorError

import pico
from keeptune import loop, session, state
from keeptune.checks import run_checks
from keeptune.disk import locked
from keeptune.errors import (
    DataError,
    FolderError,
    KeeptuneError,
    ModelError,
    RecipeError,
    TrainingError,
)
from keeptune.failures import failure, write_failure
from keeptune.folder import RunFolder
from keeptune.inspection import inspect
from keeptune.method import Context
from keeptune.methods.ewc import EWC
from keeptune.methods.replay import Replay
from keeptune.methods.retrieval import Retrieval
from keeptune.methods.task_lora import TaskLoRA
from keeptune.notebook import fit
from keeptune.progress import Silent
from keeptune.recipe import Recipe, load_recipe, parse_recipe
from keeptune.runs import learn, run

TRAINER = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pico.tiny_folder(tmp_path)
    for task in range(3):
        pico.write_rows(tmp_path / f"train{task}.jsonl", pico.questions(task, 8))
        pico.write_rows(tmp_path / f"eval{task}.jsonl", pico.questions(task, 4))
    return tmp_path


def recipe(home: Path, *, count: int = 2, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": str(home / "tiny"),
        "adapter": "none",
        "tasks": [
            {
                "name": f"t{i}",
                "train": str(home / f"train{i}.jsonl"),
                "eval": str(home / f"eval{i}.jsonl"),
            }
            for i in range(count)
        ],
        "trainer": dict(TRAINER),
        "out": str(home / "run"),
    }
    return parse_recipe({**values, **changes})


# -- what a run leaves ----------------------------------------------------------------------------


def test_a_run_fills_a_square_r_with_row_0(home: Path) -> None:
    guard = pico.write_rows(home / "guard.jsonl", pico.questions(9, 5))
    folder = run(recipe(home, guards=[{"name": "old", "eval": guard}], methods=["replay"]))
    assert folder.info.status == "done"
    assert folder.matrix("task").shape == (3, 2)
    assert folder.matrix("guard").shape == (3, 1)
    assert not np.isnan(folder.matrix("task")).any()
    cell = folder.cell(2, "task", 1)
    assert cell is not None
    assert [e.expected.strip() for e in cell.examples] == [
        r["completion"].strip() for r in pico.questions(1, 4)
    ]
    assert folder.evidence()[1].methods[0].values["rows_replayed"] > 0
    phases = {p.phase for p in folder.cost().phases}
    assert phases == {"load", "train", "end_task", "save", "evaluate"}
    assert folder.cost().peak_memory_bytes > 0
    assert folder.steps()


def test_nothing_in_a_run_folder_is_a_pickle(home: Path) -> None:
    folder = run(recipe(home, methods=["ewc"], checkpoint_minutes=0))
    kinds = {p.suffix for p in folder.path.rglob("*") if p.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".yaml", ".html"}


def test_row_0_is_taken_over_from_a_run_on_the_same_model_and_data(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(recipe(home))
    pico.write_rows(home / "eval1.jsonl", pico.questions(8, 4))
    scored: list[str] = []
    original = loop.Loop.score
    monkeypatch.setattr(
        loop.Loop,
        "score",
        lambda self, item, *more: (scored.append(item.name), original(self, item, *more))[1],
    )
    second = run(recipe(home, out=str(home / "second")), row_0=first)
    assert scored == ["t1", "t0", "t1", "t0", "t1"]
    assert second.cell(0, "task", 0) == first.cell(0, "task", 0)


def test_the_recipe_kept_with_a_run_is_the_whole_recipe(home: Path) -> None:
    asked = recipe(home)
    folder = run(asked)
    assert load_recipe(folder.path / "recipe.yaml") == asked


def test_learn_adds_a_row_and_a_column(home: Path) -> None:
    folder = run(recipe(home, methods=["replay", {"ewc": {"strength": 10}}]))
    before = folder.matrix("task")
    grown = learn(
        folder.path, str(home / "train2.jsonl"), name="t2", eval=str(home / "eval2.jsonl")
    )
    R = grown.matrix("task")
    assert R.shape == (4, 3)
    assert np.array_equal(R[:3, :2], before)
    # The new task is scored on the base model and on the model of the day; not on models gone by.
    assert not np.isnan(R[[0, 2, 3], 2]).any()
    assert np.isnan(R[1, 2])
    assert grown.evidence()[2].methods[0].values["rows_by_task"].keys() <= {"t0", "t1"}


def test_learn_refuses_a_name_that_is_taken_and_an_unfinished_run(home: Path) -> None:
    folder = run(recipe(home))
    with pytest.raises(FolderError, match="has learned a task 't1' already"):
        learn(folder.path, str(home / "train2.jsonl"), name="t1")
    folder.info = folder.info.model_copy(update={"status": "stopped"})
    folder.save_info()
    with pytest.raises(FolderError, match="is not finished"):
        learn(folder.path, str(home / "train2.jsonl"), name="t2")


def test_fit_works_with_objects_in_a_notebook(tmp_path: Path) -> None:
    fitted = fit(
        pico.causal_lm(),
        {
            "a": (pico.questions(0, 8), pico.questions(0, 8)),
            "b": (pico.questions(1, 8), pico.questions(1, 8)),
        },
        tokenizer=pico.tokenizer(),
        methods=[EWC(strength=10), Replay()],
        guards={"old": pico.questions(7, 8)},
        adapter=peft.LoraConfig(r=4, target_modules="all-linear"),
        out=tmp_path / "run",
        trainer=TRAINER,
    )
    assert fitted.folder.matrix("task").shape == (3, 2)
    assert fitted.folder.info.strategy == "ewc + replay"
    assert isinstance(fitted.model, peft.PeftModel)


def test_task_lora_serves_each_task_with_its_own_adapter(tmp_path: Path) -> None:
    model = pico.causal_lm()
    probe = torch.tensor([[7, 8, 9, 10]])
    fitted = fit(
        model,
        {f"t{i}": (pico.questions(i, 8), pico.questions(i, 8)) for i in range(3)},
        tokenizer=pico.tokenizer(),
        methods=[TaskLoRA()],
        adapter=peft.LoraConfig(r=4, target_modules="all-linear"),
        out=tmp_path / "run",
        trainer=TRAINER,
    )
    R = fitted.folder.matrix("task")
    assert R[1, 0] == R[2, 0] == R[3, 0]
    logits = {}
    for adapter in ("task_000", "task_002"):
        fitted.model.set_adapter(adapter)
        logits[adapter] = fitted.model(probe).logits
    assert not torch.equal(logits["task_000"], logits["task_002"])


def distinct(task: int, n: int = 8) -> list[dict[str, str]]:
    """Rows whose questions have letters of their own."""
    two = "ab" if task == 0 else "YZ"
    words = [two[i // 4] + two[i // 2 % 2] + two[i % 2] for i in range(n)]
    return [
        {"prompt": word, "completion": f" {chr(97 + i + 5 * task)}"} for i, word in enumerate(words)
    ]


def test_a_question_of_unknown_task_is_answered_by_the_adapter_of_its_task(home: Path) -> None:
    for task in range(2):
        pico.write_rows(home / f"train{task}.jsonl", distinct(task))
        pico.write_rows(home / f"eval{task}.jsonl", distinct(task))
    mixed = [row for pair in zip(distinct(0), distinct(1), strict=True) for row in pair]
    guard = {"name": "mixed", "eval": pico.write_rows(home / "mixed.jsonl", mixed)}
    asked = recipe(
        home,
        adapter={"kind": "lora", "rank": 4},
        guards=[guard],
        methods=[{"task_lora": {"unknown": "nearest"}}],
    )
    folder = run(asked)
    assert folder.routes(0) is None
    assert folder.routes(1) is None
    routes = folder.routes(2)
    assert routes is not None
    assert routes.right("t0") == routes.right("t1") == 1.0
    cell = folder.cell(2, "guard", 0)
    assert cell is not None
    assert [e.id for e in cell.examples] == list(range(16))
    alone = [folder.cell(2, "task", task) for task in range(2)]
    for i, example in enumerate(cell.examples):
        own = alone[i % 2]
        assert own is not None
        same = next(e for e in own.examples if e.prompt == example.prompt)
        assert same.answer == example.answer


def test_what_is_put_before_questions_is_counted_and_each_score_is_asked_with_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = {"name": "text", "text": write_text(home / "guard.txt")}
    asked: list[tuple[int, int]] = []
    original = Retrieval.prompt

    def seen(self: Retrieval, ctx: Context, ids: list[int], room: int) -> list[int]:
        found = original(self, ctx, ids, room)
        asked.append((len(ids), len(found)))
        assert found[len(found) - len(ids) :] == ids
        assert len(found) <= room
        return found

    monkeypatch.setattr(Retrieval, "prompt", seen)
    folder = run(recipe(home, guards=[guard], methods=[{"retrieval": {"tokens": 40}}]))
    before, after = folder.cell(0, "task", 0), folder.cell(2, "task", 0)
    assert before is not None
    assert after is not None
    assert before.added_tokens == 0
    assert 0 < after.added_tokens <= 40 * after.n
    assert 0 < after.added_seconds <= after.seconds
    text = folder.cell(2, "guard", 0)
    assert text is not None
    assert text.added_tokens == 0


def write_text(path: Path) -> str:
    path.write_text("The committee met on Tuesday.\n" * 4)
    return str(path)


def test_a_classifier_learns_tasks_from_a_recipe(home: Path) -> None:
    model = pico.classifier(2)
    model.config.pad_token_id = 0
    model.save_pretrained(home / "classifier")
    pico.tokenizer().save_pretrained(home / "classifier")
    tasks = []
    for i in range(2):
        data = [{"text": f"{i} {c}", "label": "yes" if c in "abcd" else "no"} for c in "abcdefgh"]
        tasks.append({"name": f"c{i}", "train": pico.write_rows(home / f"c{i}.jsonl", data)})
        tasks[-1]["eval"] = tasks[-1]["train"]
    asked = recipe(
        home,
        model=str(home / "classifier"),
        kind="classification",
        tasks=tasks,
        methods=["ewc", "lwf"],
    )
    folder = run(asked)
    assert folder.info.tasks[0].score == "accuracy"
    assert not np.isnan(folder.matrix("task")).any()


def test_inspect_says_what_would_be_trained_and_writes_nothing(home: Path) -> None:
    before = sorted(home.rglob("*"))
    found = inspect(recipe(home, methods=["ewc"]))
    assert not found.problems
    text = "\n".join(found.lines)
    for word in ("t0: 8 rows", "strategy  ewc", "optimizer", "a step", "DDP", "FSDP2"):
        assert word in text
    assert sorted(home.rglob("*")) == before


def test_a_step_that_cannot_be_counted_is_said_and_is_no_problem(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(session: Any) -> Any:
        raise ModelError("It cannot be counted.")

    monkeypatch.setattr("keeptune.inspection.sizer_of", refuse)
    found = inspect(recipe(home))
    assert not found.problems
    assert "memory    It cannot be counted." in found.lines


def test_a_recipe_for_several_processes_is_checked_by_one(home: Path) -> None:
    assert not inspect(recipe(home, trainer={**TRAINER, "fsdp": True})).problems


# -- bad input: one sentence, nothing written ---------------------------------------------------


def refused(home: Path, asked: Recipe, kind: type[KeeptuneError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        run(asked)
    for word in words:
        assert word in str(caught.value)
    assert not (home / "run").exists()


def test_all_problems_are_named_at_once(home: Path) -> None:
    (home / "train1.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    asked = recipe(home, guards=[{"name": "gone", "text": str(home / "gone.txt")}])
    refused(home, asked, RecipeError, "train1.jsonl", "line 2", "gone.txt")
    assert len(inspect(asked).problems) == 2


def test_an_unknown_ready_made_guard_gets_near_names(home: Path) -> None:
    refused(home, recipe(home, guards=["capitls"]), RecipeError, "'capitls'", "capitals")


def test_wrong_rows_for_the_kind_are_refused(home: Path) -> None:
    refused(home, recipe(home, kind="classification"), DataError, "kind: classification", "'t0'")


def test_a_leak_is_warned_of_with_its_count(home: Path) -> None:
    heard: list[str] = []

    class Ear(Silent):
        def warn(self, message: str) -> None:
            heard.append(message)

    folder = run(recipe(home), progress=Ear())
    assert "4 of 4 evaluation rows of task 't0'" in heard[0]
    assert folder.info.tasks[0].leaked_rows == 4
    assert "KT003" in {finding.code for finding in run_checks(folder)}


def test_rows_longer_than_the_context_are_counted(home: Path) -> None:
    long = [{"prompt": "x" * 600 + f"{i}:", "completion": " a"} for i in range(4)]
    pico.write_rows(home / "train0.jsonl", long + pico.questions(0, 8))
    found = inspect(recipe(home))
    assert any("4 cut to 512" in line for line in found.lines)


def test_a_full_folder_is_refused_unless_resumed(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run" / "mine.txt").write_text("precious")
    with pytest.raises(FolderError, match="is not empty"):
        run(recipe(home))
    assert (home / "run" / "mine.txt").read_text() == "precious"


def test_two_processes_never_work_in_one_folder(home: Path) -> None:
    folder = run(recipe(home))
    with locked(folder.path), pytest.raises(FolderError, match="Another process is at work"):
        run(recipe(home), resume=True)


def test_resume_refuses_another_recipe_and_other_data(home: Path) -> None:
    run(recipe(home))
    with pytest.raises(FolderError, match="belongs to another recipe: seed differ"):
        run(recipe(home, seed=1), resume=True)
    pico.write_rows(home / "train0.jsonl", pico.questions(5, 8))
    with pytest.raises(DataError, match="train rows of task 't0' changed"):
        run(recipe(home), resume=True)


def test_resume_of_a_finished_run_changes_nothing(home: Path) -> None:
    folder = run(recipe(home))
    before = {p: p.read_bytes() for p in (folder.path / "rows").rglob("*.json")}
    again = run(recipe(home), resume=True)
    assert {p: p.read_bytes() for p in (again.path / "rows").rglob("*.json")} == before


def test_a_damaged_state_is_named_and_a_way_out_offered(home: Path) -> None:
    folder = run(recipe(home, count=3))
    file = folder.path / "state" / "task-003" / "weights.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(FolderError, match=r"weights\.safetensors is damaged") as caught:
        run(recipe(home, count=3), resume=True)
    assert "after task 't1'" in str(caught.value)
    assert "delete" in str(caught.value)


def test_a_damaged_run_json_is_named(home: Path) -> None:
    folder = run(recipe(home))
    (folder.path / "run.json").write_text('{"format": 1, ')
    with pytest.raises(FolderError, match=r"run\.json is damaged"):
        RunFolder(folder.path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(TrainingError, match=r"disk that holds .* is full"):
            run(recipe(home))
    assert RunFolder(home / "run").info.status == "failed"
    assert not list((home / "run").rglob("*.tmp"))
    assert run(recipe(home), resume=True).info.status == "done"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_full_memory_names_the_batch_size(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(session, "score_rows", full)
    with pytest.raises(TrainingError, match="per_device_train_batch_size: 4"):
        run(recipe(home))


def test_a_loss_that_is_not_a_number_keeps_the_last_good_state(home: Path) -> None:
    asked = recipe(home, trainer={**TRAINER, "learning_rate": 1e30, "max_grad_norm": 0})
    with pytest.raises(TrainingError, match=r"task 't0'"):
        run(asked)
    folder = RunFolder(home / "run")
    assert folder.info.status == "failed"
    assert not list(folder.path.glob("state/task-*"))
    assert folder.matrix("task").shape == (1, 2)


def test_trainer_settings_that_contradict_each_other_are_a_sentence(home: Path) -> None:
    asked = recipe(home, trainer={**TRAINER, "bf16": True, "fp16": True})
    refused(home, asked, RecipeError, "trainer:")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("learning_rate", -1, "must be at least 0, got -1"),
        ("learning_rate", float("nan"), "must be a finite number, got nan"),
        ("per_device_train_batch_size", 0, "must be at least 1, got 0"),
        ("gradient_accumulation_steps", 0, "must be at least 1, got 0"),
        ("optim", "adamw_bnb_8bit", "trainer: "),
        ("lr_scheduler_type", "cosine_with_min_lr", "trainer: "),
        ("accelerator_config", "nope.json", "trainer: "),
        ("report_to", "wandb", "trainer: "),
    ],
)
def test_what_the_trainer_would_stumble_over_is_said_before_anything_is_written(
    home: Path, key: str, value: Any, words: str
) -> None:
    asked = recipe(home, trainer={**TRAINER, key: value})
    refused(home, asked, RecipeError, words)
    assert inspect(asked).problems


def test_a_template_that_is_missing_is_said_with_where(home: Path) -> None:
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    guard = {"name": "chats", "eval": pico.write_rows(home / "chat.jsonl", chat)}
    refused(home, recipe(home, guards=[guard]), DataError, "guard 'chats', evaluation rows: ")
    task = {"name": "c", "train": guard["eval"], "eval": guard["eval"]}
    refused(home, recipe(home, tasks=[task]), DataError, "task 'c': ")


@pytest.mark.parametrize("what", ["file", "junk", "below"])
def test_where_no_run_can_go_is_said_before_anything_is_loaded(home: Path, what: str) -> None:
    (home / "file").write_text("mine")
    (home / "junk").mkdir()
    (home / "junk" / "mine.txt").write_text("mine")
    places = {"file": ("file", "is a file"), "junk": ("junk", "holds no run to go on with")}
    place, words = places.get(what, ("file/run", "cannot be made, since .*file is a file"))
    for resume in (False, True):
        with pytest.raises(FolderError, match=words):
            run(recipe(home, out=str(home / place), model="none/there"), resume=resume)


def test_a_run_whose_state_is_gone_is_not_taken_for_one_that_learned_nothing(home: Path) -> None:
    folder = run(recipe(home))
    shutil.rmtree(folder.path / "state")
    with pytest.raises(FolderError, match="state/ in it holds no weights any more"):
        learn(folder.path, str(home / "train2.jsonl"), name="t2")


def test_other_weights_of_the_base_model_are_refused(home: Path) -> None:
    folder = run(recipe(home))
    pico.causal_lm(seed=3).save_pretrained(home / "tiny")
    with pytest.raises(ModelError, match="The weights of tiny changed since"):
        learn(folder.path, str(home / "train2.jsonl"), name="t2")
    with pytest.raises(ModelError, match="changed since"):
        run(recipe(home), resume=True)


def test_a_failure_that_another_try_left_goes_when_the_run_is_done(home: Path) -> None:
    folder = run(recipe(home))
    write_failure(folder.path, "Another process is at work")
    run(recipe(home), resume=True)
    assert failure(folder.path) is None


# -- stopped by the user --------------------------------------------------------------------------


def test_ctrl_c_saves_a_state_and_the_run_goes_on_bit_for_bit(home: Path) -> None:
    class Impatient(Silent):
        """Presses Ctrl-C in the second task."""

        tasks = 0

        def task(self, number: int, total: int, name: str) -> None:
            self.tasks = number

        def advance(self, done: int, **figures: float) -> None:
            if self.tasks == 2 and done == 1:
                self.tasks = 0
                os.kill(os.getpid(), signal.SIGINT)

    asked = recipe(home, methods=[{"ewc": {"strength": 10}}, "replay"])
    with pytest.raises(KeyboardInterrupt):
        run(asked, progress=Impatient())
    stopped = RunFolder(home / "run")
    assert stopped.info.status == "stopped"
    assert list(stopped.path.glob("state/progress/001-*"))
    run(asked, resume=True)
    whole = run(asked.model_copy(update={"out": home / "whole"}))
    ends = [
        (folder / "state" / "task-002" / "manifest.json").read_text()
        for folder in (home / "run", whole.path)
    ]
    assert ends[0] == ends[1]
