"""Which half: of every category, from the seed and the task, and never of the embeddings."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from transformers import MambaConfig, MambaForCausalLM

import pico
from keeptune.methods._isolate.layers import units
from keeptune.methods.half import Half
from pencil import ONE_ROW, context


def held(model: Any, index: int = 0, seed: int = 0, share: float = 0.5) -> set[str]:
    """The names of the weights that are frozen in a task."""
    method, ctx = Half(share=share), context(model, ONE_ROW, index=index, seed=seed)
    before = ctx.trainable().keys()
    method.begin_task(ctx)
    frozen = before - ctx.trainable().keys()
    assert method.evidence().get("frozen", 0) == sum(model.get_parameter(n).numel() for n in frozen)
    method.end_task(ctx)
    assert ctx.trainable().keys() == before
    return frozen


def per_layer(frozen: set[str], kind: str) -> list[int]:
    found = Counter(int(n.split(".layers.")[1].split(".")[0]) for n in frozen if kind in n)
    return [found[index] for index in range(2)]


@pytest.mark.parametrize("seed", range(5))
def test_half_of_every_category(seed: int) -> None:
    frozen = held(pico.causal_lm(), seed=seed)
    assert per_layer(frozen, ".self_attn.") == [2, 2]
    assert sorted(per_layer(frozen, ".mlp.")) == [1, 2]
    assert per_layer(frozen, "layernorm") == [1, 1]
    assert all(".layers." in name for name in frozen)


def test_another_half_for_each_task_and_seed_and_the_same_when_asked_again() -> None:
    model = pico.causal_lm()
    sets = [held(model, index, seed) for index, seed in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert sets[0] == sets[3]
    assert sets[0] != sets[1]
    assert sets[0] != sets[2]


def test_both_factors_of_an_adapter_are_frozen_together() -> None:
    frozen = held(pico.adapted(pico.causal_lm()))
    ends = Counter(name.partition(".lora_")[0] for name in frozen)
    assert set(ends.values()) == {2}
    assert per_layer(frozen, ".self_attn.") == [4, 4]


def test_a_layer_norm_in_a_berts_attention_is_a_norm() -> None:
    frozen = held(pico.classifier(bert=True))
    norms = [n for n in frozen if "LayerNorm.weight" in n]
    assert len(norms) == 2
    matrices = [n for n in frozen if ".attention." in n and "weight" in n and "Norm" not in n]
    assert len(matrices) == 4


@pytest.mark.parametrize(("share", "attention"), [(0.25, [1, 1]), (0.75, [3, 3]), (0.0, [0, 0])])
def test_any_share(share: float, attention: list[int]) -> None:
    assert per_layer(held(pico.causal_lm(), share=share), ".self_attn.") == attention


def test_a_part_with_weights_of_its_own_beside_others_is_not_all_of_them() -> None:
    config = MambaConfig(vocab_size=16, hidden_size=16, state_size=4, num_hidden_layers=4)
    model = MambaForCausalLM(config)
    for seed in range(3):
        method, ctx = Half(), context(model, seed=seed)
        method.begin_task(ctx)
        assert 0.3 < method.evidence()["frozen_share"] < 0.7
        method.end_task(ctx)
    kinds = [name for name, _ in model.named_parameters() if ".layers.0.mixer." in name]
    starts = [f"backbone.layers.0.{start}" for _, start in units(model.backbone.layers, 0)]
    assert all(sum(name.startswith(start) for start in starts) == 1 for name in kinds)
