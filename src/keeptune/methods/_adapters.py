"""LoRA adapters of a model by their names: adding one, its tensors, and their hash."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import peft
import torch
from torch import nn

from keeptune.method import Context

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
    devices = [ctx.device] if ctx.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(ctx.random("adapter").integers(2**31)))
        if head:
            model.add_adapter(name, config)
        else:
            config.modules_to_save, config.lora_dropout = None, 0.0
            # A classifier's own `add_adapter` would add a head.
            peft.PeftModel.add_adapter(model, name, config)


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
