"""One LoRA adapter per task; earlier ones are never touched.

Paper: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685 ; one module per task as in Rusu et
    al. 2016, Progressive neural networks, https://arxiv.org/abs/1606.04671
Equation: W_t = W_0 + scale · B_t A_t for task t; for an unknown task W_0 + mean_t scale · B_t A_t
Changes: begin_task, serve
Cost: one adapter per task, rank · (in + out) floats for each adapted matrix; no time per step.
Use when: the task is known when the model answers: old tasks cannot be forgotten at all.
Not when: tasks should help each other, or one model must serve an unknown task well.
Differs from the paper: adapters are independent (no lateral connections); for an unknown task the
    mean of all updates is served, joined exactly by stacking the factors.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import PrivateAttr

from keeptune.errors import MethodError
from keeptune.method import Context, Method, State
from keeptune.methods._adapters import FIRST, adapter_hash, add_adapter

MERGED = "merged"


class TaskLoRA(Method):
    """A fresh adapter for each task; `serve` picks it by the task's name."""

    proof: ClassVar[str] = "adapters"
    active_from: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"adapter"})
    traits: ClassVar[frozenset[str]] = frozenset({"isolation", "structure"})
    excludes: ClassVar[frozenset[str]] = frozenset({"anchor", "restart", "structure"})

    _adapters: dict[str, str] = PrivateAttr(default_factory=dict)
    _hashes: dict[str, str] = PrivateAttr(default_factory=dict)

    def begin_task(self, ctx: Context) -> None:
        """Add and train one more adapter."""
        model: Any = ctx.model
        self._drop_merged(model)
        self._hashes = {t: adapter_hash(model, a) for t, a in self._adapters.items()}
        name = f"task_{ctx.index:03d}"
        add_adapter(ctx, name)
        self._adapters[ctx.task] = name
        model.set_adapter(name)

    @staticmethod
    def _drop_merged(model: Any) -> None:
        if MERGED in model.peft_config:
            model.set_adapter(FIRST)
            model.delete_adapter(MERGED)

    def end_task(self, ctx: Context) -> None:
        """Check that earlier adapters are bit for bit what they were."""
        for task, before in self._hashes.items():
            if adapter_hash(ctx.model, self._adapters[task]) != before:
                raise MethodError(
                    f"task_lora found the adapter of task {task!r} changed while {ctx.task!r} was "
                    "learned. Another method in the strategy must be editing it; remove that one."
                )
        self._evidence.update(adapters=len(self._adapters), identical=len(self._hashes))

    def serve(self, ctx: Context, task: str | None) -> None:
        """The task's adapter; for an unknown task the mean of all."""
        model: Any = ctx.model
        self._drop_merged(model)
        adapters = list(self._adapters.values())
        if task in self._adapters:
            model.set_adapter(self._adapters[task], inference_mode=True)
        elif len(adapters) < 2:
            model.set_adapter((adapters or [FIRST])[0], inference_mode=True)
        else:
            weights = [1 / len(adapters)] * len(adapters)
            # "cat" stacks the factors and is exact; "linear" would mix A and B apart.
            model.add_weighted_adapter(adapters, weights, MERGED, combination_type="cat")
            model.set_adapter(MERGED, inference_mode=True)

    def state(self) -> State:
        """Which adapter belongs to which task; their weights are the model's."""
        return State(values={"adapters": self._adapters, "hashes": self._hashes})

    def restore(self, ctx: Context, state: State) -> None:
        """Add the adapters again; their weights are loaded after this."""
        model: Any = ctx.model
        self._adapters = dict(state.values["adapters"])
        self._hashes = dict(state.values["hashes"])
        for name in self._adapters.values():
            if name not in model.peft_config:
                add_adapter(ctx, name)
