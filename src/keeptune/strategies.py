"""The strategies of a comparison as words: `plain,replay+ewc,ewc(strength=10)`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from keeptune import privacy, registry
from keeptune.chain import Chain
from keeptune.errors import KeeptuneError, RecipeError
from keeptune.method import Method
from keeptune.recipe import Recipe
from keeptune.yamltext import Document

_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Strategy:
    """Methods that run together.

    Attributes:
        words: As they were written.
        methods: Each method and its settings, every default filled in.
    """

    words: str
    methods: list[tuple[str, dict[str, Any]]]


def read_strategies(text: str, recipe: Recipe) -> list[Strategy]:
    """Read and check a list of strategies.

    Args:
        text: Strategies with commas between them; each is one method or several joined by `+`.
            Settings may follow a name in brackets: `ewc(strength=10, decay=0.9)`.
        recipe: A method that it lists has its settings where none are given; any other one its
            defaults.

    Raises:
        RecipeError: With everything that is wrong, one line each.
    """
    found, problems = [], []
    for words in _split(text, ","):
        try:
            found.append(_strategy(words, recipe))
        except KeeptuneError as error:
            problems.append(f"--methods {words or repr(text)}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    return found


def strategy_of(recipe: Recipe) -> Strategy:
    """The recipe's own strategy."""
    built = [registry.build(name, settings) for name, settings in recipe.strategy]
    return Strategy(Chain(built).name.replace(" ", ""), _filled(built))


def _strategy(words: str, recipe: Recipe) -> Strategy:
    own = dict(recipe.strategy)
    built = []
    for part in _split(words, "+"):
        name, given = _settings(part)
        built.append(registry.build(name, {**own.get(name, {}), **given}))
    Chain(built)
    if said := privacy.refusal(built, recipe.privacy):
        raise RecipeError(said)
    return Strategy(words, _filled(built))


def _filled(methods: list[Method]) -> list[tuple[str, dict[str, Any]]]:
    return [(method.name(), method.model_dump(mode="json")) for method in methods]


def _settings(part: str) -> tuple[str, dict[str, Any]]:
    """`ewc(strength=10)` as a name and what is in the brackets."""
    name, bracket, rest = part.partition("(")
    name = name.strip()
    if not name or (bracket and not rest.rstrip().endswith(")")):
        raise RecipeError(
            "write methods as in plain,replay+ewc,ewc(strength=10): names with + between them, "
            "and settings in brackets."
        )
    document = Document()
    for setting in _split(rest.rstrip()[:-1], ",") if bracket else ():
        key, equals, _ = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{setting!r} is no setting; write {name}(key=value).")
        try:
            document = document.override(setting)
        except RecipeError as error:
            raise RecipeError(str(error).replace("--set ", "", 1)) from error
    return name, document.values()


def _split(text: str, separator: str) -> Iterator[str]:
    """Parts between separators that stand in no bracket and in no quotes."""
    depth, quote, part = 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (not quote and letter in _OPEN) - (not quote and letter in _CLOSE)
        if letter == separator and not depth and not quote:
            yield part.strip()
            part = ""
        else:
            part += letter
    yield part.strip()
