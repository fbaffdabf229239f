"""Rows of data: read from anywhere, checked one by one, in one of five shapes.

A shape is found by the columns, in this order:

| columns                      | shape      | trained on                                   |
|------------------------------|------------|----------------------------------------------|
| messages                     | messages   | the assistant's turns                        |
| prompt, choices, answer      | choice     | the right choice after the prompt            |
| prompt, completion           | completion | the completion                               |
| text, label                  | label      | the class of the text (classifiers only)     |
| text                         | text       | every token                                  |

Further columns are kept for scorers and otherwise ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from keeptune.errors import DataError, suggest
from keeptune.sources import Raw, read

Row = dict[str, Any]
Messages = list[dict[str, str]]


class Shape(StrEnum):
    """What a row holds; the table above says which columns make which shape."""

    MESSAGES = "messages"
    CHOICE = "choice"
    COMPLETION = "completion"
    LABEL = "label"
    TEXT = "text"


COLUMNS = {
    Shape.MESSAGES: ("messages",),
    Shape.CHOICE: ("prompt", "choices", "answer"),
    Shape.COMPLETION: ("prompt", "completion"),
    Shape.LABEL: ("text", "label"),
    Shape.TEXT: ("text",),
}


@dataclass(frozen=True)
class Rows:
    """Checked rows of one shape.

    Attributes:
        rows: One dictionary a row; for Shape.CHOICE `answer` is the index of the right choice.
        shape: The shape of every row.
        source: Where they came from, for people.
        sha256: Hash of the content, the same for the same rows in another file format.
    """

    rows: list[Row]
    shape: Shape
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(source: Any, *, split: str = "train", field: str = "") -> Rows:
    """Read and check rows.

    Args:
        source: Path of a .jsonl, .json, .csv, .parquet or .txt file; a hub data set as
            "owner/name" or "owner/name:split"; a list of dictionaries; or a `datasets.Dataset`.
        split: Which split of a hub data set to take when the id names none.
        field: Name of the recipe's field, put in front of error messages.

    Raises:
        DataError: Nothing there, unreadable, empty, wrong columns, mixed shapes, a wrong value.
    """
    try:
        raw = read(source, split)
        if not raw.rows:
            raise DataError(f"{raw.name} is empty: it needs at least one row.")
        shape = _common_shape(raw)
        rows = [_checked(row, shape, raw.place(i)) for i, row in enumerate(raw.rows)]
    except DataError as error:
        raise DataError(f"{field}: {error}" if field else str(error)) from error.__cause__
    return Rows(rows, shape, raw.name, _hash(rows, shape))


def leaked(train: Rows, evaluation: Rows) -> int:
    """Count the evaluation rows whose question and answer also occur among the training rows.

    White space is collapsed first, so that a trailing new line hides nothing.
    """
    return len(evaluation) - len(new_rows(train, evaluation))


def new_rows(known: Rows, rows: Rows) -> list[int]:
    """Positions of the rows whose question and answer do not occur among the known ones."""
    seen = {_fingerprint(row, known.shape) for row in known.rows}
    return [i for i, row in enumerate(rows.rows) if _fingerprint(row, rows.shape) not in seen]


def part(rows: Rows, positions: Sequence[int]) -> Rows:
    """Some of the rows, with a hash of their own."""
    chosen = [rows.rows[i] for i in positions]
    return replace(rows, rows=chosen, sha256=_hash(chosen, rows.shape))


def question(row: Row, shape: Shape) -> str | Messages:
    """What the model is asked: a string, or the messages before the last assistant turn."""
    if shape in (Shape.TEXT, Shape.LABEL):
        return str(row["text"])
    if is_conversation(row, shape):
        messages, _ = conversation(row)
        return messages[: _last_answer(messages)]
    prompt: str | Messages = row["prompt"]
    return prompt


def answer(row: Row, shape: Shape) -> str:
    """The right answer as text: the last assistant turn, the completion, the choice, the label.

    For Shape.TEXT there is none: "".
    """
    if shape is Shape.TEXT:
        return ""
    if shape is Shape.LABEL:
        return str(row["label"])
    if shape is Shape.CHOICE:
        return str(row["choices"][row["answer"]])
    if is_conversation(row, shape):
        messages, _ = conversation(row)
        return messages[_last_answer(messages)]["content"]
    return str(row["completion"])


def is_conversation(row: Row, shape: Shape) -> bool:
    """Whether the row is messages throughout: `messages`, or prompt and completion as lists."""
    return shape is Shape.MESSAGES or (
        shape is Shape.COMPLETION and isinstance(row["completion"], list)
    )


def conversation(row: Row) -> tuple[Messages, int]:
    """All messages of such a row, and the index from which assistant turns are answers."""
    if row.get("messages") is not None:
        return row["messages"], 0
    return row["prompt"] + row["completion"], len(row["prompt"])


def options(row: Row, shape: Shape) -> tuple[list[str], int] | None:
    """The choices of a row and the index of the right one, or None where there are none.

    A completion row has them when its column `choices` holds the completion.
    """
    if shape is Shape.CHOICE:
        return row["choices"], row["answer"]
    choices = row.get("choices") if shape is Shape.COMPLETION else None
    if not (isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)):
        return None
    stripped = [c.strip() for c in choices]
    right = answer(row, shape).strip()
    return (choices, stripped.index(right)) if right in stripped else None


def answered(row: Row, shape: Shape) -> list[Row]:
    """The row with each of its choices as the right one, in their order; none where none are."""
    if (found := options(row, shape)) is None:
        return []
    choices, right = found
    if shape is Shape.CHOICE:
        return [row | {"answer": i} for i in range(len(choices))]
    given = row["completion"]
    others = [
        c if isinstance(given, str) else [*given[:-1], given[-1] | {"content": c}] for c in choices
    ]
    return [row | {"completion": given if i == right else c} for i, c in enumerate(others)]


def label_id(label: str | int, labels: Sequence[str]) -> int:
    """The class id of a label: its place among the names, or a whole number as it is.

    Raises:
        DataError: No such class.
    """
    if str(label) in labels:
        return labels.index(str(label))
    # A number is a class's place only where it cannot be meant as a class's name.
    is_place = str(label).isdecimal() and not any(name.isdecimal() for name in labels)
    if is_place and (not labels or int(label) < len(labels)):
        return int(label)
    known = suggest(str(label), labels) if labels else "Give the names of the classes as labels."
    raise DataError(f"unknown label {label!r}. {known}")


def as_text(prompt: str | Messages) -> str:
    """A prompt for people: messages as one "role: content" a line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _last_answer(messages: Messages) -> int:
    return max(i for i, m in enumerate(messages) if m["role"] == "assistant")


