"""Learning without forgetting: stay near the answers the model gave before the task.

Paper: Li & Hoiem 2016, Learning without forgetting, https://arxiv.org/abs/1606.09282
Equation: L(w) + strength · T² · mean over answers of KL(p_old(· | x; T) ‖ p_w(· | x; T)), where
    p(·; T) = softmax(logits / T) and p_old is the model before the task, on the new task's inputs
Changes: loss
Cost: one copy of the trained weights (adapters only, under LoRA); one extra forward per batch.
Use when: no old data may be kept, and also to keep the base model's knowledge: the first task is
    held to the base model.
Not when: the new task must contradict what the model says on the same inputs.
Differs from the paper: targets come from the frozen weights at each step instead of being recorded
    once, on the answer's tokens only; the term carries T² (Hinton et al. 2015) so that its gradient
    does not shrink with T; no warm-up of a new head, since a language model has none.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn import functional as F

from keeptune.errors import MethodError
from keeptune.method import Batch, Context, Method, State


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) of each row: [N, V] to [N], in nats."""
    p = F.log_softmax(teacher.float() / temperature, -1)
    q = F.log_softmax(student.float() / temperature, -1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


class LwF(Method):
    """Distil the model before the task into the model that learns it."""

    strength: float = Field(1.0, ge=0, description="weight of the term; the paper's λ_o")
    temperature: float = Field(2.0, gt=0, description="softening of both distributions; T")

    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    proof: ClassVar[str] = "kl"
    active_from: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    _teacher: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _teacher_of: int = PrivateAttr(-1)
    _sums: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def begin_task(self, ctx: Context) -> None:
        """Refuse sharded weights: FSDP would run the student in the teacher's place.

        Raises:
            MethodError: The weights are spread over processes.
        """
        if self.strength and any(isinstance(p, DTensor) for p in ctx.trainable().values()):
            raise MethodError(
                "The method 'lwf' cannot run the model with old weights while FSDP spreads them "
                "over processes. Train with DDP (leave `fsdp` out), or remove the method."
            )

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        """The distillation term of one micro batch."""
        if not self.strength:
            return None
        self._look_back(ctx)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            ctx.model.eval()
            teacher = functional_call(ctx.model, self._teacher, (), inputs, tie_weights=True).logits
            ctx.model.train()
        kl = softened_kl(
            ctx.answer_logits(outputs.logits, batch),
            ctx.answer_logits(teacher, batch),
            self.temperature,
        )
        self._add_evidence(kl.detach(), len(batch["labels"]))
        return self.strength * ctx.mean_over_answers(kl)

    def _look_back(self, ctx: Context) -> None:
        # At the first batch of a task, not in `begin_task`: other methods may still add adapters
        # there, and no weight has moved before the first batch.
        if self._teacher_of != ctx.index:
            self._teacher = {n: p.detach().clone() for n, p in ctx.trainable().items()}
            self._teacher_of = ctx.index
            self._sums = torch.zeros(3, dtype=torch.float64, device=ctx.device)

    def _add_evidence(self, kl: Tensor, rows: int) -> None:
        # Kept as running sums so that nothing waits for the device at each step.
        self._sums[0] += kl.sum()
        self._sums[1] += kl.numel()
        self._sums[2] += rows

    def evidence(self) -> dict[str, Any]:
        """Mean of the term over all answers trained on, in nats."""
        total, answers, rows = self._sums.tolist()
        return {
            "kl": total / max(answers, 1),
            "answers": int(answers),
            "extra_forward_rows": int(rows),
        }

    def state(self) -> State:
        """The weights before the present task; not needed once the task has ended."""
        tensors = {f"teacher/{n}": t for n, t in self._teacher.items()}
        return State(tensors | {"sums": self._sums}, {"teacher_of": self._teacher_of})

    def end_task(self, ctx: Context) -> None:
        """Drop the old weights."""
        self._teacher.clear()
        self._teacher_of = -1

    def restore(self, ctx: Context, state: State) -> None:
        """Take the old weights back."""
        self._teacher_of = int(state.values["teacher_of"])
        self._sums = state.tensors["sums"].to(ctx.device)
        self._teacher = {
            n.removeprefix("teacher/"): t.to(ctx.device)
            for n, t in state.tensors.items()
            if n.startswith("teacher/")
        }

    def declared_bytes(self, ctx: Context) -> int:
        """One copy of the trained weights during a task; between tasks three numbers."""
        weights = sum(p.numel() * p.element_size() for p in ctx.trainable().values())
        return weights * bool(self._teacher) + self._sums.nbytes
