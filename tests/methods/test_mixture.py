"""A mixture of experts by hand: shares, what they add up to, and what later tasks leave alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import pico
from keeptune import state
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import ADDED, Method
from keeptune.methods._isolate.gate import Gate, level, likely_shares
from keeptune.methods._questions import Router
from keeptune.methods.ewc import EWC
from keeptune.methods.freeze import Freeze
from keeptune.methods.inc_lora import IncLoRA
from keeptune.methods.mixture import Mixture
from keeptune.methods.packnet import PackNet
from keeptune.methods.progressive import Progressive
from keeptune.methods.task_lora import TaskLoRA
from pencil import context
from words import fresh, questions, rows, shares

IDS = torch.tensor([[6, 21, 13, 30, 9, 22, 31, 8]])  # words of all tasks


@torch.no_grad()
def answers(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits.clone()


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"} | settings
    )


def stream(tasks: int, **settings: Any) -> tuple[Any, Mixture]:
    """A model that has learned tasks, each of which moved its expert somewhere of its own."""
    model, method = fresh(), Mixture(**settings)
    for index in range(tasks):
        ctx = context(model, rows(index), task=f"t{index}", index=index)
        method.begin_task(ctx)
        move(ctx, index)
        method.end_task(ctx)
    return model, method


@torch.no_grad()
def move(ctx: Any, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for weight in ctx.trainable().values():
        weight.add_(0.3 * torch.randn(weight.shape, generator=g))


# -- the gate -------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    gate = Gate(temperature=1.0)
    gate.learned(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, math.log(3)]))
    # (5, 5) over its rms is (1, 1): scores 1 and 1 + ln 3
    torch.testing.assert_close(gate(torch.tensor([5.0, 5.0])), torch.tensor([0.25, 0.75]))
    # (3, 0) becomes (√2, 0): scores √2 and ln 3
    one = math.exp(2**0.5) / (math.exp(2**0.5) + 3)
    torch.testing.assert_close(gate(torch.tensor([3.0, 0.0])), torch.tensor([one, 1 - one]))
    hot = Gate(temperature=2.0)
    hot.learned(gate.keys, gate.offsets)
    share = 1 / (1 + 3**0.5)
    torch.testing.assert_close(hot(torch.tensor([5.0, 5.0])), torch.tensor([share, 1 - share]))


def test_shares_are_not_of_half_precision_in_mixed_training() -> None:
    gate = Gate(temperature=1.0)
    # Of 700, bfloat16 tells apart steps of 4.
    gate.learned(torch.tensor([[700.0, 0.0], [700.0, 0.0]]), torch.tensor([0.0, math.log(3)]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gate(torch.tensor([5.0, 5.0])), torch.tensor([0.25, 0.75]))


def test_a_large_token_is_leveled() -> None:
    token = torch.tensor([[3.0, -4.0], [3000.0, -4000.0]])
    torch.testing.assert_close(level(token)[0], level(token)[1])
    assert level(token[0].to(torch.bfloat16)).dtype == torch.float32


def test_shares_are_how_likely_each_task_is() -> None:
    router, g = Router("classifier"), torch.Generator().manual_seed(0)
    for middle in (0.0, 1.0, -0.5):
        router.learn(torch.randn(400, 3, generator=g) + middle)
    weights, offsets = router.discriminant()
    asked = torch.randn(7, 3, generator=g)
    shown = [
        torch.distributions.MultivariateNormal(mean, router.covariance()).log_prob(asked)
        for mean in router.tensors["means"]
    ]
    want = torch.stack(shown, 1).softmax(1)
    torch.testing.assert_close((asked @ weights - offsets).softmax(1), want, atol=1e-5, rtol=1e-4)


def test_the_gate_is_that_of_all_tasks_at_once_in_any_order() -> None:
    keys = []
    for order in ((0, 1, 2), (2, 0, 1)):
        model, method = fresh(), Mixture()
        for index in order:  # the task's own number, so that the same tokens are looked at
            ctx = context(model, rows(index), task=f"t{index}", index=index)
            method.begin_task(ctx)
            move(ctx, index)
            method.end_task(ctx)
        gate = model.get_submodule(ADDED)
        keys.append(gate.keys[[order.index(task) for task in range(3)]])
    torch.testing.assert_close(keys[0], keys[1], atol=1e-3, rtol=1e-4)


def test_the_shares_of_unseen_tokens_are_those_of_draws() -> None:
    gate, g = Gate(temperature=1.5), torch.Generator().manual_seed(0)
    gate.learned(torch.randn(3, 4, generator=g), torch.randn(3, generator=g))
    center, mix = torch.ones(4), torch.randn(4, 4, generator=g)
    drawn = center + torch.randn(20_000, 4, generator=g) @ mix.T
    want = ((drawn @ gate.keys.T + gate.offsets) / 1.5).softmax(-1).mean(0)
    normal = torch.randn(20_000, 3, generator=g)
    got = likely_shares(center, mix @ mix.T, gate, normal)
    torch.testing.assert_close(got, want, atol=0.01, rtol=0)


# -- the model ------------------------------------------------------------------------------------


def test_a_layer_adds_the_experts_by_their_shares() -> None:
    model, _ = stream(3)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    answers(model.eval())
    (x, got), share = seen[0], model.get_submodule(ADDED).shares
    want = layer.base_layer(x)
    for number, name in enumerate(("task_000", "task_001", "default")):
        want = want + share[..., number, None] * (x @ layer.get_delta_weight(name).T)
    assert share.shape == (1, 8, 3)
    torch.testing.assert_close(share.sum(-1), torch.ones(1, 8))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_first_task_trains_its_expert_as_plain_lora() -> None:
    model, plain = stream(0)[0], fresh()
    ctx = context(model, rows(0))
    Mixture().begin_task(ctx)
    upper = [n for n in context(plain).trainable() if ".layers.1." in n]
    assert list(ctx.trainable()) == upper
    assert torch.equal(answers(model), answers(plain))
    move(ctx, 0)
    for name, weight in ctx.trainable().items():
        plain.get_parameter(name).data.copy_(weight.data)
    assert torch.equal(answers(model), answers(plain))


def test_a_text_is_shared_out_alike_token_by_token_from_a_cache() -> None:
    model, _ = stream(3)
    whole = model.eval()(input_ids=IDS).logits
    share = model.get_submodule(ADDED).shares
    cache, steps = None, []
    for place in range(IDS.shape[1]):
        out = model(input_ids=IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append((out.logits, model.get_submodule(ADDED).shares))
    torch.testing.assert_close(torch.cat([s for _, s in steps], 1), share, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(torch.cat([x for x, _ in steps], 1), whole, atol=1e-3, rtol=1e-3)


def test_words_of_a_task_go_to_its_expert_whatever_came_after() -> None:
    model, method = stream(3)
    for task in range(3):
        assert shares(model, task)[task] > 0.99
    shown = method.evidence()
    assert shown["frozen_adapters"] == 2
    assert len(shown["shares"]) == 3
    assert sum(shown["shares"]) == pytest.approx(1)
    assert shown["new_share"] == shown["shares"][2] > 0.9
    assert 0 < shown["taken_from_old"] < 0.01


def test_an_old_task_is_answered_as_before_where_its_tokens_are_its_own() -> None:
    after = []
    for tasks in (1, 3):
        model, _ = stream(tasks)
        after.append(answers(model.eval(), questions(0)))
        with model.disable_adapter():
            base = answers(model, questions(0))
    apart = (after[1] - after[0]).norm() / (after[0] - base).norm()
    assert 0 < apart < 0.01


def test_two_forwards_do_not_mix_when_layers_are_recomputed() -> None:
    found = []
    for saving in (False, True):
        model, _ = stream(3)
        if saving:
            model.activation_checkpointing_enable()
        model.train()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        answers(model, IDS.flip(1))  # as a teacher's
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_a_copy_of_the_model_has_a_gate_of_its_own() -> None:
    model, _ = stream(2)
    before, twin = answers(model), copy.deepcopy(model)
    gate = model.get_submodule(ADDED)
    gate.learned(-gate.keys, gate.offsets)
    assert torch.equal(answers(twin), before)
    assert not torch.equal(answers(model), before)


def test_base_answers_are_the_base_models() -> None:
    model, _ = stream(2)
    with model.disable_adapter():
        assert torch.equal(answers(model), answers(pico.causal_lm(32)))


def test_a_classifier_has_experts_and_one_head() -> None:
    for base, parts in (
        (pico.classifier(3), ["q_proj"]),
        (pico.classifier(3, bert=True), ["query"]),
    ):
        config = lora(task_type="SEQ_CLS", target_modules=parts)
        model, method = pico.adapted(base, config), Mixture()
        for index in range(2):
            ctx = context(
                model, rows(index).remove_columns("labels").add_column("labels", [0] * 16)
            )
            ctx.index = index
            method.begin_task(ctx)
            move(ctx, index)
            method.end_task(ctx)
        heads = [name for name in ctx.trainable() if "lora_" not in name]
        assert heads
        assert all("modules_to_save.default" in name for name in heads)
        assert model(input_ids=IDS).logits.shape == (1, 3)
        assert method.evidence()["new_share"] > 0.5


# -- where it stands ------------------------------------------------------------------------------


def test_it_reads_the_lowest_layer_with_experts() -> None:
    model = pico.adapted(
        pico.causal_lm(32), lora(layers_to_transform=[1], target_modules=["q_proj"])
    )
    Mixture(layers=0.0).begin_task(context(model, rows(0)))
    _, size = model.get_submodule(ADDED).keys.shape
    assert size == 32
    model = fresh()
    Mixture(layers=0.0).begin_task(ctx := context(model, rows(0)))
    assert any(".layers.0." in name for name in ctx.trainable())


@pytest.mark.parametrize(
    ("settings", "config", "more", "words"),
    [
        ({"layers": 3}, {}, {}, "Mixture.layers: the model has 2 layers, got 3"),
        (
            {"layers": 1},
            {"layers_to_transform": [0], "target_modules": ["q_proj"]},
            {},
            "the lowest 1 of 2 layers without expe",
        ),
        ({"layers": 2}, {}, {}, "no weights in those above. Set fewer, or adapt higher layers"),
        ({}, {"use_dora": True}, {}, "'mixture' sums LoRA updates, which DoRA rescales"),
        ({}, {}, {"online": True}, "'mixture' looks at a task's rows before .* one after another"),
    ],
)
def test_what_it_cannot_do_is_refused(
    settings: dict[str, Any], config: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    model = pico.adapted(pico.causal_lm(32), lora(**config))
    with pytest.raises(MethodError, match=words):
        Mixture(**settings).begin_task(context(model, rows(0), **more))


@pytest.mark.parametrize("other", [EWC, Freeze, IncLoRA, PackNet, Progressive, TaskLoRA])
def test_it_does_not_run_beside_what_moves_the_same(other: type[Method]) -> None:
    with pytest.raises(MethodError, match=r"'mixture'.*cannot run together"):
        Chain([Mixture(), other()])


# -- what it keeps --------------------------------------------------------------------------------


def test_it_comes_back_with_the_models_own_tensors() -> None:
    model, method = stream(3)
    want = answers(model.eval())
    saved = {n: t.detach().clone() for n, t in state.own_tensors(model).items()}
    other, again = fresh(seed=5), Mixture()
    again.restore(ctx := context(other, index=2), method.state())
    state.put_tensors(other, saved)
    assert torch.equal(answers(other.eval()), want)
    assert list(ctx.trainable()) == [n for n, p in model.named_parameters() if p.requires_grad]


def test_it_keeps_a_mean_for_each_task_and_one_covariance() -> None:
    model, method = stream(2)
    kept = method.state().tensors
    assert {name: tuple(t.shape) for name, t in kept.items()} == {
        "means": (2, 32),
        "scatter": (32, 32),
    }
    assert method.declared_bytes(context(model)) == 4 * (2 * 32 + 32 * 32)
    assert Mixture().declared_bytes(context(model)) == 0
