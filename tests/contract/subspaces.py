"""What a method that keeps new updates out of old directions must do beyond the clauses."""

from __future__ import annotations

import torch

import pico
from keeptune.methods._adapters import factors
from keeptune.methods.olora import OLoRA
from pencil import context, learn


def pulls_off_the_earlier_adapters(cls: type[OLoRA]) -> None:
    """In the third task the pull on A is the gradient of strength · Σ |A_old Aᵀ| over both."""
    model, method = pico.adapted(pico.causal_lm(16)), cls(strength=2.0)
    for index in range(2):
        learn(model, method, index)
    ctx = context(model, task="t2", index=2)
    method.begin_task(ctx)
    for weight in ctx.trainable().values():
        weight.grad = torch.zeros_like(weight)
    method.gradients(ctx)
    new, old = factors(model, "default"), [factors(model, f"task_00{i}") for i in range(2)]
    for name, factor in new.items():
        want = torch.zeros_like(factor)
        if "lora_A" in name:
            for adapter in old:
                want += 2 * (factor @ adapter[name].T).sign() @ adapter[name]
        assert factor.grad is not None
        assert torch.allclose(factor.grad, want, atol=1e-5), f"{name} is pulled otherwise"
