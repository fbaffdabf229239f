"""`privacy: strict`: methods that keep rows are refused, and no row is left in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr

import pico
import traces
from keeptune import registry, report, session
from keeptune.errors import MethodError, RecipeError
from keeptune.loop import Loop
from keeptune.method import Context, Method, State
from keeptune.methods.ewc import EWC
from keeptune.methods.lwf import LwF
from keeptune.methods.pseudo_replay import PseudoReplay
from keeptune.methods.replay import Replay
from keeptune.methods.self_rewrite import SelfRewrite
from keeptune.notebook import fit
from keeptune.privacy import refusal, without_text
from keeptune.progress import Silent
from keeptune.recipe import check_recipe, parse_recipe
from keeptune.recipe_checks import check_methods
from keeptune.records import Example

KEEPING = sorted(n for n in registry.names() if "buffer" in registry.get(n).traits)
TRAINER = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}


def rows(task: int) -> list[dict[str, str]]:
    """Eight rows of one task, long enough to be known again."""
    if task:
        return [
            {"prompt": f"Invoice no. {i}{i}7:", "completion": f" unpaid since {i} May"}
            for i in range(8)
        ]
    words = ("parrot", "lantern", "harbour", "cinnamon")
    return [
        {
            "prompt": f"Patient {i} on {words[i % 4]} street?",
            "completion": f" has {words[-i % 4]} flu",
        }
        for i in range(8)
    ]


def patterns(count: int) -> Iterator[bytes]:
    """All that must not be found of the rows of so many tasks."""
    tokenizer = pico.tokenizer(chat=True)
    for task in range(count):
        for row in rows(task):
            for text in (row["prompt"], row["completion"]):
                yield from traces.texts(text)
                yield from traces.tokens(tokenizer.encode(text))


def learn(path: Path, methods: list[Method], privacy: str = "strict", count: int = 2) -> Path:
    """A run whose evaluation rows are its training rows, and whose guard asks one of them again."""
    tasks = {f"t{i}": (rows(i), rows(i)) for i in range(count)}
    fit(
        pico.causal_lm(),
        tasks,
        tokenizer=pico.tokenizer(chat=True),
        methods=methods,
        guards={"again": [rows(0)[0] | {"prompt": "Once more:"}]},
        trainer=TRAINER,
        checkpoint_minutes=0,
        privacy=privacy,
        out=path,
    )
    report.write([path], None)
    return path


STRATEGIES: dict[str, list[Method]] = {
    "pseudo_replay": [PseudoReplay(ratio=1.0, distil=1.0, general=0.5, probe=2), EWC()],
    "self_rewrite": [SelfRewrite(agree="any", top_k=20), LwF()],
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_row_is_left_in_the_run_folder(name: str, tmp_path: Path) -> None:
    folder = learn(tmp_path / "run", STRATEGIES[name])
    assert traces.found(folder, patterns(2)) == []
    html = (folder / "report.html").read_text("utf-8")
    assert "Patient" not in html
    cell = json.loads((folder / "rows" / "002" / "task-000.json").read_text("utf-8"))
    assert len(cell["examples"]) == 8
    assert {e["prompt"] + e["expected"] + e["answer"] for e in cell["examples"]} == {""}


def test_without_strict_results_hold_texts() -> None:
    assert without_text(Example(id=3, prompt="a", expected="b", answer="c", score=0.5)) == Example(
        id=3, prompt="", expected="", answer="", score=0.5
    )


def test_the_search_finds_texts_and_ids_where_they_are_kept(tmp_path: Path) -> None:
    folder = learn(tmp_path / "run", [Replay()], privacy="open")
    files = {hit.partition(":")[0] for hit in traces.found(folder, patterns(2))}
    assert "rows/001/task-000.json" in files
    assert "state/task-002/method-0-replay.safetensors" in files


class Keeps(Method):
    """Keeps a row and does not say so."""

    wide: ClassVar[torch.dtype] = torch.int32
    _kept: list[int] = PrivateAttr(default_factory=list)

    def end_task(self, ctx: Context) -> None:
        self._kept = list(ctx.dataset[0]["input_ids"])

    def state(self) -> State:
        return State({"ids": torch.tensor(self._kept, dtype=self.wide)})


class KeepsWide(Keeps):
    """The same in 64 bits."""

    wide: ClassVar[torch.dtype] = torch.int64


class KeepsAsValues(Keeps):
    """The same as JSON."""

    def state(self) -> State:
        return State(values={"ids": self._kept})


class Tells(Keeps):
    """Shows a text as evidence."""

    def state(self) -> State:
        return State()

    def end_task(self, ctx: Context) -> None:
        self._evidence["first"] = ctx.tokenizer.decode(ctx.dataset[0]["input_ids"])


@pytest.mark.parametrize("cls", [Keeps, KeepsWide, KeepsAsValues, Tells])
def test_a_method_that_keeps_a_row_in_secret_is_caught(cls: type[Method], tmp_path: Path) -> None:
    folder = learn(tmp_path / "run", [cls()], count=1)
    hits = {h.partition(":")[0] for h in traces.found(folder, patterns(1))}
    where = "state/task-001/method-0-keeps"
    assert (
        hits
        == {
            Keeps: {f"{where}.safetensors"},
            KeepsWide: {f"{where}wide.safetensors"},
            KeepsAsValues: {f"{where}asvalues.json"},
            Tells: {"evidence/001.json", "report.html", "state/task-001/method-0-tells.json"},
        }[cls]
    )


def test_inside_a_task_no_row_of_an_earlier_one_is_there(tmp_path: Path) -> None:
    """Stopped in the second task, the folder holds nothing of the first."""
    path, stop = tmp_path / "run", Event()

    class Stops(Silent):
        def phase(self, name: str, total: int, unit: str = "steps") -> None:
            if name == "train t1" and total:
                stop.set()

    own = Loop.__init__

    def with_stop(self: Loop, a: Any, b: Any, progress: Any, _: Event) -> None:
        own(self, a, b, Stops(), stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "__init__", with_stop)
        with pytest.raises(KeyboardInterrupt):
            learn(path, [PseudoReplay(ratio=1.0), SelfRewrite(agree="any", top_k=20)])
    assert list((path / "state" / "progress").iterdir())
    assert traces.found(path, patterns(1)) == []


# -- what is refused ------------------------------------------------------------------------------


def recipe(**more: Any) -> Any:
    tasks = [{"name": "t", "train": "a.jsonl", "eval": "b.jsonl"}]
    return parse_recipe({"model": "demo", "tasks": tasks, **more})


def test_these_keep_rows() -> None:
    assert {"agem", "gem", "joint", "replay"} <= set(KEEPING)
    assert not {"pseudo_replay", "self_rewrite", "lwf", "ewc", "plain"} & set(KEEPING)


@pytest.mark.parametrize("name", KEEPING)
def test_a_recipe_with_a_method_that_keeps_rows_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"privacy: strict` does not allow '{name}'"):
        check_methods(recipe(privacy="strict", methods=[name]))
    check_methods(recipe(methods=[name]))


def test_it_says_all_and_what_to_do_instead() -> None:
    methods = [registry.get(n)() for n in ("replay", "ewc", "agem")]
    assert refusal(methods, "strict") == (
        "`privacy: strict` does not allow 'replay' and 'agem', which would keep training rows for "
        "later tasks. Use pseudo_replay, lwf or ewc instead, or set `privacy: open`."
    )
    assert refusal(methods, "open") is None
    assert refusal([EWC()], "strict") is None


def test_fit_refuses_before_any_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "dress", pytest.fail)
    with pytest.raises(MethodError, match="does not allow 'replay'"):
        learn(tmp_path / "run", [Replay()])
    assert not (tmp_path / "run").exists()


def test_a_strict_recipe_with_methods_that_keep_nothing_is_fine() -> None:
    check_recipe(recipe(privacy="strict", methods=["pseudo_replay", "ewc", "lwf"]))
    with pytest.raises(RecipeError, match="privacy"):
        recipe(privacy="secret")
