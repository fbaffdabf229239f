"""WiSE-FT: interpolation by hand, and the best low-rank cut against a dense SVD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import pico
from keeptune.errors import MethodError
from keeptune.layers import blocks_of
from keeptune.method import Method
from keeptune.methods._factors import in_pairs, mix_factors
from keeptune.methods._guarded import share_within, text_loss
from keeptune.methods.merge import Merge
from keeptune.methods.osf import OSF
from keeptune.methods.wise import WiSE
from pencil import ONE_ROW, Softmax, context, texts


@pytest.mark.parametrize(("mix", "want"), [(0.0, 1.0), (0.25, 2.0), (0.5, 3.0), (1.0, 5.0)])
def test_weights_by_hand(mix: float, want: float) -> None:
    model, method = Softmax([[1.0]]), WiSE(mix=mix)
    ctx = context(model)
    method.begin_task(ctx)
    with torch.no_grad():
        model.weight.fill_(5.0)
    method.end_task(ctx)
    assert model.weight.item() == want
    if mix < 1:
        assert method.evidence()["moved_back"] == 5.0 - want


def test_it_goes_back_to_the_weights_before_this_task_only() -> None:
    model, method = Softmax([[0.0]]), WiSE(mix=0.5)
    for index, want in enumerate([4.0, 6.0, 7.0]):  # each task ends at 8
        ctx = context(model, index=index)
        method.begin_task(ctx)
        with torch.no_grad():
            model.weight.fill_(8.0)
        method.end_task(ctx)
        assert model.weight.item() == want
        assert method.state().tensors == {}


def factors(seed: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 6, generator=g), torch.randn(7, rank, generator=g)


def test_the_cut_is_the_best_of_its_rank() -> None:
    old, new = factors(0), factors(1)
    a, b, error = mix_factors(old, new, 0.3)
    dense = 0.7 * old[1] @ old[0] + 0.3 * new[1] @ new[0]
    u, s, vh = torch.linalg.svd(dense.double())
    best = (u[:, :3] * s[:3]) @ vh[:3]
    torch.testing.assert_close((b @ a).double(), best, atol=1e-5, rtol=1e-5)
    tail, total = s[3:].square().sum(), s.square().sum()
    assert error == pytest.approx(float((tail / total).sqrt()), rel=1e-5)


def test_nothing_is_cut_when_the_sum_has_the_rank() -> None:
    a, b = factors(0)
    a_mix, b_mix, error = mix_factors((a, b), (a, 3 * b), 0.5)
    torch.testing.assert_close(b_mix @ a_mix, 2 * b @ a, atol=1e-4, rtol=1e-4)
    assert error < 1e-6


def test_an_adapter_that_started_at_zero_is_shrunk_exactly() -> None:
    a, b = factors(0)
    a_mix, b_mix, error = mix_factors((a, torch.zeros_like(b)), (a, b), 0.25)
    torch.testing.assert_close(b_mix @ a_mix, 0.25 * b @ a, atol=1e-5, rtol=1e-5)
    assert error < 1e-6


def test_no_update_at_all_is_no_error() -> None:
    a, b = factors(0)
    zero = torch.zeros_like(b)
    a_mix, b_mix, error = mix_factors((a, zero), (a, zero), 0.5)
    assert torch.count_nonzero(b_mix @ a_mix) == 0
    assert error == 0.0


def updates(model: Any) -> dict[str, Tensor]:
    """scale · B A of every adapted layer."""
    return {
        name: layer.get_delta_weight("default").detach().clone()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def test_under_lora_the_update_is_interpolated_not_its_factors() -> None:
    model, method = pico.adapted(pico.causal_lm(16)), WiSE(mix=0.25)
    ctx = context(model)
    method.begin_task(ctx)
    before = updates(model)
    base = model.get_base_model().model.embed_tokens.weight.clone()
    with torch.no_grad():
        for name, weight in ctx.trainable().items():
            if "lora_B" in name:
                weight.mul_(-3.0)  # the same A: the mean has the adapter's rank
    method.end_task(ctx)
    for name, update in updates(model).items():
        # 0.75 ΔW + 0.25 · (−3 ΔW) = 0; the factors' means would give another product.
        assert update.norm() < 1e-5 * before[name].norm()
    assert torch.equal(model.get_base_model().model.embed_tokens.weight, base)
    assert method.evidence()["moved_back"] > 0


def test_under_lora_the_error_of_the_cut_is_shown() -> None:
    model, method = pico.adapted(pico.causal_lm(16)), WiSE(mix=0.5)
    ctx = context(model)
    method.begin_task(ctx)
    before = updates(model)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.copy_(torch.randn(weight.shape, generator=g))
    after = updates(model)
    method.end_task(ctx)
    worst = 0.0
    for name, update in updates(model).items():
        dense = 0.5 * before[name] + 0.5 * after[name]
        worst = max(worst, float((update - dense).norm() / dense.norm()))
    assert method.evidence()["worst_cut_error"] == pytest.approx(worst, rel=1e-4)
    assert 0 < worst < 1


def test_switched_off_it_keeps_no_copy() -> None:
    method = WiSE(mix=1)
    method.begin_task(context(Softmax([[1.0]])))
    assert method.state().tensors == {}


def test_each_layer_belongs_to_a_third() -> None:
    names = ["embed.weight", *(f"layers.{i}.{p}.w" for i in range(5) for p in "ab"), "norm", "head"]
    assert blocks_of(names, 3) == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert blocks_of(["weight"], 3) == [0]


def test_a_layers_number_is_the_first_in_its_name() -> None:
    assert blocks_of(["h.0.x.7.w", "h.1.x.7.w", "h.2.x.7.w"], 3) == [0, 1, 2]


def test_three_numbers_are_the_mix_of_lower_middle_and_upper_layers() -> None:
    model, method = pico.causal_lm(16), WiSE(mix=(1.0, 0.25, 0.0))
    assert blocks_of(["layers.0.w", "layers.1.w"], 3) == [0, 1]
    ctx = context(model)
    method.begin_task(ctx)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(4.0)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    method.end_task(ctx)
    for name, weight in model.named_parameters():
        if "layers.0." in name or "embed" in name:
            assert torch.equal(weight, after[name])
        else:
            step = 1.0 if "layers.1." in name else 0.0
            torch.testing.assert_close(weight, before[name] + step, atol=1e-5, rtol=0)


def test_three_ones_keep_no_copy_either() -> None:
    method = WiSE(mix=[1, 1, 1])
    method.begin_task(context(Softmax([[1.0]])))
    assert method.state().tensors == {}


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ([0.5, 2.0, 0.5], r"WiSE.mix.1: must be at most 1.0, got 2.0"),
        ([0.5, 0.5], "WiSE.mix.2 must be given"),
        ("half", "WiSE.mix: .*valid number.*got 'half'"),
    ],
)
def test_what_is_no_mix_is_refused(mix: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        WiSE(mix=mix)


# -- chosen on a guard ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "share", "after", "looks"),
    [
        (1.0, 1.0, 1.0, 1),
        (0.3, 0.53125, 0.53125**2, 6),  # 17/32; 18/32 squared is above 0.3
        (0.25, 0.5, 0.25, 6),
        (0.0005, 0.0, 0.0, 6),  # 1/32 squared is above
    ],
)
def test_halving_by_hand(limit: float, share: float, after: float, looks: int) -> None:
    seen = []

    def square(at: float) -> float:
        seen.append(at)
        return at * at

    found = share_within(square, 0.0, limit)
    assert found == {"share": share, "after": after, "at_mix": 1.0}
    assert len(seen) == looks


@pytest.fixture
def lines(tmp_path: Path) -> str:
    """Four texts of six letters."""
    path = tmp_path / "guard.txt"
    path.write_text("abcabc\nbcdbcd\n\ncabcab\nddcbaa\n")
    return str(path)


def guarded(lines: str, *, lora: bool, **settings: Any) -> tuple[Any, WiSE, Any]:
    """A model that forgot the texts in a task, and the method after it."""
    model: Any = pico.causal_lm()
    model = pico.adapted(model) if lora else model
    ctx = context(model, texts([9, 9, 9, 9]), tokenizer=pico.tokenizer())
    method = WiSE(guard=lines, **settings)
    method.begin_task(ctx)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.add_((0.5 if lora else 0.1) * torch.randn(weight.shape, generator=g))
    return model, method, ctx


@pytest.mark.parametrize("lora", [False, True])
def test_a_guard_takes_as_much_of_the_mix_as_it_bears(lora: bool, lines: str) -> None:
    rise = 0.01 if lora else 0.1
    _, method, ctx = guarded(lines, lora=lora, mix=0.9, rise=rise)
    before, trained = dict(method._before), ctx.trainable()
    after = {name: weight.detach().clone() for name, weight in trained.items()}
    method.end_task(ctx)
    shown, share = method.evidence(), method.evidence()["guard_share"]
    assert 0 < share < 1
    assert share * 32 % 1 == 0
    assert shown["guard_before"] < shown["guard_after"] <= shown["guard_before"] + rise
    assert shown["guard_at_mix"] > shown["guard_before"] + rise
    assert text_loss(ctx, method._texts) == pytest.approx(shown["guard_after"])
    assert shown["moved_back"] > 0
    if not lora:
        for name, weight in trained.items():
            want = before[name] + 0.9 * share * (after[name] - before[name])
            torch.testing.assert_close(weight.detach(), want, atol=1e-6, rtol=1e-5)


def test_a_guard_that_loses_nothing_leaves_the_mix_as_it_is(lines: str) -> None:
    ends = []
    for guard in (lines, ""):
        model, method, ctx = guarded(guard, lora=False, mix=0.25, rise=100.0)
        method.end_task(ctx)
        ends.append((method.evidence(), [p.detach().clone() for p in model.parameters()]))
    (shown, one), (plain, other) = ends
    assert shown["guard_share"] == 1
    assert shown["guard_after"] == shown["guard_at_mix"]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert plain.keys() == {"moved_back", "worst_cut_error"}


def test_a_guard_that_may_lose_nothing_loses_nothing(lines: str) -> None:
    _, method, ctx = guarded(lines, lora=False, mix=0.9, rise=0.0)
    method.end_task(ctx)
    shown = method.evidence()
    assert shown["guard_share"] < 1
    assert shown["guard_after"] <= shown["guard_before"]
    assert text_loss(ctx, method._texts) == pytest.approx(shown["guard_after"])


def test_a_guard_that_cannot_decide_is_refused(lines: str) -> None:
    ctx = context(pico.causal_lm(), texts([9, 9]), tokenizer=pico.tokenizer())
    for mix in (1.0, (1, 1, 1)):
        with pytest.raises(MethodError, match=r"but mix is .* Set mix to the most"):
            WiSE(mix=mix, guard=lines).begin_task(ctx)
    with pytest.raises(MethodError, match=r"WiSE.guard: 'nowhere.txt' cannot be read"):
        WiSE(guard="nowhere.txt").begin_task(ctx)
    ctx = context(pico.classifier(), ONE_ROW, tokenizer=pico.tokenizer())
    with pytest.raises(MethodError, match=r"WiSE.guard is a file of texts, by which a classifier"):
        WiSE(guard=lines).begin_task(ctx)
    with pytest.raises(MethodError, match=r"WiSE.guard is .* but this trainer has no tokenizer"):
        WiSE(guard=lines).begin_task(context(pico.causal_lm(), texts([9, 9])))


def test_factors_come_in_pairs_and_lone_ones_alone() -> None:
    names = ["x.lora_A.default.w", "x.lora_B.default.w", "y.lora_B.default.w", "z.w"]
    assert list(in_pairs(names)) == [
        ("x.lora_A.default.w", "x.lora_B.default.w"),
        ("y.lora_B.default.w", None),
        ("z.w", None),
    ]
    of_words = ["w.lora_embedding_A.default", "w.lora_embedding_B.default"]
    assert list(in_pairs(of_words)) == [tuple(of_words)]


@pytest.mark.parametrize("mix", [0.0, (0.0, 0.0, 0.0)])
def test_under_lora_nothing_of_the_task_is_the_adapter_before_bit_for_bit(mix: Any) -> None:
    model = peft.get_peft_model(
        pico.causal_lm(16), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    method, ctx = WiSE(mix=mix), context(model)
    before = {name: weight.detach().clone() for name, weight in ctx.trainable().items()}
    method.begin_task(ctx)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.add_(0.1)
    method.end_task(ctx)
    # B is 0 again, but A is not: with both at 0 no later task would learn.
    assert all(torch.equal(weight, before[name]) for name, weight in ctx.trainable().items())


@pytest.mark.parametrize("rank", [4, 24])
def test_embeddings_and_high_ranks_are_interpolated_too(rank: int) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, target_modules=["embed_tokens", "k_proj", "q_proj"]
    )
    model: Any = pico.adapted(pico.causal_lm(16), config)
    method, ctx = WiSE(mix=0.5), context(model)
    method.begin_task(ctx)
    before = updates(model)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in ctx.trainable().items():
            if "_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=g))
    after = updates(model)
    method.end_task(ctx)
    for name, update in updates(model).items():
        dense = 0.5 * before[name] + 0.5 * after[name]
        torch.testing.assert_close(update, dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [WiSE(), Merge(), OSF()])
def test_what_reads_an_update_off_its_factors_refuses_dora(method: Method) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=True)
    with pytest.raises(MethodError, match="which DoRA rescales row by row"):
        method.begin_task(context(pico.adapted(pico.causal_lm(16), config)))
