"""Rows scored as a strategy serves them: each question by the model of its task."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from keeptune.chain import Chain
from keeptune.likelihood import context_length
from keeptune.method import Context, Ids
from keeptune.records import Example
from keeptune.rows import Rows, Shape
from keeptune.session import Session
from keeptune.tokens import cut_left, encode, prompt_ids


class Prompts:
    """Asks the methods what stands in for a question, and counts what that costs.

    Attributes:
        tokens: How many were added.
        seconds: What it took.
        cut: Rows scored so far that were longer than the context, and lost their beginning.
    """

    def __init__(self, chain: Chain, ctx: Context) -> None:
        self.chain, self.ctx = chain, ctx
        self.tokens, self.seconds, self.cut = 0, 0.0, 0

    def __call__(self, ids: Ids, room: int) -> Ids:
        """What is asked in place of `ids`."""
        started = time.monotonic()
        asked = self.chain.prompt(self.ctx, ids, room)
        if asked is not ids:
            self.tokens += len(asked) - len(ids)
            self.seconds += time.monotonic() - started
        return asked


def score_served(
    session: Session,
    ctx: Context,
    rows: Rows,
    score: str,
    task: str | None,
    prompts: Prompts,
    *,
    max_new_tokens: int | None,
    tick: Callable[[int], None] = lambda n: None,
) -> list[Example]:
    """Score rows by what the strategy serves for them.

    Args:
        session: The run; its model stands after the last task learned.
        ctx: A context for the methods.
        rows: What is asked.
        score: See `keeptune.scorers`.
        task: Whose rows they are; None where that is not known, so that the strategy may choose a
            task for each of them.
        prompts: What is asked in place of questions.
        max_new_tokens: Longest generated answer; None is the expected answer's length plus 8.
        tick: Called with the number of rows that were just scored.

    Returns:
        One example a row, in the rows' order.
    """
    found = {}
    for served, positions in _by_task(session, ctx, rows, task).items():
        session.chain.serve(ctx, served)
        some = dataclasses.replace(rows, rows=[rows.rows[i] for i in positions])
        examples = session.score(
            some, score, max_new_tokens=max_new_tokens, tick=tick, prompt=prompts
        )
        prompts.cut += examples.truncated
        for i, example in zip(positions, examples, strict=True):
            found[i] = example.model_copy(update={"id": i})
    return [found[i] for i in range(len(rows))]


def routes(session: Session, ctx: Context, rows: Rows) -> list[str] | None:
    """The task that each row is served as when its own is not known; None where none is chosen."""
    # To know the questions all rows must be tokenised, which most strategies have no use for.
    return session.chain.route(ctx, questions(session, rows)) if session.chain.routes else None


def questions(session: Session, rows: Rows) -> list[Ids]:
    """The token ids of each row, up to where its answer begins."""
    room = context_length(session.model, session.plan.max_length)
    return [_question(session.tokenizer, row, rows.shape, room) for row in rows.rows]


def _question(tokenizer: Any, row: dict[str, Any], shape: Shape, room: int) -> Ids:
    if shape is Shape.LABEL:
        return encode(row, shape, tokenizer, room)[0]
    return cut_left(prompt_ids(row, shape, tokenizer), tokenizer, room)


def _by_task(
    session: Session, ctx: Context, rows: Rows, task: str | None
) -> dict[str | None, list[int]]:
    """The rows' positions by the task that they are served as."""
    chosen = None if task is not None else routes(session, ctx, rows)
    if chosen is None:
        return {task: list(range(len(rows)))}
    return {name: [i for i, c in enumerate(chosen) if c == name] for name in sorted(set(chosen))}
