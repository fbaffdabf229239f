"""Which old rows are kept, and how they are drawn.

Rows are tokenised once and kept as int32 arrays: 4 bytes a token for the ids, 4 for the labels.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from keeptune.errors import DataError
from keeptune.method import State

COLUMNS = ["input_ids", "labels"]


class Buffer:
    """Keeps at most `size` of all rows it was shown, each with the same chance.

    Reservoir sampling (Vitter 1985, algorithm R): after n rows each is kept with probability
    min(1, size / n), whatever the order of the tasks.

    Args:
        size: Rows kept over all tasks; None keeps every row.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.seen = 0
        self._ids: list[NDArray[np.int32]] = []
        self._labels: list[NDArray[np.int32]] = []
        self._tasks: list[str] = []

    def __len__(self) -> int:
        return len(self._ids)

    def counts(self) -> dict[str, int]:
        """Rows kept of each task."""
        return dict(Counter(self._tasks))

    def add(self, dataset: Dataset, task: str, random: np.random.Generator) -> None:
        """Show every row of a task to the reservoir.

        Raises:
            DataError: The rows are packed, so that none can be kept alone.
        """
        if "seq_lengths" in dataset.column_names:
            raise DataError(
                f"The rows of task {task!r} are packed, several in one, and cannot be kept for "
                "later tasks. Leave `packing` out of the trainer's settings."
            )
        for row in dataset.select_columns(COLUMNS):
            ids = np.asarray(row["input_ids"], dtype=np.int32)
            labels = np.atleast_1d(np.asarray(row["labels"], dtype=np.int32))
            self.seen += 1
            if self.size is None or len(self) < self.size:
                self._ids.append(ids)
                self._labels.append(labels)
                self._tasks.append(task)
            elif (slot := int(random.integers(self.seen))) < self.size:
                self._ids[slot], self._labels[slot], self._tasks[slot] = ids, labels, task

    def draw(self, count: int, random: np.random.Generator) -> list[int]:
        """Positions of `count` rows drawn without repeats; fewer when fewer are kept."""
        return [int(i) for i in random.permutation(len(self))[:count]]

    def tasks(self, positions: list[int]) -> dict[str, int]:
        """How many of these rows each task gave."""
        return dict(Counter(self._tasks[i] for i in positions))

    def beside(self, dataset: Dataset, positions: list[int]) -> Dataset:
        """A task's rows followed by the kept ones at these positions; both columns, no others."""
        dataset = dataset.select_columns(COLUMNS)
        return concatenate_datasets([dataset, self.rows(positions, dataset)])

    def rows(self, positions: list[int], like: Dataset) -> Dataset:
        """The rows at these positions, with the types of `like`."""
        scalar = not hasattr(like[0]["labels"], "__len__") if len(like) else False
        labels = [
            int(self._labels[i][0]) if scalar else self._labels[i].tolist() for i in positions
        ]
        columns = {"input_ids": [self._ids[i].tolist() for i in positions], "labels": labels}
        return Dataset.from_dict(columns, features=like.select_columns(COLUMNS).features)

    def state(self) -> State:
        """The buffer as four arrays and the task names."""
        empty: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        tensors = {
            "ids": torch.from_numpy(np.concatenate(self._ids or empty)),
            "labels": torch.from_numpy(np.concatenate(self._labels or empty)),
            "id_lengths": torch.tensor([len(x) for x in self._ids], dtype=torch.int32),
            "label_lengths": torch.tensor([len(x) for x in self._labels], dtype=torch.int32),
        }
        return State(tensors, {"seen": self.seen, "tasks": self._tasks})

    def restore(self, state: State) -> None:
        """Take back what `state` gave."""
        self.seen = int(state.values["seen"])
        self._tasks = list(state.values["tasks"])
        self._ids = _split(state.tensors["ids"], state.tensors["id_lengths"])
        self._labels = _split(state.tensors["labels"], state.tensors["label_lengths"])

    def nbytes(self) -> int:
        """Bytes of the kept rows, lengths included."""
        values = sum(a.nbytes + b.nbytes for a, b in zip(self._ids, self._labels, strict=True))
        return values + 8 * len(self)


def _split(flat: torch.Tensor, lengths: torch.Tensor) -> list[NDArray[np.int32]]:
    ends = np.cumsum(lengths.numpy())[:-1]
    return [np.array(part) for part in np.split(flat.numpy(), ends)] if len(lengths) else []
