"""What a model said, kept in few bytes: of each answer the k likeliest entries and the rest.

At k = 64 and a vocabulary of at most 65,536 entries an answer takes 260 bytes: ids of 2 bytes, log
probabilities of 2, and the probability of all other entries. All 49,152 logits of SmolLM2 would
take 196,608.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from keeptune.answers import Answers
from keeptune.errors import DataError
from keeptune.method import IGNORED, Batch, Context
from keeptune.methods._anchor.undisturbed import undisturbed
from keeptune.methods._distil.terms import TopK
from keeptune.processes import reshard
from keeptune.rowstore import COLUMNS

BATCH = 8  # rows in one forward
KEY = 16  # bytes that stand for a row
Numbers = NDArray[Any]


@dataclass(frozen=True)
class Recorded:
    """What a model said at N answers.

    Attributes:
        ids: uint16 or int32 [N, k], the likeliest entries, in no order.
        log_q: float16 [N, k], their log probabilities, softened by the temperature.
        rest: float32 [N], the probability of all other entries.
    """

    ids: Numbers
    log_q: Numbers
    rest: Numbers

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, Numbers]:
        """All three by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def term(self, temperature: float, device: torch.device) -> TopK:
        """As what a student is held to.

        Args:
            temperature: The one it was recorded at.
            device: Where the student is.
        """
        q = torch.from_numpy(self.log_q).to(device, torch.float32).exp_()
        rest = torch.from_numpy(self.rest).to(device)
        # Rounded to 16 bits they do not sum to 1 any more.
        q *= ((1 - rest) / q.sum(1).clamp_min(torch.finfo(q.dtype).tiny))[:, None]
        return TopK(torch.from_numpy(self.ids.astype(np.int64)).to(device), q, rest, temperature)

    def take(self, positions: NDArray[np.int64]) -> Recorded:
        """These answers, in that order; of −1 nothing is known: all is in the rest."""
        taken = Recorded(*(array[positions] for array in self.arrays().values()))
        taken.log_q[positions < 0] = -np.inf
        taken.rest[positions < 0] = 1
        return taken

    @classmethod
    def joined(cls, parts: Sequence[Recorded]) -> Recorded:
        """One after another."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


@torch.no_grad()
def record(answers: Answers, top_k: int, temperature: float) -> Recorded:
    """Keep what a model says.

    Args:
        answers: Of the model.
        top_k: Entries that are kept, at most.
        temperature: Above 0; logits are divided by it.
    """
    k = min(top_k, answers.vocabulary)
    device = answers.values.device
    ids = torch.empty(len(answers), k, dtype=torch.int32, device=device)
    log_q = torch.empty(len(answers), k, dtype=torch.float16, device=device)
    rest = torch.empty(len(answers), dtype=torch.float32, device=device)
    for span in answers.chunks(2):
        logits = answers.logits(span).div_(temperature)
        values, ids[span] = logits.topk(k, sorted=False)
        values -= logits.logsumexp(1, keepdim=True)
        log_q[span] = values
        rest[span] = (1 - values.exp().sum(1)).clamp_min(0)
    small = np.uint16 if answers.vocabulary <= 65_536 else np.int32
    return Recorded(ids.cpu().numpy().astype(small), log_q.cpu().numpy(), rest.cpu().numpy())


def record_rows(ctx: Context, rows: Dataset, top_k: int, temperature: float) -> list[Recorded]:
    """What the model says now at the answers of each row, without dropout; nothing is disturbed."""
    found: dict[int, Recorded] = {}
    with undisturbed(ctx, {}), torch.no_grad():
        for numbers, batch in batches(ctx, rows):
            kept = record(ctx.read(batch), top_k, temperature)
            ends = np.cumsum(answers_of(batch))
            for number, end, length in zip(numbers, ends, answers_of(batch), strict=True):
                found[number] = kept.take(np.arange(end - length, end))
    reshard(ctx.model)
    return [found[number] for number in range(len(rows))]


def batches(ctx: Context, rows: Dataset) -> Iterator[tuple[list[int], Batch]]:
    """All rows, those of like length side by side, with their numbers."""
    rows = rows.select_columns(COLUMNS)
    order = np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable").tolist()
    for begin in range(0, len(order), BATCH):
        numbers = order[begin : begin + BATCH]
        yield numbers, ctx.batch([rows[number] for number in numbers])


def answers_of(batch: Batch) -> list[int]:
    """How many answers each row of a batch has."""
    labels = batch["labels"]
    if labels.dim() == 1:
        return [1] * len(labels)
    counts: list[int] = (labels[:, 1:] != IGNORED).sum(1).tolist()
    return counts


class Store:
    """What a model said at the answers of many rows, found again by the rows themselves.

    Batches do not say which rows they are made of, and need not: the same tokens had the same
    answers.
    """

    def __init__(self) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}
        self._kept: Recorded | None = None

    def __len__(self) -> int:
        return len(self._places)

    @classmethod
    def of(cls, ctx: Context, rows: Dataset, top_k: int, temperature: float) -> Store:
        """Let the model of now go through these rows.

        Raises:
            DataError: The rows are packed, so that none can be found again.
        """
        if "seq_lengths" in rows.column_names:
            raise DataError(
                f"The rows of task {ctx.task!r} are packed, several in one, so what the model "
                "said to each cannot be found again. Leave `packing` out of the trainer's settings."
            )
        store, begin = cls(), 0
        parts = record_rows(ctx, rows, top_k, temperature)
        for row, part in zip(rows.select_columns(COLUMNS), parts, strict=True):
            store._places[_key(row["input_ids"], row["labels"])] = (begin, begin + len(part))
            begin += len(part)
        store._kept = Recorded.joined(parts)
        return store

    def find(self, batch: Batch) -> tuple[Recorded, Tensor]:
        """What is kept of a batch's answers.

        Returns:
            Of N answers, and bool [N]: of which anything is kept.
        """
        assert self._kept is not None
        places: list[NDArray[np.int64]] = []
        ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
        there = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).cpu().bool()
        for i, count in enumerate(answers_of(batch)):
            own = labels[i] if labels.dim() == 1 else labels[i][there[i]]
            place = self._places.get(_key(ids[i][there[i]].tolist(), own.tolist()))
            places.append(np.full(count, -1) if place is None else np.arange(*place))
        positions = np.concatenate(places)
        known = torch.from_numpy(positions >= 0).to(batch["labels"].device)
        return self._kept.take(positions), known

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for a method's state; nothing when nothing is kept."""
        if self._kept is None:
            return {}
        keys = np.frombuffer(b"".join(self._places), np.uint8).reshape(-1, KEY)
        arrays = self._kept.arrays() | {"keys": keys, "places": np.array([*self._places.values()])}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Store:
        """What `tensors` gave."""
        store = cls()
        if tensors:
            arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            keys, places = arrays.pop("keys"), arrays.pop("places").tolist()
            pairs = zip(keys, places, strict=True)
            store._places = {key.tobytes(): (begin, end) for key, (begin, end) in pairs}
            store._kept = Recorded(**arrays)
        return store

    @property
    def nbytes(self) -> int:
        """Of each answer what is kept of it, of each row 32 bytes."""
        return len(self) * (KEY + 16) + (self._kept.nbytes if self._kept else 0)


def _key(ids: Sequence[int], labels: Sequence[int] | int) -> bytes:
    parts = np.asarray(ids, np.int64).tobytes(), np.asarray(labels, np.int64).tobytes()
    return blake2b(b"".join(parts), digest_size=KEY).digest()
