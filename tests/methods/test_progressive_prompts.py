"""All prompts up to a task's own, the newest first, against vectors joined by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pico
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import ADDED
from keeptune.methods.progressive_prompts import ProgressivePrompts
from keeptune.methods.prompt import PromptTuning
from pencil import context, learn

IDS = torch.tensor([[6, 7, 8, 9, 10], [11, 12, 13, 14, 15]])
LENGTH = 3


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def joined(plain: Any, *rows: Tensor) -> Tensor:
    """The logits after these prompts, put before the tokens' embeddings by hand."""
    first = torch.cat(rows).expand(len(IDS), -1, -1)
    whole = torch.cat([first, plain.get_input_embeddings()(IDS)], 1)
    return plain(inputs_embeds=whole).logits[:, first.shape[1] :]


def build(*, lora: bool) -> Any:
    return pico.adapted(pico.causal_lm(16)) if lora else pico.causal_lm(16)


def stream(tasks: int, *, lora: bool = False) -> tuple[Any, ProgressivePrompts, list[Tensor]]:
    model, method, after = build(lora=lora), ProgressivePrompts(length=LENGTH), []
    for index in range(tasks):
        learn(model, method, index)
        after.append(answers(model))
    return model, method, after


@pytest.mark.parametrize("lora", [False, True])
def test_the_newest_prompt_stands_first(lora: bool) -> None:
    model, method, after = stream(3, lora=lora)
    one, two, three = (part.rows for part in getattr(model, ADDED))
    wanted = [(one,), (two, one), (three, two, one)]
    plain = build(lora=lora)
    for index in (0, 2, 1):
        method.serve(context(model), f"t{index}")
        assert torch.equal(answers(model), after[index])
        assert torch.equal(answers(model), joined(plain, *wanted[index]))
    method.serve(context(model), None)
    assert torch.equal(answers(model), after[2])


def test_only_the_newest_prompt_is_trained() -> None:
    model, method, _ = stream(2)
    ctx = context(model, task="t2", index=2)
    method.begin_task(ctx)
    assert list(ctx.trainable()) == [f"{ADDED}.parts.2.rows"]
    model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    assert [part.rows.grad is not None for part in getattr(model, ADDED)] == [False, False, True]


def test_an_earlier_prompt_is_read_by_later_tasks_only() -> None:
    model, method, after = stream(2)
    with torch.no_grad():
        getattr(model, ADDED).parts[1].rows.add_(1.0)
    method.serve(context(model), "t0")
    assert torch.equal(answers(model), after[0])
    with torch.no_grad():
        getattr(model, ADDED).parts[1].rows.sub_(1.0)
        getattr(model, ADDED).parts[0].rows.add_(1.0)
    method.serve(context(model), "t1")
    assert (answers(model) - after[1]).abs().max() > 1e-3


def test_evidence_counts_what_is_read_before_a_text() -> None:
    model, method = build(lora=False), ProgressivePrompts(length=LENGTH)
    for index in range(3):
        learn(model, method, index)
        shown = method.evidence()
        assert shown["moved"] > 0
        assert shown["prompts"] == index + 1
        assert shown["parameters"] == LENGTH * 32
        assert shown["parameters_of_all"] == LENGTH * 32 * (index + 1)
        assert shown["tokens_before"] == LENGTH * (index + 1)


def test_it_is_refused_beside_other_prompts() -> None:
    with pytest.raises(MethodError, match=r"cannot run together.*Remove one of them"):
        Chain([ProgressivePrompts(), PromptTuning()])
