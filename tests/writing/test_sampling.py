"""Sampling: the same however it is batched, by the model's own distribution, without a trace."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pico
from keeptune.errors import MethodError
from keeptune.methods._writing import sampling
from keeptune.methods._writing.sampling import Ids, Written, require_writer, write
from pencil import Softmax, examples
from pencil import context as without_text
from scribe import Scribe, context, says

EOS = 2


def until_eos(ids: Ids) -> bool:
    return ids[-1] == EOS


def texts(model: nn.Module, prompts: list[Ids], most: int = 12, top_k: int = 20) -> list[Written]:
    ctx = context(model)
    randoms = [ctx.random("text", i) for i in range(len(prompts))]
    return write(ctx, prompts, [most] * len(prompts), until_eos, randoms, top_k=top_k)


PROMPTS = [[10, 11], [12, 13, 14, 15, 16], [17], [10, 20, 30], [40] * 9]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_does_not_change_what_is_written(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico.adapted(pico.causal_lm())
    monkeypatch.setattr(sampling, "BATCH", 3)
    usual = texts(model, PROMPTS)
    monkeypatch.setattr(sampling, "BATCH", batch)
    other = texts(model, PROMPTS)
    assert [text.ids for text in other] == [text.ids for text in usual]
    assert [text.nats for text in other] == pytest.approx([t.nats for t in usual], rel=1e-4)


def test_the_cache_changes_nothing() -> None:
    # The likelihood of what was written, by one forward without any cache or padding.
    model = pico.causal_lm()
    for prompt, text in zip(PROMPTS, texts(model, PROMPTS), strict=True):
        ids = torch.tensor([prompt + text.ids])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        own = log_p[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])
        assert text.nats == pytest.approx(-float(own.sum()), rel=1e-4)


def test_the_likeliest_token_with_top_1() -> None:
    model = pico.causal_lm()
    (text,) = texts(model, [[10, 11]], most=6, top_k=1)
    ids = [10, 11]
    for _ in range(len(text.ids)):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert text.ids == ids[2:]


def test_tokens_are_drawn_by_their_probabilities_among_the_top_k() -> None:
    # Three tokens of 0.6, 0.3 and 0.1; of the top two that is 2 : 1.
    logits = torch.full((pico.VOCAB,), -50.0)
    logits[[7, 8, 9]] = torch.tensor([0.6, 0.3, 0.1]).log()
    model = Scribe(lambda text: logits)
    drawn = [text.ids[0] for text in texts(model, [[5]] * 600, most=1, top_k=2)]
    assert set(drawn) == {7, 8}
    assert drawn.count(7) / 600 == pytest.approx(2 / 3, abs=4 * math.sqrt(2 / 9 / 600))


def test_likelihood_is_that_of_the_whole_distribution() -> None:
    logits = torch.full((pico.VOCAB,), -50.0)
    logits[[7, 8]] = torch.tensor([0.75, 0.25]).log()
    model = Scribe(lambda text: logits)
    (text,) = texts(model, [[5]], most=3, top_k=1)
    assert text.nats == pytest.approx(-3 * math.log(0.75), rel=1e-5)
    assert text.nats_per_token == pytest.approx(-math.log(0.75), rel=1e-5)


def test_it_ends_where_it_is_whole_or_used_up() -> None:
    model = Scribe(lambda text: says(EOS if len(text) == 4 else 9))
    short, long = texts(model, [[5], [5, 6, 7]], most=2), texts(model, [[5]], most=9)
    assert [(t.ids, t.ended) for t in short] == [([9, 9], False), ([9, EOS], True)]
    assert [(t.ids, t.ended) for t in long] == [([9, 9, 9, EOS], True)]


def test_nothing_is_written_when_nothing_is_asked() -> None:
    assert texts(Scribe(lambda text: says(9)), []) == []


def test_it_leaves_no_trace() -> None:
    model = pico.adapted(pico.causal_lm()).train()
    learned = [p.requires_grad for p in model.parameters()]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    texts(model, PROMPTS)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == learned


def test_a_model_without_a_cache_is_refused() -> None:
    class Forgetful(Scribe):
        def forward(self, *args: Any, **named: Any) -> Any:
            found = super().forward(*args, **named)
            found.past_key_values = None
            return found

    with pytest.raises(MethodError, match="Forgetful keeps no keys and values"):
        texts(Forgetful(lambda text: says(9)), [[5]])


def test_what_cannot_write_is_refused() -> None:
    classifier = without_text(Softmax([[0.0, 0.0]]), examples((0, 1)))
    with pytest.raises(MethodError, match="'m' lets the model write rows, but a classifier"):
        require_writer(classifier, "m")
    with pytest.raises(MethodError, match=r"needs its tokenizer.*processing_class=tokenizer"):
        require_writer(context(pico.causal_lm(), tokenizer=None), "m")
    require_writer(context(pico.causal_lm()), "m")
