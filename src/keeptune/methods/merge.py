"""Merge what the tasks did to the weights: task arithmetic, TIES, DARE or SLERP over task vectors.

Paper: task arithmetic: Ilharco et al. 2023, https://arxiv.org/abs/2212.04089 ; TIES: Yadav et al.
    2023, https://arxiv.org/abs/2306.01708 ; DARE: Yu et al. 2024,
    https://arxiv.org/abs/2311.03099 ; SLERP: Shoemake 1985, https://doi.org/10.1145/325334.325242
Equation: τ_i = w_i − w_0 for the weights w_i after task i; from the second task's end on
    w ← w_0 + strength · m(τ_1, …, τ_t). m of task_arithmetic: the sum; ties: keep the `density`
    largest of each τ, of these those with the sign of the sum, their mean; dare: keep a random
    `density` of each, over `density`, and sum; dare_ties: the same, then signs and means; slerp:
    along the arc from the merged vector to the new one, by 1/t
Changes: begin_task, end_task
Cost: one copy of the trained weights for each task and one of the first (adapters only, under
    LoRA); no time per step. Under LoRA an SVD of every adapted matrix at each task's end.
Use when: tasks were, or can be, learned apart from each other, and no old data may be kept.
Not when: tasks build on each other, or are many: the memory grows with each.
Differs from the paper: the merge is done anew after each task of a stream. `start: merged` trains
    each task from the merged weights, where the papers train all from the same first ones; sums
    are refused there, since each vector then holds those before it. Vectors are merged tensor by
    tensor, each with its own limit and angle. Under LoRA the effective updates B A are merged, then
    cut to the adapter's rank; the error of the cut is in the evidence; DoRA is refused.
Status: contract tested
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from peft.utils import merge_utils
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from keeptune.errors import MethodError
from keeptune.method import Context, Method, State, wide
from keeptune.methods._adapters import refuse_dora
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._factors import in_pairs, low_rank

Form = Literal["task_arithmetic", "ties", "dare", "dare_ties", "slerp"]
Weights = dict[str, Tensor]


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Along the arc from one tensor to another; on a line where they are all but parallel."""
    sizes = one.norm() * other.norm()
    cosine = (one * other).sum() / sizes if sizes > 0 else sizes.new_ones(())
    if cosine.abs() > 0.9995:
        return torch.lerp(one, other, share)
    angle = cosine.acos()
    begun, ended = ((1 - share) * angle).sin(), (share * angle).sin()
    return torch.div(begun * one + ended * other, angle.sin())


def merged(vectors: list[Tensor], form: Form, density: float) -> Tensor:
    """One vector of several; `dare` and `dare_ties` draw from torch's generator."""
    if form == "slerp":
        found = vectors[0]
        for number, vector in enumerate(vectors[1:], 2):
            found = slerp(found, vector, 1 / number)
        return found
    equal = torch.ones(len(vectors), dtype=vectors[0].dtype, device=vectors[0].device)
    # PEFT keeps ⌊density · n⌋ of n, which is none of a few.
    density = max(density, min(1.0, 1.5 / vectors[0].numel()))
    total: Tensor
    if form == "task_arithmetic":
        total = merge_utils.task_arithmetic(vectors, equal)
    elif form == "ties":
        total = merge_utils.ties(vectors, equal, density)
    elif form == "dare":
        total = merge_utils.dare_linear(vectors, equal, density)
    else:
        total = merge_utils.dare_ties(vectors, equal, density)
    return total


class Merge(Method):
    """Merge the vectors of all tasks after each of them."""

    form: Form = Field("ties", description="how vectors are merged")
    strength: float = Field(1.0, ge=0, description="weight of the merged vector; λ")
    density: float = Field(0.2, gt=0, lt=1, description="share of each vector kept by ties, dare")
    start: Literal["first", "merged"] = Field(
        "first", description="weights a later task starts from"
    )

    proof: ClassVar[str] = "moved"
    traits: ClassVar[frozenset[str]] = frozenset({"restart"})
    excludes: ClassVar[frozenset[str]] = frozenset({"anchor", "restart", "structure"})

    @model_validator(mode="after")
    def _adds_nothing_twice(self) -> Merge:
        if self.start == "merged" and self.form in ("task_arithmetic", "dare"):
            raise MethodError(
                f"Merge.form {self.form} adds all vectors up, but with start: merged each already "
                "holds those before it. Use start: first, or another form."
            )
        return self

    _first: Weights = PrivateAttr(default_factory=dict)
    _ends: list[Weights] = PrivateAttr(default_factory=list)

    @torch.no_grad()
    def begin_task(self, ctx: Context) -> None:
        """Keep the first weights, or go back to them.

        Raises:
            MethodError: The weights are spread over processes, or the adapter is a DoRA.
        """
        why = "needs whole weights, but FSDP spreads them over processes"
        refuse_shards(ctx, self.name(), why)
        refuse_dora(ctx, self.name(), "merges LoRA's updates")
        if self.start == "first":
            for name, weight in self._weights(ctx).items():
                weight.copy_(self._first[name])
        for name, weight in ctx.trainable().items():
            if name not in self._first:
                self._first[name] = weight.detach().clone()

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Keep this task's weights; from the second on put the merged ones in their place."""
        weights, squares, worst = self._weights(ctx), 0.0, 0.0
        self._ends.append({name: weight.detach().clone() for name, weight in weights.items()})
        if len(self._ends) < 2:
            return
        devices = [ctx.device] if ctx.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(ctx.random(self.form).integers(2**63)))
            for name, partner in in_pairs(weights):
                weight = weights[name]
                if partner is not None:
                    update = self._merged([wide(w[partner]) @ wide(w[name]) for w in self._all()])
                    a, b, error = low_rank(update, weight.shape[0])
                    pairs, worst = [(weight, a), (weights[partner], b)], max(worst, error)
                else:
                    pairs = [(weight, self._merged([wide(w[name]) for w in self._all()]))]
                for old, new in pairs:
                    squares += float((new - old).square().sum())
                    old.copy_(new)
        self._evidence.update(moved=squares**0.5, worst_cut_error=worst, vectors=len(self._ends))

    def _weights(self, ctx: Context) -> dict[str, nn.Parameter]:
        """All that were ever trained; `half` trains others in each task."""
        return {n: p for n, p in ctx.model.named_parameters() if n in self._first}

    def _all(self) -> list[Weights]:
        """The first weights and those after each task, which some were not trained in."""
        return [self._first, *({**self._first, **kept} for kept in self._ends)]

    def _merged(self, values: list[Tensor]) -> Tensor:
        """The merged value of the first one and those after each task."""
        first, *ends = values
        return first + self.strength * merged([w - first for w in ends], self.form, self.density)

    def state(self) -> State:
        """The first weights and those after each task."""
        every = {
            f"{i}/{n}": t
            for i, kept in enumerate([self._first, *self._ends])
            for n, t in kept.items()
        }
        return State(every, {"tasks": len(self._ends)})

    def restore(self, ctx: Context, state: State) -> None:
        """Take all weights back."""
        found: list[Weights] = [{} for _ in range(1 + int(state.values["tasks"]))]
        for key, tensor in state.tensors.items():
            number, _, name = key.partition("/")
            found[int(number)][name] = tensor.to(ctx.device)
        self._first, *self._ends = found

    def declared_bytes(self, ctx: Context) -> int:
        """A copy of the trained weights for each task, and one of the first."""
        return sum(t.nbytes for kept in (self._first, *self._ends) for t in kept.values())
