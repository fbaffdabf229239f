"""Finds what is left of rows in files: as text, and as token ids in any usual form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

Ids = Sequence[int]
TYPES = (np.uint8, np.uint16, np.int32, np.int64)
SHORTEST = 6  # tokens or characters that no file has by chance


def texts(text: str) -> Iterator[bytes]:
    """A text as it may stand in a file: as it is, and as JSON has it."""
    if len(text.strip()) >= SHORTEST:
        yield text.strip().encode()
        yield json.dumps(text.strip())[1:-1].encode()


def tokens(ids: Ids) -> Iterator[bytes]:
    """Every run of `SHORTEST` ids as numbers of 1, 2, 4 and 8 bytes, and as JSON has them."""
    for begin in range(len(ids) - SHORTEST + 1):
        some = ids[begin : begin + SHORTEST]
        for kind in TYPES:
            if max(some) <= np.iinfo(kind).max:
                yield np.array(some, kind).tobytes()
        yield ", ".join(map(str, some)).encode()
        yield ",".join(map(str, some)).encode()


def found(folder: Path, patterns: Iterable[bytes]) -> list[str]:
    """The files under a folder that hold any of these, and the first that each holds."""
    patterns = list(dict.fromkeys(patterns))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hits = []
    for path in files:
        content = path.read_bytes() + str(path.relative_to(folder)).encode()
        hits += [f"{path.relative_to(folder)}: {p!r}" for p in patterns if p in content][:1]
    return hits
