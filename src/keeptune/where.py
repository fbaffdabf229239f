"""Which rows `keeptune forget` means: conditions as the command line gives them.

    task=NAME        rows of this task
    text=WORDS       rows with these words; case and kind of white space do not matter
    regex=PATTERN    rows in whose text this regular expression of Python is found
    rows=FILE        the rows of this data file

All conditions must hold. The text of a kept row is its tokens decoded, of an evaluated example its
prompt, expected answer and answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.errors import RecipeError, suggest
from keeptune.method import IGNORED
from keeptune.records import Example
from keeptune.rows import Rows, answer, as_text, question, read_rows
from keeptune.tokens import encode

FORMS = ("task", "text", "regex", "rows")


@dataclass(frozen=True)
class Where:
    """Conditions, all of which must hold; an empty tuple is none.

    Attributes:
        tasks: Names of tasks.
        texts: Words, folded.
        patterns: Regular expressions.
        rows: Rows of data files.
    """

    tasks: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    patterns: tuple[re.Pattern[str], ...] = ()
    rows: tuple[Rows, ...] = ()

    @property
    def reads_text(self) -> bool:
        """Whether tokens must be decoded, or rows encoded."""
        return bool(self.texts or self.patterns or self.rows)

    def of_task(self, name: str) -> bool:
        """Whether rows of this task can be meant."""
        return all(name == task for task in self.tasks)

    def of_text(self, text: str) -> bool:
        """Whether this text has what is looked for."""
        folded = _folded(text) if self.texts else ""
        return all(words in folded for words in self.texts) and all(
            pattern.search(text) for pattern in self.patterns
        )

    def of_tokens(self, rows: Sequence[Sequence[int]], tokenizer: Any) -> list[bool]:
        """Which of these rows of token ids are meant, whatever their task."""
        found = [True] * len(rows)
        if not rows:
            return found
        if self.texts or self.patterns:
            texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
            found = [self.of_text(text) for text in texts]
        for given in self.rows:
            # What was too long for training was cut to the length that the longest rows have.
            longest = max(map(len, rows))
            pairs = [encode(row, given.shape, tokenizer, longest) for row in given.rows]
            wanted = {tuple(ids) for ids, _ in pairs}
            # feature_replay keeps answers, with one id in place of each other token.
            wanted |= {
                tuple(blank if label == IGNORED else label for label in labels)
                for _, labels in pairs
                for blank in (0, 1)
            }
            found = [ok and tuple(row) in wanted for ok, row in zip(found, rows, strict=True)]
        return found

    def of_example(self, task: str, example: Example) -> bool:
        """Whether an evaluated example is meant."""
        text = "\n".join((example.prompt, example.expected, example.answer))
        asked = (example.prompt, example.expected)
        return (
            self.of_task(task)
            and self.of_text(text)
            and all(asked in _asked(given) for given in self.rows)
        )


def parse(conditions: Sequence[str]) -> Where:
    """Read conditions.

    Raises:
        RecipeError: One is none.
        DataError: A data file cannot be read.
    """
    if not conditions:
        raise RecipeError("Nothing says what to forget: give --where, such as --where text=WORDS.")
    found: dict[str, list[str]] = {form: [] for form in FORMS}
    for condition in conditions:
        form, equals, value = condition.partition("=")
        if form not in FORMS or not equals or not value.strip():
            hint = "" if form in FORMS else f" {suggest(form, FORMS)}"
            raise RecipeError(
                f"--where {condition!r} is no condition: it must be task=NAME, text=WORDS, "
                f"regex=PATTERN or rows=FILE.{hint}"
            )
        found[form].append(value)
    return Where(
        tasks=tuple(found["task"]),
        texts=tuple(map(_folded, found["text"])),
        patterns=tuple(map(_pattern, found["regex"])),
        rows=tuple(read_rows(file, field="--where rows") for file in found["rows"]),
    )


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(
            f"--where regex={text!r} is no regular expression of Python: {error}."
        ) from error


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _asked(given: Rows) -> set[tuple[str, str]]:
    return {(as_text(question(r, given.shape)), answer(r, given.shape)) for r in given.rows}
