"""A mixture of LoRA experts: one more for each task, old ones frozen, shared out token by token.

Paper: Yu et al. 2024, Boosting continual learning of vision-language models via mixture-of-experts
    adapters, https://arxiv.org/abs/2403.11549 ; for language models Dou et al. 2023, LoRAMoE,
    https://arxiv.org/abs/2312.09979
Equation: W x + Σ_t g_t(h) · scale · B_t A_t x, with g(h) = softmax_t((k_tᵀ h + c_t) / temperature),
    k_t = Σ⁻¹ μ_t, c_t = −½ μ_tᵀ Σ⁻¹ μ_t; h is what a token enters the lowest layer with experts as,
    over its rms, μ_t its mean over tokens of task t, and Σ its covariance within the tasks
Changes: begin_task, end_task
Cost: as inc_lora, one adapter more with each task, of the rank that the run's adapter has, in
    memory and in every step; d floats a task and d² once for hidden size d, and a pass over up to
    512 rows before each task. There is no export: answers need keeptune beside the model.
Use when: tasks can be told from their texts, the task is not known when the model answers, and an
    answer may need what several tasks taught.
Not when: tasks look alike, since their experts then share all tokens and disturb each other;
    answers of old tasks must not change by one bit (task_lora); or a plain model is wanted.
Differs from the paper: the gate is learned in closed form from what the tasks' tokens look like,
    not by the loss, which in a new task knows nothing of old ones and would give their tokens to
    the new expert. As sums over the tasks are all it needs, it is the gate that all tasks at once
    would give, and keeps no row; a tenth of Σ is spread evenly. One gate serves the whole model,
    and the `layers` below it have no experts: so an old task's tokens enter it, bit for bit, as
    when they were learned, and carry what stands before them. All experts work at each token, not
    the best few. PEFT's own gates read trained adapters from files: X-LoRA trains all of its gate
    at once and reads each text twice, Arrow learns none. A classifier's head is trained in all
    tasks and not frozen.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from peft.tuners.lora import LoraLayer
from pydantic import Field, PrivateAttr
from torch import nn

from keeptune.errors import MethodError
from keeptune.method import ADDED, Context, State
from keeptune.methods._adapters import FIRST
from keeptune.methods._isolate import below, embeddings, layers, lowest
from keeptune.methods._isolate.gate import Gate, likely_shares, tokens, used
from keeptune.methods._questions import Router
from keeptune.methods._stack import Stacked

DRAWS = 256  # from what is known of an old task's tokens


class Mixture(Stacked):
    """Train a new expert with each task, in the share of the tokens that a gate gives it."""

    layers: float = Field(
        0.5, ge=0, description="bottom layers without experts: a share below 1, else their number"
    )
    temperature: float = Field(
        1.0, gt=0, description="above 1 experts share more evenly; towards 0 the likeliest has all"
    )

    proof: ClassVar[str] = "new_share"
    active_from: ClassVar[int] = 0
    excludes: ClassVar[frozenset[str]] = frozenset(
        {"anchor", "freeze", "isolation", "restart", "structure"}
    )
    served: ClassVar[Literal["one model", "per task", "keeptune"]] = "keeptune"

    _router: Router = PrivateAttr(default_factory=lambda: Router("classifier"))

    def begin_task(self, ctx: Context) -> None:
        """Freeze the last expert, add a new one, and learn what the task's tokens look like.

        Raises:
            MethodError: No adapter is above the layers without experts, DoRA rescales adapters,
                FSDP has sharded the weights, or the rows come once.
        """
        if ctx.online:
            raise MethodError(
                f"The method {self.name()!r} looks at a task's rows before it is learned, and "
                "online they come one after another. Remove the method, or leave `online` out."
            )
        super().begin_task(ctx)
        _, blocks, number = self._place(ctx)
        self._router.learn(tokens(ctx, blocks[number]))
        self._share_out(ctx)

    def _place(self, ctx: Context) -> tuple[str, nn.ModuleList, int]:
        """The model's layers by name and themselves, and the number of the lowest with experts."""
        stack, blocks = layers(ctx.model, self.name())
        without = lowest(self.layers, len(blocks), "Mixture")
        adapted = [name for name, m in ctx.model.named_modules() if isinstance(m, LoraLayer)]
        for number in range(without, len(blocks)):
            if any(name.startswith(f"{stack}.{number}.") for name in adapted):
                return stack, blocks, number
        raise MethodError(
            f"Mixture.layers leaves the lowest {without} of {len(blocks)} layers without experts, "
            "and the adapter has no weights in those above. Set fewer, or adapt higher layers."
        )

    def _stacked(self, ctx: Context) -> list[Any]:
        """The layers in which each task has an expert: LoRA's, but for those the gate stands on."""
        _, blocks, number = self._place(ctx)
        upper = [module for block in blocks[number:] for module in block.modules()]
        return [module for module in upper if isinstance(module, LoraLayer)]

    def _share_out(self, ctx: Context) -> None:
        """Let the gate share out what it has learned, and train nothing below it."""
        stack, blocks, number = self._place(ctx)
        gate = getattr(ctx.model, ADDED, None)
        if gate is None:
            gate = Gate(self.temperature).to(ctx.device).attach(ctx.model, list(blocks[number:]))
        assert isinstance(gate, Gate)
        gate.weigh([*self._frozen, FIRST], self._stacked(ctx))
        if self._router.tensors:
            weights, offsets = self._router.discriminant()
            gate.learned(weights.T, -offsets)
        upper = tuple(f"{stack}.{index}." for index in range(number, len(blocks)))
        under = below(stack, number)
        read = embeddings(ctx.model, stack)
        for name, weight in ctx.trainable().items():
            is_apart = ".lora_" in name and not name.startswith(upper)
            if is_apart or name.startswith(under) or name in read:
                weight.requires_grad_(False)

    def end_task(self, ctx: Context) -> None:
        """Show how the experts share the task's tokens, and what the new one takes of old ones."""
        super().end_task(ctx)
        gate, shown = ctx.model.get_submodule(ADDED), self._evidence
        assert isinstance(gate, Gate)
        shares = used(ctx, gate)
        shown.update(new_share=float(shares[-1]), shares=shares.tolist())
        if len(shares) > 1:
            draws = ctx.random("shares").standard_normal((DRAWS, len(shares)))
            normal, covariance = torch.from_numpy(draws).float(), self._router.covariance()
            *old, _ = self._router.tensors["means"]
            taken = [likely_shares(mean, covariance, gate, normal)[-1] for mean in old]
            shown["taken_from_old"] = float(torch.stack(taken).mean())

    def state(self) -> State:
        """Which adapters are frozen, whose weights are the model's; what the gate knows."""
        values = super().state().values | {"tokens": self._router.seen}
        return State(dict(self._router.tensors), values)

    def restore(self, ctx: Context, state: State) -> None:
        """Add the frozen adapters and the gate again; their weights are loaded after this."""
        super().restore(ctx, state)
        self._router.tensors = dict(state.tensors)
        self._router.seen = int(state.values["tokens"])
        self._share_out(ctx)

    def declared_bytes(self, ctx: Context) -> int:
        """What the gate knows: d floats a task, and d² once."""
        if not self._router.tensors:
            return 0
        tasks, size = self._router.tensors["means"].shape
        return 4 * size * (tasks + size)
