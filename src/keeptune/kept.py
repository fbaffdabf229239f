"""Very many rows, all but the newest in files.

Rows lie in blocks of `BLOCK`, each a file that is never changed; those that fill no block yet are
in memory. An index says which rows are alive, and in which order. Once more rows are dead than
alive, neighbours whose living rows fit into one block are joined, and every join leaves one block
fewer: so a row that is added costs at most one more copy, and files hold at most two rows for each
that is alive, and one block.

Without a folder for files all rows are in memory, one after another, and there is no index.
"""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keeptune import rowfiles
from keeptune.disk import link
from keeptune.rowstore import Rows, Whole, joined

BLOCK = 8192  # rows in a file


@dataclass(frozen=True)
class _Block:
    rows: Rows
    path: Path
    size: int  # bytes of the file

    @classmethod
    def read(cls, path: Path) -> _Block:
        return cls(rowfiles.read(path), path, path.stat().st_size)


class Kept:
    """Rows that come and go, each at a position."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._loose = Rows.none()
        # Where the row at each position lies: its number among those of all blocks and then of
        # those in memory. None where that is its position.
        self._at: NDArray[np.uint32] | None = None
        self._starts: Whole = np.zeros(1, np.int64)
        self._list()

    def __len__(self) -> int:
        return len(self._loose) if self._at is None else len(self._at)

    # -- looking ------------------------------------------------------------------------------

    def take(self, positions: Whole) -> Rows:
        """The rows at these positions, in that order."""
        if self._at is None:
            return self._loose.take(positions)
        numbers = self._at[positions].astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        bounds = np.searchsorted(numbers, [*self._starts, np.iinfo(np.int64).max])
        parts = [
            rows.take(numbers[begin:end] - start)
            for rows, start, begin, end in zip(
                self._parts, self._starts, bounds[:-1], bounds[1:], strict=True
            )
            if end > begin
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return joined(parts).take(back)

    def each(self, positions: Iterable[int]) -> list[tuple[Rows, int]]:
        """For each position the rows in which it lies, and where in them."""
        if self._at is None:
            return [(self._loose, position) for position in positions]
        parts, starts, found = self._parts, self._firsts, []
        for position in positions:
            number = self._at.item(position)
            part = bisect_right(starts, number) - 1
            found.append((parts[part], number - starts[part]))
        return found

    def lengths(self, positions: Whole | None = None) -> Whole:
        """Tokens of these rows, or of all."""
        if self._at is None:
            return self._loose.tokens(positions)
        every = np.concatenate([part.tokens() for part in self._parts])
        return every[self._at if positions is None else self._at[positions]]

    def classes(self) -> Whole | None:
        """The class of each row; None for rows of a language model, and where there are none."""
        parts = [part.classes() for part in self._parts if len(part)]
        if not parts or parts[0] is None:
            return None
        every = np.concatenate([part for part in parts if part is not None])
        return every if self._at is None else every[self._at]

    @property
    def on_disk(self) -> int:
        """Bytes of all files."""
        return sum(block.size for block in self._blocks)

    @property
    def has_dead(self) -> bool:
        """Whether files hold rows that are at no position."""
        return self._dead > 0

    @property
    def _dead(self) -> int:
        return int(self._starts[-1]) + len(self._loose) - len(self)

    # -- changing -----------------------------------------------------------------------------

    def replace(self, order: Whole, parts: Iterable[Rows], folder: Path | None) -> None:
        """Keep these rows, and no others.

        Args:
            order: What each position then holds: a position of now, or beyond those, that many
                rows further in `parts`.
            parts: New rows, all of which stay.
            folder: Where files may be made.
        """
        numbers, old = self._numbers(), len(self)
        is_new = order >= old
        kept = numbers[order[~is_new]]
        files = int(self._starts[-1])
        is_loose = kept >= files
        loose = [self._loose.take(kept[is_loose] - files)]
        kept[is_loose] = files + np.arange(len(loose[0]))
        at = np.empty(len(order), np.int64)
        at[~is_new] = kept
        at[is_new] = files + len(loose[0]) + order[is_new] - old
        for part in parts:
            loose.append(part)
            while folder is not None and sum(map(len, loose)) >= BLOCK:
                full = joined(loose)
                self._append(full.take(np.arange(BLOCK)), folder)
                loose = [full.take(np.arange(BLOCK, len(full)))]
        self._loose = joined(loose)
        self._settle(at)
        if folder is not None and self._dead > len(self):
            self._tidy(folder, every=False)

    def delete(self, positions: Whole, folder: Path | None) -> None:
        """Let go of these rows, and of all that are dead: nothing of them is in any file left.

        Args:
            positions: Without repeats.
            folder: Where files may be made.
        """
        order = np.delete(np.arange(len(self)), positions)
        self.replace(order, (), folder)
        if self._blocks:
            assert folder is not None, "rows in files can only be deleted where files can be made"
            self._tidy(folder, every=True)

    def _numbers(self) -> Whole:
        return np.arange(len(self)) if self._at is None else self._at.astype(np.int64)

    def _settle(self, at: Whole) -> None:
        if self._blocks:
            self._at = at.astype(np.uint32)
        else:
            self._loose, self._at = self._loose.take(at), None
        self._list()

    def _list(self) -> None:
        self._parts = [*(block.rows for block in self._blocks), self._loose]
        self._firsts = self._starts.tolist()

    def _append(self, rows: Rows, folder: Path) -> None:
        self._blocks.append(_written(rows, folder))
        self._starts = _starts([block.rows for block in self._blocks])

    def _tidy(self, folder: Path, *, every: bool) -> None:
        """Join blocks whose living rows fit into one; with `every`, leave no dead row anywhere."""
        if not self._blocks:
            return
        at, files = self._numbers(), int(self._starts[-1])
        alive = np.zeros(files, bool)
        alive[at[at < files]] = True
        spans = list(zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True))
        groups = _groups([int(alive[a:b].sum()) for a, b in spans])
        moved = np.arange(files)
        blocks: list[_Block] = []
        begin = 0
        for group in groups:
            first, last = spans[group[0]][0], spans[group[-1]][1]
            living = np.flatnonzero(alive[first:last]) + first
            if len(group) == 1 and len(living) and not (every and len(living) < last - first):
                block = self._blocks[group[0]]
                moved[first:last] = begin + np.arange(last - first)
            elif len(living):
                rows = [
                    self._blocks[i].rows.take(np.flatnonzero(alive[slice(*spans[i])]))
                    for i in group
                ]
                block = _written(joined(rows), folder)
                moved[living] = begin + np.arange(len(living))
            else:
                continue
            blocks.append(block)
            begin += len(block.rows)
        left = {block.path for block in self._blocks} - {block.path for block in blocks}
        self._blocks, self._starts = blocks, _starts([block.rows for block in blocks])
        in_file = at < files
        at[in_file] = moved[at[in_file]]
        at[~in_file] += begin - files
        self._settle(at)
        for path in left:
            # A file of a saved state is not this buffer's own.
            if path.parent == folder:
                path.unlink()

    # -- saving -------------------------------------------------------------------------------

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is in memory."""
        rows = {f"rows/{name}": array for name, array in self._loose.arrays().items()}
        return rows if self._at is None else rows | {"at": self._at}

    def files(self) -> dict[str, Path]:
        """The files, which are never changed."""
        return {f"rows-{i:05d}.arrow": block.path for i, block in enumerate(self._blocks)}

    @property
    def kind(self) -> str:
        """Of the rows in memory: what their labels are."""
        return self._loose.kind

    @classmethod
    def restored(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        kind: str,
        files: Mapping[str, Path],
        folder: Path | None,
    ) -> Kept:
        """What `arrays`, `kind` and `files` gave; nothing of a file is read.

        Args:
            arrays: As they were.
            kind: As it was.
            files: As they were; none is changed or removed.
            folder: Where files may be made.
        """
        kept = cls()
        rows = {n.removeprefix("rows/"): a for n, a in arrays.items() if n.startswith("rows/")}
        kept._loose, kept._at = Rows.from_arrays(rows, kind), arrays.get("at")
        for _, file in sorted(files.items()):
            path = file
            if folder is not None:
                path = _new_name(folder)
                link(file, path)
            kept._blocks.append(_Block.read(path))
        kept._starts = _starts([block.rows for block in kept._blocks])
        kept._list()
        return kept


def _new_name(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{uuid.uuid4().hex}.arrow"


def _written(rows: Rows, folder: Path) -> _Block:
    path = _new_name(folder)
    rowfiles.write(path, rows)
    return _Block.read(path)


def _starts(parts: list[Rows]) -> Whole:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)


def _groups(living: list[int]) -> list[list[int]]:
    """Neighbours that fit into one block together."""
    groups: list[list[int]] = []
    rows = 0
    for number, count in enumerate(living):
        if not groups or rows + count > BLOCK:
            groups.append([])
            rows = 0
        groups[-1].append(number)
        rows += count
    return groups
