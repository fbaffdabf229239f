"""Gradients on kept rows, and a step's own gradient moved by them: for `agem`, `gem`, `ilora`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from keeptune.buffer import Buffer
from keeptune.head_pass import CrossEntropy
from keeptune.method import Batch, Context, Method, State, wide
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._anchor.weights import blocks
from keeptune.processes import processes

Gradient = list[Tensor]  # one tensor for each weight
NO_SECOND_GRADIENT = "cannot take a second gradient while FSDP spreads the weights over processes"


def moved_weights(ctx: Context) -> list[nn.Parameter]:
    """The weights that this step moves: those with a gradient.

    Others have no part in an inner product with the step's gradient, and must stay where they are.
    """
    return [p for p in ctx.trainable().values() if p.grad is not None]


def mean_gradient(
    ctx: Context, weights: Sequence[nn.Parameter], rows: Iterable[Any], *words: object
) -> Gradient:
    """Gradient of the mean cross-entropy over the answers in these rows, times `ctx.grad_scale`.

    Args:
        ctx: The task.
        weights: What is differentiated by; each process has the whole of them.
        rows: The same in all processes.
        words: What the random numbers depend on besides seed and task.
    """
    batch = ctx.batch(list(rows))
    answers = max(1, ctx.answer_labels(batch).numel())

    def mean_loss(part: Batch) -> Tensor:
        said = ctx.read(part)
        said.add(CrossEntropy(ctx.answer_labels(part)), 1 / answers)
        total = said.total()
        assert total is not None
        return total

    return shared_gradient(ctx, weights, batch, mean_loss, *words)


def batch_gradient(
    ctx: Context,
    weights: Sequence[nn.Parameter],
    batch: Batch,
    logits_of: Callable[[Batch], Tensor],
    *words: object,
) -> Gradient:
    """`mean_gradient` for rows that are a batch already.

    Args:
        ctx: The task.
        weights: What is differentiated by.
        batch: All of it; every tensor has a line for each row.
        logits_of: From the rows of this process to their logits.
        words: As there.
    """
    answers = max(1, ctx.answer_labels(batch).numel())

    def mean_loss(part: Batch) -> Tensor:
        logits = ctx.answer_logits(logits_of(part), part)
        loss = F.cross_entropy(wide(logits), ctx.answer_labels(part), reduction="sum")
        return loss / answers

    return shared_gradient(ctx, weights, batch, mean_loss, *words)


def shared_gradient(
    ctx: Context,
    weights: Sequence[nn.Parameter],
    batch: Batch,
    objective: Callable[[Batch], Tensor],
    *words: object,
) -> Gradient:
    """Gradient of an objective that is a sum over rows, times `ctx.grad_scale`.

    One forward and backward in the model's present mode; `.grad` and the random state are left as
    they are. Dropout is drawn from (seed, task, words). Several processes share the rows out and
    all end with the gradient over all of them.

    Args:
        ctx: The task.
        weights: What is differentiated by; each process has the whole of them.
        batch: The rows, the same in all processes.
        objective: Called with this process's share of them, if it has any.
        words: What the random numbers depend on besides seed and task.
    """
    rank, world = processes()
    batch = {key: value[rank::world] for key, value in batch.items()}
    if not len(batch["labels"]):
        found = [torch.zeros_like(weight) for weight in weights]
    else:
        with torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad():
            torch.manual_seed(int(ctx.random(*words, rank).integers(2**63)))
            value = objective(batch) * ctx.grad_scale
            found = list(torch.autograd.grad(value, weights, materialize_grads=True))
    if world > 1:
        for i, tensor in enumerate(found):
            # A copy: autograd may give two weights the same tensor, which must not be summed twice.
            found[i] = tensor.clone(memory_format=torch.contiguous_format)
            distributed.all_reduce(found[i])
    return found


def add_gradient(
    ctx: Context, batch: Batch, objective: Callable[[Batch], Tensor], *words: object
) -> None:
    """Add the gradient of an objective to that of the step; as `shared_gradient`."""
    weights = moved_weights(ctx)
    found = shared_gradient(ctx, weights, batch, objective, *words)
    for weight, gradient in zip(weights, found, strict=True):
        assert weight.grad is not None
        weight.grad.add_(gradient)


@torch.no_grad()
def inner_products(gradients: Sequence[Gradient]) -> Tensor:
    """All inner products between gradients: k of them to [k, k] in float64, on the CPU.

    In blocks, so that no more is held than the gradients themselves.
    """
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    if gradients[0]:
        total = total.to(gradients[0][0].device)
    for tensors in zip(*gradients, strict=True):
        flat = [tensor.reshape(-1) for tensor in tensors]
        for span in blocks(flat[0]):
            block = [wide(values[span]) for values in flat]
            total += _products(block).to(total.device)
    return total.cpu()


def _products(values: list[Tensor]) -> Tensor:
    if len(values) > 2:
        stacked = torch.stack(values)
        return stacked @ stacked.T
    # Of two, nothing is copied.
    return torch.stack([one @ other for one in values for other in values]).view(len(values), -1)


def angle(dot: float, one: float, other: float) -> float:
    """Angle between two gradients in degrees, 0 to 180; 90 when one of them is 0.

    Args:
        dot: Their inner product.
        one: The square of the first one's norm.
        other: The square of the second one's.
    """
    size = math.sqrt(one * other)
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / size)))) if size else 90.0


class Referenced(Method):
    """A method that moves the step's gradient by gradients on kept rows."""

    rows: int = Field(8, ge=0, description="old rows in a reference gradient, each step")
    size: int = Field(2000, ge=1, description="rows kept over all earlier tasks")

    neutral: ClassVar[dict[str, Any]] = {"rows": 0}
    proof: ClassVar[str] = "reference_rows"
    traits: ClassVar[frozenset[str]] = frozenset({"buffer"})

    _buffers: dict[str, Buffer] = PrivateAttr(default_factory=dict)

    @abstractmethod
    def _buffer_of(self, task: str) -> str:
        """Name of the buffer that keeps a task's rows; each buffer gives one reference."""

    @abstractmethod
    def _weights_of(self, products: Tensor) -> list[float]:
        """What of each reference is added to the step's gradient.

        Args:
            products: [1 + k, 1 + k], inner products of the step's gradient and k references.
        """

    def begin_task(self, ctx: Context) -> None:
        """Refuse sharded weights.

        Raises:
            MethodError: The weights are spread over processes.
        """
        if self.rows:
            refuse_shards(ctx, self.name(), NO_SECOND_GRADIENT)

    def gradients(self, ctx: Context) -> None:
        """Move the step's gradient where it would undo what was learned."""
        if not self.rows or not self._filled:
            return
        weights = moved_weights(ctx)
        references, rows = [], 0
        for name, buffer in self._filled.items():
            drawn = buffer.draw(self.rows, ctx.random(self.name(), name, ctx.step))
            words = ("dropout", self.name(), name, ctx.step)
            kept = buffer.examples(drawn)
            references.append(mean_gradient(ctx, weights, kept, *words))
            rows += len(drawn)
        own = [weight.grad for weight in weights if weight.grad is not None]
        products = inner_products([own, *references])
        for reference, weight in zip(references, self._weights_of(products), strict=True):
            if weight != 0:
                for tensor, other in zip(own, reference, strict=True):
                    tensor.add_(other, alpha=weight)
        self._note(products, rows)

    @property
    def _filled(self) -> dict[str, Buffer]:
        """Those with rows: all may have been forgotten."""
        return {name: buffer for name, buffer in self._buffers.items() if len(buffer)}

    def _note(self, products: Tensor, rows: int) -> None:
        shown = self._evidence
        for key in ("reference_rows", "extra_forward_rows", "extra_backward_rows"):
            shown[key] = shown.get(key, 0) + rows
        short = self.rows * len(self._filled) - rows
        shown["rows_short"] = shown.get("rows_short", 0) + short
        if not products.isfinite().all():
            return
        own, *dots = products[0].tolist()
        squares = products.diagonal()[1:].tolist()
        sums = shown.setdefault("angles", dict.fromkeys(self._filled, 0.0))
        for name, dot, square in zip(self._filled, dots, squares, strict=True):
            sums[name] += angle(dot, own, square)
        shown["steps"] = shown.get("steps", 0) + 1
        shown["conflicts"] = shown.get("conflicts", 0) + (min(dots) < 0)

    def evidence(self) -> dict[str, Any]:
        """Old rows looked at, missed and kept, share of conflicts, mean angles in degrees."""
        shown = dict(self._evidence)
        if steps := shown.pop("steps", 0):
            shown["conflict_share"] = shown.pop("conflicts") / steps
            shown["angles"] = {name: value / steps for name, value in shown["angles"].items()}
        buffers = self._buffers.values()
        return shown | {
            "rows_kept": sum(map(len, buffers)),
            "bytes_on_disk": sum(buffer.on_disk() for buffer in buffers),
        }

    def end_task(self, ctx: Context) -> None:
        """Keep rows of the task."""
        if self.rows:
            buffer = self._buffers.setdefault(self._buffer_of(ctx.task), Buffer(self.size))
            buffer.add(ctx.dataset, ctx.task, ctx.random("reservoir"), folder=ctx.folder)

    def state(self) -> State:
        """The kept rows."""
        whole = State(values={"buffers": list(self._buffers)})
        for i, buffer in enumerate(self._buffers.values()):
            part = buffer.state().under(str(i))
            whole.tensors |= part.tensors
            whole.files |= part.files
        return whole

    def restore(self, ctx: Context, state: State) -> None:
        """Take the kept rows back."""
        self._buffers = {}
        for i, name in enumerate(state.values["buffers"]):
            self._buffers[name] = Buffer(self.size)
            self._buffers[name].restore(state.part(str(i)), ctx.folder)

    def declared_bytes(self, ctx: Context) -> int:
        """The kept rows."""
        return sum(buffer.nbytes() for buffer in self._buffers.values())
