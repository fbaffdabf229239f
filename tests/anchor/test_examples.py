"""Sums of squared and absolute gradients per example, against one backward an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import pico
from keeptune.method import Context
from keeptune.methods._anchor.examples import (
    batched_sums,
    example_sums,
    sign_sums,
)
from keeptune.methods._anchor.hooks import ExampleHooks, Power
from keeptune.methods._anchor.objectives import (
    Objective,
    all_labels,
    log_likelihood,
    sampled,
    squared_norm,
)
from keeptune.tokens import collate

LENGTHS = (9, 5, 12, 7, 3, 8, 8)
ROWS = range(len(LENGTHS))
Sums = dict[str, Tensor]


def texts(*lengths: int, seed: int = 0) -> Dataset:
    """Rows of a language model, which learns their second half."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, pico.VOCAB, (n,), generator=g).tolist() for n in lengths or LENGTHS]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * (len(x) // 2) + x[len(x) // 2 :] for x in ids]}
    )


def labelled(classes: int = 3) -> Dataset:
    """The same rows, for a classifier."""
    ids = texts()["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": [i % classes for i in ROWS]})


def stage(model: nn.Module, dataset: Dataset, **more: Any) -> Context:
    """A context that pads its batches."""
    return Context(
        model=model, task="t", index=0, dataset=dataset, collate=collate(pico.tokenizer()), **more
    )


def every_weight(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def log_p(ctx: Context, row: int) -> Tensor:
    """Log-probability of one row's answer, written out."""
    batch = ctx.batch([ctx.dataset[row]])
    labels = batch.pop("labels")
    predicted = ctx.model(**batch).logits.log_softmax(-1)
    if labels.dim() == 1:
        return predicted[0, labels[0]]
    n = labels.shape[1]
    return sum(predicted[0, i - 1, labels[0, i]] for i in range(1, n) if labels[0, i] >= 0)


def one_by_one(
    values: Sequence[Tensor], weights: dict[str, nn.Parameter], power: Power = "square"
) -> Sums:
    """The naive loop: a backward for each of the scalars."""
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for value in values:
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), found, strict=True):
            if gradient is not None:
                total += gradient.square() if power == "square" else gradient.abs()
    return sums


def naive(ctx: Context, weights: dict[str, nn.Parameter], power: Power = "square") -> Sums:
    ctx.model.eval()
    return one_by_one([log_p(ctx, row) for row in range(len(ctx.dataset))], weights, power)


def assert_near(got: Sums, want: Sums, share: float = 1e-5) -> None:
    """Each tensor within a share of its maximum; what is rounding only compares to all tensors."""
    assert got.keys() == want.keys()
    largest = max(float(values.max()) for values in want.values())
    for name, values in want.items():
        error = float((got[name] - values).abs().max())
        assert error <= share * float(values.max()) + 1e-13 * largest, name
        assert float(got[name].min()) >= 0, name


def sized(**more: Any) -> dict[str, Any]:
    return pico._sizes(pico.VOCAB, 64) | {"num_key_value_heads": 2, "head_dim": 8} | more


def qwen() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**sized(), attention_bias=True))


def gpt2() -> nn.Module:
    shape = {"vocab_size": pico.VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2))


def gemma() -> nn.Module:
    return GemmaForCausalLM(GemmaConfig(**sized()))


def lora() -> nn.Module:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5
    )
    return pico.adapted(pico.causal_lm(), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama, tied": pico.causal_lm,
    "qwen, q and k norms and biases": qwen,
    "gpt2, conv1d, layernorm, tied": gpt2,
    "gemma, scaled and tied": gemma,
}


# -- the same numbers as one backward an example ---------------------------------------------------


@pytest.mark.parametrize("power", ["square", "absolute"])
@pytest.mark.parametrize("name", MODELS)
def test_language_models(name: str, power: Power) -> None:
    torch.manual_seed(0)
    ctx = stage(MODELS[name](), texts())
    weights = every_weight(ctx.model)
    got, how = example_sums(ctx, weights, ROWS, log_likelihood, power, batch=3)
    assert how == "hooks"
    assert_near(got, naive(ctx, weights, power))


@pytest.mark.parametrize("bert", [False, True])
def test_classifiers(bert: bool) -> None:
    ctx = stage(pico.classifier(3, bert=bert), labelled())
    weights = every_weight(ctx.model)
    got, how = example_sums(ctx, weights, ROWS, log_likelihood, "square", batch=3)
    assert how == "hooks"
    assert_near(got, naive(ctx, weights))


