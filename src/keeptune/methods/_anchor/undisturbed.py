"""Looking at a model in the middle of a run without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.processes import is_sharded


@contextmanager
def undisturbed(ctx: Context, weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, with only these weights requiring gradients; all is put back afterwards."""
    modes = [(module, module.training) for module in ctx.model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in ctx.model.parameters()]
    wanted = set(weights.values())
    sharded = is_sharded(ctx.model)
    if sharded and not all(weight.requires_grad for weight in wanted):
        raise MethodError(
            "FSDP gives no gradients of frozen weights, which the importance of effective weights "
            "needs. Use `on: factors`, or train without FSDP."
        )
    config: Any = getattr(ctx.model, "config", None)
    caches = getattr(config, "use_cache", None)
    devices = [ctx.device] if ctx.device.type == "cuda" else []
    try:
        ctx.model.eval()
        for parameter, *_ in parameters:
            parameter.grad = None
            if not sharded:  # FSDP has taken note of them
                parameter.requires_grad_(parameter in wanted)
        if caches:
            config.use_cache = False  # keys and values for generation, which nobody reads
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, learned, gradient in parameters:
            parameter.requires_grad_(learned)
            parameter.grad = gradient
        if caches:
            config.use_cache = caches
