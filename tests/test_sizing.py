"""What a run is said to need: the bytes that can be known exactly are exact, the others near."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, MixtralConfig

import pico
from keeptune import Chain, Context, Method, phantom, registry
from keeptune.errors import ModelError
from keeptune.phantom import WIDE, Batch, count
from keeptune.prices import PRICES
from keeptune.sizing import Need, Sizer, Speed, measure_speed
from keeptune.tokens import collate

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SETTINGS = {"per_device_train_batch_size": 4}


@cache
def sizer(*, lora: bool = False) -> Sizer:
    config, adapter = pico.causal_lm().config, LORA if lora else None
    return Sizer(config, adapter, SETTINGS, longest=16, tokens=16, answers=16, rows=8)


def need(name: str, **settings: Any) -> Need:
    return sizer().need([registry.build(name, settings)])


# -- plain training -------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA])
def test_weights_gradients_and_moments_are_those_of_the_real_model(adapter: Any) -> None:
    model: Any = pico.causal_lm()
    if adapter is not None:
        model = pico.adapted(model, adapter)
    found = sizer(lora=adapter is not None).need([])
    ids = torch.ones(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    assert found.optimizer == sum(
        t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim()
    )


def test_what_a_forward_keeps_is_counted_on_a_real_model() -> None:
    kept: dict[int, int] = {}
    model = pico.causal_lm().train()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(4, 16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(input_ids=ids, labels=ids, use_cache=False)
    assert out.loss.requires_grad
    step = count(model.config, None, Batch(4, 16, logits=True))
    assert step.kept == pytest.approx(sum(kept.values()), rel=0.1)


def test_products_are_six_operations_a_weight_and_token_and_four_under_an_adapter() -> None:
    model = pico.causal_lm()
    tokens, weights = 4 * 16, sum(p.numel() for p in model.parameters())
    full = count(model.config, None, Batch(4, 16, logits=True))
    lora = count(model.config, LORA, Batch(4, 16, logits=True))
    assert full.forward_flops == pytest.approx(2 * weights * tokens, rel=0.15)
    assert full.backward_flops == pytest.approx(4 * weights * tokens, rel=0.15)
    added = lora.weights - full.weights
    frozen = 4 * weights * tokens + 6 * added * tokens
    assert lora.forward_flops + lora.backward_flops == pytest.approx(frozen, rel=0.15)


def test_a_deep_model_is_counted_as_if_every_layer_were_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(phantom, "SHALLOW", 1)
    monkeypatch.setattr(phantom, "DEEP", 2)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=5,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    short = count(config, None, Batch(2, 8))
    whole = phantom._count(config, None, Batch(2, 8), "causal_lm")
    for name in ("weights", "trained", "matrices", "edges", "kept", "forward_flops", "top"):
        assert getattr(short, name) == pytest.approx(getattr(whole, name), rel=1e-3), name
    assert short.rest >= whole.rest


def test_layers_computed_again_and_half_precision_keep_less() -> None:
    config = pico.causal_lm().config
    plain = count(config, None, Batch(4, 16))
    again = count(config, None, Batch(4, 16, recompute=True))
    half = count(config, None, Batch(4, 16, half=True))
    assert again.kept < 0.5 * plain.kept
    assert again.backward_flops > 1.2 * plain.backward_flops
    assert half.kept < plain.kept


def test_logits_of_all_positions_take_more() -> None:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    found = Sizer(config, None, SETTINGS, longest=16)
    assert found.need([registry.build("eaft")]).kept > 2 * found.need([]).kept
    assert found.need([registry.build("eaft", {"power": 0.0})]) == found.need([])


def test_a_classifier_is_counted_too() -> None:
    config = pico.classifier(3).config
    step = count(config, None, Batch(4, 16), kind="classification")
    assert step.weights == sum(p.numel() for p in pico.classifier(3).parameters())


def test_a_model_that_asks_for_values_is_said_to_be_uncountable() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"this model \(mixtral\) needs cannot be counted"):
        count(config, None, Batch(2, 8))


def test_counting_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    count(pico.causal_lm().config, LORA, Batch(2, 8))
    assert torch.equal(torch.get_rng_state(), before)


# -- methods --------------------------------------------------------------------------------------


def test_every_method_of_the_package_has_a_price() -> None:
    own = {n for n in registry.names() if registry.get(n).__module__.startswith("keeptune.")}
    assert set(PRICES) == own


@pytest.mark.parametrize("name", sorted(PRICES))
def test_no_price_is_below_nothing(name: str) -> None:
    found = sizer(lora=True).need([registry.build(name)])
    plain = sizer(lora=True).need([])
    assert found.memory > 0
    assert found.spread >= 0
    assert found.whole >= 0
    assert found.rows >= 1
    assert found.state >= plain.state


def after_one_task(method: Method) -> tuple[Method, Context]:
    """A method that has learned a task of two steps and begins another, and where it stands."""
    model = pico.causal_lm().train()
    rows = Dataset.from_dict({"input_ids": [[9] * 16] * 8, "labels": [[9] * 16] * 8})
    chain, contexts = Chain([method]), []
    for index in range(2):
        ctx = Context(model, f"t{index}", index, rows, collate(pico.tokenizer()))
        contexts.append(ctx)
        chain.begin_task(ctx)
        if index == 0:
            model(**ctx.batch(rows.to_list()[:4])).loss.backward()
            ctx.step, ctx.learning_rate = 0, 1e-3
            chain.gradients(ctx)
            chain.after_step(ctx)
            chain.end_task(ctx)
    return method, contexts[-1]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ewc", {}),
        ("ewc", {"precision": "bfloat16"}),
        ("mas", {}),
        ("l2sp", {}),
        ("wise", {}),
        ("ema", {}),
        ("merge", {}),
    ],
)
def test_what_is_held_for_weights_is_what_the_method_declares(
    name: str, settings: dict[str, Any]
) -> None:
    method, ctx = after_one_task(registry.build(name, settings))
    declared = method.declared_bytes(ctx)
    assert need(name, **settings).spread == pytest.approx(declared, rel=0.01)


def test_kept_rows_are_what_a_buffer_declares() -> None:
    method, ctx = after_one_task(registry.build("replay"))
    assert need("replay").whole == pytest.approx(method.declared_bytes(ctx), rel=0.3)


def test_methods_together_add_up_and_rows_multiply() -> None:
    both = sizer().need([registry.build("replay", {"ratio": 0.5}), registry.build("ewc")])
    assert both.spread == need("ewc").spread
    assert both.whole == need("replay").whole
    assert both.rows == 1.5
    assert both.flops == need("plain").flops


def test_a_neutral_method_costs_nothing() -> None:
    assert need("lwf", strength=0.0) == need("plain")


def test_lwf_is_one_forward_more_and_half_trains_less() -> None:
    plain, lwf, half = need("plain"), need("lwf"), need("half")
    assert lwf.flops / plain.flops == pytest.approx(4 / 3, rel=0.05)
    assert half.optimizer == plain.optimizer / 2
    assert half.flops < plain.flops


# -- devices and seconds --------------------------------------------------------------------------


def test_ddp_divides_nothing_and_fsdp_all_that_belongs_to_weights() -> None:
    found = need("ewc")
    assert found.ddp(1) == found.fsdp(1) == found.memory
    assert found.ddp(8) == found.ddp(2) == found.memory + found.gradients
    per_weight = found.weights + found.optimizer + found.gradients + found.spread
    assert found.fsdp(2) - found.fsdp(4) == pytest.approx(per_weight / 4)


def test_seconds_are_products_and_bytes_by_the_machines_speed() -> None:
    found = need("plain")
    assert found.seconds(Speed(found.flops, found.traffic, found.streamed)) == 3.0
    here = measure_speed(sizer().case)
    assert here.flops > 0
    assert here.traffic > 0
    assert here.streamed > 0


@pytest.mark.parametrize(
    ("optimizer", "each"), [("adamw_torch", 8), ("adamw_bnb_8bit", 2), ("sgd", 0)]
)
def test_the_optimizer_is_the_trainers(optimizer: str, each: int) -> None:
    config = pico.causal_lm().config
    found = Sizer(config, None, {"optim": optimizer}, longest=8).need([])
    assert found.optimizer == each * found.weights / WIDE


def test_accumulated_gradients_are_there_when_the_next_batch_begins() -> None:
    config = pico.causal_lm().config
    once, more = (
        Sizer(config, None, {"gradient_accumulation_steps": n}, longest=16).need([]).peak
        for n in (1, 2)
    )
    assert more > once


@pytest.mark.parametrize(("kind", "half"), [("causal_lm", True), ("classification", False)])
def test_on_a_gpu_each_kind_is_sized_for_its_own_trainers_defaults(
    kind: str, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model: Any = pico.classifier() if kind == "classification" else pico.causal_lm()
    batch = Sizer(model.config, None, {}, kind=kind).case.batch
    assert (batch.half, batch.recompute) == (half, half)
