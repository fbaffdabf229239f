"""Reads a method's card out of the docstring of its module."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from keeptune.method import Method


@dataclass(frozen=True)
class Card:
    """A method's card: its module's docstring, read by fixed keys.

    Attributes:
        title: The first line.
        fields: "Paper", "Equation", "Changes", "Cost", "Use when", "Not when",
            "Differs from the paper", "Status".
    """

    title: str
    fields: dict[str, str]


CARD_KEYS = (
    "Paper",
    "Equation",
    "Changes",
    "Cost",
    "Use when",
    "Not when",
    "Differs from the paper",
    "Status",
)


def card(cls: type[Method]) -> Card:
    """Read a method's card from the docstring of its module."""
    lines = (inspect.getdoc(inspect.getmodule(cls)) or "").splitlines()
    fields: dict[str, str] = {}
    key = ""
    for line in lines[1:]:
        head, colon, rest = line.partition(":")
        if colon and head in CARD_KEYS:
            key = head
            fields[key] = rest.strip()
        elif key and line.strip():
            fields[key] += " " + line.strip()
    return Card(title=lines[0] if lines else "", fields=fields)