def test_adapters_with_dropout_and_the_frozen_weights_under_them() -> None:
    ctx = stage(lora(), texts())
    factors = ctx.trainable()
    ctx.model.train()
    got, how = example_sums(ctx, factors, ROWS, log_likelihood, "square", batch=3)
    assert how == "hooks"
    assert_near(got, naive(ctx, factors))
    under = {n: p for n, p in ctx.model.named_parameters() if "base_layer" in n}
    got, how = example_sums(ctx, under, ROWS, log_likelihood, "square", batch=3)
    assert how == "hooks"
    for weight in under.values():
        weight.requires_grad_(True)
    assert_near(got, naive(ctx, under))


class Perceptron(nn.Module):
    """Reads two numbers, not token ids; its activations work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            aside = self.unused(x).sum()
        return SimpleNamespace(logits=self.inside(x) + aside)


def points() -> Context:
    torch.manual_seed(0)
    rows = Dataset.from_dict({"x": torch.randn(9, 2).tolist(), "labels": [0, 1, 2] * 3})

    def stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in ("x", "labels")}

    return Context(model=Perceptron(), task="t", index=0, dataset=rows, collate=stack)


def test_a_perceptron_and_all_its_labels_and_an_unused_module() -> None:
    ctx = points()
    weights = every_weight(ctx.model)
    got, how = example_sums(ctx, weights, range(9), all_labels, "square", batch=4)
    assert how == "hooks"
    values = []
    for row in ctx.dataset:
        for c in range(3):
            predicted = ctx.model(torch.tensor([row["x"]])).logits.log_softmax(-1)[0, c]
            values.append(predicted.exp().sqrt().detach() * predicted)
    assert_near(got, one_by_one(values, weights))
    assert not got["unused.weight"].any()
    assert not got["unused.bias"].any()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_finds_the_same() -> None:
    ids = torch.randint(6, pico.VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    ctx = stage(pico.causal_lm(), rows)
    got, _ = example_sums(ctx, every_weight(ctx.model), range(4), log_likelihood, "square", batch=2)
    theirs = pico.causal_lm().train()  # Opacus looks at nothing in eval mode; there is no dropout
    wrapped = GradSampleModule(theirs, loss_reduction="sum", strict=False)
    logits = wrapped(input_ids=ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    want = {n: p.grad_sample.square().sum(0) for n, p in theirs.named_parameters()}
    assert_near(got, want)


# -- nothing but the rows matters ------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [log_likelihood, sampled, squared_norm(5)], ids=["true", "sampled", "norm"]
)
@pytest.mark.parametrize("power", ["square", "absolute"])
def test_the_batch_size_changes_nothing(objective: Any, power: Power) -> None:
    ctx = stage(pico.causal_lm().double(), texts())
    chosen: Objective = objective(ctx) if objective is sampled else objective
    weights = every_weight(ctx.model)
    first, _ = example_sums(ctx, weights, ROWS, chosen, power, batch=1)
    for batch in (2, 5, 8):
        again, how = example_sums(ctx, weights, ROWS, chosen, power, batch=batch)
        assert how == "hooks"
        for name, values in first.items():
            torch.testing.assert_close(again[name], values, rtol=1e-6, atol=1e-12)
    few, _ = example_sums(ctx, weights, [2, 4], chosen, power, batch=8)
    rest, _ = example_sums(ctx, weights, [0, 6, 5, 3, 1], chosen, power, batch=8)
    for name, values in first.items():
        torch.testing.assert_close(few[name] + rest[name], values, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("most", [1, 3])
def test_where_memory_is_short_fewer_rows_are_taken_at_a_time(most: int) -> None:
    ctx = stage(pico.causal_lm().double(), texts())
    weights, sizes = every_weight(ctx.model), []

    def hungry(batch: Any, logits: Tensor, rows: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return log_likelihood(batch, logits, rows)

    got, how = example_sums(ctx, weights, ROWS, hungry, "square", batch=8)
    want, _ = example_sums(ctx, weights, ROWS, log_likelihood, "square", batch=8)
    assert how == "hooks"
    assert max(sizes) > most
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=1e-6, atol=1e-12)


def test_one_row_that_does_not_fit_is_no_rows_fault() -> None:
    ctx = stage(pico.causal_lm(), texts())

    def starved(batch: Any, logits: Tensor, rows: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        example_sums(ctx, every_weight(ctx.model), ROWS, starved, "square")


def test_the_batch_size_changes_nothing_in_float32_either() -> None:
    ctx = stage(pico.causal_lm(), texts())
    weights = every_weight(ctx.model)
    first, _ = example_sums(ctx, weights, ROWS, log_likelihood, "square", batch=1)
    again, _ = example_sums(ctx, weights, ROWS, log_likelihood, "square", batch=7)
    assert_near(again, first, 1e-6)


def test_bfloat16_is_summed_in_float32() -> None:
    ctx = stage(pico.causal_lm().bfloat16(), texts())
    exact = stage(pico.causal_lm().bfloat16().float(), texts())
    got, how = example_sums(ctx, every_weight(ctx.model), ROWS, log_likelihood, "square")
    assert how == "hooks"
    assert {values.dtype for values in got.values()} == {torch.float32}
    assert_near(got, naive(exact, every_weight(exact.model)), 0.15)


class Small(nn.Module):
    """Words, one block and a head; its block may be recomputed, called twice, or see padding."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = nn.Embedding(pico.VOCAB, 8)
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8))
            self.head = nn.Linear(8, pico.VOCAB)
        self.kind = kind

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.words(input_ids)
        if self.kind == "recomputed":
            x = x + checkpoint(self.block, x, use_reentrant=False)
        else:
            x = x + self.block(x)
        if self.kind == "called twice":
            x = x + self.block(x)
        if self.kind == "used without its module":
            x = x @ self.block[0].weight
        if self.kind == "flattened":
            return SimpleNamespace(logits=self.head(x.flatten(0, 1)).view(*x.shape[:2], -1))
        if self.kind == "padding leaks":
            x = x + x.mean(1, keepdim=True)
        return SimpleNamespace(logits=self.head(x))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("", "hooks"),
        ("recomputed", "hooks"),
        ("called twice", "loop"),
        ("used without its module", "loop"),
        ("flattened", "loop"),
        ("padding leaks", "loop"),
    ],
)
def test_it_goes_one_at_a_time_where_batches_cannot_be_right(kind: str, how: str) -> None:
    ctx = stage(Small(kind), texts())
    weights = every_weight(ctx.model)
    got, done = example_sums(ctx, weights, ROWS, log_likelihood, "square", batch=3)
    assert done == how
    assert_near(got, naive(ctx, weights))


