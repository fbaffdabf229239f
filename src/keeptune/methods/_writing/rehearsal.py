"""Rows for rehearsal: written by the model, sieved, and counted by what became of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keeptune.method import Context
from keeptune.methods._writing.chats import Turns
from keeptune.methods._writing.sampling import Ids, Written, write
from keeptune.methods._writing.stock import rows_of, shared_out
from keeptune.methods._writing.whole_rows import Form, Row

TRIES = 4  # texts written for each row that is wanted, at most
SHORTEST = 4  # tokens of a question in a chat
WHAT = ("written", "unfinished", "unparsed", "perplexing", "short", "copies")
Verdict = Row | str  # a row, or what is wrong with what was written
Attempt = Callable[[Sequence[int]], list[Verdict]]


@dataclass
class Harvest:
    """Rows that were written, and how many texts came to what end.

    Attributes:
        rows: Those that are good, in the order they were written.
        counts: `WHAT`: "written" texts, and of them those with a fault.
    """

    rows: list[Row] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Sieve:
    """What is good enough.

    Attributes:
        longest: Most tokens of a text.
        perplexity: Most that the model itself may be surprised by a text, per token.
        top_k: Only the so many likeliest tokens are drawn.
    """

    longest: int
    perplexity: float
    top_k: int

    def refuses(self, written: Written) -> str | None:
        """What is wrong with a text, if anything is."""
        if not written.ended:
            return "unfinished"
        return "perplexing" if written.nats_per_token > math.log(self.perplexity) else None


def harvest(count: int, attempt: Attempt, known: set[tuple[int, ...]]) -> Harvest:
    """Let rows be written until there are enough, or `TRIES` times as many texts.

    Args:
        count: Rows wanted.
        attempt: Writes the texts of these numbers, and judges each.
        known: Rows that are there already, by their ids; those written are added.
    """
    found, tried = Harvest(), 0
    while len(found.rows) < count and tried < TRIES * count:
        missing = count - len(found.rows)
        numbers = range(tried, min(tried + 2 * missing, TRIES * count))
        if not tried:
            numbers = range(count)
        tried = numbers.stop
        for verdict in attempt(numbers):
            found.counts["written"] += 1
            if isinstance(verdict, str):
                found.counts[verdict] += 1
            elif tuple(verdict.input_ids) in known:
                found.counts["copies"] += 1
            elif len(found.rows) < count:
                known.add(tuple(verdict.input_ids))
                found.rows.append(verdict)
    return found


def written(
    ctx: Context, *wanted: tuple[int, Mapping[str, Attempt]]
) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Let rows be written for a task.

    Args:
        ctx: The task; its own rows are not written again.
        wanted: How many rows, and who writes them, among whom they are shared out evenly.

    Returns:
        The rows by name, and what is to be said of them as evidence.
    """
    rows: dict[str, list[Row]] = {}
    counts: Counter[str] = Counter()
    known = {tuple(row.input_ids) for row in rows_of(ctx.dataset)}
    asked = 0
    for total, attempts in wanted:
        for name, count in shared_out(total, list(attempts)).items():
            found = harvest(count, attempts[name], known)
            rows[name] = found.rows
            counts += found.counts
            asked += count
    got = sum(map(len, rows.values()))
    shown = {
        "rows_generated": got,
        "rows_by_task": {name: len(some) for name, some in rows.items()},
        "rows_new": len(ctx.dataset),
        "rows_short": asked - got,
        **{f"texts_{what}": counts[what] for what in WHAT},
    }
    return rows, shown


def copies(ctx: Context, count: int, attempt: Attempt) -> dict[str, int]:
    """How many of the rows that would be written of a task are rows of the task."""
    known = {tuple(row.input_ids) for row in rows_of(ctx.dataset)}
    found = [verdict for verdict in attempt(range(count)) if not isinstance(verdict, str)]
    copied = sum(tuple(row.input_ids) in known for row in found)
    return {"probe_texts": count, "probe_rows": len(found), "probe_copies": copied}


def of_task(ctx: Context, task: str, most: int, sieve: Sieve) -> Attempt:
    """Writes whole rows of a task.

    Args:
        ctx: The present task.
        task: The task whose rows are written.
        most: Tokens of its longest text.
        sieve: What is good enough.
    """
    form = Form.of(task, ctx.tokenizer)

    def attempt(numbers: Sequence[int]) -> list[Verdict]:
        randoms = [ctx.random("rows of", task, number) for number in numbers]
        n = len(numbers)
        prompts, room = [form.prefix] * n, [max(1, most - len(form.prefix))] * n
        texts = write(ctx, prompts, room, form.is_whole, randoms, top_k=sieve.top_k)
        return [sieve.refuses(text) or form.row(text.ids) or "unparsed" for text in texts]

    return attempt


def of_chats(ctx: Context, turns: Turns, sieve: Sieve) -> Attempt:
    """Writes what a user may ask, and answers it."""

    def attempt(numbers: Sequence[int]) -> list[Verdict]:
        n = len(numbers)
        most = [sieve.longest] * n
        randoms = [ctx.random("question", number) for number in numbers]
        asked = write(ctx, [turns.head] * n, most, turns.asked, randoms, top_k=sieve.top_k)
        verdicts: list[Verdict] = [_judged(text, sieve, SHORTEST) for text in asked]
        good = [i for i, verdict in enumerate(verdicts) if not verdict]
        questions: list[Ids] = [asked[i].ids[:-1] for i in good]
        answers = write(
            ctx,
            [turns.prompt(question) for question in questions],
            most[: len(good)],
            turns.answered,
            [ctx.random("answer", numbers[i]) for i in good],
            top_k=sieve.top_k,
        )
        for i, question, answer in zip(good, questions, answers, strict=True):
            verdicts[i] = _judged(answer, sieve, 1) or turns.row(question, answer.ids[:-1])
        return verdicts

    return attempt


def _judged(text: Written, sieve: Sieve, shortest: int) -> str:
    """What is wrong with a text of a chat, whose last token ends it; "" if nothing is."""
    refused = sieve.refuses(text)
    return refused or ("short" if len(text.ids) <= shortest else "")
