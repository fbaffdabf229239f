"""What people see while a run works."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from keeptune.progress import Bars, Lines, Progress, Silent, choose, duration, figures_text


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines() -> tuple[Lines, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return Lines(stream, every=10, clock=clock), stream, clock


def test_lines_say_little_and_all_that_counts(lines: tuple[Lines, io.StringIO, Clock]) -> None:
    progress, stream, clock = lines
    progress.task(1, 2, "tickets")
    progress.phase("train tickets", 100)
    for step in range(1, 101):
        clock.now += 0.25
        progress.advance(step, loss=1 / step, tokens_per_second=5120.4)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "task 1 of 2: tickets",
        "train tickets: 40 of 100 steps, loss 0.025, 5,120 tokens/s, 15 s left",
        "train tickets: 80 of 100 steps, loss 0.0125, 5,120 tokens/s, 5 s left",
        "train tickets: 100 of 100 steps, loss 0.01, 5,120 tokens/s, 25 s in all",
    ]


def test_a_new_phase_ends_the_former_one(lines: tuple[Lines, io.StringIO, Clock]) -> None:
    progress, stream, clock = lines
    progress.phase("train", 2)
    progress.advance(2)
    clock.now += 3
    progress.phase("evaluate", 0, "examples")
    progress.advance(1234)
    progress.close()
    progress.close()
    assert stream.getvalue().splitlines() == [
        "train: 2 of 2 steps, 3 s in all",
        "evaluate: 1,234 examples, 0 s in all",
    ]


def test_the_same_phase_again_only_sets_its_length(
    lines: tuple[Lines, io.StringIO, Clock],
) -> None:
    progress, stream, _ = lines
    progress.phase("train", 0)
    progress.phase("train", 8)
    progress.advance(8)
    progress.close()
    assert stream.getvalue() == "train: 8 of 8 steps, 0 s in all\n"


def test_time_left_of_a_resumed_phase_counts_only_what_was_done_now(
    lines: tuple[Lines, io.StringIO, Clock],
) -> None:
    progress, stream, clock = lines
    progress.phase("train", 100)
    clock.now += 5
    progress.advance(80)
    clock.now += 10
    progress.advance(90)
    assert "90 of 100 steps, 10 s left" in stream.getvalue()


def test_notes_and_warnings_are_plain(lines: tuple[Lines, io.StringIO, Clock]) -> None:
    progress, stream, _ = lines
    progress.note("3 rows [cut]")
    progress.warn("leak")
    progress.advance(1)
    assert stream.getvalue() == "3 rows [cut]\nwarning: leak\n"


def test_bars_show_task_steps_loss_and_speed() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, _environ={})
    bars = Bars(console)
    bars.phase("load [bold]", 0, "files")
    bars.task(2, 3, "<script>[red]")
    bars.phase("train", 0)
    bars.phase("train", 120)
    bars.advance(40, loss=0.5, tokens_per_second=900)
    bars._bars.refresh()
    bars.warn("three rows [leak]")
    bars.close()
    bars.close()
    shown = stream.getvalue()
    for text in (
        "load [bold]: 0 files",
        "task 2 of 3: <script>[red]",
        "1/3",
        "40/120",
        "loss 0.5, 900 tokens/s",
        "warning: three rows [leak]",
        "train: 40 of 120 steps, loss 0.5, 900 tokens/s, 0 s in all",
    ):
        assert text in shown


def test_bars_bear_figures_outside_a_phase() -> None:
    bars = Bars(Console(file=io.StringIO(), force_terminal=True, _environ={}))
    bars.advance(3, loss=1.0)
    bars.close()


def test_a_terminal_gets_bars_and_a_pipe_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose(Terminal()), Bars)
    assert isinstance(choose(io.StringIO()), Lines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose(Terminal()), Lines)


def test_silent_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Progress = Silent()
    progress.task(1, 1, "a")
    progress.phase("a", 3)
    progress.advance(1, loss=2.0)
    progress.note("a")
    progress.warn("a")
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_only_loss_speeds_and_scores_are_shown() -> None:
    figures = {"loss": float("nan"), "grad_norm": 1.5, "tokens_per_second": 12345.6}
    figures |= {"facts_share": 0.62, "old news_perplexity": 14.21}
    assert figures_text(figures) == "loss nan, 12,346 tokens/s, facts 62 %, old news 14.21"
