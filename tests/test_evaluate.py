"""Evaluation must say what the model would say, whatever the batch, wrapper or padding."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import pico
from keeptune import evaluate, likelihood
from keeptune.errors import DataError, ModelError
from keeptune.evaluate import score_rows
from keeptune.rows import read_rows

CHOICES = [
    {"prompt": "What is it?", "choices": ["cat", "a dog", "elephants"], "answer": 1},
    {"prompt": "Q", "choices": ["yes", "no"], "answer": "no"},
    {"prompt": "A far longer question than the others:", "choices": list("abcd"), "answer": 0},
]
PAIRS = [
    {"prompt": "ab:", "completion": "ba"},
    {"prompt": "a longer prompt than that:", "completion": "yes it is"},
    {"prompt": "z", "completion": "q"},
]
TEXTS = [{"text": "To be or not"}, {"text": "x"}, {"text": "that is the question, friend."}]


def gpt2() -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=pico.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def sliding() -> MistralForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MistralForCausalLM(
            MistralConfig(**pico._sizes(pico.VOCAB, 512), num_key_value_heads=2, sliding_window=8)
        ).eval()


def adapted() -> torch.nn.Module:
    return pico.adapted(pico.causal_lm())


def by_hand(model: torch.nn.Module, ids: list[int], n: int) -> float:
    """Mean negative log-likelihood of the last n ids, one sequence alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return float(F.cross_entropy(logits[-n:], torch.tensor(ids[-n:])))


@pytest.mark.parametrize("build", [pico.causal_lm, gpt2, sliding, adapted])
def test_choice_is_the_option_of_least_loss_per_token(build):
    model, tokenizer = build(), pico.tokenizer()
    got = score_rows(model, tokenizer, read_rows(CHOICES), "choice", batch_size=3)
    for example, row in zip(got, CHOICES, strict=True):
        heads = tokenizer(row["prompt"] + " ")["input_ids"]
        losses = [
            by_hand(model, heads + tokenizer(c)["input_ids"], len(c) + 1) for c in row["choices"]
        ]
        assert example.answer == row["choices"][losses.index(min(losses))]
        assert example.score == float(example.answer == example.expected)


@pytest.mark.parametrize("build", [pico.causal_lm, gpt2, adapted])
def test_options_that_share_their_question_cost_what_they_cost_alone(build):
    model = build()
    heads = [[5, 6, 7, 8], [9], [20, 21, 22, 23, 24, 25, 26]]
    tails = [[[30], [31, 32]], [[33, 34, 35], [36], [37, 38]], [[39], [41]]]
    with torch.inference_mode():
        shared = likelihood.option_losses(model, heads, tails, 0)
    for head, options, losses in zip(heads, tails, shared, strict=True):
        for tail, loss in zip(options, losses, strict=True):
            assert loss == pytest.approx(len(tail) * by_hand(model, head + tail, len(tail)), 1e-4)


def test_a_sliding_window_never_sees_padding():
    assert likelihood._plain_cache(sliding()) is None
    assert likelihood._plain_cache(pico.causal_lm()) is not None


def test_virtual_tokens_are_kept_out_of_the_shared_cache():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = pico.adapted(pico.causal_lm(), config)
    got = score_rows(model, pico.tokenizer(), read_rows(CHOICES), "choice")
    alone = score_rows(model, pico.tokenizer(), read_rows(CHOICES), "choice", batch_size=1)
    assert [e.answer for e in got] == [e.answer for e in alone]
    loss = score_rows(model, pico.tokenizer(), read_rows(TEXTS[:1]), "perplexity")[0]
    ids = pico.tokenizer()(TEXTS[0]["text"])["input_ids"]
    assert loss.score == pytest.approx(by_hand(model, ids, len(ids) - 1), rel=1e-5)


def test_a_completion_row_with_choices_can_be_ranked():
    rows = [{"prompt": "Intent:", "completion": " pay bill", "choices": ["pay bill", "translate"]}]
    asked = [{"prompt": "Intent:", "choices": ["pay bill", "translate"], "answer": 0}]
    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    one = score_rows(model, tokenizer, read_rows(rows), "choice")
    two = score_rows(model, tokenizer, read_rows(asked), "choice")
    assert one[0].answer == two[0].answer
    assert one[0].score == two[0].score


def test_perplexity_of_text_is_the_mean_loss_of_its_tokens():
    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    got = score_rows(model, tokenizer, read_rows(TEXTS), "perplexity", batch_size=2)
    assert [e.weight for e in got] == [11, 0, 28]
    for example, row in zip(got, TEXTS, strict=True):
        if example.weight:
            ids = tokenizer(row["text"])["input_ids"]
            assert example.score == pytest.approx(by_hand(model, ids, len(ids) - 1), rel=1e-5)
    assert got[1].score == 0


