"""PLACEHOLDER by the lead: the owner of guards replaces this file (names(), load(name) -> [(name, Rows, score)], unknown(name) -> sentence)."""
from __future__ import annotations
def names(): return []
def unknown(name): return f"There is no guard {name!r}."
def load(name): return []
