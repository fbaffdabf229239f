"""The quadratic penalty that the family shares: strength/2 · Σ Ω (w − a)².

A method of the family says what a (the anchor) and Ω (the importance) are; all else is here: the
pull on the gradients or the implicit step, the strength, what is kept and where, and the proof.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, GetCoreSchemaHandler, PrivateAttr
from pydantic_core import CoreSchema, core_schema
from torch import Tensor

from keeptune.method import Context, Method, State, wide
from keeptune.methods._anchor.kept import BLOCK, Kept, Place, Precision
from keeptune.methods._anchor.shards import (
    Spec,
    local,
    part,
    spec_of,
    sum_over_shards,
    whole,
)
from keeptune.methods._anchor.weights import Weights, blocks

# `strength: auto` is settled at the measured steps up to this one.
LAST_TUNED = 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class NumberOrAuto:
    """Validates a number of at least `ge`, or the word auto; an error speaks of one of them."""

    ge: float = 0.0

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The two, told apart by the value."""
        number = core_schema.float_schema(ge=self.ge, allow_inf_nan=False)
        word = core_schema.literal_schema(["auto"])
        return core_schema.tagged_union_schema({"number": number, "word": word}, _kind)


def _kind(value: Any) -> str:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return "word"
    return "word" if isinstance(value, bool) else "number"


Strength = Annotated[float | Literal["auto"], NumberOrAuto()]
SHARE = "with strength auto: Σ|pull| over Σ|task gradient|, at first"
STRENGTH = "weight of the penalty, λ; auto: see `share`"


def is_measured(step: int) -> bool:
    """Whether evidence is measured at this step: powers of two, and every 64th."""
    return step > 0 and (step & (step - 1) == 0 or step % 64 == 0)


def sum_of_sizes(values: Tensor) -> Tensor:
    """Σ |v|, in float64 where there is one; on the CPU.

    It measures pulls and gradients: the norm that is dual to the box in which Adam and its like
    step. Squares would not do: importances of a language model are spread so widely that a few
    weights make up the sum.
    """
    total: Tensor = torch.linalg.vector_norm(values, 1, dtype=_widest(values))
    return total.cpu()


def sum_of_squares(values: Tensor) -> Tensor:
    """Σ v², which neither overflows nor vanishes: in float64 where there is one; on the CPU."""
    norm: Tensor = torch.linalg.vector_norm(values, dtype=_widest(values))
    return norm.square().cpu()


