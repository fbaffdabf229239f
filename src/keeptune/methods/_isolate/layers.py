"""Where a transformer's layers and embeddings are, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from keeptune.errors import MethodError


def layers(model: nn.Module, who: str) -> tuple[str, nn.ModuleList]:
    """The stack of a model's layers, bottom first, and its name.

    Args:
        model: With or without adapters.
        who: The method that asks, for the error.

    Raises:
        MethodError: There is no such stack.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not found:
        raise MethodError(
            f"The method {who!r} needs a model made of layers, but {type(model).__name__} has no "
            "torch.nn.ModuleList of them. Remove the method."
        )
    return max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def lowest(wanted: float, there: int, who: str) -> int:
    """How many of the bottom layers a setting means.

    Args:
        wanted: A share of them below 1, else their number.
        there: Layers of the model.
        who: The class whose setting `layers` it is, for the error.

    Raises:
        MethodError: There are not so many.
    """
    if wanted > there:
        raise MethodError(
            f"{who}.layers: the model has {there} layers, got {wanted:g}. Give their number, or a "
            "share of them below 1."
        )
    return round(wanted * there) if wanted < 1 else int(wanted)


def below(stack: str, count: int) -> tuple[str, ...]:
    """How names of parameters in the lowest `count` layers start."""
    return tuple(f"{stack}.{index}." for index in range(count))


def embeddings(model: nn.Module, stack: str) -> set[str]:
    """Names of the parameters that turn token ids into the first layer's input.

    Those of every torch.nn.Embedding, and of whatever stands with it in a module of its own, as a
    BERT's layer norm. A head that is tied to one is the same parameter.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or name.startswith(stack):
            continue
        home = name.rpartition(".")[0]
        if stack.startswith(f"{home}.") or not home:
            home = name
        found |= {n for n, _ in model.named_parameters() if n.startswith(f"{home}.")}
    return found


def units(stack: nn.ModuleList, index: int) -> Iterator[tuple[str, str]]:
    """The parts of one layer as (category, start of its parameters' names within the layer).

    A part is a linear layer with its adapter, a norm, or a parameter of a module that has other
    parts in it; its category is what it stands in ("self_attn", "mlp", …), or "norm".
    """
    inside = ""  # an adapted part is one, whatever stands in it
    for name, module in stack[index].named_modules():
        if inside and name.startswith(inside):
            continue
        adapted = isinstance(module, BaseTunerLayer)
        own = list(module.parameters(recurse=adapted))
        if not own:
            continue
        inside = f"{name}." if adapted else ""
        flat = not adapted and all(p.dim() < 2 for p in own)
        category, start = "norm" if flat else name.partition(".")[0], f"{name}." if name else ""
        if adapted or len(own) == len(list(module.parameters())):
            yield category, start
        else:
            yield from ((category, start + n) for n, _ in module.named_parameters(recurse=False))