def test_gradient_checkpointing_of_transformers_changes_nothing() -> None:
    ctx = stage(pico.causal_lm(), texts())
    weights = every_weight(ctx.model)
    want = naive(ctx, weights)
    ctx.model.activation_checkpointing_enable()
    ctx.model.train()
    got, how = example_sums(ctx, weights, ROWS, log_likelihood, "square")
    assert how == "hooks"
    assert_near(got, want)


def squares_apart(hooks: ExampleHooks, module: nn.Embedding, ids: Tensor, g: Tensor) -> None:
    """The fault of squaring what head and embedding give before it is added."""
    hooks._heads.clear()
    whole(hooks, module, ids, g)


def sums_first(hooks: ExampleHooks, weight: Any, gradients: Tensor) -> None:
    """The fault of squaring the sum over a batch."""
    summed(hooks, weight, gradients.flatten(0, 1)[None])


whole, summed = ExampleHooks._embedding, ExampleHooks._summed


@pytest.mark.parametrize(
    ("rule", "fault"), [("_embedding", squares_apart), ("_summed", sums_first)]
)
def test_a_planted_fault_in_a_rule_is_caught(
    rule: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExampleHooks, rule, fault)
    ctx = stage(pico.causal_lm(), texts())
    weights = every_weight(ctx.model)
    got, how = example_sums(ctx, weights, ROWS, log_likelihood, "square")
    assert how == "loop"
    assert_near(got, naive(ctx, weights))


def test_all_is_left_as_it_was() -> None:
    ctx = stage(lora(), texts())
    ctx.model.train()
    ctx.model.base_model.model.lm_head.eval()
    weights = every_weight(ctx.model)
    trained = list(ctx.trainable().values())
    for weight in trained:
        weight.grad = torch.ones_like(weight)
    gradients = [weight.grad for weight in trained]
    modes = [module.training for module in ctx.model.modules()]
    asked = [weight.requires_grad for weight in weights.values()]
    random = torch.get_rng_state()
    hooks = [len(m._forward_hooks) for m in ctx.model.modules()]
    example_sums(ctx, weights, ROWS, sampled(ctx), "square")
    sign_sums(ctx, weights, ROWS, log_likelihood)
    batched_sums(ctx, weights, ROWS, log_likelihood)
    assert [module.training for module in ctx.model.modules()] == modes
    assert [weight.requires_grad for weight in weights.values()] == asked
    assert [len(m._forward_hooks) for m in ctx.model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert all(w.grad is g for w, g in zip(trained, gradients, strict=True))
    assert all(bool((g == 1).all()) for g in gradients)
    assert ctx.model.config.use_cache
