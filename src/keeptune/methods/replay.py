"""Experience replay: keep a few old rows and mix them into every new task.

Paper: Robins 1995, https://doi.org/10.1080/09540099550039318 ; Chaudhry et al. 2019, On tiny
    episodic memories in continual learning, https://arxiv.org/abs/1902.10486
Equation: train on D_t plus round(ratio |D_t|) rows drawn from a reservoir of D_1 … D_{t-1}
Changes: data, end_task
Cost: 8 bytes a token for at most `size` rows; training rows grow by `ratio`.
Use when: old training rows may be kept. A few per cent usually remove most of the forgetting.
Not when: old data must not be stored, or only knowledge of the base model is at stake, for which
    there are no rows to keep.
Differs from the paper: rows are mixed into the task's data set and shuffled with it, instead of one
    memory batch beside each new batch; the reservoir is filled when a task ends.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from pydantic import Field, PrivateAttr

from keeptune.buffer import Buffer
from keeptune.method import Context, Method, State


def rows_to_replay(new_rows: int, ratio: float) -> int:
    """How many old rows go with `new_rows` new ones: round(ratio · new)."""
    return round(ratio * new_rows)


class Replay(Method):
    """Mix rows of earlier tasks into each new task.

    When fewer rows are kept than `ratio` asks for, all of them are used once and the shortfall is
    reported; none is repeated.
    """

    ratio: float = Field(0.2, ge=0, le=100, description="old rows for each new row")
    size: int = Field(2000, ge=1, description="rows kept over all earlier tasks")

    neutral: ClassVar[dict[str, Any]] = {"ratio": 0.0}
    proof: ClassVar[str] = "rows_replayed"
    traits: ClassVar[frozenset[str]] = frozenset({"buffer"})

    _buffer: Buffer = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Start with an empty reservoir."""
        super().model_post_init(context)
        self._buffer = Buffer(self.size)

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        """The rows given, plus rows drawn from the reservoir."""
        wanted = rows_to_replay(len(ctx.dataset), self.ratio)
        drawn = self._buffer.draw(wanted, ctx.random("replay"))
        self._evidence.update(
            rows_replayed=len(drawn),
            rows_by_task=self._buffer.tasks(drawn),
            rows_new=len(ctx.dataset),
            rows_short=wanted - len(drawn) if len(self._buffer) else 0,
            rows_kept=len(self._buffer),
        )
        if not drawn:
            return dataset
        return self._buffer.beside(dataset, drawn)

    def end_task(self, ctx: Context) -> None:
        """Show the task's rows to the reservoir."""
        self._buffer.add(ctx.dataset, ctx.task, ctx.random("reservoir"))

    def state(self) -> State:
        """The reservoir."""
        return self._buffer.state()

    def restore(self, ctx: Context, state: State) -> None:
        """Take the reservoir back."""
        self._buffer.restore(state)

    def declared_bytes(self, ctx: Context) -> int:
        """8 bytes a token and 8 a row."""
        return self._buffer.nbytes()
