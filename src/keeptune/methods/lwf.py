"""Learning without forgetting: stay near the answers the model gave before the task.

Paper: Li & Hoiem 2016, Learning without forgetting, https://arxiv.org/abs/1606.09282
Equation: L(w) + strength · T² · mean over answers of KL(p_old(· | x; T) ‖ p_w(· | x; T)), where
    p(·; T) = softmax(logits / T) and p_old is the model before the task, on the new task's inputs
Changes: data or loss
Cost: online: one extra forward per batch, and one copy of the trained weights, under LoRA of the
    adapters only. recorded: one forward over the task's rows before it, no copy of any weight and
    next to no time per step; 4 top_k + 4 bytes for each answer during the task (260 at top_k 64,
    for vocabularies of at most 65,536; else 6 top_k + 4).
Use when: no old data may be kept, and also to keep the base model's knowledge: the first task is
    held to the base model.
Not when: the new task must contradict what the model says on the same inputs.
Differs from the paper: on the answer's tokens only; the term carries T² (Hinton et al. 2015) so
    that its gradient does not shrink with T; no warm-up of a new head, since a language model has
    none. online, the default, asks the frozen weights at each step, for old rows of other methods
    as well; recorded is the paper's way, for the task's own rows, with the top_k likeliest entries
    of an answer and one bucket for all others. On SmolLM2, top_k 64, its gradient at the logits is
    5.6 % off that of all entries, 16 % without the bucket (benchmarks).
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from pydantic import Field, PrivateAttr
from torch import Tensor

from keeptune.errors import MethodError
from keeptune.method import Batch, Context, Method, State
from keeptune.methods._distil import Frozen, Store, Sums, Teacher, TopK
from keeptune.processes import is_sharded


class LwF(Method):
    """Distil the model before the task into the model that learns it."""

    strength: float = Field(1.0, ge=0, description="weight of the term; the paper's λ_o")
    temperature: float = Field(2.0, gt=0, description="softening of both distributions; T")
    targets: Literal["online", "recorded"] = Field(
        "online", description="old answers computed at each step, or kept from before the task"
    )
    top_k: int = Field(64, ge=1, description="entries kept of a recorded answer")

    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    proof: ClassVar[str] = "kl"
    active_from: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"answers"})
    steered: ClassVar[str] = "strength"

    _teacher: Frozen = PrivateAttr(default_factory=lambda: Frozen({}))
    _teacher_of: int = PrivateAttr(-1)
    _store: Store = PrivateAttr(default_factory=Store)
    _recorded: int = PrivateAttr(0)
    _sums: Sums = PrivateAttr(default_factory=lambda: Sums(3))

    def begin_task(self, ctx: Context) -> None:
        """Refuse sharded weights: FSDP would run the student in the teacher's place.

        Raises:
            MethodError: The weights are spread over processes.
        """
        if self.strength and self.targets == "online" and is_sharded(ctx.model):
            raise MethodError(
                "The method 'lwf' cannot run the model with old weights while FSDP spreads them "
                "over processes. Use `targets: recorded`, or train with DDP (leave `fsdp` out)."
            )
        self._sums = Sums(3, ctx.device)

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        """Record what the model says to the task's own rows before it learns them.

        Not in `begin_task`, where other methods may still add adapters.
        """
        if self.strength and self.targets == "recorded" and not len(self._store):
            self._store = Store.of(ctx, ctx.dataset, self.top_k, self.temperature)
        self._recorded = len(self._store)
        return dataset

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        """Add the distillation term of one micro batch."""
        if not self.strength:
            return None
        assert ctx.answers is not None
        term: TopK | Teacher
        if self.targets == "recorded":
            kept, known = self._store.find(batch)
            term = kept.term(self.temperature, ctx.device)
        else:
            self._look_back(ctx)
            term = Teacher(self._teacher.answers(ctx, batch), self.temperature)
            known = torch.ones(len(ctx.answers), dtype=torch.bool, device=ctx.device)
            self._sums.add(2, len(batch["labels"]))
        self._sums.add(1, known.sum())
        weight = self.strength * self._effort / ctx.answers_in_step
        ctx.answers.add(term, known * weight, lambda kl: self._note(kl * known))
        return None

    def _look_back(self, ctx: Context) -> None:
        # At the first batch of a task, for the same reason; no weight has moved before it.
        if self._teacher_of != ctx.index:
            self._teacher = Frozen.of(ctx)
            self._teacher_of = ctx.index

    def _note(self, kl: Tensor) -> None:
        self._sums.add(0, kl.sum())

    def evidence(self) -> dict[str, Any]:
        """Mean of the term over all answers that have old ones, in nats; rows that were kept."""
        total, answers, rows = self._sums.values()
        return {
            "kl": total / max(answers, 1),
            "answers": int(answers),
            "extra_forward_rows": int(rows) + self._recorded,
        }

    def state(self) -> State:
        """What the model was before the present task; not needed once the task has ended."""
        tensors = {f"teacher/{n}": t for n, t in self._teacher.weights.items()}
        tensors |= {f"store/{n}": t for n, t in self._store.tensors().items()}
        values = {"teacher_of": self._teacher_of, "recorded": self._recorded}
        return State(tensors | {"sums": self._sums.total()}, values)

    def end_task(self, ctx: Context) -> None:
        """Drop it; what was counted stays."""
        self._sums.total()
        self._teacher, self._store, self._teacher_of = Frozen({}), Store(), -1

    def restore(self, ctx: Context, state: State) -> None:
        """Take it back."""
        self._teacher_of = int(state.values["teacher_of"])
        self._recorded = int(state.values["recorded"])
        self._sums = Sums.of(state.tensors["sums"], ctx.device)
        teacher = state.part("teacher").tensors
        self._teacher = Frozen({n: t.to(ctx.device) for n, t in teacher.items()})
        self._store = Store.from_tensors(state.part("store").tensors)

    def declared_bytes(self, ctx: Context) -> int:
        """During a task the copy of the trained weights, or what was recorded; and three sums."""
        return self._teacher.nbytes + self._store.nbytes + self._sums.nbytes
