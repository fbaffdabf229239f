"""The house: every method has its four files, everything public has a home and a sentence."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import keeptune
from keeptune import registry
from keeptune.cards import card
from keeptune.recipe import check_recipe, load_recipe

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/keeptune"
OWN = sorted(path.stem for path in (SOURCE / "methods").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", OWN)
def test_a_method_has_its_four_files(name: str) -> None:
    assert (ROOT / f"tests/methods/test_{name}.py").is_file()
    assert (ROOT / f"recipes/{name}.yaml").is_file()
    assert (ROOT / f"docs/methods/{name}.md").is_file()


@pytest.mark.parametrize("folder", ["tests/methods/test_*.py", "recipes/*.yaml", "docs/methods/*"])
def test_no_file_is_left_of_a_method_that_is_gone(folder: str) -> None:
    found = {path.stem.removeprefix("test_") for path in ROOT.glob(folder)}
    assert found == set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_its_recipe_loads_and_runs_it(name: str) -> None:
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
    check_recipe(recipe)
    ((listed, settings),) = recipe.strategy
    assert listed == name
    method = registry.build(name, settings)
    assert method.is_neutral() == (name == "plain")
    assert set(settings) == set(type(method).model_fields), "a recipe shows every setting"
    assert len(recipe.tasks) >= 2


@pytest.mark.parametrize("name", OWN)
def test_its_page_is_its_card(name: str) -> None:
    page = (ROOT / f"docs/methods/{name}.md").read_text("utf-8")
    assert card(registry.get(name)).title in page


def test_public_names_lead_somewhere() -> None:
    for name in dir(keeptune):
        thing = getattr(keeptune, name)
        assert inspect.getdoc(thing), f"{name} has no docstring"
        assert thing.__module__.startswith("keeptune.")


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path)
        for path in SOURCE.rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []


def test_no_room_for_odds_and_ends() -> None:
    stems = {path.stem for path in SOURCE.rglob("*.py")}
    assert not stems & {"utils", "util", "helpers", "helper", "misc", "common", "base"}
