"""Per-example gradients out of one batched backward, summed as squares or absolute values.

The weights do not require gradients; the backward computes those of the modules' outputs only. A
module's input x and output gradient g give each example's weight gradient gᵀx, one GEMM into a
small buffer that is squared while it is in the cache. Nothing of a whole weight's size is made.

Rules exist for linear maps, embeddings (tied to a head too), LayerNorm and RMSNorm. `Uncovered`
is raised wherever they cannot be right: the caller then goes one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from keeptune.method import wide

Power = Literal["square", "absolute"]
# Elements of the buffer for gradients of one example: what stays in a core's cache; on a GPU the
# launches of kernels count instead.
CACHED, ON_GPU = 1 << 17, 1 << 26


class Uncovered(Exception):  # noqa: N818 - it is no error, the loop can do it
    """Some weight's gradient per example cannot be had from its module's input and output."""


def raised(values: Tensor, power: Power) -> Tensor:
    """Squares or absolute values."""
    return values.square() if power == "square" else values.abs()


def add_raised(sums: Tensor, values: Tensor, power: Power) -> None:
    """Add squares or absolute values to `sums`, in its precision; `values` may be overwritten."""
    if power == "square":
        sums.addcmul_(values, values)
    else:
        sums.add_(values.abs_())


class ExampleHooks:
    """While entered, every `backward` adds Σ over examples of (∂/∂w)² or |∂/∂w| to `sums`.

    Args:
        model: In eval mode, with no parameter that requires a gradient.
        sums: What is added to, by weight: each of the weight's shape.
        power: What is summed.

    Raises:
        Uncovered: There is no rule for one of the weights.
    """

    def __init__(self, model: nn.Module, sums: dict[nn.Parameter, Tensor], power: Power) -> None:
        self.sums, self.power = sums, power
        self.examples = self.rows = 0
        self.rounding = 0.0
        self._buffer = torch.empty(0)
        self._watched: list[tuple[nn.Module, Callable[..., None]]] = []
        self._handles: list[RemovableHandle] = []
        self._fired: set[nn.Module] = set()
        # Of weights that are embedding and head at once: the ids of this batch, and the head's
        # part of the gradient in the rows that the embedding also reaches.
        self._ids: dict[nn.Parameter, Tensor] = {}
        self._heads: dict[nn.Parameter, Tensor] = {}
        owners: dict[nn.Parameter, list[type]] = {weight: [] for weight in sums}
        for module in model.modules():
            own = [p for p in module.parameters(recurse=False) if p in owners]
            if own:
                self._watched.append((module, self._rule(module)))
            for weight in own:
                owners[weight].append(nn.Embedding if _is_embedding(module) else type(module))
        for weight, kinds in owners.items():
            if len(kinds) == 2 and nn.Embedding in kinds and nn.Linear in kinds:
                self._ids[weight] = torch.empty(0)
            elif len(kinds) != 1:
                raise Uncovered

    def __enter__(self) -> ExampleHooks:
        for module, rule in self._watched:
            watch = partial(self._watch, rule)
            self._handles.append(module.register_forward_hook(watch, prepend=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        for weight in self._ids:
            self.sums[weight].clamp_(min=0)  # by cancellation 0 may have become −0.0000001

    def expect(self, examples: int, rows: int) -> None:
        """Say how many examples the next batch has, and its rows: a multiple of them."""
        self.examples, self.rows = examples, rows

    def backward(self, total: Tensor, *, again: bool) -> None:
        """Run the backward of Σ over examples, and add to the sums.

        Args:
            total: The scalar.
            again: Whether another backward through the same batch follows.
        """
        if not total.requires_grad:
            raise Uncovered
        self._fired.clear()
        self._heads.clear()
        total.backward(retain_graph=again)  # type: ignore[no-untyped-call]

    # -- what the hooks do ------------------------------------------------------------------------

    def _watch(
        self, rule: Callable[..., None], module: Any, inputs: tuple[Any, ...], output: Any
    ) -> Tensor | None:
        if not torch.is_grad_enabled():  # the model wants no gradients of this part
            return None
        if len(inputs) != 1 or not isinstance(output, Tensor):
            raise Uncovered
        x = inputs[0].detach()
        if not output.requires_grad:
            # The graph begins here. The copy may be changed in place, which a leaf may not.
            first = output.detach()
            if _is_embedding(module) and len(x) == 1 and x.dim() > 1:
                # Positions, shared by all rows: spread out, each row has a gradient of its own.
                first = first.expand(self.rows, *first.shape[1:])
                x = x.expand(self.rows, *x.shape[1:])
            output = first.requires_grad_().clone()
        if _is_embedding(module) and module.weight in self._ids:
            self._ids[module.weight] = self._by_example(x)
        traced: Tensor = output
        traced.register_hook(partial(self._take, rule, module, x))  # type: ignore[no-untyped-call]
        return traced

    @torch.no_grad()
    def _take(self, rule: Callable[..., None], module: nn.Module, x: Tensor, g: Tensor) -> None:
        """Called with ∂ total / ∂ output, which has the output's shape."""
        if module in self._fired or len(x) != self.rows or len(g) != self.rows:
            raise Uncovered
        self._fired.add(module)
        self.rounding = max(self.rounding, torch.finfo(g.dtype).eps)
        if _is_embedding(module):
            x = self._by_example(x)
        else:
            x = x.reshape(self.examples, -1, x.shape[-1])
        rule(module, x, g.reshape(self.examples, -1, g.shape[-1]))

    def _by_example(self, ids: Tensor) -> Tensor:
        return ids.reshape(self.examples, -1)

    # -- the rules: x [examples, positions, in], g [examples, positions, out] -------------------

    def _rule(self, module: Any) -> Callable[..., None]:
        if isinstance(module, nn.Linear):
            return self._linear
        if type(module).__name__ == "Conv1D" and "nf" in vars(module):
            return self._transposed_linear
        if _is_embedding(module):
            return self._embedding
        is_norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        if is_norm and module.weight.dim() == 1:
            return self._norm
        raise Uncovered

    def _linear(self, module: Any, x: Tensor, g: Tensor) -> None:
        self._products(module.weight, g, x.to(g.dtype))
        self._summed(module.bias, g)

    def _transposed_linear(self, module: Any, x: Tensor, g: Tensor) -> None:
        self._products(module.weight, x.to(g.dtype), g)
        self._summed(module.bias, g)

    def _norm(self, module: Any, x: Tensor, g: Tensor) -> None:
        self._summed(module.weight, g * _normalised(module, x))
        self._summed(getattr(module, "bias", None), g)

    def _embedding(self, module: Any, ids: Tensor, g: Tensor) -> None:
        """One gradient row per example and id that occurs in it."""
        sums = self.sums[module.weight]
        shift = torch.arange(len(ids), device=ids.device)[:, None] * module.num_embeddings
        found, place = torch.unique(ids + shift, return_inverse=True)
        place = place.flatten()
        found %= module.num_embeddings
        own = torch.zeros(len(found), g.shape[-1], dtype=sums.dtype, device=g.device)
        own.index_add_(0, place, g.flatten(0, 1).to(sums.dtype))
        own *= getattr(module, "embed_scale", 1.0)  # Gemma's
        if module.padding_idx is not None:
            own[found == module.padding_idx] = 0
        head = self._heads.get(module.weight)
        if head is None:
            sums.index_add_(0, found, raised(own, self.power))
            return
        # An id's head part stands at every place of the id; any of them will do.
        at = torch.empty_like(found).scatter_(0, place, torch.arange(len(place), device=g.device))
        head = head.flatten(0, 1)[at].to(sums.dtype)
        if self.power == "square":
            change = own * (2 * head + own)
        else:
            change = (head + own).abs() - head.abs()
        sums.index_add_(0, found, change)

    def _products(self, weight: nn.Parameter, left: Tensor, right: Tensor) -> None:
        """Add (leftᵀ right) of every example, raised, to the sums of a weight [left, right]."""
        if weight not in self.sums:
            return
        sums = self.sums[weight]
        if weight in self._ids:
            ids = self._ids[weight][:, None, :].expand(-1, left.shape[1], -1)
            self._heads[weight] = left.gather(2, ids).transpose(1, 2) @ right
        if left.shape[1] == 1:
            both = (raised(side[:, 0].to(sums.dtype), self.power) for side in (left, right))
            sums.addmm_(next(both).T, next(both))
            return
        size = CACHED if left.device.type == "cpu" else ON_GPU
        step = max(1, size // right.shape[2])
        if self._buffer.dtype != left.dtype or self._buffer.numel() < step * right.shape[2]:
            self._buffer = left.new_empty(max(size, right.shape[2]))
        for begin in range(0, len(sums), step):
            part = sums[begin : begin + step]
            product = self._buffer[: part.numel()].view_as(part)
            for a, b in zip(left[:, :, begin : begin + step].mT, right, strict=True):
                torch.mm(a, b, out=product)
                add_raised(part, product, self.power)

    def _summed(self, weight: nn.Parameter | None, gradients: Tensor) -> None:
        """Add gradients [examples, positions, n], summed over positions and raised."""
        if weight is not None and weight in self.sums:
            sums = self.sums[weight]
            each = gradients.sum(1, dtype=sums.dtype)
            sums.add_(raised(each, self.power).sum(0))


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and not (module.scale_grad_by_freq or module.sparse)


def _normalised(module: Any, x: Tensor) -> Tensor:
    """What a norm multiplies by its weight (or by 1 + weight), in float32 at least."""
    x = wide(x)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], eps=module.eps)
    names: Iterable[str] = ("variance_epsilon", "eps")
    given = [vars(module)[name] for name in names if vars(module).get(name) is not None]
    return F.rms_norm(x, x.shape[-1:], eps=given[0] if given else None)
