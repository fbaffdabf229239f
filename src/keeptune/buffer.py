"""Which old rows are kept, and how they are drawn.

Rows are tokenised once and kept in about two bytes a token (`rowstore`), very many of them in files
(`kept`). What is kept and what is drawn depends on the rows, their order and the generator that is
given, on nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch import Tensor

from keeptune.errors import DataError
from keeptune.kept import BLOCK, Kept
from keeptune.method import State
from keeptune.places import even_shares, pick, reservoir
from keeptune.rowstore import COLUMNS, Rows, examples
from keeptune.selection import herd, spread

Policy = Literal["reservoir", "ring", "balanced", "herding", "surprise", "diversity"]
Unit = Literal["rows", "tokens"]
Order = NDArray[np.int64]
Values = NDArray[np.float32]
# From row numbers of a data set to what is kept besides: by name, an array [m, ...] for each row.
Extras = Callable[[Order], Mapping[str, Sequence[NDArray[Any]]]]


class Buffer:
    """Keeps at most `size` of all rows it was shown.

    "reservoir" keeps each row of all tasks with the same chance, so that a task has places by its
    size. The other policies share the places out evenly, among the classes of a classifier, among
    the tasks of a language model; what a small one cannot fill goes to the others. They differ in
    what is kept of each: "ring" its last rows, "balanced" rows at random, "herding" those whose
    mean feature is nearest to that of all, "surprise" those of the highest loss, "diversity" those
    nearest to the centres of clusters.

    Args:
        size: Rows kept over all tasks; None keeps every row.
        policy: Which rows are kept.
    """

    def __init__(self, size: int | None, policy: Policy = "reservoir") -> None:
        assert policy in get_args(Policy)
        self.size = size
        self.policy = policy
        self.seen = 0
        self._rows = Kept()
        self._tasks: NDArray[np.unsignedinteger] = np.empty(0, np.uint8)
        self._names: list[str] = []
        self._ranks: Values = np.empty(0, np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def counts(self) -> dict[str, int]:
        """Rows kept of each task."""
        return self.tasks(np.arange(len(self)))

    def tasks(self, positions: list[int] | Order) -> dict[str, int]:
        """How many of these rows each task gave."""
        found = np.bincount(self._tasks[positions], minlength=len(self._names))
        return {name: int(n) for name, n in zip(self._names, found, strict=True) if n}

    def owners(self, positions: list[int] | Order) -> list[str]:
        """The task that gave each of these rows."""
        return [self._names[number] for number in self._tasks[positions].tolist()]

    def is_of(self, task: str) -> NDArray[np.bool_]:
        """Whether each row is of a task, [rows]."""
        return np.asarray(self._tasks == self._names.index(task))

    def tokens(self, positions: list[int]) -> int:
        """Tokens of these rows together."""
        return int(self._rows.lengths(np.asarray(positions, np.int64)).sum())

    # -- keeping ------------------------------------------------------------------------------

    def add(
        self,
        dataset: Dataset,
        task: str,
        random: np.random.Generator,
        values: Values | None = None,
        extras: Extras | None = None,
        folder: Path | None = None,
    ) -> None:
        """Show every row of a task to the buffer.

        Args:
            dataset: Tokenised rows.
            task: Whose they are.
            random: Decides what is left to chance.
            values: What the policy goes by: [n] losses for "surprise", [n, d] features for
                "herding" and "diversity"; else None.
            extras: Gives what is kept of a row besides, always or never for one buffer. It is
                called with the row numbers, ascending, of new rows that are kept, for 8192 of
                them at a time, and returns for every name one array [m, ...] for each of these
                rows, where m may differ from row to row, the other axes and the type may not.
            folder: Where files may be made (`ctx.folder`); None keeps all in memory.

        Raises:
            DataError: The rows are packed, so that none can be kept alone.
        """
        if "seq_lengths" in dataset.column_names:
            raise DataError(
                f"The rows of task {task!r} are packed, several in one, and cannot be kept for "
                "later tasks. Leave `packing` out of the trainer's settings."
            )
        new = len(dataset)
        if task not in self._names:
            self._names.append(task)
        number = self._names.index(task)
        if self.size is None or self.policy == "reservoir":
            order = reservoir(len(self), new, self.seen, self.size, random)
        else:
            order, ranks = self._evenly(dataset, number, random, values)
            self._ranks = ranks[order]
        self._replace(order, dataset, number, extras, folder)
        self.seen += new

    def _replace(
        self,
        order: Order,
        dataset: Dataset,
        number: int,
        extras: Extras | None,
        folder: Path | None,
    ) -> None:
        """Keep these: a number is a place's, or beyond them that of a row of the data set."""
        old = len(self)
        is_new = order >= old
        new = np.sort(order[is_new]) - old
        table = dataset.select_columns(COLUMNS).with_format("arrow")

        def parts() -> Iterator[Rows]:
            for begin in range(0, len(new), BLOCK):
                part = new[begin : begin + BLOCK]
                first, last = int(part[0]), int(part[-1])
                is_whole = last - first == len(part) - 1
                rows = Rows.of(table[range(first, last + 1) if is_whole else part.tolist()])
                yield rows if extras is None else rows.with_extras(extras(part))

        place = order.copy()
        place[is_new] = old + np.searchsorted(new, order[is_new] - old)
        self._rows.replace(place, parts(), folder)
        tasks = np.concatenate([self._tasks, np.full(len(new), number)])
        self._tasks = tasks[place].astype(np.min_scalar_type(len(self._names)))

    def delete(self, positions: list[int] | Order, folder: Path | None = None) -> None:
        """Let go of these rows; nothing of them is left, and the others stay as they are.

        A reservoir goes on as if their places were empty: all other rows, those that came and those
        that will, are kept with the chance that they would have had.

        Args:
            positions: Without repeats.
            folder: Where files may be made, needed when rows are in files.
        """
        at = np.asarray(positions, np.int64)
        self._rows.delete(at, folder)
        self._tasks = np.delete(self._tasks, at)
        if len(self._ranks):
            self._ranks = np.delete(self._ranks, at)

    def _evenly(
        self,
        dataset: Dataset,
        number: int,
        random: np.random.Generator,
        values: Values | None,
    ) -> tuple[Order, Values]:
        """What is kept when every group has as many places, the best ranks of each.

        Returns:
            Numbers as for `_replace`, and the ranks of all kept and all new rows.
        """
        old, new = len(self), len(dataset)
        groups = self._groups(dataset, number)
        members, sizes = np.unique(groups, return_counts=True)
        shares = dict(zip(members.tolist(), even_shares(sizes, self.size or 0), strict=True))
        ranks = np.concatenate([self._ranks, np.empty(new, np.float32)])
        for group in np.unique(groups[old:]).tolist():
            (own,) = np.nonzero(groups[old:] == group)
            share = min(shares[group], len(own))
            ranks[old + own] = self._ranked(own, share, random, values)
        kept = []
        for group in members.tolist():
            (own,) = np.nonzero(groups == group)
            # Of equal ranks the newest are kept, which is all that a ring asks for.
            best = np.lexsort((-own, -ranks[own]))
            kept.append(own[best[: shares[group]]])
        return np.sort(np.concatenate([np.empty(0, np.int64), *kept])), ranks

    def _groups(self, dataset: Dataset, number: int) -> Order:
        """The class of each kept and each new row of a classifier, or its task."""
        labels = dataset.with_format("numpy")["labels"] if len(dataset) else []
        classes = self._rows.classes() if len(self) else np.empty(0, np.int64)
        if classes is not None and len(labels) and np.ndim(labels[0]) == 0:
            return np.concatenate([classes, np.asarray(labels[:], np.int64)])
        return np.concatenate([self._tasks, np.full(len(dataset), number)]).astype(np.int64)

    def _ranked(
        self, own: Order, share: int, random: np.random.Generator, values: Values | None
    ) -> Values:
        """Ranks of a group's new rows, the highest kept longest.

        Args:
            own: The rows' numbers in the task.
            share: How many can be kept at most.
            random: As for `add`.
            values: As for `add`.
        """
        if self.policy == "ring":
            return np.zeros(len(own), np.float32)
        if self.policy == "balanced":
            return random.random(len(own), np.float32)
        assert values is not None, f"{self.policy} goes by values"
        if self.policy == "surprise":
            return values[own]
        features = values[own]
        chosen = (
            herd(features, share) if self.policy == "herding" else spread(features, share, random)
        )
        ranks = np.full(len(own), -np.inf, np.float32)
        ranks[chosen] = -np.arange(share)
        return ranks

    # -- drawing ------------------------------------------------------------------------------

    def draw(
        self,
        amount: int,
        random: np.random.Generator,
        *,
        unit: Unit = "rows",
        weights: Mapping[str, float] | None = None,
        repeats: bool = False,
    ) -> list[int]:
        """Positions of rows drawn at random.

        Args:
            amount: How many; of tokens, as many rows as reach it.
            random: Decides which.
            unit: What `amount` counts.
            weights: How likely a row of a task is drawn; 1 for tasks not named, 0 for never.
            repeats: Each draw is from all rows, so that one may come twice. Without, there are
                fewer when fewer are kept.
        """
        chances = self._chances(weights or {})
        able = len(self) if chances is None else int(np.count_nonzero(chances))
        if not able or amount <= 0:
            return []
        most = amount
        if unit == "tokens":
            most = -(-amount // max(1, int(self._rows.lengths().min()))) if repeats else able
        picked = pick(most, chances, able, random, repeats=repeats)
        if unit == "tokens":
            tokens = self._rows.lengths(picked)
            before = np.cumsum(tokens) - tokens
            picked = picked[before < amount]
        positions: list[int] = picked.tolist()
        return positions

    def _chances(self, weights: Mapping[str, float]) -> NDArray[np.float64] | None:
        """Relative chance of every row, or None where all are the same."""
        if not weights:
            return None
        by_task = np.array([weights.get(name, 1.0) for name in self._names])
        return None if (by_task == 1).all() else by_task[self._tasks]

    # -- giving -------------------------------------------------------------------------------

    def beside(self, dataset: Dataset, positions: list[int]) -> Dataset:
        """A task's rows followed by the kept ones at these positions; both columns, no others."""
        dataset = dataset.select_columns(COLUMNS)
        return concatenate_datasets([dataset, self.rows(positions, dataset)])

    def rows(self, positions: list[int], like: Dataset) -> Dataset:
        """The rows at these positions, with the types of `like`."""
        return self._rows.take(np.asarray(positions, np.int64)).dataset(like)

    def examples(self, positions: list[int]) -> list[dict[str, Any]]:
        """The rows at these positions as `ctx.batch` takes them; for a few, quicker than `rows`."""
        return examples(self._rows.each(positions)) if positions else []

    def extras(self, positions: list[int]) -> dict[str, NDArray[Any]]:
        """What is kept of these rows besides: by name, one row's values after another's."""
        parts = [rows.besides(row) for rows, row in self._rows.each(positions)]
        names = parts[0] if parts else {}
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def state(self) -> State:
        """The buffer: all in tensors and files, so that it can be found in any method's state."""
        about = {"seen": self.seen, "names": self._names, "kind": self._rows.kind}
        arrays = self._rows.arrays() | {"tasks": self._tasks, "ranks": self._ranks}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8).copy()
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return State(tensors, files=self._rows.files())

    def restore(self, state: State, folder: Path | None = None) -> None:
        """Take back what `state` gave.

        Args:
            state: Further tensors in it are passed over.
            folder: Where files may be made (`ctx.folder`).
        """
        arrays = {name: tensor.numpy() for name, tensor in self.tensors_of(state).items()}
        about = json.loads(arrays["about"].tobytes())
        self.seen, self._names = about["seen"], about["names"]
        self._tasks, self._ranks = arrays["tasks"], arrays["ranks"]
        self._rows = Kept.restored(arrays, about["kind"], state.files, folder)

    @staticmethod
    def tensors_of(state: State) -> dict[str, Tensor]:
        """Of a method's state what a buffer gave."""
        own = ("about", "at", "tasks", "ranks")
        return {n: t for n, t in state.tensors.items() if n in own or n.startswith("rows/")}

    @property
    def has_dead(self) -> bool:
        """Whether files still hold rows that are kept no longer."""
        return self._rows.has_dead

    def nbytes(self) -> int:
        """Bytes of the kept rows and of what is known of them, in memory and in files."""
        return sum(t.nbytes for t in self.state().tensors.values()) + self._rows.on_disk

    def on_disk(self) -> int:
        """Bytes of them in files."""
        return self._rows.on_disk


def buffers_in(state: State) -> list[str]:
    """Under which names a method's state has buffers; "" where it is one itself."""
    return [
        name.removesuffix("rows/labels").removesuffix("/")
        for name in state.tensors
        if name == "rows/labels" or name.endswith("/rows/labels")
    ]
