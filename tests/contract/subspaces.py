"""What a method that keeps new updates out of old directions must do beyond the clauses."""

from __future__ import annotations

import torch
from torch import nn

import pico
from keeptune.methods._adapters import factors
from keeptune.methods._subspace import strongest
from keeptune.methods.olora import OLoRA
from keeptune.methods.osf import OSF
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


def train(method: OSF, model: nn.Module, index: int, steps: int = 20) -> None:
    """A task of AdamW steps, with weight decay, on random gradients."""
    ctx = context(model, task=f"t{index}", index=index)
    method.begin_task(ctx)
    weights = list(ctx.trainable().values())
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    g = torch.Generator().manual_seed(index)
    for ctx.step in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=g)
        method.gradients(ctx)
        optimizer.step()
        method.after_step(ctx)
    method.end_task(ctx)


def keeps_the_old_subspace(cls: type[OSF]) -> None:
    """After AdamW the low part's singular vectors are orthogonal to the old ones, to 1e-5."""
    model, method = pico.causal_lm(16), cls(ratio=0.25, grow=0.25)
    for index, share in enumerate((0.25, 0.5)):
        layers = {n: m for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}
        before = {n: m.weight.detach().clone() for n, m in layers.items()}
        train(method, model, index)
        for name, layer in layers.items():
            # As exactly as the method: the last direction held may be all but equal to the next.
            u, s, v = strongest(before[name], share)
            low = layer.weight.detach().double() - (u.double() * s) @ v.double().T
            u_low, s_low, vh_low = torch.linalg.svd(low, full_matrices=False)
            real = s_low > 0.1 * s_low[0]  # of weak ones rounding turns the direction
            leaks = (u.double().T @ u_low[:, real], v.double().T @ vh_low[real].T)
            leak = max(part.abs().max() for part in leaks)
            assert leak < 1e-5, f"{name} leaks {leak:.1g} into the old subspace in task {index}"
