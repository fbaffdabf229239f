"""One adapter per task: which is trained, which is served, and that old ones never change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config
from torch import Tensor

import pico
from keeptune.errors import MethodError
from keeptune.methods._adapters import adapter_hash
from keeptune.methods.task_lora import TaskLoRA
from keeptune.tokens import collate
from keeptune.trainers import build_trainer
from pencil import context, learn, texts

IDS = torch.tensor([[6, 7, 8, 9, 10]])


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.clone()


def stream(tasks: int) -> tuple[Any, TaskLoRA, list[Tensor]]:
    """A model that has learned some tasks, and its answers right after each."""
    model, method, after = pico.adapted(pico.causal_lm(16)), TaskLoRA(), []
    for index in range(tasks):
        learn(model, method, index)
        after.append(answers(model))
    return model, method, after


def test_a_new_task_trains_its_own_adapter_only() -> None:
    model, method, _ = stream(2)
    ctx = context(model, task="t2", index=2)
    method.begin_task(ctx)
    assert ctx.trainable()
    assert all(".task_002." in name for name in ctx.trainable())


def test_a_new_adapter_starts_without_effect() -> None:
    model, method = pico.adapted(pico.causal_lm(16)), TaskLoRA()
    with model.disable_adapter():
        base = answers(model)
    method.begin_task(context(model))
    assert torch.equal(answers(model), base)


def test_a_new_adapter_depends_on_seed_and_task_alone() -> None:
    hashes = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        model = pico.adapted(pico.causal_lm(16))
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        TaskLoRA().begin_task(context(model, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        hashes.append(adapter_hash(model, "task_000"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_task_is_answered_as_right_after_it_was_learned() -> None:
    model, method, after = stream(3)
    for index in (0, 2, 1):
        method.serve(context(model), f"t{index}")
        assert torch.equal(answers(model), after[index])
    assert not torch.equal(after[0], after[1])


def updates(model: Any, adapter: str) -> dict[str, Tensor]:
    return {
        name: layer.get_delta_weight(adapter).detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def test_an_unknown_task_is_answered_by_the_exact_mean_of_all_updates() -> None:
    model, method, _ = stream(3)
    parts = [updates(model, f"task_{index:03d}") for index in range(3)]
    method.serve(context(model), None)
    assert model.active_adapter == "merged"
    for name, update in updates(model, "merged").items():
        mean = (parts[0][name] + parts[1][name] + parts[2][name]) / 3
        torch.testing.assert_close(update, mean, atol=1e-5, rtol=1e-5)


def test_a_name_never_learned_is_an_unknown_task() -> None:
    model, method, _ = stream(2)
    method.serve(context(model), None)
    mean = answers(model)
    method.serve(context(model), "never seen")
    assert torch.equal(answers(model), mean)


def test_before_any_task_the_first_adapter_answers() -> None:
    model = pico.adapted(pico.causal_lm(16))
    before = answers(model)
    TaskLoRA().serve(context(model), None)
    assert torch.equal(answers(model), before)


def test_serving_leaves_every_adapter_as_it_was() -> None:
    model, method, _ = stream(3)
    names = [f"task_{index:03d}" for index in range(3)]
    before = [adapter_hash(model, name) for name in names]
    for task in (None, "t0", None, "t2"):
        method.serve(context(model), task)
    assert [adapter_hash(model, name) for name in names] == before
    learn(model, method, 3)
    assert set(model.peft_config) == {"default", *names, "task_003"}


def test_evidence_counts_the_adapters_that_stayed() -> None:
    _, method, _ = stream(3)
    assert method.evidence() == {"adapters": 3, "identical": 2}


def test_an_adapter_edited_while_another_task_is_learned_is_found() -> None:
    model, method, _ = stream(2)
    ctx = context(model, task="t2", index=2)
    method.begin_task(ctx)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".task_001." in n).view(-1)[0] += 1e-3
    with pytest.raises(MethodError, match="adapter of task 't1' changed while 't2'"):
        method.end_task(ctx)


def test_the_hash_sees_one_changed_bit() -> None:
    model = pico.adapted(pico.causal_lm(16))
    before = adapter_hash(model, "default")
    assert adapter_hash(model, "default") == before
    with torch.no_grad():
        weight = next(p for n, p in model.named_parameters() if ".default." in n).view(-1)
        weight[:1] = torch.nextafter(weight[:1], torch.tensor(9.0))
    assert adapter_hash(model, "default") != before


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: pico.causal_lm(16), "all weights are trained here"),
        (
            lambda: pico.adapted(pico.causal_lm(16), IA3Config(task_type="CAUSAL_LM")),
            "another kind of adapter is trained here",
        ),
    ],
)
def test_a_model_without_lora_is_refused_before_anything_runs(
    model: Any, words: str, tmp_path: Any
) -> None:
    tokenizer = pico.tokenizer()
    settings = {"output_dir": str(tmp_path), "seed": 0}
    with pytest.raises(MethodError, match=f"'task_lora' needs a LoRA adapter, but {words}"):
        build_trainer(
            "causal_lm", model(), tokenizer, texts([6, 7]), [TaskLoRA()], settings,
            collate(tokenizer),
        )  # fmt: skip
