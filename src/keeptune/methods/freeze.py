"""Freeze the bottom layers, the embeddings, or whatever is named.

Paper: Zheng et al. 2025, Spurious forgetting in continual learning of language models,
    https://arxiv.org/abs/2501.13453
Equation: w ← w for every weight of the lowest `layers` layers, of the embeddings, and of `patterns`
Changes: begin_task, end_task
Cost: less than plain: no gradients and no optimizer state of what is frozen, and no backward
    through it. With `cache`, on disk at most `cache_gb` GB for each process in the folder for
    temporary files (TMPDIR), 2 bytes · hidden size · tokens; the first epoch passes each row
    through the frozen layers alone, later ones not at all.
Use when: the model knows what the task needs and only has to use it, and training must be cheap.
    Under LoRA it means adapters on the top layers only.
Not when: the task brings new facts, which lower layers store; or, with `cache`, the run has one
    epoch: then nothing is used twice.
Differs from the paper: any share of the layers, not 3 to 7 of them; no early stop; the cache.
    It rounds what enters the trained layers to bfloat16. Frozen weights are those of every task, so
    that they keep the base model's values.
Status: contract tested
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from keeptune.errors import MethodError
from keeptune.method import Context, Method
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._isolate import (
    SETTLED,
    below,
    embeddings,
    freeze,
    give_free,
    layers,
    lowest,
    size,
)
from keeptune.methods._isolate.cache import BYTES, Store, keep_activations


class Freeze(Method):
    """Train the top of the model only."""

    layers: float = Field(
        0.5, ge=0, description="bottom layers that are frozen: a share below 1, else their number"
    )
    embeddings: bool = Field(True, description="freeze the embeddings, and a head tied to them")
    patterns: tuple[str, ...] = Field(
        (), description='names of further weights to freeze, as "*.lm_head.*" or "model.norm.*"'
    )
    cache: bool = Field(False, description="compute what the frozen layers give once for each row")
    cache_gb: float = Field(4.0, gt=0, description="most disk for the cache; rows beyond it wait")

    neutral: ClassVar[dict[str, Any]] = {"layers": 0.0, "embeddings": False, "patterns": ()}
    proof: ClassVar[str] = "frozen_share"
    active_from: ClassVar[int] = 0
    traits: ClassVar[frozenset[str]] = frozenset({"freeze"})

    _frozen: list[str] = PrivateAttr(default_factory=list)
    _store: Store | None = PrivateAttr(None)
    _detach: Callable[[], None] | None = PrivateAttr(None)

    def begin_task(self, ctx: Context) -> None:
        """Freeze, and stand ready to keep activations.

        Raises:
            MethodError: A pattern or number fits nothing, nothing is left to train, what `cache`
                needs is missing, or the weights are sharded.
        """
        if self.is_neutral():
            return
        refuse_shards(ctx, self.name(), SETTLED)
        before = size(ctx, list(ctx.trainable()))
        stack, blocks = layers(ctx.model, self.name())
        count = lowest(self.layers, len(blocks), "Freeze")
        self._frozen = freeze(ctx, self._names(ctx, stack, count), self.name())
        frozen = size(ctx, self._frozen)
        self._evidence.update(
            layers=count, frozen=frozen, trained=before - frozen, frozen_share=frozen / before
        )
        if self.cache:
            if not count:
                raise MethodError("Freeze.cache needs frozen layers: set layers above 0.")
            self._store = Store(int(self.cache_gb * 1e9))
            width, self._detach = keep_activations(ctx, blocks, count, self._store)
            tokens = sum(map(len, ctx.dataset["input_ids"]))
            room = self._store.limit / (tokens * width * BYTES)
            self._evidence["cached_share"] = min(1.0, room)

    def _names(self, ctx: Context, stack: str, count: int) -> list[str]:
        every = [name for name, _ in ctx.model.named_parameters()]
        start = below(stack, count)
        chosen = {name for name in every if name.startswith(start)}
        if self.embeddings:
            chosen |= embeddings(ctx.model, stack)
        for pattern in self.patterns:
            if not (found := {name for name in every if fnmatchcase(name, pattern)}):
                raise MethodError(
                    f"Freeze.patterns: no weight's name is like {pattern!r}. The names are as "
                    f"{every[0]!r}; * stands for any part of one."
                )
            chosen |= found
        return [name for name in every if name in chosen]

    def end_task(self, ctx: Context) -> None:
        """Train again what was trained before."""
        give_free(ctx, self._frozen)
        self._frozen = []
        if self._detach is not None and self._store is not None:
            self._detach()
            self._store.close()
            self._detach = self._store = None
