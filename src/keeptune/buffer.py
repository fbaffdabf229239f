"""Which old rows are kept, and how they are drawn.

Rows are tokenised once and kept in about two bytes a token (`rowstore`). What is kept and what is
drawn depends on the rows, their order and the generator that is given, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from keeptune.errors import DataError
from keeptune.method import State
from keeptune.rowstore import COLUMNS, Rows, joined
from keeptune.selection import herd, spread

# Up to so many positions are shuffled to draw some, as all were in the runs that are published; of
# more, a few are found without looking at the others.
SHUFFLED = 10_000
PART = 8192  # new rows handled at a time
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
        self._rows = Rows.none()
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

    def tokens(self, positions: list[int]) -> int:
        """Tokens of these rows together."""
        return int(self._rows.tokens(np.asarray(positions, np.int64)).sum())

    # -- keeping ------------------------------------------------------------------------------

    def add(
        self,
        dataset: Dataset,
        task: str,
        random: np.random.Generator,
        values: Values | None = None,
        extras: Extras | None = None,
    ) -> None:
        """Show every row of a task to the buffer.

        Args:
            dataset: Tokenised rows.
            task: Whose they are.
            random: Decides what is left to chance.
            values: What the policy goes by: [n] losses for "surprise", [n, d] features for
                "herding" and "diversity"; else None.
            extras: Gives what is kept of a row besides, always or never for one buffer. It is
                called with the row numbers, ascending, of new rows that are kept, for `PART` of
                them at a time, and returns for every name one array [m, ...] for each of these
                rows, where m may differ from row to row, the other axes and the type may not.

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
        self._replace(order, dataset, number, extras)
        self.seen += new

    def _replace(self, order: Order, dataset: Dataset, number: int, extras: Extras | None) -> None:
        """Keep these: a number is a place's, or beyond them that of a row of the data set."""
        old = len(self)
        is_new = order >= old
        new = np.sort(order[is_new]) - old
        parts = []
        for begin in range(0, len(new), PART):
            part = new[begin : begin + PART]
            rows = Rows.of(dataset.select(part))
            parts.append(rows if extras is None else rows.with_extras(extras(part)))
        place = order.copy()
        place[is_new] = old + np.searchsorted(new, order[is_new] - old)
        small = np.min_scalar_type(len(self._names))
        tasks = np.concatenate([self._tasks, np.full(len(new), number)])
        self._rows = joined([self._rows, *parts]).take(place)
        self._tasks = tasks[place].astype(small)

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
            most = -(-amount // max(1, int(self._rows.ids.lengths.min()))) if repeats else able
        picked = self._pick(most, chances, able, random, repeats=repeats)
        if unit == "tokens":
            before = np.cumsum(self._rows.tokens(picked)) - self._rows.tokens(picked)
            picked = picked[before < amount]
        return [int(position) for position in picked]

    def _pick(
        self,
        count: int,
        chances: NDArray[np.float64] | None,
        able: int,
        random: np.random.Generator,
        *,
        repeats: bool,
    ) -> Order:
        if repeats:
            share = None if chances is None else chances / chances.sum()
            return random.choice(len(self), count, p=share)
        if chances is None and able <= SHUFFLED:
            return random.permutation(able)[:count]
        if chances is None:
            return random.choice(able, min(count, able), replace=False)
        # The first arrivals are a weighted draw without repeats (Efraimidis and Spirakis 2006).
        with np.errstate(divide="ignore"):
            arrivals = random.exponential(size=len(self)) / chances
        return np.argsort(arrivals, kind="stable")[: min(count, able)]

    def _chances(self, weights: Mapping[str, float]) -> NDArray[np.float64] | None:
        """Relative chance of every row, or None where all are the same."""
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

    def extras(self, positions: list[int]) -> dict[str, NDArray[Any]]:
        """What is kept of these rows besides: by name, one row's values after another's."""
        at = np.asarray(positions, np.int64)
        return {name: part.take(at).values for name, part in self._rows.extras.items()}

    def state(self) -> State:
        """The buffer as arrays, and the task names."""
        arrays = {f"rows/{name}": array for name, array in self._rows.arrays().items()}
        arrays |= {"tasks": self._tasks, "ranks": self._ranks}
        values = {"seen": self.seen, "names": list(self._names), "kind": self._rows.kind}
        return State({name: torch.from_numpy(array) for name, array in arrays.items()}, values)

    def restore(self, state: State) -> None:
        """Take back what `state` gave."""
        self.seen = int(state.values["seen"])
        self._names = list(state.values["names"])
        self._tasks, self._ranks = (state.tensors[name].numpy() for name in ("tasks", "ranks"))
        rows = {
            name.removeprefix("rows/"): tensor.numpy()
            for name, tensor in state.tensors.items()
            if name.startswith("rows/")
        }
        self._rows = Rows.from_arrays(rows, str(state.values["kind"]))

    def nbytes(self) -> int:
        """Bytes of the kept rows and of what is known of them."""
        return self._rows.nbytes + self._tasks.nbytes + self._ranks.nbytes


def reservoir(
    kept: int, new: int, seen: int, size: int | None, random: np.random.Generator
) -> Order:
    """Algorithm R (Vitter 1985): after n rows each is kept with probability min(1, size / n).

    Args:
        kept: Places that are taken.
        new: Rows that come now.
        seen: Rows that came before.
        size: All places; None for as many as there are rows.
        random: Its numbers decide which row takes which place.

    Returns:
        What each place then holds: the number of a place before, or `kept` + that of a new row.
    """
    size = kept + new if size is None else size
    free = min(size - kept, new)
    order = np.arange(kept + free)
    # The n-th row of all takes the place that it draws among n, if there is such a place.
    places = random.integers(np.arange(seen + free, seen + new) + 1)
    taken = places < size
    np.put(order, places[taken], kept + np.arange(free, new)[taken])  # the last one stays
    return order


def even_shares(sizes: NDArray[np.integer], places: int) -> list[int]:
    """Places shared out as evenly as can be, none getting more than it can fill.

    Args:
        sizes: What each could fill.
        places: How many there are.

    Returns:
        min(size, level) for each, the first ones one more where places are left over.
    """
    left, level = places, 0
    for above, size in zip(range(len(sizes), 0, -1), sorted(sizes.tolist()), strict=True):
        level = min(size, left // above)
        if level < size:
            break
        left -= size
    shares = np.minimum(sizes, level)
    (more,) = np.nonzero(sizes > level)
    shares[more[: places - int(shares.sum())]] += 1
    return [int(share) for share in shares]
