"""Answers of a task's rows in the model's own words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.method import Context
from keeptune.methods._writing.agreement import Agree, agrees
from keeptune.methods._writing.chats import Turns
from keeptune.methods._writing.sampling import Ids, write
from keeptune.methods._writing.whole_rows import Row, last_answer

ASKED = (
    "Below are an instruction that describes a task along with a reference answer. Using the "
    "reference answer as a guide, write your own response.\n\n"
    "### Instruction:\n{question}\n\n### Reference Answer:\n{answer}\n\n### Response:\n"
)
ROOM = 16  # tokens that a rewritten answer may have beyond twice the reference's


@dataclass(frozen=True)
class Rewriter:
    """How answers are rewritten.

    Attributes:
        agree: When one is kept.
        longest: Tokens of a rewritten answer at most.
        top_k: The likeliest tokens that are drawn from; 1 for the likeliest.
    """

    agree: Agree
    longest: int
    top_k: int

    def rewrite(
        self, ctx: Context, rows: Sequence[Row], places: Sequence[int]
    ) -> tuple[dict[int, Row], Counter[str]]:
        """Let the model put answers in its own words.

        Args:
            ctx: The task; its model writes as it is now.
            rows: The task's.
            places: Which of them.

        Returns:
            New rows by place, those that agree with the old ones; and how many others were
            "unfinished", "disagreeing" or the "same".
        """
        stops = _stops(ctx.tokenizer)
        parts = [_Parts.of(rows[place], ctx.tokenizer, stops) for place in places]
        written = write(
            ctx,
            [part.prompt(ctx.tokenizer) for part in parts],
            [min(self.longest, 2 * len(part.answer) + ROOM) for part in parts],
            lambda ids: ids[-1] in stops,
            [ctx.random("rewrite", place) for place in places],
            top_k=self.top_k,
        )
        found: dict[int, Row] = {}
        counts: Counter[str] = Counter()
        for place, part, one in zip(places, parts, written, strict=True):
            text = ctx.tokenizer.decode(one.ids[:-1], skip_special_tokens=True).strip()
            if not one.ended:
                counts["unfinished"] += 1
            elif not agrees(text, part.text, self.agree):
                counts["disagreeing"] += 1
            elif text == part.text.strip():
                counts["same"] += 1
            else:
                found[place] = part.with_answer(text, ctx.tokenizer)
        return found, counts


@dataclass(frozen=True)
class _Parts:
    """A row taken apart: what is asked, its last answer, and the tokens that end that."""

    row: Row
    begin: int
    answer: Ids
    end: Ids
    text: str

    @classmethod
    def of(cls, row: Row, tokenizer: Any, stops: set[int]) -> _Parts:
        begin, close = last_answer(row.labels)
        cut = close
        while cut > begin and row.input_ids[cut - 1] in stops:
            cut -= 1
        answer = row.input_ids[begin:cut]
        return cls(row, begin, answer, row.input_ids[cut:close], tokenizer.decode(answer))

    def prompt(self, tokenizer: Any) -> Ids:
        """The request to put the answer in other words."""
        question = tokenizer.decode(self.row.input_ids[: self.begin], skip_special_tokens=True)
        text = ASKED.format(question=question.strip(), answer=self.text.strip())
        if not tokenizer.chat_template:
            return list(tokenizer.encode(text, add_special_tokens=False))
        chat = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(asked, add_special_tokens=False))

    def with_answer(self, text: str, tokenizer: Any) -> Row:
        """The row with another last answer, after the same white space and before the same end."""
        space = self.text[: len(self.text) - len(self.text.lstrip())]
        new = [*tokenizer.encode(space + text, add_special_tokens=False), *self.end]
        return Row(
            self.row.input_ids[: self.begin] + new, list(self.row.labels[: self.begin]) + new
        )


def _stops(tokenizer: Any) -> set[int]:
    """Tokens at which an answer ends: EOS, and whatever a chat template ends turns with."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        stops.add(Turns.of(tokenizer, "self_rewrite").end[0])
    return stops
