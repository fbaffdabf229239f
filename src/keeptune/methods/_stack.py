"""One LoRA adapter learns each task, on top of those before it: what `inc_lora` and `olora` share.

The trained adapter is always the model's first one, so that its weights keep their names, and a
classifier's head is one and the same for all tasks. When a new task begins, what it holds goes to a
frozen adapter of its own, and it starts again from A at random and B = 0.
"""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import ref

import torch
from peft.tuners.lora import LoraLayer
from pydantic import PrivateAttr

from keeptune.method import Context, Method, State
from keeptune.methods._adapters import FIRST, add_adapter, factors, refuse_biases, refuse_dora
from keeptune.methods._anchor.shards import refuse_shards


class Stacked(Method):
    """A model of the base and the sum of one adapter for each task, all but the last frozen."""

    proof: ClassVar[str] = "frozen_adapters"
    needs: ClassVar[frozenset[str]] = frozenset({"adapter"})
    traits: ClassVar[frozenset[str]] = frozenset({"structure"})
    excludes: ClassVar[frozenset[str]] = frozenset({"anchor", "restart", "structure"})

    _frozen: list[str] = PrivateAttr(default_factory=list)
    _learned: int = PrivateAttr(0)
    # Found once a task: to look for them in each step would take longer than what is done there.
    _refs: list[ref[Any]] = PrivateAttr(default_factory=list)

    def begin_task(self, ctx: Context) -> None:
        """Freeze what the last task learned, and start anew on top of it.

        Raises:
            MethodError: The adapters cannot be summed, or FSDP has sharded them.
        """
        refuse_dora(ctx, self.name(), "sums LoRA updates")
        refuse_biases(ctx, self.name())
        refuse_shards(ctx, self.name(), "adds weights to a model that FSDP has sharded")
        if self._learned > len(self._frozen):
            self._freeze(ctx)
        self._evidence["frozen_adapters"] = len(self._frozen)

    @torch.no_grad()
    def _freeze(self, ctx: Context) -> None:
        self._stack(ctx, [*self._frozen, f"task_{len(self._frozen):03d}"])
        trained = factors(ctx.model, FIRST)
        for name, factor in factors(ctx.model, self._frozen[-1]).items():
            factor.copy_(trained[name])
        devices = [ctx.device] if ctx.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(ctx.random("adapter").integers(2**31)))
            for layer in self._layers():
                layer.reset_lora_parameters(FIRST, True)

    def _stack(self, ctx: Context, names: list[str]) -> None:
        """Let these adapters, frozen, and the trained one work together."""
        model: Any = ctx.model
        trained = [(p, p.requires_grad) for p in factors(model, FIRST).values()]
        for name in names:
            if name not in model.peft_config:
                add_adapter(ctx, name, head=False)
        layers = self._stacked(ctx)
        self._refs = [ref(layer) for layer in layers]
        for layer in layers:
            # Not the whole model's `set_adapter`: a classifier's head takes one adapter only.
            layer.set_adapter([*names, FIRST])
        for name in names:
            for factor in factors(model, name).values():
                factor.requires_grad_(False)
        for factor, flag in trained:  # others may have frozen some; PEFT frees what is active
            factor.requires_grad_(flag)
        self._frozen = names

    def _stacked(self, ctx: Context) -> list[Any]:
        """The layers in which each task has an adapter of its own: all with LoRA factors."""
        return [module for module in ctx.model.modules() if isinstance(module, LoraLayer)]

    def _layers(self) -> list[Any]:
        """Those layers, once something is frozen in them."""
        return [layer for found in self._refs if (layer := found()) is not None]

    def end_task(self, ctx: Context) -> None:
        """Count the task."""
        self._learned += 1

    def state(self) -> State:
        """Which adapters are frozen; their weights are the model's."""
        return State(values={"frozen": self._frozen, "learned": self._learned})

    def restore(self, ctx: Context, state: State) -> None:
        """Add the frozen adapters again; their weights are loaded after this."""
        self._learned = int(state.values["learned"])
        self._stack(ctx, list(state.values["frozen"]))
