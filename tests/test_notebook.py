"""What `fit` is given in a notebook, when it is the wrong thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pico
from keeptune.errors import RecipeError
from keeptune.methods.replay import Replay
from keeptune.notebook import fit

ROWS = pico.questions(0, 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "m"}, r"`model` is 'm' \(str\); give a loaded transformers model"),
        ({"tokenizer": None}, "`tokenizer` is None"),
        ({"tasks": {"a": ROWS}}, "task 'a' is .* a pair of training rows and evaluation rows"),
        ({"tasks": {1: (ROWS, ROWS)}}, "task 1 is .* its name as text"),
        ({"tasks": [("a", ROWS, ROWS)]}, r"`tasks` holds .* \(tuple\); give names .* or Task obj"),
        ({"methods": ["replay"]}, r"`methods` holds 'replay' \(str\); give objects of methods"),
        ({"methods": [Replay]}, "`methods` holds .*Replay"),
        ({"methods": Replay()}, r"`methods` is .*; give a list, as \[EWC\(\)\]"),
        ({"methods": None}, "`methods` is None"),
        ({"guards": ["facts"]}, r"`guards` holds 'facts' \(str\); give names .* or Guard objects"),
        ({"adapter": {"kind": "lora"}}, "`adapter` is .*; give a PEFT config"),
        ({"trainer": {"learning_rat": 1}}, "learning_rat.*Did you mean 'learning_rate'"),
    ],
)
def test_names_where_objects_belong_are_one_sentence(
    tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    right = {"model": pico.causal_lm(), "tasks": {"a": (ROWS, ROWS)}, "tokenizer": pico.tokenizer()}
    with pytest.raises(RecipeError, match=words):
        fit(**{**right, "out": tmp_path / "run", **given})
    assert not (tmp_path / "run").exists()