def _fingerprint(row: Row, shape: Shape) -> tuple[str, str]:
    asked = " ".join(as_text(question(row, shape)).split())
    return asked, " ".join(answer(row, shape).split())


def _hash(rows: list[Row], shape: Shape) -> str:
    digest = hashlib.sha256(shape.encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


# ---- checks ---------------------------------------------------------------------------------


def _shape(row: Any) -> Shape | None:
    if not isinstance(row, dict):
        return None
    filled = {key for key, value in row.items() if value is not None}
    return next((s for s, columns in COLUMNS.items() if filled.issuperset(columns)), None)


def _common_shape(raw: Raw) -> Shape:
    shapes = [_shape(row) for row in raw.rows]
    for i, (row, shape) in enumerate(zip(raw.rows, shapes, strict=True)):
        if shape is None:
            allowed = "; ".join(" + ".join(columns) for columns in COLUMNS.values())
            got = (
                "has the columns "
                + (", ".join(str(k) for k in row if row[k] is not None) or "none")
                if isinstance(row, dict)
                else f"is a {type(row).__name__}"
            )
            raise DataError(f"{raw.place(i)} {got}; a row needs the columns {allowed}.")
        if shape is not shapes[0]:
            raise DataError(
                f"{raw.place(i)} has the shape {shape}, but {raw.place(0)} has {shapes[0]}; "
                "all rows of one source must have the same columns."
            )
    return next(shape for shape in shapes if shape is not None)


def _checked(row: Row, shape: Shape, place: str) -> Row:
    if shape is Shape.MESSAGES:
        _check_messages(row["messages"], f"`messages` in {place}", asked=True)
    elif shape is Shape.CHOICE:
        _check_prompt(row["prompt"], place)
        return row | {"answer": _choice(row["choices"], row["answer"], place)}
    elif shape is Shape.COMPLETION:
        _check_prompt(row["prompt"], place)
        if isinstance(row["prompt"], str):
            _check_text(row["completion"], f"`completion` in {place}")
        else:
            _check_messages(row["completion"], f"`completion` in {place}", asked=False)
    else:
        _check_text(row["text"], f"`text` in {place}")
        if shape is Shape.LABEL and not isinstance(row["label"], str | int):
            got = f"{row['label']!r} ({type(row['label']).__name__})"
            raise DataError(f"`label` in {place} is {got}; it must be a name or a whole number.")
    return dict(row)


def _check_text(value: Any, place: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{place} is {value!r:.60} ({type(value).__name__}); it must be text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place} holds half of a surrogate pair, which is not text.") from None


def _check_prompt(prompt: Any, place: str) -> None:
    if isinstance(prompt, list):
        _check_messages(prompt, f"`prompt` in {place}", asked=None)
    else:
        _check_text(prompt, f"`prompt` in {place}")


def _check_messages(messages: Any, place: str, *, asked: bool | None) -> None:
    """Check a list of messages; `asked` None means a prompt, which needs no assistant turn."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place} is {messages!r:.60}; it must be a list of messages.")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{place} holds {message!r:.60}; a message needs `role` and `content`.")
        _check_text(message["role"], f"a role of {place}")
        _check_text(message["content"], f"a content of {place}")
    roles = [message["role"] for message in messages]
    if asked is not None and "assistant" not in roles:
        raise DataError(f"{place} has no assistant turn, so there is nothing to learn or score.")
    if asked and roles[0] == "assistant":
        raise DataError(
            f"{place} begins with the assistant; a user or system turn must come first."
        )


def _choice(choices: Any, right: Any, place: str) -> int:
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"`choices` in {place} is {choices!r:.60}; it must be a list of 2 or more.")
    for choice in choices:
        _check_text(choice, f"one of `choices` in {place}")
    if not all(c.strip() for c in choices) or len(set(choices)) < len(choices):
        raise DataError(f"`choices` in {place} must be different from each other and not empty.")
    if right in choices:
        return int(choices.index(right))
    if isinstance(right, str) and re.fullmatch(r"\d+", right):
        right = int(right)
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(choices):
        return right
    raise DataError(
        f"`answer` in {place} is {right!r:.60}; it must be one of the choices, or its index "
        f"from 0 to {len(choices) - 1}."
    )
