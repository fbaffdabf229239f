"""A recipe: read, filled in, and every way to write it wrongly, with the sentence that it gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from keeptune.errors import RecipeError
from keeptune.recipe import (
    Adapter,
    LmEvalGuard,
    Recipe,
    RowsGuard,
    TextGuard,
    check_adapter,
    check_methods,
    check_recipe,
    check_scores,
    check_trainer,
    dump,
    load_recipe,
    parse_recipe,
    resolve,
    schema,
)
from keeptune.recipe_checks import peft_settings

SMALL = """\
model: demo
tasks:
  - {name: a, train: a.jsonl, eval: b.jsonl}
  - {name: b, train: c.jsonl, eval: d.jsonl}
"""
FULL = """\
model: HuggingFaceTB/SmolLM2-135M-Instruct   # hub id, folder, .gguf file, or "demo"
adapter: {kind: lora, rank: 8}
tasks:
  - {name: tickets, train: t/train.jsonl, eval: t/test.jsonl, score: choice}
  - {name: sql, train: s/train.parquet, eval: s/test.parquet, score: exact_match}
guards: [facts, {name: wiki, text: wiki.txt}, {lm_eval: [arc_easy], limit: 200},
         {name: own, eval: own.jsonl, score: rouge_l}]
methods:
  - replay: {ratio: 0.1, size: 2000}
  - ewc: {strength: 300}
  - wise
trainer: {learning_rate: 2e-4, num_train_epochs: 2}
seed: 3
out: runs/first
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a recipe as r.yaml in an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return Path("r.yaml")

    return write


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# -- what is read ---------------------------------------------------------------------------------


def test_a_full_recipe(written: Any) -> None:
    recipe = load_recipe(written(FULL))
    assert [task.name for task in recipe.tasks] == ["tickets", "sql"]
    assert recipe.adapter == Adapter(rank=8, alpha=16.0)
    assert recipe.guards == [
        "facts",
        TextGuard(name="wiki", text="wiki.txt"),
        LmEvalGuard(lm_eval=["arc_easy"], limit=200),
        RowsGuard(name="own", eval="own.jsonl", score="rouge_l"),
    ]
    assert recipe.strategy == [
        ("replay", {"ratio": 0.1, "size": 2000}),
        ("ewc", {"strength": 300}),
        ("wise", {}),
    ]
    assert recipe.trainer == {"learning_rate": 0.0002, "num_train_epochs": 2}
    assert recipe.out == Path("runs/first")


