"""Soft prompts against vectors joined by hand: padding, positions, the cache, checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import pico
from keeptune import likelihood, state
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import ADDED
from keeptune.methods.packnet import PackNet
from keeptune.methods.prompt import PromptTuning
from pencil import context, learn

IDS = torch.tensor([[6, 7, 8, 9, 10], [11, 12, 13, 14, 15]])
LENGTH = 3


def gpt2() -> Any:
    """A model of learned positions, which do not bear a shift."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=16, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def build(kind: str) -> Any:
    if kind == "gpt2":
        return gpt2()
    return pico.adapted(pico.causal_lm(16)) if kind == "lora" else pico.causal_lm(16)


def prompted(kind: str = "full", tasks: int = 1) -> tuple[Any, Any, Tensor]:
    """A model with a prompt, one without, and what stands before the input, [K, D]."""
    model, plain, method = build(kind), build(kind), PromptTuning(length=LENGTH)
    for index in range(tasks):
        learn(model, method, index)
    return model, plain, torch.cat([part.rows for part in getattr(model, ADDED).chosen()])


def joined(plain: Any, rows: Tensor, ids: Tensor, **more: Any) -> Tensor:
    """The logits after the prompt's vectors, put before the tokens' by hand."""
    own = plain.get_input_embeddings()(ids)
    whole = torch.cat([rows.expand(len(ids), -1, -1), own], 1)
    return plain(inputs_embeds=whole, **more).logits[:, len(rows) :]


each_kind = pytest.mark.parametrize("kind", ["full", "lora", "gpt2"])


@each_kind
@torch.no_grad()
def test_the_model_reads_the_prompt_first(kind: str) -> None:
    model, plain, rows = prompted(kind)
    wanted = joined(plain, rows, IDS)
    got = model(input_ids=IDS).logits
    assert torch.equal(got, wanted)
    assert (got - plain(input_ids=IDS).logits).abs().max() > 1e-3
    mask = torch.ones_like(IDS)
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=mask).logits, wanted)
    places = torch.arange(5)[None]
    torch.testing.assert_close(model(input_ids=IDS, position_ids=places).logits, wanted)
    own = plain.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=own).logits, wanted)


@torch.no_grad()
def test_the_decoder_may_be_called_by_position() -> None:
    model, _, _ = prompted()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    one = model.model(IDS, mask).last_hidden_state
    assert torch.equal(one, model.model(input_ids=IDS, attention_mask=mask).last_hidden_state)


@torch.no_grad()
def test_all_hidden_states_have_the_inputs_length() -> None:
    model, _, _ = prompted()
    outputs = model(input_ids=IDS, output_hidden_states=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 5, 32)] * 3
    torch.testing.assert_close(outputs.hidden_states[0], model.model.embed_tokens(IDS))


@each_kind
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind: str, side: str) -> None:
    model, plain, rows = prompted(kind)
    short = IDS[1:, :3]
    wanted = joined(plain, rows, short)
    pads, ones = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
    parts = ([pads, short], [pads, ones]) if side == "left" else ([short, pads], [ones, pads])
    ids, mask = (torch.cat(part, 1) for part in parts)
    ids, mask = torch.cat([IDS[:1], ids]), torch.cat([torch.ones_like(IDS[:1]), mask])
    own = slice(2, 5) if side == "left" else slice(0, 3)
    given = (mask.cumsum(1) - 1).clamp(min=0)
    for more in ({}, {"position_ids": given}):
        got = model(input_ids=ids, attention_mask=mask, **more).logits
        torch.testing.assert_close(got[1:, own], wanted)
        torch.testing.assert_close(got[:1], joined(plain, rows, IDS[:1]))


@each_kind
@torch.no_grad()
def test_a_cache_keeps_the_prompt(kind: str) -> None:
    model, plain, rows = prompted(kind)
    wanted = joined(plain, rows, IDS)
    for mask in (None, torch.ones_like(IDS)):
        seen = [None if mask is None else mask[:, :end] for end in (2, 4, 5)]
        first = model(input_ids=IDS[:, :2], attention_mask=seen[0], use_cache=True)
        cache = first.past_key_values
        assert cache.get_seq_length() == LENGTH + 2
        then = model(input_ids=IDS[:, 2:4], attention_mask=seen[1], past_key_values=cache)
        more = {"position_ids": torch.tensor([[4]]), "past_key_values": cache}
        last = model(input_ids=IDS[:, 4:], attention_mask=seen[2], **more)
        got = torch.cat([first.logits, then.logits, last.logits], 1)
        torch.testing.assert_close(got, wanted)


