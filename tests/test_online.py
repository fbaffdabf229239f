"""Online: rows come once, in their order, with what was seen before them and nothing else."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

import pico
from keeptune.buffer import Buffer, reservoir
from keeptune.cli import app
from keeptune.errors import MethodError, RecipeError
from keeptune.method import Batch, Context, Method
from keeptune.methods._arrivals import numbered
from keeptune.methods.joint import Joint
from keeptune.methods.plain import Plain
from keeptune.methods.replay import Replay
from keeptune.notebook import fit
from keeptune.recipe import check_recipe, load_recipe, parse_recipe
from keeptune.runs import learn, run
from keeptune.tokens import collate
from keeptune.trainers import TextTrainer, build_trainer
from pencil import Softmax, context, examples, texts

# -- which rows a step has ------------------------------------------------------------------------


def steps(kept: int = 0, new: int = 40, **more: Any) -> list[tuple[list[int], list[int]]]:
    settings: dict[str, Any] = {"seen": kept, "size": 10, "rows": 4, "ratio": 1.0} | more
    found = numbered(
        kept,
        new,
        places=np.random.default_rng(5),
        draws=lambda step: np.random.default_rng([7, step]),
        **settings,
    )
    return [(fresh.tolist(), old.tolist()) for fresh, old in found]


def test_every_row_comes_once_and_in_its_order() -> None:
    found = steps(kept=6)
    assert [number for fresh, _ in found for number in fresh] == list(range(6, 46))


def test_a_step_is_as_large_as_a_batch_and_half_of_it_comes_back() -> None:
    found = steps()
    assert found[0] == ([0, 1, 2, 3], [])  # nothing was seen yet
    assert all((len(fresh), len(old)) == (2, 2) for fresh, old in found[1:])


@pytest.mark.parametrize(("ratio", "share"), [(0.1, 1 / 11), (1 / 3, 1 / 4), (2.0, 2 / 3)])
def test_the_ratio_is_met_over_steps_where_a_step_cannot(ratio: float, share: float) -> None:
    found = steps(kept=10, new=1000, rows=4, ratio=ratio)
    back = sum(len(old) for _, old in found)
    assert back / (1000 + back) == pytest.approx(share, abs=0.01)
    assert {len(fresh) + len(old) for fresh, old in found[:-1]} == {4}


def test_a_step_always_has_a_new_row() -> None:
    assert all(fresh for fresh, _ in steps(kept=10, ratio=100.0))


@pytest.mark.parametrize("kept", [0, 3, 10])
def test_what_comes_back_was_held_after_the_steps_before(kept: int) -> None:
    """By hand: one row at a time, as Vitter wrote it."""
    held, seen = list(range(kept)), kept
    places = np.random.default_rng(5)
    for fresh, old in steps(kept=kept, new=200):
        assert len(set(old)) == len(old)
        assert set(old) <= set(held)
        for number in fresh:
            seen += 1
            place = len(held) if len(held) < 10 else int(places.integers(seen))
            held[place : place + 1] = [number] if place < 10 else held[place : place + 1]
    assert len(held) == 10


@pytest.mark.parametrize("cuts", [[50], [1] * 50, [7, 13, 30]])
def test_a_reservoir_in_pieces_is_the_same_as_at_once(cuts: list[int]) -> None:
    random, held, seen = np.random.default_rng(3), np.arange(4), 4
    for new in cuts:
        order = reservoir(len(held), new, seen, 8, random)
        held = np.concatenate([held, seen + np.arange(new)])[order]
        seen += new
    whole = reservoir(4, 50, 4, 8, np.random.default_rng(3))
    assert held.tolist() == whole.tolist()


def test_each_row_seen_comes_back_equally_often() -> None:
    counts = np.zeros(60)
    for seed in range(500):
        *_, (fresh, old) = numbered(
            0, 60, 0, 5, rows=6, ratio=1.0,
            places=np.random.default_rng([1, seed]),
            draws=lambda step, seed=seed: np.random.default_rng([2, seed, step]),
        )  # fmt: skip
        counts[old] += 1
    seen = int(fresh[0])
    expected = counts.sum() / seen
    assert not counts[seen:].any()
    assert np.abs(counts[:seen] - expected).max() < 5 * np.sqrt(expected)


# -- replay as a whole ----------------------------------------------------------------------------


def stream_of(method: Replay, index: int, rows: int, **more: Any) -> list[tuple[int, int]]:
    """What a stream of rows is trained on, as (word, task) pairs."""
    dataset = examples(*[(word, index) for word in range(rows)])
    settings = {"task": f"t{index}", "index": index, "online": True, "rows_in_step": 4} | more
    ctx = context(Softmax([[0.0]]), dataset, **settings)
    method._evidence.clear()
    method.begin_task(ctx)
    trained = method.data(ctx, dataset)
    method.end_task(ctx)
    return [(row["input_ids"][0], row["labels"]) for row in trained]


def test_replay_mixes_rows_of_this_stream_and_of_earlier_ones() -> None:
    method = Replay(ratio=1.0, size=20)
    first, second = stream_of(method, 0, 30), stream_of(method, 1, 40)
    assert len(first) == 30 + 26  # four new rows, and then two of each kind
    assert first[:4] == [(word, 0) for word in range(4)]
    own = [word for word, task in second if task == 1]
    assert {task for _, task in second[:4]} == {0, 1}
    assert set(own) == set(range(40))
    evidence = method.evidence()
    assert evidence["rows_replayed"] == len(second) - 40
    assert sum(evidence["rows_by_task"].values()) == evidence["rows_replayed"]
    assert set(evidence["rows_by_task"]) == {"t0", "t1"}
    assert evidence["rows_new"] == 40
    assert evidence["rows_kept"] == 20
    assert evidence["rows_short"] == 0


def test_the_first_step_is_short_of_old_rows_and_says_so() -> None:
    method = Replay(ratio=1.0, size=20)
    assert len(stream_of(method, 0, 30)) == 30 + 26
    assert method.evidence()["rows_short"] == 4


def test_the_buffer_holds_at_the_end_what_it_held_for_the_last_draw() -> None:
    method, whole = Replay(ratio=1.0, size=8), Buffer(8)
    stream_of(method, 0, 50)
    ctx = context(Softmax([[0.0]]))
    whole.add(examples(*[(word, 0) for word in range(50)]), "t0", ctx.random("reservoir"))
    kept = method.state().tensors
    assert all(torch.equal(tensor, kept[name]) for name, tensor in whole.state().tensors.items())


def test_without_a_ratio_the_stream_is_as_it_came() -> None:
    assert stream_of(Replay(ratio=0.0), 0, 9) == [(word, 0) for word in range(9)]


def test_the_seed_decides_what_comes_back() -> None:
    runs = [stream_of(Replay(ratio=1.0), 0, 40, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "herding"}, r"Replay\.policy is 'herding', but online .* Leave it out"),
        ({"count": "tokens"}, r"Replay\.count is 'tokens'"),
        ({"task_weights": {"t0": 2.0}}, r"Replay\.task_weights is \{'t0': 2\.0\}"),
    ],
)
def test_settings_that_go_by_the_whole_task_are_refused(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(MethodError, match=words):
        stream_of(Replay(**settings), 0, 8)


def test_a_step_of_one_row_is_refused() -> None:
    with pytest.raises(MethodError, match=r"step has one row\. Set trainer\.per_device_train_b"):
        stream_of(Replay(), 0, 8, rows_in_step=1)


# -- the trainer ----------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "output_dir": tempfile.gettempdir(),
}
TASKS = [
    texts(*[[6 + 20 * task + row, 7 + row % 3, 9 + row % 4] for row in range(10)])
    for task in range(2)
]


def text_trainer(*methods: Method, online: bool = True, **settings: Any) -> TextTrainer:
    tokenizer = pico.tokenizer()
    trainer = build_trainer(
        "causal_lm",
        pico.causal_lm(),
        tokenizer,
        TASKS[0],
        methods,
        SETTINGS | {"per_device_train_batch_size": 4} | settings,
        collate(tokenizer),
        online=online,
    )
    assert isinstance(trainer, TextTrainer)
    return trainer


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


class Notes(Plain):
    """Notes the rows of every step."""

    def is_neutral(self) -> bool:
        return False

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> None:
        self._evidence.setdefault("rows", []).append((ctx.step, batch["input_ids"].tolist()))


def rows_of_steps(trainer: TextTrainer, notes: Notes) -> list[list[list[int]]]:
    trainer.learn("t0", TASKS[0])
    seen: dict[int, list[list[int]]] = {}
    for step, rows in notes.evidence()["rows"]:
        seen.setdefault(step, []).extend(rows)
    return list(seen.values())


@pytest.mark.parametrize("cut", [1, 2])
def test_a_trainer_learns_each_row_once_in_the_order_of_the_file(cut: int) -> None:
    notes = Notes()
    settings = {"per_device_train_batch_size": 4 // cut, "gradient_accumulation_steps": cut}
    found = rows_of_steps(text_trainer(notes, **settings), notes)
    ids = TASKS[0]["input_ids"]
    assert found == [ids[0:4], ids[4:8], ids[8:10]]


@pytest.mark.parametrize("cut", [1, 2])
def test_a_step_of_the_trainer_is_a_step_of_replay(cut: int) -> None:
    notes = Notes()
    settings = {"per_device_train_batch_size": 4 // cut, "gradient_accumulation_steps": cut}
    found = rows_of_steps(text_trainer(Replay(ratio=1.0), notes, **settings), notes)
    ids = TASKS[0]["input_ids"]
    assert found[0] == ids[0:4]
    for i, rows in enumerate(found[1:]):
        new = ids[4 + 2 * i : 6 + 2 * i]
        assert rows[:2] == new
        assert len(rows) == 4
        assert all(row in ids[: 4 + 2 * i] for row in rows[2:])


def test_replay_at_a_ratio_of_0_is_plain_bit_for_bit() -> None:
    ends = []
    for methods in ((), (Replay(ratio=0.0),)):
        trainer = text_trainer(*methods)
        for task in range(2):
            trainer.learn(f"t{task}", TASKS[task])
        ends.append({n: t.clone() for n, t in trainer.model.state_dict().items()})
    assert same(*ends)


def test_a_run_that_was_stopped_inside_a_stream_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def learned(stop_at: int | None) -> dict[str, Tensor]:
        trainer, stop = text_trainer(Replay(ratio=1.0, size=6)), Event()
        trainer.learn("t0", TASKS[0])
        weights = {n: t.clone() for n, t in trainer.model.state_dict().items()}
        # A copy: the buffer goes on in its own arrays.
        kept = copy.deepcopy(trainer.strategy.methods[0].state())
        if stop_at is None:
            trainer.learn("t1", TASKS[1])
            return dict(trainer.model.state_dict())
        trainer.progress_root = tmp_path
        trainer.watch(lambda step, *_: stop.set() if step == stop_at else None, 60, stop)
        trainer.learn("t1", TASKS[1])
        (progress,) = tmp_path.iterdir()
        again = text_trainer(Replay(ratio=1.0, size=6))
        again.model.load_state_dict(weights)
        again.strategy.methods[0].restore(context(again.model), kept)
        again.learn("t1", TASKS[1], index=1, resume=progress)
        return dict(again.model.state_dict())

    assert same(learned(None), learned(2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_train_epochs": 3}, r"trainer\.num_train_epochs is 3, but online .* needs 1\. Leave"),
        ({"max_steps": 2}, r"trainer\.max_steps is 2, but online"),
        ({"train_sampling_strategy": "random"}, r"trainer\.train_sampling_strategy is 'random'"),
    ],
)
def test_a_trainer_that_is_not_online_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        text_trainer(**settings)


def test_a_method_that_needs_the_whole_task_is_refused() -> None:
    with pytest.raises(MethodError, match=r"'joint' chooses among all rows .* Remove the method"):
        text_trainer(Joint())
    text_trainer(Joint(), online=False)


# -- recipes, commands and folders ----------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    folder = pico.tiny_folder(tmp_path)
    lines = [f'{{"prompt": "{i}", "completion": " {i * 7 % 10}"}}' for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = tmp_path / "rows.jsonl"
    (tmp_path / "stream.yaml").write_text(
        f"model: {folder}\nadapter: none\nout: {tmp_path / 'run'}\n"
        f"tasks: [{{name: a, train: {data}, eval: {data}, recall: true}}]\n"
        "methods: [{replay: {ratio: 1.0}}]\n"
        "trainer: {per_device_train_batch_size: 4, learning_rate: 0.01}\n"
    )
    return tmp_path / "stream.yaml"


def test_the_flag_and_the_key_are_the_same(recipe_file: Path) -> None:
    done = CliRunner().invoke(app, ["run", str(recipe_file), "--online"])
    assert done.exit_code == 0, done.output
    folder = recipe_file.parent / "run"
    assert load_recipe(folder / "recipe.yaml").online
    again = run(load_recipe(recipe_file, ["online=true"]), resume=True)
    (evidence,) = again.evidence()
    assert evidence.methods[0].values["rows_replayed"] > 0
    assert len(again.steps()) == 4  # 4 new rows, then 2 in each step


def test_a_run_goes_on_learning_as_a_stream(recipe_file: Path) -> None:
    folder = run(load_recipe(recipe_file, ["online=true"]))
    learned = learn(folder.path, str(recipe_file.parent / "rows.jsonl"), name="b")
    assert len([step for step in learned.steps() if step["task"] == "b"]) == 5


def test_a_trainer_key_that_contradicts_is_named_with_its_line(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["online=true", "trainer.num_train_epochs=2"])
    with pytest.raises(RecipeError, match=r"trainer\.num_train_epochs is 2, but with `online: tr"):
        check_recipe(recipe)
    check_recipe(load_recipe(recipe_file, ["online=true", "trainer.num_train_epochs=1"]))


def test_fit_learns_a_stream(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": f" {i}"} for i in range(9)]
    fitted = fit(
        pico.causal_lm(),
        {"a": (rows, rows)},
        tokenizer=pico.tokenizer(),
        out=tmp_path / "run",
        online=True,
        trainer={"per_device_train_batch_size": 3},
    )
    assert len(fitted.folder.steps()) == 3
    assert parse_recipe({**load_recipe(tmp_path / "run" / "recipe.yaml").model_dump()}).online


# -- a stream that drifts -------------------------------------------------------------------------


def drifting(seed: int, rows: int = 160) -> Dataset:
    """A mapping of words to answers whose words move: first 0 to 7, at the end 16 to 23.

    Answers of the early words and the late ones differ, so that learning the late ones hides the
    early ones.
    """
    random = np.random.default_rng([9, seed])
    answer = np.random.default_rng([8, seed]).permutation(24) + 24
    middle = np.linspace(0, 16, rows)
    words = np.clip(np.round(middle + random.integers(0, 8, rows)), 0, 23).astype(int)
    return texts(*[[6 + int(w), 6 + int(answer[w]) % 50] for w in words])


def early_loss(seed: int, *methods: Method) -> float:
    """Loss on the words of the stream's first third after the whole of it."""
    rows = drifting(seed)
    tokenizer = pico.tokenizer()
    trainer = build_trainer(
        "causal_lm",
        pico.causal_lm(seed=seed),
        tokenizer,
        rows,
        methods,
        SETTINGS
        | {"per_device_train_batch_size": 8, "seed": seed, "optim": "adamw_torch",
           "learning_rate": 5e-3},
        collate(tokenizer),
        online=True,
    )  # fmt: skip
    trainer.learn("stream", rows)
    early = {tuple(row["input_ids"]) for row in rows.select(range(50))}
    ids = torch.tensor(sorted(early))
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(input_ids=ids).logits[:, 0]
    return float(F.cross_entropy(logits, ids[:, 1]))


def test_on_a_stream_that_drifts_replay_keeps_its_beginning() -> None:
    gaps = [early_loss(seed) - early_loss(seed, Replay(ratio=1.0)) for seed in range(3)]
    assert min(gaps) > 0.5, gaps