def test_every_default_is_filled_in(written: Any) -> None:
    assert resolve(load_recipe(written(SMALL))) == {
        "model": "demo",
        "kind": "causal_lm",
        "labels": [],
        "adapter": {
            "kind": "lora",
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.0,
            "target_modules": "all-linear",
            "layers": None,
            "options": {},
        },
        "tasks": [
            {"name": "a", "train": "a.jsonl", "eval": "b.jsonl"}
            | {"score": None, "max_new_tokens": None, "recall": False},
            {"name": "b", "train": "c.jsonl", "eval": "d.jsonl"}
            | {"score": None, "max_new_tokens": None, "recall": False},
        ],
        "guards": [],
        "methods": [],
        "trainer": {},
        "online": False,
        "privacy": "open",
        "validation": None,
        "seed": 0,
        "out": None,
        "eval_batch_size": 16,
        "max_length": None,
        "checkpoint_minutes": 10.0,
        "watch": None,
        "budget": None,
        "trust_remote_code": False,
    }


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "adapter=none",
        "adapter={kind: ia3}",
        "adapter={kind: lokr, rank: 4, target_modules: [q], layers: [0, 2], options: {a: 0.1}}",
        "trainer={learning_rate: 1e-5, optim: 'no', x: '1e-4', y: '2026-11-21', z: '~', w: 'on'}",
        'tasks.0.name="<script>: é"',
    ],
)
def test_what_is_dumped_is_read_back_unchanged(written: Any, change: str) -> None:
    recipe = load_recipe(written(FULL), [change])
    Path("again.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load_recipe("again.yaml") == recipe
    assert resolve(load_recipe("again.yaml")) == resolve(recipe)
    assert parse_recipe(json.loads(json.dumps(resolve(recipe)))) == recipe


def test_plain_values_are_those_of_yaml_1_2(written: Any) -> None:
    text = SMALL.replace("name: a,", "name: 2026-11-21,").replace("name: b,", "name: no,")
    text += "trainer: {learning_rate: 1e-4, a: 1_000, b: 010, c: .5, d: 12:30, e: TRUE, f: ~}\n"
    recipe = load_recipe(written(text))
    assert [task.name for task in recipe.tasks] == ["2026-11-21", "no"]
    assert recipe.trainer == {
        "learning_rate": 1e-4,
        "a": 1000,
        "b": "010",
        "c": 0.5,
        "d": "12:30",
        "e": True,
        "f": None,
    }


def test_a_number_may_be_a_name_or_label(written: Any) -> None:
    text = SMALL.replace("name: a", "name: 7") + "kind: classification\nlabels: [0, 1, no]\n"
    recipe = load_recipe(written(text))
    assert recipe.tasks[0].name == "7"
    assert recipe.labels == ["0", "1", "no"]


def test_anchors_and_merges(written: Any) -> None:
    recipe = load_recipe(
        written(
            "model: demo\n"
            "tasks:\n"
            "  - &one {name: a, train: x.csv, eval: y.csv, score: choice}\n"
            "  - {<<: *one, name: b}\n"
        ),
        ["tasks.1.score=rouge_l"],
    )
    assert [(t.name, t.train, t.score) for t in recipe.tasks] == [
        ("a", "x.csv", "choice"),
        ("b", "x.csv", "rouge_l"),
    ]


def test_relative_paths_start_from_a_base_when_one_is_given(written: Any, tmp_path: Path) -> None:
    base = tmp_path / "elsewhere"
    base.mkdir()
    (base / "a.jsonl").touch()
    (base / "wiki.txt").touch()
    text = SMALL + "guards: [wiki.txt, {name: w, text: wiki.txt}]\n"
    recipe = load_recipe(written(text), base=base)
    assert recipe.tasks[0].train == str(base / "a.jsonl")
    assert recipe.tasks[0].eval == "b.jsonl"
    assert recipe.guards == ["wiki.txt", TextGuard(name="w", text=str(base / "wiki.txt"))]


def test_a_recipe_is_read_without_torch(written: Any) -> None:
    code = (
        "import sys; from keeptune.recipe import load_recipe, schema; "
        f"load_recipe({str(written(FULL))!r}); schema(); "
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


# -- overrides ------------------------------------------------------------------------------------


def test_overrides_reach_every_place(written: Any) -> None:
    recipe = load_recipe(
        written(FULL),
        [
            "seed=5",
            "tasks.0.score=rouge_l",
            "methods.1.ewc.strength=10",
            "methods.2.wise.mix=0.3",
            "methods.3=lwf",
            "trainer.learning_rate=1e-4",
            "trainer.lr_scheduler_kwargs.num_cycles=2",
            "adapter.options.use_dora=true",
            "guards=[]",
            "guards.0=facts",
            "out=runs/a=b",
        ],
    )
    assert recipe.seed == 5
    assert recipe.tasks[0].score == "rouge_l"
    assert recipe.strategy[1:] == [("ewc", {"strength": 10}), ("wise", {"mix": 0.3}), ("lwf", {})]
    assert recipe.trainer["learning_rate"] == 1e-4
    assert recipe.trainer["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert isinstance(recipe.adapter, Adapter)
    assert recipe.adapter.options == {"use_dora": True}
    assert recipe.guards == ["facts"]
    assert recipe.out == Path("runs/a=b")


def test_lists_that_are_not_there_yet_can_be_begun(written: Any) -> None:
    recipe = load_recipe(written(SMALL), ["methods.0.ewc.strength=1", "methods.1=wise"])
    assert recipe.strategy == [("ewc", {"strength": 1}), ("wise", {})]


def test_an_override_does_not_reach_through_an_anchor(written: Any) -> None:
    text = SMALL + "trainer: &t {a: {x: 1}, b: 2}\n"
    text = text.replace("model: demo", "model: demo\nmethods: [{ewc: &s {strength: 1}}, {si: *s}]")
    recipe = load_recipe(written(text), ["methods.0.ewc.strength=2"])
    assert recipe.strategy == [("ewc", {"strength": 2}), ("si", {"strength": 1})]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", "--set seed: write key=value, for example --set trainer.learning_rate=1e-4."),
        ("=3", "--set =3: write key=value, for example --set trainer.learning_rate=1e-4."),
        ("a..b=3", "--set a..b=3: write key=value, for example --set trainer.learning_rate=1e-4."),
        (
            "tasks.3.score=choice",
            "--set tasks.3.score=choice: '3' is no position in this list; allowed: 0 to 2 "
            "(2 appends).",
        ),
        (
            "tasks.sql.score=choice",
            "--set tasks.sql.score=choice: 'sql' is no position in this list; allowed: 0 to 2 "
            "(2 appends).",
        ),
        (
            "model.name=x",
            "--set model.name=x: the recipe has the single value 'demo' there, so 'name' has no "
            "place in it; set the whole mapping, for example --set 'adapter={kind: lora, "
            "rank: 8}'.",
        ),
        ("seed=-1", "--set seed=-1: seed must be at least 0, got -1."),
        ("sead=1", "--set sead=1: there is no key 'sead'. Did you mean 'seed'?"),
        (
            "labels=[a",
            "--set labels=[a: not YAML: expected ',' or ']', but got '<stream end>'.",
        ),
        (
            "trainer={a: 1, a: 2}",
            "--set trainer={a: 1, a: 2}: the key 'a' is given twice (first in line 1); keep one.",
        ),
        ("methods=", "--set methods=: methods must be a list, got nothing."),
    ],
)
def test_bad_overrides(written: Any, override: str, sentence: str) -> None:
    assert complaint(written(SMALL), override) == sentence


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "r.yaml: the recipe is empty; it needs at least `model` and `tasks`."),
        ("# nothing\n", "r.yaml: the recipe is empty; it needs at least `model` and `tasks`."),
        (
            "\n- model: demo\n",
            "r.yaml:2: a recipe is a mapping (key: value) with at least `model` and `tasks`.",
        ),
        (
            "model: demo\ntasks: [a\nseed: 1\n",
            "r.yaml:3: not YAML: expected ',' or ']', but got ':' (column 5).",
        ),
        (
            "model: demo\n\tseed: 1\n",
            "r.yaml:2: not YAML: found character '\\t' that cannot start any token (column 1).",
        ),
        (
            "model: demo\n---\nmodel: demo\n",
            "r.yaml:2: not YAML: but found another document (column 1).",
        ),
        (
            "model: demo\nseed: 1\nmodel: x\n",
            "r.yaml:3: the key 'model' is given twice (first in line 1); keep one.",
        ),
        ("model: demo\n1: x\n", "r.yaml:2: a key must be text, got '1'; quote it."),
        ("model: demo\n[a]: x\n", "r.yaml:2: a key must be text, got a list or mapping; quote it."),
        ("model: &a\n  b: *a\n", "r.yaml:1: this alias contains itself."),
        ("a: \x00\n", "r.yaml:1: not YAML: the character #x0000 is not allowed there."),
        (
            "model: !!python/object:os.system x\n",
            "r.yaml:1: not YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object:os.system' (column 8).",
        ),
        ("[" * 5000, "r.yaml: not YAML that can be read: nested too deep."),
    ],
)
def test_text_that_is_no_recipe(written: Any, text: str, sentence: str) -> None:
    assert complaint(written(text)) == sentence


