"""LoRA adapters of a model by their names: adding one, its tensors, and their hash."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import nn

from keeptune.errors import MethodError
from keeptune.method import Context

# What biases that are trained beside an adapter stand against.
MORE = "adds an adapter with each task, and only one adapter of a model can train biases"
BASE = "asks the model without its adapter, where trained biases would stay"
FIRST = "default"  # the adapter that a model is dressed with


def add_adapter(ctx: Context, name: str, *, head: bool = True) -> None:
    """Add an adapter of the kind of the first one; which is active stays as it is.

    Its first weights depend on the seed and the task alone.

    Args:
        ctx: The task.
        name: Of the new adapter.
        head: With a head of its own, for classifiers, and with the first one's dropout; else with
            neither, for an adapter that is never trained.
    """
    model: Any = ctx.model
    config = copy.deepcopy(model.peft_config[FIRST])
    config.inference_mode = False
    config.init_lora_weights = True  # others, as PiSSA's, would take a second part out of the base
    devices = [ctx.device] if ctx.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(ctx.random("adapter").integers(2**31)))
        if head:
            model.add_adapter(name, config)
        else:
            config.modules_to_save, config.lora_dropout = None, 0.0
            # A classifier's own `add_adapter` would add a head.
            peft.PeftModel.add_adapter(model, name, config)


def refuse_dora(ctx: Context, who: str, does: str) -> None:
    """Refuse an adapter whose update is not B A alone.

    Args:
        ctx: The task.
        who: The method.
        does: What it does, that B A is needed for.

    Raises:
        MethodError: The adapter is a DoRA.
    """
    configs: dict[str, Any] = getattr(ctx.model, "peft_config", {})
    if any(getattr(config, "use_dora", False) for config in configs.values()):
        raise MethodError(
            f"The method {who!r} {does}, which DoRA rescales row by row. Leave `use_dora` out of "
            "the adapter's options, or remove the method."
        )


def refuse_biases(ctx: Context, who: str, why: str = MORE) -> None:
    """Refuse biases that an adapter trains beside its own weights.

    Args:
        ctx: The task.
        who: The method.
        why: What it does that they stand against.

    Raises:
        MethodError: The first adapter trains biases.
    """
    configs: dict[str, Any] = getattr(ctx.model, "peft_config", {})
    biases = [getattr(config, "bias", "none") for config in configs.values()]
    if bias := next((bias for bias in biases if bias != "none"), None):
        raise MethodError(
            f"The method {who!r} {why}. Leave `bias: {bias}` out of the adapter's options, or "
            "remove the method."
        )


@contextmanager
def base_alone(ctx: Context) -> Iterator[None]:
    """The model without its adapters for a moment; what is trained stays trained."""
    model: Any = ctx.model
    learned = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in learned:  # PEFT freezes all adapters, and frees the active one
            parameter.requires_grad_(flag)


def factors(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """A and B of one adapter, by their names without the adapter's."""
    found = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if ".lora_" in name and adapter in words[-2:]:
            words.remove(adapter)
            found[".".join(words)] = parameter
    return found


def adapter_hash(model: Any, adapter: str) -> str:
    """SHA-256 over one adapter's tensors, in name order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if f".{adapter}." in name or name.endswith(f".{adapter}"):
            digest.update(name.encode())
            flat = parameter.detach().contiguous().view(-1).view(torch.uint8)
            digest.update(flat.cpu().numpy().tobytes())
    return digest.hexdigest()
