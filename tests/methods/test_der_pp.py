"""DER++: two draws for two terms."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

import pico
from keeptune.method import Context
from keeptune.methods.der_pp import DERpp
from pencil import Softmax, examples, stack, texts
from rehearsed_rows import ROWS, flat, gradients, learned, moved


def test_both_terms_by_hand() -> None:
    # One word, logits (0, 0) when kept with the answer 1, then (1, 0). Squares pull by h − z = 1
    # on the first entry, cross-entropy by p − onehot.
    model, method = Softmax([[0.0, 0.0]]), DERpp(strength=0.5, label_strength=0.25, rows=2)
    ctx = learned(method, model, examples((0, 1)))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0]]))
    p = model.weight.detach().softmax(-1)[0]
    want = 0.5 * torch.tensor([1.0, 0.0]) + 0.25 * (p - torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(gradients(method, ctx), want)


def test_with_labels_alone_it_is_replay_of_the_rows() -> None:
    model, method = pico.causal_lm(16), DERpp(strength=0, label_strength=2.0, rows=3)
    ctx = learned(method, model)
    got = gradients(method, ctx)
    batch = stack(list(ROWS))
    model.zero_grad()
    logits = ctx.answer_logits(model(batch["input_ids"]).logits, batch)
    (2.0 * F.cross_entropy(logits, ctx.answer_labels(batch))).backward()
    torch.testing.assert_close(got, flat(model), atol=1e-6, rtol=1e-4)


def draws(cls: type[DERpp]) -> list[list[int]]:
    """What is drawn over some steps: for the outputs, for the labels, for the outputs, …"""
    model, method = pico.causal_lm(16), cls(rows=4)
    ctx = learned(method, model, texts(*([i, i + 1, i + 2] for i in range(12))))
    found: list[list[int]] = []
    inside = method._buffer.draw

    def watched(*given: Any) -> list[int]:
        found.append(inside(*given))
        return found[-1]

    method._buffer.draw = watched  # type: ignore[method-assign]
    for ctx.step in range(8):
        gradients(method, ctx)
    return found


class OneDraw(DERpp):
    """The fault that is looked for: the same rows for both terms."""

    def gradients(self, ctx: Context) -> None:
        named = ctx.random
        ctx.random = lambda *words: named(words[0], "one", words[-1])  # type: ignore[method-assign]
        super().gradients(ctx)
        del ctx.random


def test_the_two_draws_are_independent() -> None:
    found = draws(DERpp)
    assert all(len(drawn) == 2 for drawn in found)
    assert sum(o == c for o, c in zip(found[::2], found[1::2], strict=True)) < 4
    found = draws(OneDraw)
    assert found[::2] == found[1::2]


def test_of_an_odd_number_the_outputs_have_one_more() -> None:
    assert DERpp(rows=5)._amounts() == {"outputs": 3, "labels": 2}


def test_it_is_der_and_labels_added_up() -> None:
    model, method = pico.causal_lm(16), DERpp(rows=6)
    ctx = learned(method, model)
    moved(model)
    both = gradients(method, ctx)
    outputs, labels = (
        DERpp(rows=3, strength=a, label_strength=b) for a, b in ((0.5, 0.0), (0.0, 0.5))
    )
    for one in (outputs, labels):
        one.restore(ctx, method.state())
    # Three rows are kept, so each draw has them all.
    want = gradients(outputs, ctx) + gradients(labels, ctx)
    torch.testing.assert_close(both, want, atol=1e-6, rtol=1e-4)
