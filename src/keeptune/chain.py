"""Runs a list of methods as one, each verb of all of them in its turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor

from keeptune.errors import MethodError
from keeptune.method import Batch, Context, Ids, Method


def _rank_at_begin(method: Method) -> int:
    if method.traits & {"structure", "freeze"}:
        return 0 if "structure" in method.traits else 1
    # What answered may have put other weights into the model, and puts the trained ones back.
    return 3 if type(method).serve is Method.serve else 2


def _rank_at_end(method: Method) -> int:
    if "moves" in method.traits:
        return -1
    return 2 if "freeze" in method.traits else 1 if "isolation" in method.traits else 0


class Chain:
    """Runs methods as one, in the order written.

    `data` pipes left to right, terms of `loss` add, all other effects run in list order, but: what
    adds weights begins first, what freezes them next, and then what has a `serve` and may have to
    put the trained ones back, so that all others find what will be trained; what moves the weights
    when a task ends does so before the others look at them; frozen weights are given free after all
    others have ended the task; and what isolates tasks has the last word on gradients and weights.

    Args:
        methods: The strategy; empty is plain fine-tuning.

    Raises:
        MethodError: Two methods clash, or one is listed twice.
    """

    def __init__(self, methods: Sequence[Method] = ()) -> None:
        self.methods = list(methods)
        self._check_clashes()

    def _check_clashes(self) -> None:
        names = [m.name() for m in self.methods]
        for name in names:
            if names.count(name) > 1:
                raise MethodError(f"The method {name!r} is listed twice. Keep one of them.")
        for one in self.methods:
            for other in self.methods:
                if one is not other and (clash := one.excludes & other.traits):
                    raise MethodError(
                        f"The methods {one.name()!r} and {other.name()!r} cannot run together "
                        f"({', '.join(sorted(clash))}). Remove one of them."
                    )

    @property
    def name(self) -> str:
        """The strategy's name: "plain", or the methods' names joined by " + "."""
        return " + ".join(m.name() for m in self.methods) or "plain"

    @property
    def needs(self) -> frozenset[str]:
        """What the methods that are not neutral need."""
        return frozenset().union(*(m.needs for m in self.methods if not m.is_neutral()))

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def hold(self, effort: float) -> None:
        """Let every method that can be steered hold so many times as hard as it is set."""
        for method in self.methods:
            method._effort = effort

    def begin_task(self, ctx: Context) -> None:
        """Run every method's `begin_task`, with last task's evidence cleared."""
        for method in self.methods:
            method._evidence.clear()
        for method in sorted(self.methods, key=_rank_at_begin):
            method.begin_task(ctx)

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        """Pipe the rows through every method."""
        for method in self.methods:
            dataset = method.data(ctx, dataset)
        return dataset

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        """Sum of the methods' terms, or None when there is none."""
        total: Tensor | None = None
        for method in self.methods:
            if (term := method.loss(ctx, batch, outputs)) is not None:
                total = term if total is None else total + term
        return total

    def gradients(self, ctx: Context) -> None:
        """Let every method edit the gradients: first who only looks, last who isolates."""
        for method in self._in_order(ctx):
            method.gradients(ctx)

    def after_step(self, ctx: Context) -> None:
        """Let every method edit the weights: first who only looks, last who isolates."""
        for method in self._in_order(ctx):
            method.after_step(ctx)

    def _in_order(self, ctx: Context) -> list[Method]:
        return sorted(self.methods, key=lambda m: (not m.reads_the_step(ctx), _rank_at_end(m)))

    def end_task(self, ctx: Context) -> None:
        """Let every method learn from the task."""
        for method in sorted(self.methods, key=_rank_at_end):
            method.end_task(ctx)

    def serve(self, ctx: Context, task: str | None) -> None:
        """Set the model up to answer."""
        for method in self.methods:
            method.serve(ctx, task)

    @property
    def routes(self) -> bool:
        """Whether any method may choose tasks for questions."""
        return any(type(method).route is not Method.route for method in self.methods)

    def route(self, ctx: Context, prompts: Sequence[Ids]) -> list[str] | None:
        """What the first method that has an answer says."""
        answers = (method.route(ctx, prompts) for method in self.methods)
        return next((answer for answer in answers if answer is not None), None)

    def prompt(self, ctx: Context, ids: Ids, room: int) -> Ids:
        """Pipe a question through every method."""
        for method in self.methods:
            ids = method.prompt(ctx, ids, room)
        return ids
