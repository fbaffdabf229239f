"""The adapter that a model is trained with, put on it."""

from __future__ import annotations

import re
import warnings
from typing import Any

import peft
import torch
from torch import nn

from keeptune.errors import RecipeError
from keeptune.recipe import Recipe
from keeptune.recipe_checks import peft_settings

LEAVES_BASE = ("gaussian", "orthogonal")  # ways to draw LoRA's first values; PiSSA and others edit


def adapter_config(recipe: Recipe) -> Any:
    """The PEFT config of a recipe's adapter, or None."""
    if recipe.adapter == "none":
        return None
    config, settings = peft_settings(recipe.adapter)
    kind = "SEQ_CLS" if recipe.kind == "classification" else "CAUSAL_LM"
    return config(**settings, task_type=kind)


def dress(model: nn.Module, adapter: Any, seed: int) -> nn.Module:
    """The model with its adapter, or with all its weights trainable; always in float32.

    The adapter's first weights depend on the seed alone.

    Raises:
        RecipeError: The adapter does not fit the model, or would change the model's own weights.
    """
    if adapter is None:
        return model.float().requires_grad_(True)
    if isinstance(model, peft.PeftModel):
        raise RecipeError("The model has an adapter already; leave `adapter` out, or give a base.")
    start = getattr(adapter, "init_lora_weights", True)
    if not isinstance(start, bool) and start not in LEAVES_BASE:
        raise RecipeError(
            f"adapter: init_lora_weights {start!r} takes the adapter's first values out of the "
            "model's own weights, so that without the adapter it is no longer what it was. "
            f"Allowed: true, false, {', '.join(LEAVES_BASE)}."
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft 0.21 asks transformers 5 by a name that transformers is about to retire.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        torch.default_generator.manual_seed(seed)  # adapters are drawn on the CPU
        try:
            dressed: nn.Module = peft.get_peft_model(model, adapter)
        except (ValueError, TypeError, KeyError, RuntimeError, re.error) as error:
            linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
            names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise RecipeError(
                f"adapter: PEFT cannot put it on this model ({error}). Its linear modules are "
                f"called {names}."
            ) from error
        return dressed
