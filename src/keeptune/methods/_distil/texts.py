"""Texts of the user's own, as rows to be learned from the first token on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keeptune.errors import MethodError
from keeptune.method import Context


def read_texts(ctx: Context, path: Path, length: int, field: str) -> list[dict[str, Any]]:
    """The lines of a file as tokenised rows.

    Args:
        ctx: Has the tokenizer.
        path: One text a line; empty lines are passed over.
        length: Tokens of a text, at most.
        field: The setting that names the file.

    Raises:
        MethodError: There is no tokenizer, no such file, or no text of two tokens in it.
    """
    if ctx.tokenizer is None:
        raise MethodError(
            f"{field} is {str(path)!r}, but this trainer has no tokenizer. Give it one as "
            "`processing_class`, or leave the setting out."
        )
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MethodError(
            f"{field}: {str(path)!r} cannot be read ({error}). Give a text file, one text a line."
        ) from error
    found = [ctx.tokenizer(line)["input_ids"][:length] for line in lines if line.strip()]
    rows = [{"input_ids": ids, "labels": ids} for ids in found if len(ids) > 1]
    if not rows:
        raise MethodError(
            f"{field}: {str(path)!r} has no text of two tokens or more. Give one text a line."
        )
    return rows