def test_files_that_cannot_be_read(written: Any, tmp_path: Path) -> None:
    assert complaint(Path("no.yaml")) == "no.yaml: there is no such recipe file."
    assert complaint(tmp_path) == f"{tmp_path}: cannot be read: Is a directory."
    Path("latin.yaml").write_bytes("model: é".encode("latin-1"))
    assert complaint(Path("latin.yaml")) == "latin.yaml: not UTF-8 text (byte 7)."


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_text("\ufeff" + SMALL, encoding="utf-8")
    assert load_recipe(path).model == "demo"


GUARD = "guards.0 must be a ready-made guard's name, or a mapping with `text`, `eval` or `lm_eval`"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("sed: 1", "there is no key 'sed'. Did you mean 'seed'?"),
        ("seed: -1", "seed must be at least 0, got -1."),
        ("seed: 4294967296", "seed must be less than 4294967296, got 4294967296."),
        ("seed: true", "seed must be a whole number, got true."),
        ("seed: 1.5", "seed must be a whole number, got 1.5."),
        ("seed: '1'", "seed must be a whole number, got '1'."),
        ("seed:", "seed must be a whole number, got nothing."),
        ("checkpoint_minutes: -1", "checkpoint_minutes must be at least 0, got -1."),
        ("checkpoint_minutes: .nan", "checkpoint_minutes must be a finite number, got nan."),
        ("eval_batch_size: 0", "eval_batch_size must be at least 1, got 0."),
        ("trust_remote_code: yes", "trust_remote_code must be true or false, got 'yes'."),
        ("trainer: [a]", "trainer must be a mapping (key: value), got ['a']."),
        ("out: 3", "out must be a path, got 3."),
        (
            "kind: classifier",
            "kind must be 'causal_lm' or 'classification', got 'classifier'. "
            "Did you mean 'classification'?",
        ),
        (
            "labels: [a]",
            "labels is only used with `kind: classification`, but kind is causal_lm; remove the "
            "labels or change the kind.",
        ),
        (
            "adapter: lora",
            "adapter must be none or a mapping, got 'lora'; write {kind: lora} or "
            "{kind: lora, rank: 16}.",
        ),
        ("adapter: {rnk: 4}", "there is no key 'rnk' in adapter. Did you mean 'rank'?"),
        ("adapter: {rank: 5000}", "adapter.rank must be at most 1024, got 5000."),
        ("adapter: {rank: x}", "adapter.rank must be a whole number, got 'x'."),
        ("adapter: {dropout: 1}", "adapter.dropout must be less than 1, got 1."),
        ("adapter: {layers: [-1]}", "adapter.layers.0 must be at least 0, got -1."),
        ("guards: facts", "guards must be a list, got 'facts'."),
        ("guards: [3]", f"{GUARD}, got 3."),
        ("guards: [{}]", f"{GUARD}, got the keys none."),
        ("guards: [{name: w, txt: a}]", f"{GUARD}, got the keys name, txt. Did you mean 'text'?"),
        (
            "guards: [{name: w, text: a, scor: b}]",
            "there is no key 'scor' in guards.0. Allowed: name, text.",
        ),
        (
            "guards: [{text: a}]",
            "guards.0.name is missing (how the guard is called in the report; unique).",
        ),
        ("guards: [{lm_eval: []}]", "guards.0.lm_eval must have at least 1 entry, got []."),
        ("guards: [{lm_eval: [x], limit: 0}]", "guards.0.limit must be at least 1, got 0."),
        (
            "guards: [facts, {lm_eval: [facts]}]",
            "guards.1 has the name 'facts', which position 0 of the list has already; names must "
            "differ.",
        ),
        (
            "guards: [{name: a, text: a.txt}]",
            "guards.0 is called 'a', like a task; give the guard another name.",
        ),
        (
            "methods: [ewc, {ewc: {strength: 3}}]",
            "methods.1 has the name 'ewc', which position 0 of the list has already; names must "
            "differ.",
        ),
        (
            "methods: [{ewc: , strength: 3}]",
            "methods.0 has the keys ewc, strength, but one entry is one method; indent the "
            "settings below the method's name, or write {ewc: {setting: value}}.",
        ),
        ("methods: [{ewc: 3}]", "methods.0.ewc must be a mapping (key: value), got 3."),
        ("methods: [{}]", "methods.0 is an empty mapping; write the method's name."),
        ("methods: [[ewc]]", "methods.0 must be a mapping (key: value), got ['ewc']."),
    ],
)
def test_one_wrong_value(written: Any, more: str, sentence: str) -> None:
    assert complaint(written(f"{SMALL}{more}\n")) == f"r.yaml:5: {sentence}"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "name: b",
            "name: a",
            "r.yaml:4: tasks.1 has the name 'a', which position 0 of the list has already; names "
            "must differ.",
        ),
        (
            "eval: d.jsonl",
            "evl: d.jsonl",
            "r.yaml:4: tasks.1.eval is missing (evaluation rows, from the same kinds of source; "
            "never trained on).\n"
            "r.yaml:4: there is no key 'evl' in tasks.1. Did you mean 'eval'?",
        ),
        ("name: b", "name: ''", "r.yaml:4: tasks.1.name must not be empty, got ''."),
        (
            "name: b",
            "name: 1.10",
            "r.yaml:4: tasks.1.name must be text, got 1.1. Put it in quotes.",
        ),
        (
            "eval: d.jsonl",
            "eval: d.jsonl, max_new_tokens: 0",
            "r.yaml:4: tasks.1.max_new_tokens must be at least 1, got 0.",
        ),
        (
            "model: demo",
            "seed: 0",
            "r.yaml:1: model is missing (hub id, folder, .gguf file, or demo).",
        ),
    ],
)
def test_wrong_tasks(written: Any, old: str, new: str, sentence: str) -> None:
    assert complaint(written(SMALL.replace(old, new))) == sentence


