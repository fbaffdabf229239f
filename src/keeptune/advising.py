"""From a recipe and a few answers to a ranked short list, with prices, and recipes to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keeptune import tokens, yamltext
from keeptune.advice import Advice, Asked, Rule, fitting, limits
from keeptune.disk import write_atomic
from keeptune.dressing import adapter_config
from keeptune.errors import RecipeError
from keeptune.inputs import read_sources
from keeptune.models import load_config, load_tokenizer
from keeptune.recipe import Recipe, check_adapter, parse_recipe
from keeptune.runs import quiet
from keeptune.session import DEFAULT_LENGTH
from keeptune.sizing import Sizer, Speed, measure_speed
from keeptune.stream import class_names


def sizer_for(recipe: Recipe) -> Sizer:
    """What sizes a recipe's runs, from the model's config and the data; no weight is loaded.

    Raises:
        KeeptuneError: The recipe, its data or its model cannot be used.
    """
    with quiet():
        tasks, _ = read_sources(recipe)
        trust = recipe.trust_remote_code
        labels = class_names(recipe.labels, tasks) if recipe.kind == "classification" else []
        config = load_config(recipe.model, labels=labels, trust_remote_code=trust)
        tokenizer = load_tokenizer(recipe.model, trust_remote_code=trust)
        longest = recipe.max_length or DEFAULT_LENGTH
        encoded = [
            tokens.tokenise(task.train, tokenizer, max_length=longest, labels=labels)
            for task in tasks
        ]
    return Sizer.of(config, adapter_config(recipe), recipe.trainer, encoded, kind=recipe.kind)


def recipe_of(model: str, adapter: str, kind: str) -> Recipe:
    """A recipe to fill in, for a case without data yet.

    Raises:
        RecipeError: A word that is none.
    """
    where = "data/first"
    return parse_recipe(
        {
            "model": model,
            "kind": kind,
            "adapter": "none" if adapter == "none" else {"kind": adapter},
            "tasks": [
                {"name": "first", "train": f"{where}/train.jsonl", "eval": f"{where}/test.jsonl"}
            ],
        }
    )


def sizer_of_model(recipe: Recipe, length: int) -> Sizer:
    """What sizes a model's runs on rows of so many tokens.

    Raises:
        KeeptuneError: The model cannot be used.
    """
    check_adapter(recipe)
    with quiet():
        labels = ("one", "other") if recipe.kind == "classification" else ()
        trust = recipe.trust_remote_code
        config = load_config(recipe.model, labels=labels, trust_remote_code=trust)
    return Sizer(
        config,
        adapter_config(recipe),
        recipe.trainer,
        kind=recipe.kind,
        longest=length,
        tokens=length / 2,
        answers=length / 4,
    )


def advise(sizer: Sizer, asked: Asked, speed: Speed | None = None) -> list[Advice]:
    """The strategies that fit a case, the best one first; those beyond a limit last.

    Args:
        sizer: Of the model and its trainer.
        asked: The case.
        speed: This machine's, by which times are compared; default: it is measured.
    """
    speed = speed or measure_speed(sizer.case)
    past = max(asked.tasks - 1, 1)
    plain = sizer.need([], past).seconds(speed)
    found = []
    for rule in fitting(asked):
        need = sizer.need(rule.methods(), past)
        step = need.seconds(speed) / plain
        found.append(Advice(rule, need, step * need.rows, step))
    return limits(found, asked)


def recipe_for(rule: Rule, recipe: Recipe, asked: Asked) -> dict[str, Any]:
    """A recipe with this strategy, as plain values: only what differs from the defaults."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["methods"] = [{name: settings} for name, settings in rule.strategy.items()]
    values["out"] = f"runs/{rule.name}"
    if asked.private:
        values["privacy"] = "strict"
    parse_recipe(values)
    return values


def write_recipes(
    advice: Sequence[Advice], recipe: Recipe, asked: Asked, folder: Path
) -> list[Path]:
    """Write a recipe for each strategy, numbered by rank.

    Raises:
        RecipeError: The folder cannot be written.
    """
    paths = []
    for number, one in enumerate(advice, 1):
        path = folder / f"{number}-{one.rule.name}.yaml"
        text = yamltext.write(recipe_for(one.rule, recipe, asked))
        reason = f"# {one.rule.reason[0].upper()}{one.rule.reason[1:]}.\n"
        try:
            write_atomic(path, (reason + text).encode())
        except OSError as error:
            raise RecipeError(f"--write {folder}: {error.strerror or error}.") from error
        paths.append(path)
    return paths
