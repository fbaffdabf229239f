"""What the command line prints about methods and scores."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field
from rich.console import Console

from keeptune.intervals import Estimate
from keeptune.method import Method
from keeptune.methods._anchor import Strength
from keeptune.metrics import summarise
from keeptune.terminal import change_text, method_settings, score_text, scores_table
from runs import fabricate, info


def shown(path: Path, **changes: object) -> list[str]:
    stream = io.StringIO()
    summary = summarise(fabricate(path, info(**changes)))  # type: ignore[arg-type]
    Console(file=stream, width=80).print(scores_table(summary))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_scores_before_and_after_with_intervals(tmp_path: Path) -> None:
    lines = shown(tmp_path / "run")
    assert lines[0].split() == ["tasks", "before", "learned", "now", "change", "since"]
    assert lines[1].split("(")[0].split() == ["French", "names", "20", "%"]
    assert "pts (-" in lines[1]
    assert lines[3].endswith("–")
    assert lines[4] == "guards"
    assert lines[5].split("(")[0].split() == ["capitals", "62", "%"]
    assert lines[10].split("(")[0].split() == ["old", "news", "14.2"]


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    lines = shown(tmp_path / "run", tasks=("[red]<script>", "b text"), guards=())
    assert lines[1].startswith("[red]<script>")
    assert not any(line.startswith("guards") for line in lines)


@pytest.mark.parametrize(
    ("estimate", "unit", "score", "change"),
    [
        (Estimate(0.714, 0.65, 0.77), "share", "71 % (65–77)", "+71 pts (+65 to +77)"),
        (Estimate(1.0, 0.99, 1.0), "share", "100 % (99–100)", "+100 pts (+99 to +100)"),
        (Estimate(0.0, 0.0, 0.004), "share", "0 % (0–0)", "0 pts (0 to 0)"),
        (Estimate(1e6, 900.0, 2e7), "perplexity", "1,000,000 (900–20,000,000)", "+100000000 %"),
        (Estimate(12.345, 11.9, 12.8), "perplexity", "12.3 (11.9–12.8)", "+1234 % (+1190 to "),
        (Estimate(0.5), "share", "50 %", "+50 pts"),
        (Estimate(None), "share", "–", "–"),
    ],
)
def test_numbers(estimate: Estimate, unit: str, score: str, change: str) -> None:
    assert score_text(estimate, unit) == score
    assert change_text(estimate, unit).startswith(change)


class Odd(Method):
    """Settings of every kind."""

    a: float = Field(..., gt=0, lt=1, description="must be there")
    b: Literal["x", "y"] = "x"
    c: int | None = Field(None, le=3)
    d: list[str] = Field(default_factory=list, min_length=1)
    e: bool = False
    f: Strength = "auto"
    g: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


def test_settings_of_every_kind() -> None:
    assert method_settings(Odd) == [
        ("a", "must be given", "number, > 0, < 1", "must be there"),
        ("b", "x", "one of x, y", ""),
        ("c", "null", "whole number or nothing, ≤ 3", ""),
        ("d", "[]", "list of text, length ≥ 1", ""),
        ("e", "false", "true or false", ""),
        ("f", "auto", "number or auto, ≥ 0.0", ""),
        ("g", "{}", "by text: number, ≥ 0", ""),
    ]