def test_no_tasks(written: Any) -> None:
    assert (
        complaint(written("model: demo\ntasks: []\n"))
        == "r.yaml:2: tasks must have at least 1 entry, got []."
    )


def test_all_problems_are_said_at_once_in_the_order_of_lines(written: Any) -> None:
    text = SMALL.replace("name: b", "name: a") + "sed: 1\nadapter:\n  rank: 0\n  alpha: -1\n"
    assert complaint(written(text), "eval_batch_size=0").splitlines() == [
        "--set eval_batch_size=0: eval_batch_size must be at least 1, got 0.",
        "r.yaml:4: tasks.1 has the name 'a', which position 0 of the list has already; names must "
        "differ.",
        "r.yaml:5: there is no key 'sed'. Did you mean 'seed'?",
        "r.yaml:7: adapter.rank must be at least 1, got 0.",
        "r.yaml:8: adapter.alpha must be more than 0, got -1.",
    ]


def test_values_without_a_file() -> None:
    with pytest.raises(RecipeError, match=r"^recipe: model is missing"):
        parse_recipe({"tasks": [{"name": "a", "train": "a", "eval": "b"}]})


# -- what only the libraries know -----------------------------------------------------------------


def test_a_good_recipe_passes_every_check(written: Any) -> None:
    recipe = load_recipe(written(FULL))
    check_recipe(recipe)
    check_recipe(load_recipe(Path("r.yaml"), ["kind=classification"]))


