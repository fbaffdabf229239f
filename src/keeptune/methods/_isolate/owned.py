"""Who owns each element of a weight; some stay exactly where they are while others are trained.

Masks are uint8, and turned into the weight's type block by block: one byte instead of four for each
weight, and on a CPU ten times faster than a boolean mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

BLOCK = 262_144  # elements; a buffer of them stays in a processor's cache
SAMPLES = 64  # elements of each weight that are looked at after a step


def _blocks(moves: Tensor, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A flat mask in the type of `like`, block by block."""
    size = BLOCK if like.device.type == "cpu" else len(moves)
    buffer = torch.empty(min(size, len(moves)), dtype=like.dtype, device=like.device)
    for start in range(0, len(moves), size):
        span = slice(start, start + size)
        mask = moves[span]
        yield span, buffer[: len(mask)].copy_(mask)


def hold_gradient(parameter: nn.Parameter, moves: Tensor) -> None:
    """Set a gradient to 0 where the flat mask is 0."""
    if parameter.grad is None:
        return
    if not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    flat = parameter.grad.view(-1)
    for span, mask in _blocks(moves, flat):
        flat[span].mul_(mask)


def put_back(weight: Tensor, moves: Tensor, kept: Tensor | None) -> None:
    """Set a weight, where the flat mask is 0, to what is kept of it; None is 0.

    Args:
        weight: Changed.
        moves: 1 where the weight may move.
        kept: Flat; 0 where the weight may move, so that multiplying and adding is exact.
    """
    flat = weight.view(-1)
    for span, mask in _blocks(moves, flat):
        if kept is None:
            flat[span].mul_(mask)
        else:
            torch.addcmul(kept[span], flat[span], mask, out=flat[span])


def strayed(weight: Tensor, moves: Tensor, kept: Tensor | None) -> Tensor:
    """Whether any of a few held elements is not what is kept of it: a boolean."""
    every = slice(None, None, max(1, len(moves) // SAMPLES))
    held = weight.view(-1)[every] * (1 - moves[every])
    return (held != (0 if kept is None else kept[every])).any()


Weights = Mapping[str, nn.Parameter]
Tensors = dict[str, Tensor]


@dataclass
class Owned:
    """Owners of all elements of some weights, by the weights' names; all tensors are flat.

    Attributes:
        owner: uint8, 0 for nobody.
        moves: uint8, in a task: 1 where elements are trained.
        kept: In a task after the first: the elements that are not trained, 0 where they are.
        hidden: The elements that `hide` set to 0, in a line.
    """

    owner: Tensors = field(default_factory=dict)
    moves: Tensors = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)
    hidden: Tensors = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """Everything, by kind and name."""
        return {f"{k}/{n}": t for k, store in vars(self).items() for n, t in store.items()}

    @classmethod
    def of(cls, tensors: Tensors, device: torch.device) -> Owned:
        """From what `tensors` gave."""
        found = cls()
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            getattr(found, kind)[name] = tensor.to(device)
        return found

    def total(self) -> int:
        """How many elements there are."""
        return sum(owner.numel() for owner in self.owner.values())

    def free(self) -> int:
        """How many of them nobody owns."""
        return sum(int((owner == 0).sum()) for owner in self.owner.values())

    def begin(self, weights: Weights) -> None:
        """Train all elements that nobody owns, and keep the others."""
        first = not self.owner
        if first:
            self.owner = {n: p.new_zeros(p.numel(), dtype=torch.uint8) for n, p in weights.items()}
        self.moves = {n: (owner == 0).to(torch.uint8) for n, owner in self.owner.items()}
        if not first:
            self.kept = {n: weights[n].view(-1) * (1 - m) for n, m in self.moves.items()}

    def end(self, weights: Weights) -> None:
        """Train nothing any more."""
        self.put_back(weights)
        self.moves, self.kept = {}, {}

    def hold_gradients(self, weights: Weights) -> None:
        """Set the gradients of what must stay to 0."""
        for name, moves in self.moves.items():
            hold_gradient(weights[name], moves)

    def strayed(self, weights: Weights) -> bool:
        """Whether anything that must stay has moved, by a sample."""
        found = [strayed(weights[n], m, self.kept.get(n)) for n, m in self.moves.items()]
        return bool(torch.stack(found).any())

    def put_back(self, weights: Weights) -> None:
        """Undo what moved elements that must stay."""
        for name, moves in self.moves.items():
            put_back(weights[name], moves, self.kept.get(name))

    def prune(self, weights: Weights, share: float, owner: int) -> tuple[int, int]:
        """Give a new owner all of what nobody owns, but for the smallest; these are 0 from now on.

        Args:
            weights: Changed.
            share: What of each weight's unowned elements is left out, above 0 and below 1.
            owner: 1 to 255.

        Returns:
            How many elements were given and how many left out.
        """
        given = left = 0
        for name, owners in self.owner.items():
            places = (owners == 0).nonzero().view(-1)
            count = int(share * len(places))
            least = weights[name].view(-1)[places].abs().topk(count, largest=False).indices
            owners[places] = owner
            owners[places[least]] = 0
            self.moves[name] = (owners == owner).to(torch.uint8)
            given, left = given + len(places) - count, left + count
        self.put_back(weights)
        return given, left

    def hide(self, weights: Weights, last: int) -> None:
        """Set to 0 what owners after `last` own."""
        for name, owner in self.owner.items():
            later, flat = owner > last, weights[name].view(-1)
            self.hidden[name] = flat[later]
            flat[later] = 0

    def show(self, weights: Weights, last: int) -> None:
        """Undo `hide`."""
        for name, values in self.hidden.items():
            weights[name].view(-1)[self.owner[name] > last] = values
        self.hidden = {}
