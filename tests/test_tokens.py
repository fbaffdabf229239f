"""What exactly is trained on: ids, loss marks, cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pico
from keeptune.errors import DataError
from keeptune.rows import Shape, label_id, read_rows
from keeptune.tokens import collate, cut_left, encode, option_ids, prompt_ids, tokenise

TOKENIZER = pico.tokenizer()
CHAT = pico.tokenizer(chat=True)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def shown(row, tokenizer=TOKENIZER, max_length=1000):
    """The whole text, and the learned part with | for each gap."""
    rows = read_rows([row])
    ids, labels = encode(rows.rows[0], rows.shape, tokenizer, max_length)
    assert len(ids) == len(labels)
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    learned, last = "", False
    for i, label in zip(ids, labels, strict=True):
        learned += "" if label == -100 else ("" if last or not learned else "|")
        learned += "" if label == -100 else tokenizer.decode([i])
        last = label != -100
    return tokenizer.decode(ids), learned


@pytest.mark.parametrize(
    ("prompt", "completion", "text", "learned"),
    [
        ("Q:", "A", "Q: A</s>", " A</s>"),
        ("Q:", " A", "Q: A</s>", " A</s>"),
        ("Q: ", "A", "Q: A</s>", " A</s>"),
        ("Q:\n", "A", "Q:\nA</s>", "A</s>"),
        ("Q:", "", "Q:</s>", "</s>"),
    ],
)
def test_prompt_and_completion_are_one_text_with_one_space(prompt, completion, text, learned):
    assert shown({"prompt": prompt, "completion": completion}) == (text, learned)


def test_text_is_learned_as_it_is():
    assert shown({"text": "To be"}) == ("To be", "To be")


def test_a_choice_row_learns_the_right_choice():
    row = {"prompt": "Q:", "choices": ["no", "yes"], "answer": 1}
    assert shown(row) == ("Q: yes</s>", " yes</s>")


def test_messages_learn_the_assistants_turns_and_their_ends():
    text, learned = shown({"messages": TALK}, CHAT)
    assert text.startswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>")
    assert learned == "hello<|im_end|>|ciao<|im_end|>"


def test_prompt_and_completion_as_messages_learn_the_completion_only():
    row = {"prompt": TALK[:3], "completion": TALK[3:]}
    text, learned = shown(row, CHAT)
    assert learned == "ciao<|im_end|>"
    assert text == shown({"messages": TALK}, CHAT)[0]
    choice = {"prompt": TALK[:1], "choices": ["hello", "no"], "answer": 0}
    assert shown(choice, CHAT) == shown({"messages": TALK[:2]}, CHAT)


def test_a_template_without_an_end_token_learns_its_line_end():
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert shown({"messages": TALK[:2]}, tokenizer)[1] == "hello\n"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q:", "completion": "A"},
        {"prompt": "Q: ", "completion": "A"},
        {"prompt": "", "completion": "A"},
        {"prompt": "Q", "choices": ["no", "yes"], "answer": 1},
        {"messages": TALK},
        {"prompt": TALK[:1], "completion": TALK[1:2]},
    ],
)
def test_generation_starts_from_what_training_saw_before_the_answer(row, bos):
    tokenizer = pico.tokenizer(chat=True, bos=bos)
    rows = read_rows([row])
    start = prompt_ids(rows.rows[0], rows.shape, tokenizer)
    ids, labels = encode(rows.rows[0], rows.shape, tokenizer, 1000)
    assert start
    assert ids[: len(start)] == start
    assert labels[len(start) - 1] == -100
    assert labels[len(start) :] == ids[len(start) :]


def test_options_continue_the_question():
    row = {"prompt": "Q: ", "choices": ["a", "bc"], "answer": 0}
    head, tails = option_ids(row, Shape.CHOICE, TOKENIZER, row["choices"])
    assert head == prompt_ids(row, Shape.CHOICE, TOKENIZER)
    assert [TOKENIZER.decode(t) for t in tails] == [" a", " bc"]


def test_where_tokens_would_merge_the_prompt_keeps_its_own():
    """A tokenizer that has "ab" as one token: the prompt "a" stays the prompt "a"."""
    core = Tokenizer(
        models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3, " ": 4}, [("a", "b")], unk_token="</s>")
    )
    core.pre_tokenizer = pre_tokenizers.Split("|", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert encode(row, Shape.MESSAGES, tokenizer, 9) == ([0, 1], [-100, 1])


def test_too_long_prompts_lose_their_beginning():
    row = {"prompt": "0123456789", "completion": "abc"}
    assert shown(row, max_length=8) == ("789 abc</s>", " abc</s>")
    assert shown(row, pico.tokenizer(bos=True), 8) == ("<s>89 abc</s>", " abc</s>")
    assert shown(row, max_length=4) == ("9 ab", " ab")
    assert shown(row, pico.tokenizer(bos=True), 4) == ("<s> ab", " ab")
    assert shown({"text": "abcdef"}, max_length=4) == ("abcd", "abcd")
    text, learned = shown({"messages": TALK}, CHAT, 12)
    assert text.endswith("assistant\nciao<|im_end|>"[-8:])
    assert learned == "ciao<|im_end|>"
    assert cut_left([1, 5, 6, 7], pico.tokenizer(), 2) == [1, 7]
    assert cut_left([5, 6, 7], pico.tokenizer(), 2) == [6, 7]


def test_cuts_and_drops_are_counted():
    rows = read_rows([{"prompt": "01234", "completion": "ab"}, {"prompt": "0", "completion": "a"}])
    done = tokenise(rows, TOKENIZER, max_length=5)
    assert (done.truncated, done.dropped) == (1, 0)
    assert done.dataset["labels"][1] == [-100, *TOKENIZER(" a</s>")["input_ids"]]
    assert (done.tokens, done.answer_tokens) == (5 + 4, 4 + 3)
    texts = tokenise(read_rows([{"text": ""}, {"text": "ab"}]), TOKENIZER, max_length=9)
    assert (texts.dropped, len(texts.dataset), texts.answer_tokens) == (1, 1, 1)
    with pytest.raises(DataError, match="no row of a list of 2 rows has a token to learn within 1"):
        tokenise(rows, TOKENIZER, max_length=1)


def test_rows_with_choices_carry_each_choice_as_an_answer():
    choices = {"prompt": "Q:", "choices": ["no", "yes"], "answer": 1}
    completion = {"prompt": "Q:", "completion": "yes", "choices": ["no", "yes"]}
    for row in (choices, completion):
        done = tokenise(read_rows([row]), TOKENIZER, max_length=99).dataset[0]
        no, yes = done["options"]
        assert yes == {"input_ids": done["input_ids"], "labels": done["labels"]}
        assert TOKENIZER.decode(no["input_ids"]) == "Q: no</s>"
        assert TOKENIZER.decode([i for i in no["labels"] if i != -100]) == " no</s>"


def test_messages_with_choices_carry_them_too():
    row = {"prompt": TALK[:1], "completion": TALK[1:2], "choices": ["hello", "no"]}
    hello, no = tokenise(read_rows([row]), CHAT, max_length=999).dataset[0]["options"]
    assert CHAT.decode([i for i in hello["labels"] if i != -100]) == "hello<|im_end|>"
    assert CHAT.decode([i for i in no["labels"] if i != -100]) == "no<|im_end|>"


def test_options_are_given_for_all_rows_or_none():
    rows = [
        {"prompt": "Q:", "completion": "yes", "choices": ["no", "yes"]},
        {"prompt": "Q:", "completion": "maybe"},
    ]
    done = tokenise(read_rows(rows), TOKENIZER, max_length=99)
    assert done.dataset.column_names == ["input_ids", "labels"]


def test_batches_are_padded_on_the_right():
    for tokenizer, padding in ((TOKENIZER, 0), (pico.tokenizer(pad=False), 2)):
        batch = collate(tokenizer)(
            [
                {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
                {"input_ids": [8, 9], "labels": [8, 9], "other": "x"},
            ]
        )
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, padding]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [8, 9, -100]]


def test_classes_become_a_vector_of_ids():
    data = [{"text": "abc", "label": "spam"}, {"text": "a", "label": 0}]
    done = tokenise(read_rows(data), TOKENIZER, max_length=2, labels=["ham", "spam"])
    assert done.dataset["labels"][:] == [1, 0]
    assert (done.truncated, done.answer_tokens) == (1, 0)
    batch = collate(TOKENIZER)(list(done.dataset))
    assert batch["labels"].dtype == torch.long
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].shape == (2, 2)


@pytest.mark.parametrize(
    ("label", "labels", "message"),
    [
        ("spma", ["ham", "spam"], "unknown label 'spma'. Did you mean 'spam'?"),
        (2, ["ham", "spam"], "unknown label 2. Allowed: ham, spam."),
        ("spam", [], "unknown label 'spam'. Give the names of the classes as labels."),
        (-1, [], "unknown label -1"),
        (2, ["0", "1"], "unknown label 2. Allowed: 0, 1."),
        (True, ["ham", "spam"], "unknown label True."),
    ],
)
def test_an_unknown_label_is_named(label, labels, message):
    with pytest.raises(DataError, match=message):
        tokenise(read_rows([{"text": "a", "label": label}]), TOKENIZER, max_length=9, labels=labels)


def test_labels_may_be_digits_from_a_csv():
    rows = read_rows([{"text": "a", "label": "1"}])
    assert tokenise(rows, TOKENIZER, max_length=9).dataset["labels"][0] == 1
    named = tokenise(rows, TOKENIZER, max_length=9, labels=["1", "0"])
    assert named.dataset["labels"][0] == 0


def test_a_tokenizer_that_lacks_what_is_needed_is_one_sentence():
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        shown({"messages": TALK})
    with pytest.raises(DataError, match="the tokenizer has no EOS token"):
        shown({"prompt": "a", "completion": "b"}, pico.tokenizer(eos=False))
    assert shown({"text": "ab"}, pico.tokenizer(eos=False)) == ("ab", "ab")
    assert shown({"messages": TALK}, pico.tokenizer(eos=False, chat=True))[1].startswith("hello")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="the chat template writes turn 2 of a conversation diff"):
        shown({"messages": TALK}, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses a conversation: roles must alternate"):
        shown({"messages": TALK}, tokenizer)


@pytest.mark.parametrize(
    ("label", "labels", "number"),
    [
        ("spam", ["ham", "spam"], 1),
        (1, ["ham", "spam"], 1),
        (1, ["1", "0"], 0),  # a name, in the order of sight
        (5, ["1", "5"], 1),
        (False, ["True", "False"], 1),
        (3, [], 3),
    ],
)
def test_the_id_of_a_label(label: Any, labels: list[str], number: int) -> None:
    assert label_id(label, labels) == number