def test_perplexity_of_a_completion_counts_the_answer_and_its_end_only():
    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    got = score_rows(model, tokenizer, read_rows(PAIRS[:1]), "perplexity")
    ids = [*tokenizer("ab: ba")["input_ids"], tokenizer.eos_token_id]
    assert got[0].weight == 4
    assert got[0].score == pytest.approx(by_hand(model, ids, 4), rel=1e-5)


def test_perplexity_in_many_small_batches_is_the_same(monkeypatch):
    model, tokenizer, rows = pico.causal_lm(), pico.tokenizer(), read_rows(TEXTS)
    whole = score_rows(model, tokenizer, rows, "perplexity")
    monkeypatch.setattr(likelihood, "MOST_LOGITS", 1)
    monkeypatch.setattr(likelihood, "CHUNK", 3)
    pieces = score_rows(model, tokenizer, rows, "perplexity")
    assert [e.score for e in pieces] == pytest.approx([e.score for e in whole], rel=1e-5)


def greedy(model: torch.nn.Module, ids: list[int], stops: set[int], n: int) -> list[int]:
    new: list[int] = []
    for _ in range(n):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("build", [pico.causal_lm, gpt2, adapted])
@pytest.mark.parametrize("pad", [True, False])
def test_generation_in_a_batch_is_greedy_decoding_alone(build, pad):
    model, tokenizer = build(), pico.tokenizer(pad=pad)
    got = score_rows(model, tokenizer, read_rows(PAIRS), "exact_match", max_new_tokens=6)
    for example, row in zip(got, PAIRS, strict=True):
        new = greedy(model, tokenizer(row["prompt"])["input_ids"], {2}, 6)
        assert example.answer == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert (example.prompt, example.expected) == (row["prompt"], row["completion"])


def always(token: int, then: int) -> torch.nn.Module:
    """A model that says `token` after anything else, and `then` after `token`."""
    model = pico.causal_lm()

    def forward(input_ids, logits_to_keep=0, **kwargs):
        logits = torch.zeros(*input_ids.shape, pico.VOCAB)
        said = input_ids == token
        logits[..., token] = (~said).float()
        logits[..., then] = torch.maximum(logits[..., then], said.float())
        out = type(model).forward(model, input_ids, logits_to_keep=logits_to_keep, **kwargs)
        out.logits = logits[:, -logits_to_keep:]
        return out

    forward.__signature__ = __import__("inspect").signature(type(model).forward)
    model.forward = forward
    return model


def test_an_answer_ends_at_eos():
    tokenizer = pico.tokenizer()
    model = always(tokenizer("y")["input_ids"][0], tokenizer.eos_token_id)
    rows = read_rows([{"prompt": "ok?", "completion": "Y"}, {"prompt": "?", "completion": "n"}])
    got = score_rows(model, tokenizer, rows, "exact_match")
    assert [(e.answer, e.score) for e in got] == [("y", 1.0), ("y", 0.0)]


