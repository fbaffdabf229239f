"""What methods share that give a model one more small module for each task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import PrivateAttr
from torch import nn

from keeptune.method import ADDED, Context, Method, State
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._isolate.frozen import SETTLED


class Parts(nn.Module):
    """The modules of all tasks, and which of them answer; a part of the model they stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.answering: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def chosen(self) -> list[Any]:
        """Those that answer, in their order."""
        return [self.parts[number] for number in self.answering]

    def attach(self, model: nn.Module) -> Self:
        """Become a part of the model, saved with it."""
        model.add_module(ADDED, self)
        return self


class Grown(Method):
    """Trains the newest module; the model and all earlier modules stay."""

    active_from: ClassVar[int] = 0
    traits: ClassVar[frozenset[str]] = frozenset({"isolation", "structure"})
    excludes: ClassVar[frozenset[str]] = frozenset({"anchor", "freeze", "restart", "structure"})
    served: ClassVar[Literal["one model", "per task", "keeptune"]] = "keeptune"

    _numbers: dict[str, int] = PrivateAttr(default_factory=dict)

    @abstractmethod
    def _attached(self, ctx: Context) -> Parts:
        """No module yet, but all it takes for those of this method to be heard."""

    @abstractmethod
    def _part(self, ctx: Context) -> nn.Module:
        """A new module, from the seed and the task alone."""

    @abstractmethod
    def _answering(self, number: int | None) -> list[int]:
        """Which modules answer for a task by its number; None when it is not known."""

    def _parts(self, ctx: Context) -> Parts:
        found = getattr(ctx.model, ADDED, None) or self._attached(ctx)
        assert isinstance(found, Parts)
        return found

    def _add(self, ctx: Context) -> nn.Module:
        seed, devices = int(ctx.random("part").integers(2**31)), []
        if ctx.device.type == "cuda":
            devices = [ctx.device]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            part = self._part(ctx).to(ctx.device)
        self._parts(ctx).parts.append(part)
        return part

    def begin_task(self, ctx: Context) -> None:
        """Freeze all there is, and add a module."""
        refuse_shards(ctx, self.name(), SETTLED)
        parts = self._parts(ctx)
        ctx.model.requires_grad_(False)
        self._add(ctx).requires_grad_(True)
        self._numbers[ctx.task] = len(self._numbers)
        parts.answering = self._answering(self._numbers[ctx.task])

    def serve(self, ctx: Context, task: str | None) -> None:
        """The task's own answers; before any task those of the model itself."""
        number = self._numbers.get(task or "")
        self._parts(ctx).answering = self._answering(number) if self._numbers else []

    def state(self) -> State:
        """Which module belongs to which task; their weights are the model's."""
        return State(values={"numbers": self._numbers})

    def restore(self, ctx: Context, state: State) -> None:
        """Add the modules again; their weights are loaded after this."""
        self._numbers = dict(state.values["numbers"])
        for _ in range(len(self._numbers) - len(self._parts(ctx).parts)):
            self._add(ctx).requires_grad_(False)
