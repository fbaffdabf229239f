"""`privacy: strict`: nothing of a training row stays in the run folder once its task has ended.

Methods that keep old rows are refused, and results are kept without any text. What a method writes
down while a task is learned (`pseudo_replay`, `self_rewrite`) goes when the task ends.

What this does not promise: weights may hold what they were trained on, and a model may write it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from keeptune.records import Example

if TYPE_CHECKING:
    from keeptune.method import Method

Privacy = Literal["open", "strict"]


def refusal(methods: Iterable[Method], privacy: Privacy) -> str | None:
    """Why a strategy may not run, in one sentence; None where it may."""
    keeping = [repr(m.name()) for m in methods if "buffer" in m.traits]
    if privacy != "strict" or not keeping:
        return None
    return (
        f"`privacy: strict` does not allow {' and '.join(keeping)}, which would keep training rows "
        "for later tasks. Use pseudo_replay, lwf or ewc instead, or set `privacy: open`."
    )


def without_text(example: Example) -> Example:
    """A result without what was asked, expected and answered: any of it may be a training row's."""
    return example.model_copy(update={"prompt": "", "expected": "", "answer": ""})