def test_a_chat_answer_ends_with_its_turn_though_that_is_not_the_eos():
    tokenizer = pico.tokenizer(chat=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = always(tokenizer("y")["input_ids"][0], end)
    talk = [{"role": "user", "content": "ok?"}, {"role": "assistant", "content": "y"}]
    rows = read_rows([{"messages": talk}])
    assert score_rows(model, tokenizer, rows, "exact_match")[0].answer == "y"
    lists = read_rows([{"prompt": talk[:1], "completion": talk[1:]}])
    assert score_rows(model, tokenizer, lists, "exact_match")[0].score == 1
    plain = read_rows([{"prompt": "ok?", "completion": "y"}])
    got = score_rows(model, tokenizer, plain, "exact_match", max_new_tokens=4)
    assert got[0].answer == "yyy" or got[0].score == 0


def test_without_a_limit_an_answer_gets_the_expected_length_plus_eight():
    tokenizer, model = pico.tokenizer(), pico.causal_lm()
    letter = tokenizer("y")["input_ids"][0]
    model = always(letter, letter)
    got = score_rows(model, tokenizer, read_rows(PAIRS), "exact_match", max_new_tokens=None)
    assert [len(e.answer) for e in got] == [len(r["completion"]) + 8 for r in PAIRS]


@pytest.mark.parametrize("build", [pico.causal_lm, adapted])
def test_the_models_own_generation_settings_change_nothing_and_stay(build):
    model, tokenizer, rows = build(), pico.tokenizer(), read_rows(PAIRS)
    plain = score_rows(model, tokenizer, rows, "exact_match", max_new_tokens=20)
    model.generation_config.update(
        do_sample=True, temperature=0.3, top_p=0.5, repetition_penalty=5.0, max_length=9
    )
    got = score_rows(model, tokenizer, rows, "exact_match", max_new_tokens=20)
    assert [e.answer for e in got] == [e.answer for e in plain]
    assert model.generation_config.repetition_penalty == 5.0
    assert model.generation_config.max_length == 9


@pytest.mark.parametrize(
    ("data", "score"), [(CHOICES, "choice"), (PAIRS, "token_f1"), (TEXTS, "perplexity")]
)
def test_the_batch_size_changes_nothing_and_order_is_kept(data, score):
    model, tokenizer, rows = pico.causal_lm(), pico.tokenizer(), read_rows(data * 3)
    done: list[int] = []
    one = score_rows(model, tokenizer, rows, score, batch_size=1, tick=done.append)
    many = score_rows(model, tokenizer, rows, score, batch_size=7, tick=done.append)
    assert [e.id for e in many] == list(range(9))
    assert [e.answer for e in one] == [e.answer for e in many]
    assert [e.score for e in one] == pytest.approx([e.score for e in many], rel=1e-5)
    assert sum(done) == 18


def test_mode_and_rng_stay_as_found():
    model, tokenizer = pico.causal_lm().train(), pico.tokenizer()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    for data, score in ((CHOICES, "choice"), (PAIRS, "exact_match"), (TEXTS, "perplexity")):
        score_rows(model, tokenizer, read_rows(data), score, max_new_tokens=3)
    with pytest.raises(DataError):
        score_rows(model, tokenizer, read_rows([{"text": "x"}]), "perplexity")
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_prompts_longer_than_the_context_lose_their_beginning_and_are_counted():
    model, tokenizer = pico.causal_lm(context=32), pico.tokenizer()
    long, short = "lost " * 20 + "kept: a b c d", "kept: a b c d"
    rows = read_rows([{"prompt": p, "completion": "yes"} for p in (long, short)])
    got = score_rows(model, tokenizer, rows, "exact_match", max_new_tokens=32 - len(short))
    assert got.truncated == 1
    assert got[0].answer == got[1].answer
    asked = [{"prompt": p, "choices": ["yes", "no"], "answer": 0} for p in (long, short)]
    assert score_rows(model, tokenizer, read_rows(asked), "choice").truncated == 1
    texts = read_rows([{"text": long}, {"text": short}])
    scored = score_rows(model, tokenizer, texts, "perplexity", max_length=len(short))
    assert (scored.truncated, scored[0].weight) == (1, len(short) - 1)


def test_no_row_of_a_batch_is_written_past_the_models_positions():
    model = gpt2()
    context = model.config.n_positions
    rows = [
        {"prompt": "a" * (context - 10), "completion": "b"},
        {"prompt": "c", "completion": "d" * (context - 20)},
        {"prompt": "e" * 5, "completion": "f"},
    ]
    alone = [
        score_rows(model, pico.tokenizer(), read_rows([row]), "exact_match")[0].answer
        for row in rows
    ]
    together = score_rows(model, pico.tokenizer(), read_rows(rows), "exact_match")
    assert [example.answer for example in together] == alone


@pytest.mark.parametrize("bert", [True, False])
@pytest.mark.parametrize("pad", [True, False])
def test_classes_are_those_of_each_text_alone(bert, pad):
    model, tokenizer = pico.classifier(3, bert=bert), pico.tokenizer(pad=pad)
    if not pad:
        model.config.pad_token_id = None
    data = [{"text": t, "label": "b"} for t in ("short", "a very much longer text", "m", "zz top")]
    got = score_rows(model, tokenizer, read_rows(data), "accuracy", labels=["a", "b", "c"])
    for example, row in zip(got, data, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(row["text"])["input_ids"]])).logits
        assert example.answer == "abc"[int(logits.argmax())]
        assert example.score == float(example.answer == "b")


def test_a_class_the_model_lacks_is_an_error():
    rows = read_rows([{"text": "x", "label": 5}])
    with pytest.raises(DataError, match="label 5 is class 5, but the model has the classes 0 to 1"):
        score_rows(pico.classifier(2), pico.tokenizer(), rows, "accuracy")


