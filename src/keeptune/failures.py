"""Why a run of a comparison failed: one file in its folder, for the next page and the next try."""

from __future__ import annotations

from pathlib import Path

from keeptune.disk import write_atomic

FILE = "error.txt"


def failure(folder: Path) -> str | None:
    """Why the run in a folder failed, in one sentence; None where it did not."""
    file = folder / FILE
    return file.read_text("utf-8").partition("\n")[0] if file.is_file() else None


def write_failure(folder: Path, sentence: str, details: str = "") -> str:
    """Keep why a run failed.

    Args:
        folder: The run folder; it need not be there yet.
        sentence: What a user reads; lines become one.
        details: For those who look for a fault, such as a traceback.

    Returns:
        The sentence on one line.
    """
    line = "; ".join(sentence.split("\n"))
    write_atomic(folder / FILE, f"{line}\n{details}".encode())
    return line


def in_a_line(error: BaseException) -> str:
    """An error that is nobody's sentence: its kind, and the first line of what it says."""
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}"


def clear_failure(folder: Path) -> None:
    """Forget a failure: the run goes on."""
    (folder / FILE).unlink(missing_ok=True)