@each_kind
@pytest.mark.parametrize("beams", [1, 3])
def test_it_writes_what_it_would_without_a_cache(kind: str, beams: int) -> None:
    model, plain, rows = prompted(kind)
    ids = torch.tensor([[6, 7, 8, 9, 10], [0, 0, 13, 14, 15]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    got = model.generate(input_ids=ids, attention_mask=mask, **asked)
    slow = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **asked)
    assert torch.equal(got, slow)
    for row in range(2):
        own = ids[row, mask[row].bool()][None]
        if beams == 1:
            found = own
            with torch.no_grad():
                for _ in range(6):
                    last = joined(plain, rows, found)[:, -1]
                    last[:, 2] = -torch.inf  # the end is not to be written
                    found = torch.cat([found, last.argmax(-1, keepdim=True)], 1)
        else:
            found = torch.cat([own, model.generate(input_ids=own, **asked)[:, own.shape[1] :]], 1)
        assert got[row, 5:].tolist() == found[0, own.shape[1] :].tolist()


@each_kind
@torch.no_grad()
def test_options_are_scored_with_and_without_a_shared_cache(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = prompted(kind)
    asked = ([[6, 7, 8], [9]], [[[10, 11], [12]], [[13, 14, 15], [6, 7]]], 0)
    shared = likelihood.option_losses(model, *asked)
    monkeypatch.setattr(likelihood, "_plain_cache", lambda model: None)
    alone = likelihood.option_losses(model, *asked)
    for one, other in zip(shared, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@each_kind
@pytest.mark.parametrize("saving", [False, True])
def test_gradients_are_those_of_the_joined_vectors(kind: str, saving: bool) -> None:
    model, plain, rows = prompted(kind)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    wanted = rows.detach().requires_grad_()
    longer = torch.cat([torch.ones(2, LENGTH, dtype=torch.long), mask], 1)
    answers = joined(plain, wanted, IDS, attention_mask=longer)[mask.bool()]
    answers.logsumexp(-1).sum().backward()
    if saving:
        model.activation_checkpointing_enable()
    logits = model.train()(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    got = logits[mask.bool()]
    got.logsumexp(-1).sum().backward()
    (own,) = getattr(model, ADDED)
    torch.testing.assert_close(got, answers)
    assert wanted.grad is not None
    assert wanted.grad.norm() > 0
    torch.testing.assert_close(own.rows.grad, wanted.grad)
    moved = [name for name, p in model.named_parameters() if p.grad is not None]
    assert moved == [f"{ADDED}.parts.0.rows"]


@torch.no_grad()
def test_each_task_has_its_own_prompt_alone() -> None:
    model, plain, _ = prompted(tasks=3)
    method = PromptTuning(length=LENGTH)
    method._numbers.update(t0=0, t1=1, t2=2)
    every = [part.rows for part in getattr(model, ADDED)]
    for index in (0, 2, 1):
        method.serve(context(model), f"t{index}")
        assert torch.equal(model(input_ids=IDS).logits, joined(plain, every[index], IDS))
    method.serve(context(model), None)
    assert torch.equal(model(input_ids=IDS).logits, joined(plain, every[2], IDS))


def test_a_prompt_starts_as_tokens_by_seed_and_task() -> None:
    drawn = []
    for seed, index in ((0, 0), (0, 0), (1, 0), (0, 1)):
        model = pico.causal_lm()
        PromptTuning(length=4).begin_task(context(model, seed=seed, index=index))
        drawn.append(getattr(model, ADDED).parts[0].rows.detach())
    words = model.get_input_embeddings().weight
    assert all(any(torch.equal(row, word) for word in words) for row in drawn[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_before_any_task_the_model_answers() -> None:
    model = pico.causal_lm(16)
    base = model(input_ids=IDS).logits
    PromptTuning().serve(context(model), None)
    assert torch.equal(model(input_ids=IDS).logits, base)


def test_evidence_says_how_far_the_prompt_moved() -> None:
    model, method = pico.causal_lm(16), PromptTuning(length=LENGTH)
    ctx = context(model)
    method.begin_task(ctx)
    method.end_task(ctx)
    assert method.evidence()["moved"] == 0
    with torch.no_grad():
        getattr(model, ADDED).parts[0].rows[1, :4] += 0.5
    method.end_task(ctx)
    shown = method.evidence()
    assert shown["moved"] == pytest.approx(1.0)
    assert shown["parameters"] == shown["parameters_of_all"] == LENGTH * 32
    assert shown["tokens_before"] == LENGTH


@pytest.mark.parametrize("kind", ["full", "lora"])
@torch.no_grad()
def test_prompts_come_back_with_the_models_own_tensors(kind: str) -> None:
    model, _, _ = prompted(kind, tasks=2)
    method = PromptTuning(length=LENGTH)
    method._numbers.update(t0=0, t1=1)
    fresh, again = build(kind), PromptTuning(length=LENGTH)
    again.restore(ctx := context(fresh, index=1), method.state())
    state.put_tensors(fresh, state.own_tensors(model))
    for index in range(2):
        method.serve(context(model), f"t{index}")
        again.serve(ctx, f"t{index}")
        assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)


@torch.no_grad()
def test_a_copy_of_the_model_keeps_its_own_prompt() -> None:
    model, _, _ = prompted()
    before, twin = model(input_ids=IDS).logits, copy.deepcopy(model)
    getattr(model, ADDED).parts[0].rows.zero_()
    assert torch.equal(twin(input_ids=IDS).logits, before)
    assert not torch.equal(model(input_ids=IDS).logits, before)


@torch.no_grad()
def test_a_llama_that_classifies_looks_at_the_last_token() -> None:
    model: Any = pico.classifier()
    learn(model, PromptTuning(length=LENGTH), 0)
    plain: Any = pico.classifier()
    (own,) = getattr(model, ADDED)
    short = IDS[1:, :3]
    vectors = torch.cat([own.rows[None], plain.model.embed_tokens(short)], 1)
    wanted = plain.score(plain.model(inputs_embeds=vectors).last_hidden_state[:, -1])
    ids = torch.cat([short, torch.zeros(1, 2, dtype=torch.long)], 1)
    got = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    torch.testing.assert_close(got, wanted)


def test_it_is_refused_where_it_makes_no_sense() -> None:
    with pytest.raises(MethodError, match=r"cannot run together.*Remove one of them"):
        Chain([PromptTuning(), PackNet()])
    with pytest.raises(MethodError, match=r"reads from left to right.*BertFor.*'adapters'"):
        PromptTuning().begin_task(context(pico.classifier(bert=True)))
    model, _, _ = prompted()
    pairs = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    with pytest.raises(MethodError, match=r"every pair of positions.*cache_implementation"):
        model(input_ids=IDS, attention_mask=pairs)


def test_a_row_too_long_for_what_stands_before_it_is_refused() -> None:
    model, _, _ = prompted("gpt2")
    model(input_ids=torch.ones(1, 61, dtype=torch.long))
    with pytest.raises(MethodError, match=r"62 tokens and 3 vectors.* max_length to 61"):
        model(input_ids=torch.ones(1, 62, dtype=torch.long))


def test_a_prompt_starts_at_the_scale_that_the_model_reads() -> None:
    model: Any = pico.causal_lm(16)
    model.set_input_embeddings(Scaled(model.get_input_embeddings()))
    method = PromptTuning(length=LENGTH)
    method.begin_task(context(model))
    rows = next(iter(getattr(model, ADDED))).rows
    every = model.get_input_embeddings()(torch.arange(16))
    assert all(any(torch.equal(row, word) for word in every) for row in rows)


class Scaled(torch.nn.Module):
    """Embeddings that are scaled as they are looked up."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.weight = own.weight

    def forward(self, ids: Tensor) -> Tensor:
        return 8.0 * self.weight[ids]
