"""Guard: an ability outside the stream that must not drop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from keeptune import guards as ready_made
from keeptune.errors import RecipeError
from keeptune.recipe_parts import LmEvalGuard, RowsGuard, TextGuard
from keeptune.records import Unit
from keeptune.rows import Rows, read_rows
from keeptune.scorers import DEFAULTS, check_score, unit


@dataclass(frozen=True)
class Guard:
    """Named evaluation data with a score; never trained on.

    Attributes:
        name: As in the report.
        rows: What is scored; None for a task of lm-eval.
        score: See `keeptune.scorers`, or "lm_eval".
        max_new_tokens: Longest generated answer; None is the expected answer's length plus 8.
        limit: For lm-eval, at most so many examples.
        include_path: For lm-eval, a folder with task YAML of one's own.
        transfer_of: The task whose facts it asks in another way, if any.
    """

    name: str
    rows: Rows | None = field(repr=False)
    score: str = ""
    max_new_tokens: int | None = None
    limit: int | None = None
    include_path: Path | None = None
    transfer_of: str = ""

    def __post_init__(self) -> None:
        if self.rows is None:
            object.__setattr__(self, "score", "lm_eval")
            return
        if not self.score:
            object.__setattr__(self, "score", DEFAULTS[self.rows.shape])
        check_score(self.score, self.rows)

    @property
    def unit(self) -> Unit:
        """The score's unit."""
        return "share" if self.rows is None else unit(self.score)

    @property
    def size(self) -> int:
        """Examples it is scored on; 0 where only lm-eval knows."""
        return len(self.rows) if self.rows is not None else self.limit or 0


def read_guard(spec: str | TextGuard | RowsGuard | LmEvalGuard, *, where: str = "") -> list[Guard]:
    """Load what one entry of a recipe's `guards` names.

    Args:
        spec: The entry.
        where: File, line and field, for messages.

    Raises:
        DataError: The file cannot be read, or the score does not fit.
        RecipeError: There is no such ready-made guard.
    """
    if isinstance(spec, str):
        if spec not in ready_made.names():
            raise RecipeError(f"{where}: {ready_made.unknown(spec)}")
        return [Guard(name, rows, score) for name, rows, score in ready_made.load(spec)]
    if isinstance(spec, TextGuard):
        return [Guard(spec.name, read_rows(spec.text, field=where), "perplexity")]
    if isinstance(spec, RowsGuard):
        rows = read_rows(spec.eval, split="test", field=where)
        transfer = spec.transfer_of or ""
        return [Guard(spec.name, rows, spec.score or "", spec.max_new_tokens, transfer_of=transfer)]
    path = Path(spec.include_path) if spec.include_path else None
    return [Guard(name, None, limit=spec.limit, include_path=path) for name in spec.lm_eval]
