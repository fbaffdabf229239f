"""What a method with slow weights must do beyond the clauses: they follow by the formula."""

from __future__ import annotations

import pytest
import torch

from keeptune.methods._slow import Slow
from pencil import Softmax, context

DECAY, STEPS = 0.75, 5


def follows_by_its_formula(cls: type[Slow]) -> None:
    """Over two tasks whose weights are 1, 2, 3, … after each step, from 0.

    For w_n = n the average is s_n = n − (1 − decayⁿ) · decay / (1 − decay).
    """
    alone = {"rows": 0} if "rows" in cls.model_fields else {}  # without replay
    model, method = Softmax([[0.0]]), cls(decay=DECAY, **alone)
    for index in range(2):
        ctx = context(model, task=f"t{index}", index=index)
        method.begin_task(ctx)
        for ctx.step in range(STEPS):
            method.gradients(ctx)
            with torch.no_grad():
                model.weight += 1
            method.after_step(ctx)
        method.end_task(ctx)
        n = STEPS * (index + 1)
        assert model.weight.item() == n, f"training goes on from {model.weight.item()}, not {n}"
        method.serve(ctx, None)
        want = n - (1 - DECAY**n) * DECAY / (1 - DECAY)
        got = model.weight.item()
        assert got == pytest.approx(want, rel=1e-6), f"answers with {got}, not {want}"
