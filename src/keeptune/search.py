"""What `keeptune tune` varies: settings of a recipe, each in a range."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune import registry
from keeptune.errors import KeeptuneError, RecipeError
from keeptune.method import Method
from keeptune.recipe import Recipe, check_recipe, load_recipe, resolve

DEFAULT = "default"
AROUND = 100.0  # a strength is searched from a hundredth of the recipe's to a hundred times it
# Where other settings are searched, and whether each doubling counts alike.
RANGES = {
    "ratio": (0.02, 1.0, True),
    "rank": (4, 64, True),
    "smoothing": (0.02, 0.4, True),
    "mix": (0.1, 1.0, False),
    "prune": (0.1, 0.9, False),
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_WORD = re.compile(rf"([^=]+)=({_NUMBER}?)\.\.({_NUMBER})(:log)?")


@dataclass(frozen=True)
class Range:
    """One setting and where it is searched.

    Attributes:
        key: Dotted, as for --set.
        low: The smallest value.
        high: The largest.
        is_log: Whether each doubling counts alike.
        is_whole: Whether it is a whole number.
    """

    key: str
    low: float
    high: float
    is_log: bool
    is_whole: bool

    def __str__(self) -> str:
        return f"{self.key}={self.low:g}..{self.high:g}" + ":log" * self.is_log

    def near(self, value: float) -> float:
        """A value of the range with three digits, as one would write it."""
        if self.is_whole:
            return round(value)
        return min(max(float(f"{value:.3g}"), self.low), self.high)


def read_search(
    words: Sequence[str], path: Path, overrides: Sequence[str], recipe: Recipe
) -> list[Range]:
    """The settings to be searched.

    Args:
        words: Each KEY=LOW..HIGH, with :log where each doubling counts alike; or "default".
        path: The recipe's file.
        overrides: What is changed in it.
        recipe: What comes of that.

    Raises:
        RecipeError: What is wrong with one of them, or there is nothing to search.
    """
    found: dict[str, Range] = {}
    for word in words or [DEFAULT]:
        for one in default_ranges(recipe) if word == DEFAULT else [_read(word, recipe)]:
            if one.key in found and word != DEFAULT:
                raise RecipeError(f"--search {word}: {one.key} is given twice; keep one.")
            found.setdefault(one.key, one)
            _check(one, path, overrides)
    if not found:
        raise RecipeError(
            "No method of this recipe has a setting with a usual range. Name what is to be "
            "searched, such as --search trainer.learning_rate=1e-5..1e-3:log."
        )
    return list(found.values())


def _read(word: str, recipe: Recipe) -> Range:
    parts = _WORD.fullmatch(word.replace(" ", ""))
    if parts is None:
        raise RecipeError(
            f"--search {word}: write KEY=LOW..HIGH, and :log where each doubling counts alike, "
            f"such as methods.0.ewc.strength=1e2..1e6:log; or {DEFAULT}."
        )
    key, low, high = parts[1], float(parts[2]), float(parts[3])
    if low >= high:
        raise RecipeError(
            f"--search {word}: {low:g} is not below {high:g}; give the smaller first."
        )
    if parts[4] and low <= 0:
        raise RecipeError(f"--search {word}: with :log the range must begin above 0, got {low:g}.")
    whole = parts[2].isdecimal() and parts[3].isdecimal()
    annotation = _annotation(key, recipe)
    if annotation is not None:
        kinds = {annotation, *typing.get_args(annotation)}
        whole = int in kinds and float not in kinds
    return Range(key, low, high, bool(parts[4]), whole)


def _annotation(key: str, recipe: Recipe) -> Any:
    """The type of a method's setting; None where the key is none."""
    for number, (name, _) in enumerate(recipe.strategy):
        fields = registry.get(name).model_fields
        for setting, field in fields.items():
            if key == f"methods.{number}.{name}.{setting}":
                return field.annotation
    return None


def _check(one: Range, path: Path, overrides: Sequence[str]) -> None:
    """Whether a recipe may have both ends of a range."""
    for value in (one.low, one.high):
        change = assignment(one, value)
        try:
            recipe = load_recipe(path, [*overrides, change])
            check_recipe(recipe)
        except KeeptuneError as error:
            said = str(error).replace(f"--set {change}: ", "", 1)
            raise RecipeError(f"--search {one}: {said}") from error
        if not isinstance(_value(recipe, one.key), int | float):
            raise RecipeError(f"--search {one}: {one.key} is no number, so that it has no range.")


def assignment(one: Range, value: float) -> str:
    """A value of a range as --set takes it."""
    return f"{one.key}={int(value) if one.is_whole else float(value)!r}"


# -- without a word of the user's -----------------------------------------------------------------


def default_ranges(recipe: Recipe) -> list[Range]:
    """Of each method the settings that weigh learning against keeping, in their usual ranges."""
    found = []
    for number, (name, settings) in enumerate(recipe.strategy):
        method = registry.build(name, settings)
        for setting, field in type(method).model_fields.items():
            bounds = _usual(setting, getattr(method, setting), type(method))
            if bounds is not None:
                low, high, is_log = bounds
                low, high = _inside(low, high, field.metadata)
                key = f"methods.{number}.{name}.{setting}"
                found.append(Range(key, low, high, is_log, field.annotation is int))
    return found


def _usual(setting: str, value: Any, cls: type[Method]) -> tuple[float, float, bool] | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if setting.endswith("strength"):
        middle = value or cls.model_fields[setting].default
        is_known = isinstance(middle, int | float) and middle > 0
        return (middle / AROUND, middle * AROUND, True) if is_known else None
    return RANGES.get(setting)


def _inside(low: float, high: float, bounds: Sequence[Any]) -> tuple[float, float]:
    """A range cut to what a setting may be."""
    for bound in bounds:
        if (most := getattr(bound, "le", None)) is not None:
            high = min(high, most)
        if (beyond := getattr(bound, "lt", None)) is not None:
            high = min(high, 0.99 * beyond)
    return low, high


def own_values(ranges: Sequence[Range], recipe: Recipe) -> list[float] | None:
    """What the recipe itself has; None where it leaves one out or has one beyond its range."""
    values = [_value(recipe, one.key) for one in ranges]
    for one, value in zip(ranges, values, strict=True):
        if not isinstance(value, int | float) or not one.low <= value <= one.high:
            return None
    return values


def _value(recipe: Recipe, key: str) -> Any:
    """What a recipe has at a dotted key, the methods' defaults filled in; None where nothing."""
    methods = [{n: registry.build(n, given).model_dump()} for n, given in recipe.strategy]
    value: Any = resolve(recipe) | {"methods": methods}
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else (value or {}).get(part)
    return value