def test_the_wrong_kind_of_model_is_an_error():
    tokenizer = pico.tokenizer()
    with pytest.raises(ModelError, match="needs a causal language model, but the model is Llama"):
        score_rows(pico.classifier(), tokenizer, read_rows(PAIRS), "exact_match")
    rows = read_rows([{"text": "x", "label": 0}])
    with pytest.raises(ModelError, match="needs a sequence classifier"):
        score_rows(pico.causal_lm(), tokenizer, rows, "accuracy")


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_that_a_trl_trainer_has_patched_still_gives_answers(tmp_path, adapted):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    before = [
        score_rows(model, tokenizer, read_rows(data), score, max_new_tokens=5)
        for data, score in ((CHOICES, "choice"), (PAIRS, "exact_match"), (TEXTS, "perplexity"))
    ]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, about its defaults
        config = SFTConfig(output_dir=str(tmp_path), bf16=False, report_to="none", use_cpu=True)
        trainer = SFTTrainer(
            model=model,
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]}),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=2) if adapted else None,
        )
    trainer.model.train()
    after = [
        score_rows(trainer.model, tokenizer, read_rows(data), score, max_new_tokens=5)
        for data, score in ((CHOICES, "choice"), (PAIRS, "exact_match"), (TEXTS, "perplexity"))
    ]
    assert [[e.answer for e in rows] for rows in after] == [
        [e.answer for e in rows] for rows in before
    ]
    assert math.isclose(after[2][0].score, before[2][0].score, rel_tol=1e-5)


# -- greedy match ---------------------------------------------------------------------------------


def test_greedy_match_is_what_greedy_generation_begins_with() -> None:
    model, tokenizer = pico.causal_lm(seed=3), pico.tokenizer()
    prompts = [f"ask {i}:" for i in range(12)]
    rows = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer(f"{prompt}")["input_ids"]])
        said = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        text = tokenizer.decode(said[0, ids.shape[1] :])
        rows.append({"prompt": prompt, "completion": text if i % 2 else f"{text[:-1]}!"})
    usable = [r for r in rows if r["completion"].isprintable() and "<" not in r["completion"]]
    # A space joins what has none of its own, so that only such answers continue the ids above.
    usable = [r for r in usable if r["completion"][0] == " "] or usable
    scored = score_rows(model, tokenizer, read_rows(usable), "greedy_match", batch_size=5)
    for row, example in zip(usable, scored, strict=True):
        joined = tokenizer(row["prompt"] + " " * (row["completion"][0] != " "))["input_ids"]
        want = tokenizer(row["completion"])["input_ids"]
        said = model.generate(
            torch.tensor([joined]), max_new_tokens=len(want), do_sample=False, eos_token_id=None
        )
        assert example.score == float(said[0, len(joined) :].tolist() == want)


def test_greedy_match_needs_no_end_of_the_answer_and_shows_where_it_went_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = pico.tokenizer()
    said = [" ab", " xb"]
    monkeypatch.setattr(
        evaluate, "sequence_guesses", lambda *_: [tokenizer(s)["input_ids"] for s in said]
    )
    rows = read_rows([{"prompt": "q:", "completion": " ab"}] * 2)
    scored = score_rows(pico.causal_lm(), tokenizer, rows, "greedy_match")
    assert [e.score for e in scored] == [1.0, 0.0]
    assert [e.answer for e in scored] == ["ab", "x …"]


@pytest.mark.parametrize("score", ["exact_match", "greedy_match", "perplexity"])
def test_what_is_put_before_a_question_is_as_if_it_had_been_asked(score: str) -> None:
    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    before = tokenizer.encode("see: ", add_special_tokens=False)
    longer = [row | {"prompt": "see: " + row["prompt"]} for row in PAIRS]
    wanted = score_rows(model, tokenizer, read_rows(longer), score)
    got = score_rows(
        model, tokenizer, read_rows(PAIRS), score, prompt=lambda ids, room: [*before, *ids]
    )
    assert [(e.answer, e.score) for e in got] == [(e.answer, e.score) for e in wanted]
    assert [e.prompt for e in got] == [row["prompt"] for row in PAIRS]


def test_options_are_ranked_after_what_is_put_before_their_question() -> None:
    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    before = tokenizer.encode("see: ", add_special_tokens=False)
    longer = [row | {"prompt": "see: " + row["prompt"]} for row in CHOICES]
    wanted = score_rows(model, tokenizer, read_rows(longer), "choice")
    plain = read_rows(CHOICES)
    got = score_rows(model, tokenizer, plain, "choice", prompt=lambda ids, room: [*before, *ids])
    assert [e.answer for e in got] == [e.answer for e in wanted]


def test_text_has_no_question_to_put_anything_before() -> None:
    model, tokenizer = pico.causal_lm(), pico.tokenizer()
    rows = read_rows(TEXTS)
    wanted = score_rows(model, tokenizer, rows, "perplexity")
    got = score_rows(model, tokenizer, rows, "perplexity", prompt=lambda ids, room: [7, *ids])
    assert [e.score for e in got] == [e.score for e in wanted]
