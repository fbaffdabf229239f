"""The adapter of a run: what fits a model, and what would change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig

import pico
from keeptune.dressing import dress
from keeptune.errors import RecipeError


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"} | settings
    )


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    def first(seed: int) -> Any:
        torch.rand(1)
        model = dress(pico.causal_lm(16), lora(), seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n)

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["query"]),
        lora(target_modules=["q_proj"], layers_to_transform=[99]),
        lora(target_modules="*.q_proj"),
        PromptTuningConfig(task_type="CAUSAL_LM"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_the_names_that_would(config: Any) -> None:
    with pytest.raises(RecipeError, match=r"PEFT cannot put it .* called q_proj, k_proj, v_proj"):
        dress(pico.causal_lm(16), config, 0)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_first_values_out_of_the_models_own_weights_are_refused(start: str) -> None:
    with pytest.raises(RecipeError, match="Allowed: true, false, gaussian, orthogonal"):
        dress(pico.causal_lm(16), lora(init_lora_weights=start), 0)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_every_other_start_leaves_the_model_what_it_was(start: Any) -> None:
    plain = pico.causal_lm(16).state_dict()
    dressed: Any = dress(pico.causal_lm(16), lora(init_lora_weights=start), 0)
    for name, weight in dressed.get_base_model().state_dict().items():
        own = name.replace(".base_layer", "")
        assert ".lora_" in name or torch.equal(weight, plain[own])
