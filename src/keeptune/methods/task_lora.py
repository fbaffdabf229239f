"""One LoRA adapter per task; earlier ones are never touched.

Paper: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685 ; one module per task as in Rusu et
    al. 2016, Progressive neural networks, https://arxiv.org/abs/1606.04671
Equation: W_t = W_0 + scale · B_t A_t for task t; of an unknown task: W_0 + mean_t scale · B_t A_t
    (merge), or t = argmin_t ‖h − μ_t‖ (nearest), or t = argmax_t μ_tᵀ Σ⁻¹ h − ½ μ_tᵀ Σ⁻¹ μ_t
    (classifier), with h the base model's last hidden state at the end of the question
Changes: begin_task, end_task, serve, route
Cost: one adapter per task, rank · (in + out) floats for each adapted matrix; no time per step.
    nearest keeps d floats a task for hidden size d, classifier also d²; both read up to 512
    questions when a task ends, and each question once more before it is answered.
Use when: the task is known when the model answers, or can be told from the question: old tasks
    cannot be forgotten at all.
Not when: tasks should help each other, or their questions look alike and the task is not known.
Differs from the paper: adapters are independent (no lateral connections). Neither paper has unknown
    tasks: merge joins all updates exactly by stacking the factors; classifier is linear
    discriminant analysis as in Hayes and Kanan 2020, https://arxiv.org/abs/1909.01520 , a tenth of
    Σ spread evenly. A question about none of the tasks gets the adapter of one of them as well.
Status: contract tested
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from pydantic import Field, PrivateAttr

from keeptune.errors import MethodError
from keeptune.method import Context, Ids, Method, State
from keeptune.methods._adapters import (
    FIRST,
    adapter_hash,
    add_adapter,
    refuse_biases,
    refuse_dora,
)
from keeptune.methods._questions import Router, hidden, questions

MERGED = "merged"
MOST = 512  # questions of a task that a router learns from


class TaskLoRA(Method):
    """A fresh adapter for each task; `serve` picks it by the task's name."""

    unknown: Literal["merge", "nearest", "classifier"] = Field(
        "merge", description="what answers when the task is unknown: all adapters, or a chosen one"
    )

    proof: ClassVar[str] = "adapters"
    active_from: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"adapter"})
    traits: ClassVar[frozenset[str]] = frozenset({"isolation", "structure"})
    excludes: ClassVar[frozenset[str]] = frozenset({"anchor", "restart", "structure"})
    served: ClassVar[Literal["one model", "per task", "keeptune"]] = "per task"

    _adapters: dict[str, str] = PrivateAttr(default_factory=dict)
    _hashes: dict[str, str] = PrivateAttr(default_factory=dict)
    _router: Router | None = PrivateAttr(None)

    def model_post_init(self, context: Any, /) -> None:
        """Start with a router that knows nothing."""
        super().model_post_init(context)
        self._router = None if self.unknown == "merge" else Router(self.unknown)

    def begin_task(self, ctx: Context) -> None:
        """Add and train one more adapter.

        Raises:
            MethodError: The adapters train biases, or cannot be merged as `unknown` asks.
        """
        model: Any = ctx.model
        refuse_biases(ctx, self.name())
        if self.unknown == "merge":
            self._refuse_unmerged(ctx)
        self._drop_merged(model)
        self._hashes = {t: adapter_hash(model, a) for t, a in self._adapters.items()}
        name = f"task_{ctx.index:03d}"
        add_adapter(ctx, name)
        self._adapters[ctx.task] = name
        model.set_adapter(name)

    def _refuse_unmerged(self, ctx: Context) -> None:
        refuse_dora(ctx, self.name(), "with `unknown: merge` averages LoRA's updates")
        if any(isinstance(module, ModulesToSaveWrapper) for module in ctx.model.modules()):
            raise MethodError(
                "task_lora trains a head, or other whole modules, of each task's own here, and "
                "with `unknown: merge` they cannot be averaged. Use `unknown: nearest` or "
                "`classifier`."
            )

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
        if self._router is not None:
            features = hidden(ctx, questions(ctx, MOST))
            self._router.learn(features)
            own = [i == len(self._hashes) for i in self._router.choose(features)]
            self._evidence["own_questions_known"] = sum(own) / len(own)

    def route(self, ctx: Context, prompts: Sequence[Ids]) -> list[str] | None:
        """The task whose questions look most like each of these."""
        if self._router is None or len(self._adapters) < 2:
            return None
        names = list(self._adapters)
        return [names[i] for i in self._router.choose(hidden(ctx, prompts))]

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
            # PEFT means a scale of 1, but writes an alpha that rsLoRA divides by √r only.
            model.peft_config[MERGED].use_rslora = False
            for layer in model.modules():
                if isinstance(layer, LoraLayer) and MERGED in layer.scaling:
                    layer.scaling[MERGED] = 1.0
            model.set_adapter(MERGED, inference_mode=True)

    def state(self) -> State:
        """Which adapter belongs to which task, whose weights are the model's; the router."""
        values = {"adapters": self._adapters, "hashes": self._hashes}
        if self._router is None:
            return State(values=values)
        return State(dict(self._router.tensors), values | {"questions": self._router.seen})

    def restore(self, ctx: Context, state: State) -> None:
        """Add the adapters again; their weights are loaded after this."""
        model: Any = ctx.model
        self._adapters = dict(state.values["adapters"])
        self._hashes = dict(state.values["hashes"])
        if self._router is not None:
            self._router.tensors = dict(state.tensors)
            self._router.seen = int(state.values["questions"])
        for name in self._adapters.values():
            if name not in model.peft_config:
                add_adapter(ctx, name)

    def declared_bytes(self, ctx: Context) -> int:
        """What the router knows: d floats a task, and for the classifier d² once."""
        if self._router is None or not self._router.tensors:
            return 0
        tasks, size = self._router.tensors["means"].shape
        return 4 * size * (tasks + (size if self.unknown == "classifier" else 0))