def test_unknown_methods_and_settings_give_the_nearest_names(written: Any) -> None:
    text = SMALL + "methods:\n  - ewcc\n  - replay:\n      siz: 3\n  - wise: {mix: 7}\n"
    with pytest.raises(RecipeError) as caught:
        check_methods(load_recipe(written(text)))
    lines = str(caught.value).splitlines()
    assert lines[0] == "r.yaml:6: methods.0.ewcc: There is no method 'ewcc'. Did you mean 'ewc'?"
    assert lines[1].startswith("r.yaml:8: methods.1.replay.siz: Replay.siz is not a setting. Did")
    assert lines[2].startswith("r.yaml:9: methods.2.wise.mix: ")
    assert "got 7" in lines[2]


def test_methods_that_clash_are_found(written: Any) -> None:
    recipe = load_recipe(written(SMALL + "methods: [joint, replay]\n"))
    with pytest.raises(RecipeError, match=r"^r.yaml:5: methods: The methods 'joint' and 'replay'"):
        check_methods(recipe)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (
            "learnig_rate: 3",
            "trainer.learnig_rate is no key of the trainer's config. "
            "Did you mean 'learning_rate'?",
        ),
        (
            "qqqq: 3",
            "trainer.qqqq is no key of the trainer's config. "
            "See the documentation of TRL's SFTConfig.",
        ),
        (
            "output_dir: x",
            "trainer.output_dir is not yours to set: use `out` at the top of the recipe.",
        ),
        (
            "data_seed: 3",
            "trainer.data_seed is not yours to set: use `seed` at the top of the recipe.",
        ),
        (
            "save_steps: 3",
            "trainer.save_steps is not yours to set: use `checkpoint_minutes` at the top of the "
            "recipe.",
        ),
        (
            "eval_strategy: steps",
            "trainer.eval_strategy is not yours to set: keeptune evaluates after each task on the "
            "tasks' `eval` rows; leave it out.",
        ),
        (
            "deepspeed: ds.json",
            "trainer.deepspeed is not yours to set: DeepSpeed hides the gradients that methods "
            "need; use `fsdp` instead.",
        ),
        (
            "max_length: 12",
            "trainer.max_length is not yours to set: use `max_length` at the top of the recipe.",
        ),
        ("learning_rate: '1e-4'", "trainer.learning_rate must be a number, got '1e-4'."),
        ("fp16: no", "trainer.fp16 must be true or false, got 'no'."),
        ("bf16: 1", "trainer.bf16 must be true or false, got 1."),
        ("max_steps: 1.5", "trainer.max_steps must be a whole number, got 1.5."),
        ("max_steps: true", "trainer.max_steps must be a whole number, got True."),
        ("max_steps: ", "trainer.max_steps must be a whole number, got None."),
    ],
)  # fmt: skip
def test_trainer_keys(written: Any, key: str, sentence: str) -> None:
    recipe = load_recipe(written(f"{SMALL}trainer:\n  {key}\n"))
    with pytest.raises(RecipeError) as caught:
        check_trainer(recipe)
    assert str(caught.value) == f"r.yaml:6: {sentence}"