def _widest(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


class Anchored(Method):
    """Holds weights back by a quadratic penalty; without importances, all alike.

    A method of the family fills `_anchor` (and `_importance`), by the names of its weights.
    """

    strength: Strength = Field("auto", description=STRENGTH)
    share: float = Field(0.3, gt=0, description=SHARE)
    proximal: bool = Field(
        False,
        description="an implicit step after the optimizer's, instead of a term of the gradient",
    )
    place: Place = Field(
        "device", description="where anchor and importance are kept: device, cpu, or a mapped file"
    )

    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    proof: ClassVar[str] = "gradient_share"
    traits: ClassVar[frozenset[str]] = frozenset({"anchor"})
    excludes: ClassVar[frozenset[str]] = frozenset({"structure", "restart"})
    steered: ClassVar[str] = "strength"

    _anchor: dict[str, Kept] = PrivateAttr(default_factory=dict)
    _importance: dict[str, Kept] = PrivateAttr(default_factory=dict)
    _specs: dict[str, Spec | None] = PrivateAttr(default_factory=dict)
    _tuned: float = PrivateAttr(0.0)
    # Of a step that is measured, where it acts after it: the weights before, distance and pull.
    _begun: dict[str, list[Tensor]] = PrivateAttr(default_factory=dict)
    _far: tuple[float, float] = PrivateAttr((0.0, 0.0))

    # -- what a method of the family may choose otherwise ----------------------------------------

    def _weights(self, ctx: Context) -> Weights:
        """What is held."""
        return Weights(ctx)

    def _acts_after_the_step(self) -> bool:
        return self.proximal

    def _move_back(self, weights: Weights, name: str, learning_rate: float) -> None:
        """Move one value towards its anchor after the optimizer's step."""
        for span in weights.spans(name):
            anchor, importance = self._block(name, span, weights.owner(name).device)
            # Beyond any use, and still finite after the next multiplication.
            rate = min(learning_rate * self._strength, 1e30)
            weight = torch.full_like(anchor, rate) if importance is None else importance * rate
            weights.step_back(name, span, anchor, weight.clamp_(max=1e30))

    # -- the verbs ---------------------------------------------------------------------------------

    def begin_task(self, ctx: Context) -> None:
        """An automatic strength is found anew in each task."""
        self._tuned = 0.0
        self._cut(self._weights(ctx))

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        """Add strength · Ω (w − a) to each gradient."""
        weights = self._weights(ctx)
        if self.strength == 0 or not (held := self._held(weights)):
            return
        if is_measured(ctx.step):
            self._measure(ctx, weights)
        if self._acts_after_the_step() or not self._strength:
            return
        strength = self._strength * ctx.grad_scale
        # Looked up once: on adapters, look-ups cost more than the arithmetic.
        anchors, importances = self._anchor, self._importance
        for name in held:
            room, value = weights.room(name), weights.value(name)
            anchor, importance = anchors[name], importances.get(name)
            for span in blocks(value):
                apart = wide(value[span]) - anchor.block(span.start, span.stop, value.device)
                if importance is None:
                    room[span].add_(apart, alpha=strength)
                else:
                    weight = importance.block(span.start, span.stop, value.device)
                    room[span].addcmul_(weight, apart, value=strength)
            weights.spread(name, room)

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """With `proximal`: w ← (w + c a) / (1 + c), c = learning rate · strength · Ω."""
        if not self._acts_after_the_step() or self.strength == 0:
            return
        weights = self._weights(ctx)
        measured, moved = is_measured(ctx.step), torch.zeros((), dtype=torch.float64)
        if measured:
            self._look_at_the_step(ctx, weights)
        if not self._strength or not (held := self._held(weights)):
            return
        for name in held:
            touched = [local(p) for p in weights.owners(name)] if measured else []
            before = [p.clone() for p in touched]
            self._move_back(weights, name, ctx.learning_rate)
            for new, old in zip(touched, before, strict=True):
                moved += sum_of_sizes((new - old).view(-1))
        if measured and ctx.learning_rate:
            (way,) = self._over_shards(weights, moved[None])
            self._note_share(way / ctx.learning_rate)

    # -- the strength, and the proof --------------------------------------------------------------

    @property
    def _strength(self) -> float:
        return self._effort * (self._tuned if self.strength == "auto" else float(self.strength))

    def _measure(self, ctx: Context, weights: Weights) -> None:
        """Measure the pull at strength 1, and what it is held against."""
        sums = torch.zeros(3, dtype=torch.float64)
        for name in self._held(weights):
            value = weights.value(name)
            unit = torch.empty_like(wide(value))
            for span in blocks(value):
                anchor, importance = self._block(name, span, value.device)
                apart = wide(value[span]) - anchor
                unit[span] = apart if importance is None else apart * importance
                sums[0] += (apart * unit[span]).sum().cpu()
            for parameter, share in weights.parts(name, unit):
                sums[1] += sum_of_sizes(share)
                # A gradient that is not there stays so: an optimizer passes over such weights.
                if parameter.grad is not None:
                    sums[2] += sum_of_sizes(local(parameter.grad))
        distance, pull, task = self._over_shards(weights, sums)
        task /= ctx.grad_scale
        if not math.isfinite(task):
            return  # fp16 overflowed, and this step will be left out
        if self._acts_after_the_step():
            owners = {n: [local(p) for p in weights.owners(n)] for n in self._held(weights)}
            self._begun = {name: [p.clone() for p in own] for name, own in owners.items()}
            self._far = distance, pull
        else:
            self._settle(ctx, task, distance, pull)
            self._note_share(self._strength * pull)

    def _look_at_the_step(self, ctx: Context, weights: Weights) -> None:
        """After the optimizer's step, whose own way is what a pull after it must be held against.

        Adam divides gradients by their size: beside the step that comes of it, a pull as large as
        they were would be nothing.
        """
        begun, self._begun = self._begun, {}
        if not begun or not ctx.learning_rate:
            return
        way = torch.zeros((), dtype=torch.float64)
        for name, before in begun.items():
            for parameter, old in zip(weights.owners(name), before, strict=True):
                way += sum_of_sizes((local(parameter) - old).view(-1))
        (total,) = self._over_shards(weights, way[None])
        self._settle(ctx, total / ctx.learning_rate, *self._far)

    def _settle(self, ctx: Context, task: float, distance: float, pull: float) -> None:
        """Settle an automatic strength; `pull` is that of strength 1, both as Σ|·|."""
        if self.strength == "auto" and pull and ctx.step <= LAST_TUNED:
            # The distance grows, so the first values are too large: the least of them holds.
            self._tuned = min(self.share * task / pull, self._tuned or float("inf"))
            self._evidence["strength"] = self._tuned
        self._evidence["penalty"] = 0.5 * self._strength * distance
        self._evidence["task_gradient"] = task

    def _note_share(self, pull: float) -> None:
        """Keep the largest share of the pull in pull + task gradient, both as Σ|·|."""
        total = pull + self._evidence.get("task_gradient", 0.0)
        share = pull / total if total else 0.0
        self._evidence["gradient_share"] = max(share, self._evidence.get("gradient_share", 0.0))

    def _over_shards(self, weights: Weights, sums: Tensor) -> list[float]:
        """Sums over this process's shards as sums over all; FSDP2 shards all weights alike."""
        first = weights.owner(weights.names()[0])
        total: list[float] = sum_over_shards(sums, first).tolist()
        return total

    # -- what is kept ------------------------------------------------------------------------------

    def _held(self, weights: Weights) -> list[str]:
        """The names of the weights that are trained now and have an anchor."""
        return [name for name in weights.names() if name in self._anchor]

    def _block(self, name: str, span: slice, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """A stretch of an anchor, and of an importance if there is one, in one type."""
        anchor = wide(self._anchor[name].block(span.start, span.stop, device))
        if name not in self._importance:
            return anchor, None
        return anchor, self._importance[name].block(span.start, span.stop, device)

    def _keep_anchor(self, weights: Weights, name: str) -> None:
        """Make the present value the anchor."""
        self._keep(self._anchor, name, weights.shaped(name, weights.value(name)), "float32")

    def _keep(
        self, store: dict[str, Kept], name: str, tensor: Tensor, precision: Precision
    ) -> None:
        if name in store:
            store[name].replace(tensor)
        else:
            store[name] = Kept(tensor, precision, self.place)

    def _precision(self) -> Precision:
        """How exactly importances are kept; anchors are always exact."""
        return "float32"

    def _stores(self) -> list[tuple[str, dict[str, Kept], Precision]]:
        importance = ("importance", self._importance, self._precision())
        return [("anchor", self._anchor, "float32"), importance]

    def _cut(self, weights: Weights) -> None:
        """Cut everything kept into shards as the weights are, which need not have been so then."""
        self._specs = {name: spec_of(weights.owner(name)) for name in weights.names()}
        for _, store, precision in self._stores():
            for name in weights.parameters.keys() & store.keys():
                kept, owner = store[name], weights.owner(name)
                if self._specs[name] and kept.numel != local(owner).numel():
                    full = kept.full(owner.device).view(owner.shape)
                    store[name] = Kept(part(full, owner), precision, self.place)

    def state(self) -> State:
        """Anchors and importances, whole, and an automatic strength."""
        tensors: dict[str, Tensor] = {}
        for kind, store, _ in self._stores():
            for name, kept in store.items():
                spec = self._specs.get(name)
                parts = {"": whole(kept.full(CPU), spec)} if spec else kept.tensors()
                tensors |= {f"{kind}/{name}/{k}".rstrip("/"): t for k, t in parts.items()}
        return State(tensors, {"strength": self._tuned})

    def restore(self, ctx: Context, state: State) -> None:
        """Take anchors, importances and the strength back."""
        weights = self._weights(ctx)
        self._tuned = state.values["strength"]
        for kind, store, precision in self._stores():
            store.clear()
            found: dict[str, dict[str, Tensor]] = {}
            for key, tensor in state.tensors.items():
                if key.startswith(f"{kind}/"):
                    name, codes = key.removeprefix(f"{kind}/"), ""
                    if name.endswith(("/codes", "/scales")):
                        name, _, codes = name.rpartition("/")
                    found.setdefault(name, {})[codes] = tensor
            for name, parts in found.items():
                owner = weights.parameters.get(name)
                device = ctx.device if owner is None else owner.device
                if "" in parts:
                    store[name] = Kept(parts[""].to(device), precision, self.place)
                else:
                    shape = self._anchor[name].shape
                    store[name] = Kept.restored(parts, shape, precision, self.place, device)
        self._cut(weights)

    def declared_bytes(self, ctx: Context) -> int:
        """The anchor in the weights' own precision, and the importance as `precision` says."""
        weights = self._weights(ctx)
        held = {name: weights.value(name) for name in weights.names() if name in self._anchor}
        total = sum(value.nbytes for value in held.values())
        for name in self._importance.keys() & held.keys():
            n = held[name].numel()
            each = {"float32": max(4, held[name].element_size()), "bfloat16": 2, "uint8": 1}
            scales = 4 * -(-n // BLOCK) if self._precision() == "uint8" else 0
            total += n * each[self._precision()] + scales
        return total
