"""Whether an answer in other words still says what the reference says."""

from __future__ import annotations

import re
from typing import Literal

Agree = Literal["contains", "final", "any"]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def agrees(rewritten: str, reference: str, how: Agree) -> bool:
    """Compare two answers.

    Args:
        rewritten: In the model's own words.
        reference: As it is in the data.
        how: "contains": all words of the reference stand in it, in their order and without others
            between them. "final": both end with the same number; where the reference has none, its
            last line is contained. "any": it is not empty.
    """
    if how == "any":
        return bool(rewritten.strip())
    if how == "final" and (wanted := final_number(reference)) is not None:
        return final_number(rewritten) == wanted
    lines = reference.strip().splitlines() or [""]
    wanted_words = _words(lines[-1] if how == "final" else reference)
    return bool(wanted_words.strip()) and wanted_words in _words(rewritten)


def final_number(text: str) -> float | None:
    """The last number in a text, or None; commas between digits do not count."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _words(text: str) -> str:
    words = re.findall(r"\w+", text.casefold())
    return f" {' '.join(words)} "