def test_trainer_keys_that_pass(written: Any) -> None:
    keys = "{learning_rate: 1e-4, num_train_epochs: 2, bf16: , report_to: [tensorboard], fsdp: x}"
    check_trainer(load_recipe(written(f"{SMALL}trainer: {keys}\n")))


def test_classification_has_the_keys_of_the_plain_trainer(written: Any) -> None:
    text = SMALL + "kind: classification\ntrainer: {loss_type: dft}\n"
    with pytest.raises(RecipeError, match="loss_type is no key"):
        check_trainer(load_recipe(written(text)))
    check_trainer(load_recipe(Path("r.yaml"), ["kind=causal_lm"]))


def test_unknown_scores_give_the_nearest_name(written: Any) -> None:
    text = SMALL.replace("eval: d.jsonl", "eval: d.jsonl, score: exact_mach")
    with pytest.raises(RecipeError) as caught:
        check_scores(load_recipe(written(text)))
    assert str(caught.value) == (
        "r.yaml:4: tasks.1.score: there is no score 'exact_mach'. Did you mean 'exact_match'? "
        "A function of your own is package.module:function."
    )
    check_scores(load_recipe(Path("r.yaml"), ["tasks.1.score=my.module:score"]))


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        (
            "{kind: loraa}",
            "adapter.kind 'loraa' is no PEFT adapter. Did you mean 'lora'",
        ),
        ("{kind: ia3, rank: 4}", "adapter.rank means nothing to kind 'ia3'; leave it out."),
        (
            "{options: {use_dorra: true}}",
            "adapter.options has 'use_dorra', which LoraConfig does not know. "
            "Did you mean 'use_dora'",
        ),
        ("{options: {r: 4}}", "adapter.options has 'r'; write it as adapter.rank instead."),
        (
            "{layers: [0]}",
            "adapter.layers needs target_modules as a list of module names, such as [q_proj, "
            "v_proj], got 'all-linear'.",
        ),
        (
            "{options: {kasa_config: 3}}",
            "adapter.options are refused by PEFT: ",
        ),
    ],
)
def test_adapters_that_peft_does_not_know(written: Any, adapter: str, sentence: str) -> None:
    recipe = load_recipe(written(f"{SMALL}adapter: {adapter}\n"))
    with pytest.raises(RecipeError) as caught:
        check_adapter(recipe)
    assert str(caught.value).startswith(f"r.yaml:5: {sentence}")


def test_peft_settings() -> None:
    config, settings = peft_settings(Adapter(rank=4, options={"use_dora": True}))
    made = config(**settings)
    assert (made.r, made.lora_alpha, made.lora_dropout) == (4, 8.0, 0.0)
    assert made.target_modules == "all-linear"
    assert made.use_dora
    config, settings = peft_settings(Adapter(target_modules=["q_proj"], layers=[0, 2]))
    assert config(**settings).layers_to_transform == [0, 2]
    config, settings = peft_settings(Adapter(kind="ia3"))
    assert (config.__name__, settings) == ("IA3Config", {})
    config, settings = peft_settings(Adapter(kind="loha", rank=2, alpha=4.0))
    assert settings == {"r": 2, "alpha": 4.0}


# -- schema ---------------------------------------------------------------------------------------


def test_schema_is_closed_and_describes_every_key() -> None:
    made = schema()
    assert made == json.loads(json.dumps(made))
    assert made["required"] == ["model", "tasks"]
    parts = {"recipe": made, **made["$defs"]}
    assert {
        "recipe", "Adapter", "TaskRecipe", "TextGuard", "RowsGuard", "LmEvalGuard", "WatchRecipe",
        "BudgetRecipe",
    } == set(parts)  # fmt: skip
    # A budget's further keys are guards.
    assert parts["BudgetRecipe"].pop("additionalProperties") == {"type": "number", "minimum": 0}
    for part in parts.values():
        assert part.get("additionalProperties", False) is False
        assert all(key.get("description") for key in part["properties"].values())
    assert set(made["properties"]) == set(Recipe.model_fields)
    one = made["properties"]["methods"]["items"]["anyOf"]
    assert [kind["type"] for kind in one] == ["string", "object"]


def test_schema_and_dump_are_plain_yaml(written: Any) -> None:
    text = dump(load_recipe(written(FULL)))
    assert list(yaml.safe_load(text)) == list(schema()["properties"])
