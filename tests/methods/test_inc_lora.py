"""Stacked adapters: what is frozen, what is trained, and that the model is the base plus all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import pico
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.methods._adapters import adapter_hash, factors
from keeptune.methods.freeze import Freeze
from keeptune.methods.inc_lora import IncLoRA
from keeptune.methods.task_lora import TaskLoRA
from pencil import context, learn

IDS = torch.tensor([[6, 7, 8, 9, 10]])


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.clone()


def fresh() -> Any:
    return pico.adapted(pico.causal_lm(16))


def test_the_first_task_is_plain_lora() -> None:
    model, method = fresh(), IncLoRA()
    before = adapter_hash(model, "default")
    method.begin_task(context(model))
    assert set(model.peft_config) == {"default"}
    assert adapter_hash(model, "default") == before
    assert method.evidence() == {"frozen_adapters": 0}


def test_a_new_task_begins_with_the_answers_of_the_last() -> None:
    model, method = fresh(), IncLoRA()
    for index in range(3):
        learn(model, method, index)
        after = answers(model)
        method.begin_task(context(model, task="next", index=index + 1))
        torch.testing.assert_close(answers(model), after, atol=1e-5, rtol=1e-5)
        method.end_task(context(model))


def test_only_the_first_adapter_is_trained_and_frozen_ones_do_not_change() -> None:
    model, method = fresh(), IncLoRA()
    names = set(context(model).trainable())
    hashes = {}
    for index in range(3):
        ctx = learn(model, method, index)
        assert set(ctx.trainable()) == names
        for name, before in hashes.items():
            assert adapter_hash(model, name) == before
        hashes |= {n: adapter_hash(model, n) for n in model.peft_config if n != "default"}
    assert list(hashes) == ["task_000", "task_001"]
    assert method.evidence() == {"frozen_adapters": 2}


def test_the_model_is_the_base_and_the_sum_of_all_updates() -> None:
    model, method = fresh(), IncLoRA()
    for index in range(3):
        learn(model, method, index)
    model.eval()
    got = answers(model)
    base = model.get_base_model()
    with torch.no_grad():
        for layer in base.modules():
            if hasattr(layer, "get_delta_weight"):
                total = sum(layer.get_delta_weight(name) for name in model.peft_config)
                layer.get_base_layer().weight += total
    with model.disable_adapter():
        torch.testing.assert_close(answers(model), got, atol=1e-4, rtol=1e-4)


def test_what_is_frozen_is_what_was_trained_and_the_new_one_starts_without_effect() -> None:
    model, method = fresh(), IncLoRA()
    learn(model, method, 0)
    trained = {n: p.detach().clone() for n, p in factors(model, "default").items()}
    method.begin_task(context(model, index=1))
    frozen = factors(model, "task_000")
    assert frozen.keys() == trained.keys()
    assert all(torch.equal(frozen[n], trained[n]) for n in trained)
    for name, factor in factors(model, "default").items():
        assert bool(factor.any()) == ("lora_A" in name)


def test_a_new_adapter_depends_on_seed_and_task_alone() -> None:
    hashes = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        model, method = fresh(), IncLoRA()
        learn(model, method, 0)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        method.begin_task(context(model, seed=seed, index=1))
        assert torch.equal(torch.get_rng_state(), before)
        hashes.append(adapter_hash(model, "default"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_frozen_adapters_drop_nothing_while_the_new_one_is_trained() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5)
    model, method = pico.adapted(pico.causal_lm(16), config), IncLoRA()
    learn(model, method, 0)
    method.begin_task(context(model, index=1))
    want = answers(model.eval())
    assert torch.equal(answers(model.train()), want)  # the new one has no effect yet


def test_a_classifiers_head_goes_on_being_trained() -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    model, method = pico.adapted(pico.classifier(3), config), IncLoRA()
    for index in range(3):
        ctx = learn(model, method, index)
        heads = [name for name in ctx.trainable() if "lora_" not in name]
        assert heads == ["base_model.model.score.modules_to_save.default.weight"]
    logits = model(input_ids=IDS).logits
    assert logits.shape == (1, 3)
    logits.sum().backward()


def test_dora_is_refused() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=True)
    model = pico.adapted(pico.causal_lm(16), config)
    with pytest.raises(MethodError, match="'inc_lora' sums LoRA updates, which DoRA rescales"):
        IncLoRA().begin_task(context(model))


@pytest.mark.parametrize("first", [True, False])
def test_what_another_method_freezes_stays_frozen(first: bool) -> None:
    model, stacked, half = fresh(), IncLoRA(), Freeze(layers=1)
    chain = Chain([stacked, half] if first else [half, stacked])
    learn(model, chain, 0)
    ctx = context(model, task="t1", index=1)
    chain.begin_task(ctx)
    wanted = set(ctx.trainable())
    assert wanted
    assert all(".layers.1." in name for name in wanted)
    stacked.restore(ctx, stacked.state())  # as when the task is gone on with
    assert set(ctx.trainable()) == wanted


def test_biases_are_refused_before_anything_is_learned() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", bias="lora_only")
    ctx = context(pico.adapted(pico.causal_lm(16), config))
    for method in (IncLoRA(), TaskLoRA()):
        with pytest.raises(MethodError, match="Leave `bias: lora_only` out"):
            method.begin_task(ctx)


def test_a_further_adapter_starts_plain_however_the_first_one_did() -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa"
    )
    model, method = pico.adapted(pico.causal_lm(16), config), IncLoRA()
    learn(model, method, 0)
    after = answers(model)
    method.begin_task(context(model, task="t1", index=1))
    torch.testing.assert_close(answers(model), after, atol=1e-5, rtol=1e-5)
