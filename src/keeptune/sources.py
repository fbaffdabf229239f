"""Where rows come from: files, hub data sets, lists; read as they are, not yet checked."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.errors import DataError

LONGEST_CELL = 2**31 - 1  # characters; Python would stop at 131,072
BLOCK = 1000  # characters after which a text file's block ends with its line


@dataclass(frozen=True)
class Raw:
    """Rows as read; `numbers` are the lines or rows that an error message names."""

    name: str
    rows: list[Any]
    numbers: Sequence[int]
    unit: str = "row"

    def place(self, i: int) -> str:
        """Where row `i` (from 0) stands, for an error message."""
        return f"{self.unit} {self.numbers[i]} of {self.name}"


def read(source: Any, split: str) -> Raw:
    """Read a path, a hub data set, a list of rows or a `datasets.Dataset`.

    Raises:
        DataError: Nothing there, or not readable.
    """
    if isinstance(source, list | tuple):
        return Raw(f"a list of {len(source)} rows", list(source), range(1, len(source) + 1))
    if hasattr(source, "to_list") and hasattr(source, "column_names"):
        return Raw("a data set", source.to_list(), range(1, len(source) + 1))
    if not isinstance(source, str | Path):
        raise DataError(
            f"data must be a path, a hub data set, a list of rows or a datasets.Dataset (one "
            f"split of it), not {type(source).__name__}."
        )
    path = Path(source).expanduser()
    try:
        is_file = path.suffix.lower() in _READERS or path.exists()
    except OSError as error:
        raise DataError(f"{path!s:.100} cannot be read: {error.strerror or error}.") from error
    if is_file:
        return _read_file(path)
    if hub := re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.\-\[\]%+:]+))?", str(source)):
        return _read_hub(hub[1], hub[2] or split)
    raise DataError(f"there is no file {source}, and it is not the id of a hub data set.")


def _read_file(path: Path) -> Raw:
    reader = _READERS.get(path.suffix.lower())
    try:
        if not path.exists():
            raise DataError(f"there is no file {path}.")
        if reader is None or path.is_dir():
            allowed = ", ".join(_READERS)
            raise DataError(f"{path} is not a data file; it must be a file that ends in {allowed}.")
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")


def _read_jsonl(path: Path) -> Raw:
    rows, numbers = [], []
    # Not splitlines(): JSON strings may hold U+2028, which it takes for the end of a line.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                at = f"line {number} of {path}"
                raise DataError(
                    f"broken JSON at {at}, column {error.colno}: {error.msg}."
                ) from error
            except (ValueError, RecursionError) as error:  # a number too long, or far too deep
                raise DataError(f"JSON at line {number} of {path} is too much: {error}.") from error
            numbers.append(number)
    return Raw(str(path), rows, numbers, "line")


def _read_json(path: Path) -> Raw:
    text = _text(path)
    if not text.lstrip().startswith("["):
        if "\n" in text.strip() and _is_json(text):
            raise DataError(
                f"{path} holds one object over several lines; it must hold a list of rows "
                "([{...}, {...}]), or one row a line."
            )
        return _read_jsonl(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON at line {error.lineno} of {path}: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"JSON in {path} is too much: {error}.") from error
    return Raw(str(path), rows, range(1, len(rows) + 1))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_csv(path: Path) -> Raw:
    rows, numbers = [], []
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"line {reader.line_num} of {path}"
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    raise DataError(
                        f"{place} has another number of cells than the header's {wanted}."
                    )
                rows.append({key: _csv_cell(key, cell, place) for key, cell in row.items()})
                numbers.append(reader.line_num)
        except csv.Error as error:
            raise DataError(
                f"broken CSV at line {reader.reader.line_num} of {path}: {error}."
            ) from error
    return Raw(str(path), rows, numbers, "line")


def _csv_cell(column: str, cell: str, place: str) -> Any:
    if column not in ("choices", "messages"):
        return cell
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise DataError(f"`{column}` in {place} must be a list in JSON: {error.msg}.") from error


def _read_parquet(path: Path) -> Raw:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}.") from error
    return Raw(str(path), rows, range(1, len(rows) + 1))


def _read_text(path: Path) -> Raw:
    rows, numbers, block, first = [], [], "", 1
    lines = _text(path).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        block += line
        if len(block) >= BLOCK or number == len(lines):
            if block.strip():
                rows.append({"text": block})
                numbers.append(first)
            block, first = "", number + 1
    return Raw(str(path), rows, numbers, "line")


def _read_hub(name: str, split: str) -> Raw:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split).to_list()
    except Exception as error:
        # The hub client raises whatever its transport does; the first line says enough.
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"there is no file {name}, and as a hub data set its split {split!r} cannot be "
            f"loaded: {reason}."
        ) from error
    return Raw(f"{name}:{split}", rows, range(1, len(rows) + 1))


_READERS: dict[str, Callable[[Path], Raw]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
