"""What is frozen, that it is given free, and that the cache gives what the layers give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import pico
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Method
from keeptune.methods._isolate.cache import Store
from keeptune.methods.freeze import Freeze
from keeptune.methods.replay import Replay
from keeptune.methods.task_lora import TaskLoRA
from keeptune.tokens import collate
from keeptune.trainers import build_trainer
from pencil import context, texts

ROWS = texts(*[[6 + (i * k) % 20 for k in range(1, 7 + i % 3)] for i in range(12)], answer_from=3)
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0)


def frozen(model: Any, **settings: Any) -> set[str]:
    """The names of the weights that are not trained during a task."""
    method, ctx = Freeze(**settings), context(model, ROWS)
    before = ctx.trainable()
    method.begin_task(ctx)
    held = before.keys() - ctx.trainable().keys()
    method.end_task(ctx)
    assert ctx.trainable().keys() == before.keys()
    return held


def layer(index: int) -> set[str]:
    return {n for n, _ in pico.causal_lm().named_parameters() if f".layers.{index}." in n}


def test_a_share_or_a_number_of_layers_is_frozen_from_the_bottom() -> None:
    for share in (0.5, 1):
        assert frozen(pico.causal_lm(), layers=share, embeddings=False) == layer(0)
    assert frozen(pico.causal_lm(), layers=2, embeddings=False) == layer(0) | layer(1)


def test_a_head_tied_to_the_embeddings_is_frozen_with_them() -> None:
    model = pico.causal_lm()
    assert frozen(model, layers=0) == {"model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_all_that_makes_a_berts_embeddings_is_frozen() -> None:
    held = frozen(pico.classifier(bert=True), layers=0)
    assert {n.rsplit(".", 2)[1] for n in held} == {
        "word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm",
    }  # fmt: skip


def test_patterns_name_further_weights() -> None:
    held = frozen(pico.causal_lm(), layers=0, embeddings=False, patterns=("*norm*", "*.1.*gate*"))
    assert "model.norm.weight" in held
    assert "model.layers.1.mlp.gate_proj.weight" in held
    assert all("norm" in name or ".1.mlp.gate" in name for name in held)


def test_under_lora_adapters_stay_on_the_top_layers_only() -> None:
    model = pico.adapted(pico.causal_lm(), LORA)
    method, ctx = Freeze(layers=1), context(model, ROWS)
    method.begin_task(ctx)
    assert ctx.trainable()
    assert all(".layers.1." in name for name in ctx.trainable())
    assert method.evidence()["frozen_share"] == 0.5


def test_it_freezes_what_another_method_adds() -> None:
    model, chain = pico.adapted(pico.causal_lm(), LORA), Chain([Freeze(layers=1), TaskLoRA()])
    chain.begin_task(ctx := context(model, ROWS))
    assert ctx.trainable()
    assert all(".layers.1." in n and ".task_000." in n for n in ctx.trainable())


def test_it_stays_frozen_until_the_others_have_ended_the_task() -> None:
    seen = []

    class Looks(Method):
        def end_task(self, ctx: Any) -> None:
            seen.append(len(ctx.trainable()))

    ctx, chain = context(pico.causal_lm(), ROWS), Chain([Freeze(layers=1), Looks()])
    every = len(ctx.trainable())
    chain.begin_task(ctx)
    chain.end_task(ctx)
    assert seen == [every - len(layer(0)) - 1]
    assert len(ctx.trainable()) == every


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": 3}, "Freeze.layers: the model has 2 layers, got 3"),
        ({"patterns": ("*nothing*",)}, "no weight's name is like '\\*nothing\\*'"),
        ({"patterns": ("*",)}, "would leave nothing to train"),
        ({"layers": 0, "cache": True}, "needs frozen layers"),
        ({"cache": True, "embeddings": False}, "embed_tokens, below the frozen layers, is trained"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        Freeze(**settings).begin_task(context(pico.causal_lm(), ROWS))


def test_a_cache_of_what_is_dropped_at_random_is_refused() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1)
    model = pico.adapted(pico.causal_lm(), config)
    with pytest.raises(MethodError, match=r"drops values at random.*lora_dropout"):
        Freeze(cache=True).begin_task(context(model, ROWS))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(MethodError, match="'freeze' needs a model made of layers, but Linear"):
        Freeze().begin_task(context(torch.nn.Linear(2, 2), ROWS))


# -- the cache ------------------------------------------------------------------------------------


def trained(methods: list[Method], folder: Any, *, lora: bool = False, tasks: int = 2) -> Any:
    """A model after some tasks of three epochs over rows of several lengths."""
    model = pico.adapted(pico.causal_lm(), LORA) if lora else pico.causal_lm()
    tokenizer = pico.tokenizer()
    settings = {
        "output_dir": str(folder), "seed": 0, "per_device_train_batch_size": 4, "optim": "sgd",
        "num_train_epochs": 3, "learning_rate": 0.3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    trainer = build_trainer(
        "causal_lm", model, tokenizer, ROWS, methods, settings, collate(tokenizer)
    )
    for index in range(tasks):
        rows = ROWS.map(
            lambda row, k=index: {"input_ids": [6 + (i + k) % 20 for i in row["input_ids"]]}
        )
        trainer.learn(f"t{index}", rows)
    return model


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("lora", [False, True])
def test_training_from_the_cache_is_training_within_bfloat16(lora: bool, tmp_path: Any) -> None:
    start = weights(trained([], tmp_path, lora=lora, tasks=0))
    plain = weights(trained([Freeze(layers=1)], tmp_path, lora=lora))
    kept = weights(trained([Freeze(layers=1, cache=True)], tmp_path, lora=lora))
    few = weights(trained([Freeze(layers=1, cache=True, cache_gb=2e-6)], tmp_path, lora=lora))
    assert torch.equal(kept, few)
    assert not torch.equal(kept, plain)
    assert (kept - plain).norm() < 2**-7 * (plain - start).norm()


def test_rows_of_other_methods_are_kept_too(tmp_path: Any) -> None:
    one = trained([Replay(), Freeze(layers=1)], tmp_path)
    other = trained([Replay(), Freeze(layers=1, cache=True)], tmp_path)
    start = weights(trained([], tmp_path, tasks=0))
    assert (weights(other) - weights(one)).norm() < 2**-7 * (weights(one) - start).norm()


def counted(model: Any, batch: dict[str, Tensor], times: int = 1) -> tuple[int, Tensor]:
    """How many rows really pass the first layer, and the last answers."""
    rows = 0

    def count(module: Any, args: Any) -> None:
        nonlocal rows
        rows += len(args[0])

    # Below the layer's own forward, which is skipped.
    handle = model.model.layers[0].input_layernorm.register_forward_pre_hook(count)
    for _ in range(times):
        logits = model(**batch).logits
    handle.remove()
    return rows, logits.detach()


def begun(**settings: Any) -> tuple[Any, Freeze, dict[str, Tensor]]:
    model = pico.causal_lm().train()
    method = Freeze(layers=1, cache=True, **settings)
    ctx = context(model, ROWS)
    method.begin_task(ctx)
    batch = collate(pico.tokenizer())(ROWS.to_list()[:3])
    return model, method, {k: v for k, v in batch.items() if k != "labels"}


def test_each_row_passes_the_frozen_layers_once() -> None:
    model, method, batch = begun()
    first, one = counted(model, batch)
    later, other = counted(model, batch, times=3)
    assert (first, later) == (3, 0)
    assert torch.equal(one, other)
    method.end_task(context(model, ROWS))
    assert counted(model, batch, times=2)[0] == 6
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_what_does_not_fit_is_computed_again() -> None:
    tokens, width = len(ROWS[0]["input_ids"]), 32
    model, method, batch = begun(cache_gb=tokens * width * 2 / 1e9)
    assert counted(model, batch, times=2)[0] == 3 + 2
    every = sum(map(len, ROWS["input_ids"]))
    assert method.evidence()["cached_share"] == pytest.approx(tokens / every)


def test_evaluation_and_foreign_batches_do_not_read_the_cache() -> None:
    model, _, batch = begun()
    counted(model, batch)
    with torch.no_grad():
        assert counted(model, batch)[0] == 3
    left = {k: v.flip(1) for k, v in batch.items()}  # padded on the left
    assert counted(model, left)[0] == 3
    positions = torch.arange(batch["input_ids"].shape[1])[None].expand(3, -1)
    assert counted(model, batch | {"position_ids": positions})[0] == 3
    model.eval()
    assert counted(model, batch)[0] == 3


def test_a_full_disk_is_a_full_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.pwrite", full)
    store = Store(10**6)
    store.write(b"row", np.ones((2, 3), np.int16))
    assert len(store) == store.limit == 0
    assert not store.read(b"row", np.zeros((2, 3), np.int16))


def test_a_store_gives_back_what_it_took_and_no_more_than_fits() -> None:
    store, rows = Store(20), [np.full((2, 3), i, np.int16) for i in (1, 2)]
    for i, row in enumerate(rows):
        store.write(bytes([i]), row)
    into = np.zeros((2, 3), np.int16)
    assert store.read(b"\x00", into)
    assert (into == rows[0]).all()
    assert not store.read(b"\x01", into)
    assert (len(store), store.used) == (1, 12)
    store.close()


def test_a_cache_of_noise_is_refused(tmp_path: Any) -> None:
    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    trainer = build_trainer(
        "causal_lm", model, tokenizer, ROWS, [Freeze(layers=1, cache=True)],
        {"output_dir": str(tmp_path), "max_steps": 2, "neftune_noise_alpha": 5.0},
        collate(tokenizer),
    )  # fmt: skip
    with pytest.raises(MethodError, match="neftune_noise_alpha adds noise below the frozen"):
        trainer.learn("a", ROWS)
