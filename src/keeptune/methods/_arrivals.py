"""A stream that is seen once, with rows from earlier in it, and from before it, in each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from keeptune.buffer import Buffer, Order
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.places import reservoir
from keeptune.rowstore import COLUMNS

Numbers = tuple[Order, Order]


def numbered(
    kept: int,
    new: int,
    seen: int,
    size: int,
    *,
    rows: int,
    ratio: float,
    places: np.random.Generator,
    draws: Callable[[int], np.random.Generator],
    repeats: bool = False,
) -> Iterator[Numbers]:
    """What each step learns: the numbers of rows of the stream, and of those that come back.

    A number below `kept` is that of a row which the reservoir holds before the stream begins;
    beyond, it is that of a row of the stream. A step draws from what the reservoir holds after all
    steps before it, so that nothing depends on the model, on threads or on where a run went on.

    Args:
        kept: Rows that the reservoir holds.
        new: Rows of the stream.
        seen: Rows that were shown to the reservoir so far.
        size: Rows that it holds at most.
        rows: In a step, both kinds together; at least one is of the stream.
        ratio: Rows that come back for each row of the stream.
        places: Decides which places of the reservoir the rows of the stream take.
        draws: From the number of a step to what decides its draw.
        repeats: Whether a row may come back more than once in one step.
    """
    share = ratio / (1 + ratio)
    held: Order = np.arange(kept)
    begin = step = 0
    while begin < new:
        due = min(round((step + 1) * rows * share) - round(step * rows * share), rows - 1)
        able = due if repeats and len(held) else min(due, len(held))
        old = draws(step).choice(held, able, replace=repeats) if able else held[:0]
        fresh = np.arange(begin, min(begin + rows - len(old), new))
        yield kept + fresh, old
        order = reservoir(len(held), len(fresh), seen + begin, size, places)
        held = np.concatenate([held, kept + fresh])[order]
        begin, step = begin + len(fresh), step + 1


def mixed(
    buffer: Buffer, ctx: Context, dataset: Dataset, ratio: float, *, repeats: bool
) -> tuple[Dataset, dict[str, Any]]:
    """A stream with rows that come back, in the order in which they are learned, and evidence.

    The buffer, a reservoir, stays as it is, so that a run which goes on inside the stream finds it
    so. Shown the task's rows with `ctx.random("reservoir")`, it will hold what the last step left.

    Raises:
        MethodError: A step has no room for a row of each kind.
    """
    if ratio and ctx.rows_in_step < 2:
        raise MethodError(
            "Online, the method 'replay' puts old rows beside new ones in each step, but a step "
            "has one row. Set trainer.per_device_train_batch_size to 2 or more."
        )
    assert buffer.size is not None
    kept, new = len(buffer), len(dataset)
    found = numbered(
        kept,
        new,
        buffer.seen,
        buffer.size,
        rows=ctx.rows_in_step,
        ratio=ratio,
        places=ctx.random("reservoir"),
        draws=lambda step: ctx.random("replay", step),
        repeats=repeats,
    )
    steps = list(found)
    old = np.concatenate([back for _, back in steps])
    of_earlier = old[old < kept]
    by_task = buffer.tasks(of_earlier)
    if len(old) > len(of_earlier):
        by_task[ctx.task] = by_task.get(ctx.task, 0) + len(old) - len(of_earlier)
    evidence = {
        "rows_replayed": len(old),
        "rows_by_task": by_task,
        "rows_repeated": len(old) - len(np.unique(old)),
        "rows_new": new,
        "rows_kept": kept,
        "bytes_on_disk": buffer.on_disk(),
        "rows_short": max(0, round(ratio * new) - len(old)),
    }
    # What comes back of what was kept before, each row once, in front of the stream's own.
    wanted = np.unique(of_earlier)
    dataset = dataset.select_columns(COLUMNS) if len(old) else dataset
    every = [buffer.rows(wanted.tolist(), dataset)] if len(wanted) else []
    if not len(old):
        return dataset, evidence
    order = np.concatenate([numbers for step in steps for numbers in step])
    at = np.where(order < kept, np.searchsorted(wanted, order), order - kept + len(wanted))
    return concatenate_datasets([*every, dataset]).select(at), evidence
