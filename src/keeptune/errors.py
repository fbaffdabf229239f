"""Every error that a user can cause, as one tree.

KeeptuneError
├── RecipeError     the recipe or a command line flag
├── DataError       a data file, a row, a tokenizer
├── ModelError      a model that cannot be loaded or used as asked
├── MethodError     a method's setting, or a clash between two methods
├── FolderError     a run folder: not there, of another recipe, damaged
└── TrainingError   training cannot go on: not-a-number loss, memory, disk

The command line prints the message as it is and exits with code 2, so each message is one plain
sentence: what is wrong, where, what was got, what is allowed, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KeeptuneError(Exception):
    """Base of all errors a user can cause."""


class RecipeError(KeeptuneError):
    """The recipe, or a flag that overrides it, is wrong."""


class DataError(KeeptuneError):
    """A data file, one of its rows, or the tokenizer that must read it."""


class ModelError(KeeptuneError):
    """A model cannot be loaded, or cannot be used as asked."""


class MethodError(KeeptuneError):
    """A method's setting is out of range, or two methods clash."""


class FolderError(KeeptuneError):
    """A run folder is missing, belongs to another recipe, or is damaged."""


class TrainingError(KeeptuneError):
    """Training cannot go on: the loss is not a number, or memory or disk is full."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Say which names are allowed, the nearest ones first.

    Args:
        name: What the user wrote.
        allowed: All names that would have been right.

    Returns:
        "Did you mean 'ewc'?" when a name is near, else "Allowed: a, b, c."
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "Allowed: " + ", ".join(names) + "."
