"""What a penalty holds: the trained weights themselves, or the effective update of LoRA modules.

Both look alike to a penalty: named flat values, room for a gradient, and a proximal step.
"""

from __future__ import annotations

from collections.abc import Iterator

import peft
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._anchor.kept import BLOCK
from keeptune.methods._anchor.shards import local


def blocks(values: Tensor) -> Iterator[slice]:
    """Cut flat values so that a buffer stays in a processor's cache, or is small on a GPU."""
    size = 1024 * BLOCK if values.device.type == "cpu" else 65536 * BLOCK
    for start in range(0, len(values), size):
        yield slice(start, min(start + size, len(values)))


class Weights:
    """The trained weights as they are: all weights, or LoRA's factors A and B.

    Under FSDP2 every process sees its own shard.

    Attributes:
        parameters: By name; a tied weight once.
    """

    def __init__(self, ctx: Context) -> None:
        self.parameters = ctx.trainable()

    def names(self) -> list[str]:
        """In the model's order, so that sums round alike everywhere."""
        return list(self.parameters)

    def shape(self, name: str) -> torch.Size:
        """The whole value's shape, not the shard's."""
        return self.parameters[name].shape

    def shaped(self, name: str, flat: Tensor) -> Tensor:
        """A flat value in the shape that this process has of it."""
        return flat.view(local(self.parameters[name]).shape)

    def owner(self, name: str) -> nn.Parameter:
        """The parameter that tells how a value is spread over processes."""
        return self.parameters[name]

    def owners(self, name: str) -> list[nn.Parameter]:
        """The trained parameters that a value is made of."""
        return [self.parameters[name]]

    def spans(self, name: str) -> Iterator[slice]:
        """The stretches in which `step_back` wants a value."""
        return blocks(self.value(name))

    @torch.no_grad()
    def value(self, name: str) -> Tensor:
        """The flat value; for weights as they are, changing it changes the weight.

        Raises:
            MethodError: The weight is not contiguous in memory.
        """
        value = local(self.parameters[name])
        if not value.is_contiguous():
            raise MethodError(
                f"The weight {name} is not contiguous in memory, so it cannot be held in place. "
                "Make it so before training: `parameter.data = parameter.data.contiguous()`."
            )
        return value.view(-1)

    @torch.no_grad()
    def room(self, name: str) -> Tensor:
        """Flat room that a penalty adds its gradient to; `spread` must follow."""
        return _gradient(self.parameters[name]).view(-1)

    def spread(self, name: str, room: Tensor) -> None:
        """Carry what was added to the room on to the gradients; here it is there already."""

    def parts(self, name: str, pull: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters whose gradients a pull on this value changes, each with its flat share."""
        return [(self.parameters[name], pull)]

    @torch.no_grad()
    def step_back(self, name: str, span: slice, anchor: Tensor, weight: Tensor) -> None:
        """One implicit step of the penalty: w ← (w + c a) / (1 + c), stable for any c.

        Args:
            name: Which value.
            span: Which stretch of it.
            anchor: a of this stretch, flat.
            weight: c = learning rate · strength · Ω, flat.
        """
        value = self.value(name)[span]
        value.lerp_(anchor.to(value.dtype), (weight / (weight + 1)).to(value.dtype))


class Effective(Weights):
    """The effective update ΔW = s·BA of every LoRA module, and any other trained weight as it is.

    Raises:
        MethodError: An adapter is not plain LoRA on linear layers, or its factors are sharded.
    """

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.modules = lora_modules(ctx.model)
        factors = [factor for name in self.modules for factor in self.factors(name)]
        if any(local(factor) is not factor for factor in factors):
            raise MethodError(
                "`on: effective` needs whole LoRA factors, but here they are spread over "
                "processes. Use `on: factors`, or DDP."
            )
        known = {id(factor) for factor in factors}
        self.parameters = {n: p for n, p in self.parameters.items() if id(p) not in known}
        for name, module in self.modules.items():
            self.parameters[name] = module.get_base_layer().weight

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, in] and B [out, r] of a module."""
        module = self.modules[name]
        (adapter,) = module.active_adapters
        return module.lora_A[adapter].weight, module.lora_B[adapter].weight

    def owners(self, name: str) -> list[nn.Parameter]:
        """A and B of a module."""
        return list(self.factors(name)) if name in self.modules else super().owners(name)

    def spans(self, name: str) -> Iterator[slice]:
        """A module's update in one piece: its factors are not to be cut."""
        if name in self.modules:
            return iter([slice(0, self.shape(name).numel())])
        return super().spans(name)

    def scaling(self, name: str) -> float:
        """S of a module."""
        module = self.modules[name]
        return float(module.scaling[module.active_adapters[0]])

    @torch.no_grad()
    def value(self, name: str) -> Tensor:
        """ΔW, flat: s·BA."""
        if name not in self.modules:
            return super().value(name)
        a, b = self.factors(name)
        return torch.mm(b, a).mul_(self.scaling(name)).view(-1)

    def room(self, name: str) -> Tensor:
        """Room for the gradient with respect to ΔW."""
        if name not in self.modules:
            return super().room(name)
        a, b = self.factors(name)
        return torch.zeros(b.shape[0] * a.shape[1], dtype=a.dtype, device=a.device)

    @torch.no_grad()
    def spread(self, name: str, room: Tensor) -> None:
        """The chain rule: with G in the room, A's gradient gets s·BᵀG and B's gets s·GAᵀ."""
        if name in self.modules:
            for factor, share in self.parts(name, room):
                _gradient(factor).view(-1).add_(share)

    @torch.no_grad()
    def parts(self, name: str, pull: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """The shares of A and of B in a pull on ΔW."""
        if name not in self.modules:
            return super().parts(name, pull)
        a, b = self.factors(name)
        pull = pull.view(b.shape[0], a.shape[1])
        s = self.scaling(name)
        return [
            (a, torch.mm(b.T, pull).mul_(s).view(-1)),
            (b, torch.mm(pull, a.T).mul_(s).view(-1)),
        ]

    @torch.no_grad()
    def step_back(self, name: str, span: slice, anchor: Tensor, weight: Tensor) -> None:
        """An implicit step on B, then one on A, neither of which can raise the penalty."""
        if name not in self.modules:
            super().step_back(name, span, anchor, weight)
            return
        a, b = self.factors(name)
        shape = (b.shape[0], a.shape[1])
        step_factors_back(a, b, self.scaling(name), anchor.view(shape), weight.view(shape))


@torch.no_grad()
def step_factors_back(a: Tensor, b: Tensor, s: float, anchor: Tensor, weight: Tensor) -> None:
    """Implicit steps of c/2 Σ Ω (s·BA − D)² on each factor in turn, in place.

    For one factor with the other fixed the penalty is quadratic, and its curvature is at most
    rank · diagonal (Cauchy–Schwarz: (Σ_k v_k x_k)² ≤ r Σ_k v_k² x_k²). The implicit step of that
    bound, x ← x − g / (1 + r h), lowers the penalty whatever its strength.

    Args:
        a: A [r, in], changed.
        b: B [out, r], changed.
        s: The module's scaling.
        anchor: D [out, in].
        weight: c·Ω [out, in], learning rate · strength · importance.
    """
    rank = a.shape[0]
    pull = (s * (b @ a) - anchor).mul_(weight)
    b.sub_(s * (pull @ a.T) / (1 + rank * s * s * (weight @ a.square().T)))
    pull = (s * (b @ a) - anchor).mul_(weight)
    a.sub_(s * (b.T @ pull) / (1 + rank * s * s * (b.square().T @ weight)))


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """The LoRA modules that are trained, by the name of what they adapt.

    Raises:
        MethodError: One of them is not plain LoRA on a linear layer.
    """
    if not isinstance(model, peft.PeftModel):
        return {}
    found = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            continue
        if not any(p.requires_grad for p in module.parameters()):
            continue
        active = module.active_adapters
        plain = isinstance(module, LoraLinear) and not module.use_dora.get(active[0], False)
        if len(active) > 1 or not plain or not isinstance(module.get_base_layer(), nn.Linear):
            raise MethodError(
                f"`on: effective` works with one plain LoRA adapter on linear layers, but {name} "
                f"is {type(module).__name__} with the adapters {active}. Use `on: factors`."
            )
        found[name] = module
    return found


def _gradient(parameter: nn.Parameter) -> Tensor:
    """This process's part of a gradient, made if there is none, dense in memory order."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = local(parameter.grad)
    if not gradient.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
        gradient = local(parameter.grad)
    return gradient
