"""Rows to token ids: the chat template, which tokens are learned, and what had to be cut.

A row becomes pieces of text, each either asked or answered. Pieces are encoded together where the
tokenizer keeps the earlier ids when text is added, else one by one; so the ids of the asked
pieces are always what generation starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from keeptune.errors import DataError
from keeptune.method import IGNORED, OPTIONS, Ids
from keeptune.rows import (
    Messages,
    Row,
    Rows,
    Shape,
    answer,
    answered,
    conversation,
    is_conversation,
    label_id,
    question,
)


@dataclass(frozen=True)
class Tokenised:
    """Token ids of rows, and what happened to them.

    Attributes:
        dataset: Columns input_ids and labels (a list as long, -100 where nothing is learned; for
            Shape.LABEL the class as one number). Where every row has choices also `options`: one
            {input_ids, labels} for each choice of the row, as if it were the right one.
        truncated: Rows that were longer than the maximum and lost their beginning (text: end).
        tokens: Tokens in `dataset`.
        answer_tokens: Tokens in `dataset` that have a loss; 0 for Shape.LABEL.
        dropped: Rows left out because they have no token to learn.
    """

    dataset: Dataset
    truncated: int
    tokens: int
    answer_tokens: int
    dropped: int


def tokenise(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, labels: Sequence[str] = ()
) -> Tokenised:
    """Encode all rows.

    Args:
        rows: What to encode.
        tokenizer: Its chat template is used for messages only.
        max_length: Longest row in tokens, 1 or more.
        labels: Names of the classes in the order of their ids (Shape.LABEL only).

    Raises:
        DataError: No chat template or EOS where one is needed, an unknown label, or no row left.
    """
    ids: list[Ids] = []
    targets: list[Ids | int] = []
    chosen: list[list[dict[str, Ids]]] = []
    truncated = dropped = 0
    for row in rows.rows:
        full, mask = _encode_all(row, rows.shape, tokenizer)
        truncated += len(full) > max_length
        kept, mask = _cut(full, mask, rows.shape, tokenizer, max_length)
        if not (kept if rows.shape is Shape.LABEL else learned(mask)):
            dropped += 1
            continue
        ids.append(kept)
        targets.append(label_id(row["label"], labels) if rows.shape is Shape.LABEL else mask)
        every = [encode(r, rows.shape, tokenizer, max_length) for r in answered(row, rows.shape)]
        chosen.append([dict(zip(("input_ids", "labels"), pair, strict=True)) for pair in every])
    if not ids:
        raise DataError(f"no row of {rows.source} has a token to learn within {max_length} tokens.")
    return Tokenised(
        Dataset.from_dict(
            {"input_ids": ids, "labels": targets} | ({OPTIONS: chosen} if all(chosen) else {})
        ),
        truncated=truncated,
        tokens=sum(map(len, ids)),
        answer_tokens=sum(learned(t) for t in targets if isinstance(t, list)),
        dropped=dropped,
    )


def encode(
    row: Row, shape: Shape, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Ids, Ids]:
    """Encode one row for training or for its likelihood.

    A row that is too long loses the beginning of its prompt, so that the answer stays; a leading
    BOS stays too. Text loses its end. Strings get an EOS after the completion; text gets none:
    it is learned as it is.

    Returns:
        input_ids and labels, equally long, at most `max_length`; labels are -100 where there is
        no loss (everywhere for Shape.LABEL).

    Raises:
        DataError: No chat template or EOS where one is needed, or an unusable template.
    """
    ids, labels = _encode_all(row, shape, tokenizer)
    return _cut(ids, labels, shape, tokenizer, max_length)


def prompt_ids(row: Row, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """What generation starts from: the question, up to where the answer begins; never empty."""
    prompt = question(row, shape)
    if isinstance(prompt, str):
        return _segments(tokenizer, [_join(prompt, "")[0]], special=True)[0]
    return _segments(tokenizer, [render(tokenizer, prompt, answering=True)], special=False)[0]


def option_ids(
    row: Row, shape: Shape, tokenizer: PreTrainedTokenizerBase, choices: Sequence[str]
) -> tuple[Ids, list[Ids]]:
    """The ids of the question, and those of each choice as its continuation (without EOS)."""
    prompt = question(row, shape)
    if isinstance(prompt, str):
        pairs = [_join(prompt, choice) for choice in choices]
    else:
        asked = render(tokenizer, prompt, answering=True)
        pairs = [(asked, choice) for choice in choices]
    special = isinstance(prompt, str)
    encoded = [_segments(tokenizer, list(pair), special=special) for pair in pairs]
    return encoded[0][0], [tail for _, tail in encoded]


def cut_left(ids: Ids, tokenizer: PreTrainedTokenizerBase, room: int) -> Ids:
    """The last `room` ids; a leading BOS stays in front, since many models lean on it."""
    if len(ids) <= room:
        return ids
    bos = ids[:1] if room > 1 and ids[0] == tokenizer.bos_token_id else []
    return bos + ids[len(ids) - room + len(bos) :]


def learned(labels: Ids) -> int:
    """How many of these labels have a loss; the first never has one, nothing predicts it."""
    return sum(label != IGNORED for label in labels[1:])


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with, always masked: the pad token's, else the EOS's, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def collate(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Make a collator for rows of `Tokenised.dataset`.

    Returns:
        A function from B rows to input_ids and attention_mask [B, T], padded on the right to the
        longest row, and labels: int64 [B, T] padded with -100, or [B] for classes.
    """
    padding = pad_id(tokenizer)

    def collator(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": torch.stack(labels)
            if labels[0].dim() == 0
            else pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    return collator


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, answering: bool) -> str:
    """Messages as the chat template's text; with `answering`, up to where the assistant speaks.

    Raises:
        DataError: There is no chat template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, which rows with messages need; take an instruct "
            "model, or write prompt and completion as strings."
        )
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses a conversation: {error}.") from error


# ---- pieces ---------------------------------------------------------------------------------


def _pieces(row: Row, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The row as (text, is it an answer) in order."""
    if is_conversation(row, shape):
        return _turns(*conversation(row), tokenizer)
    asked = question(row, shape)
    if not isinstance(asked, str):
        return _turns([*asked, {"role": "assistant", "content": answer(row, shape)}], 0, tokenizer)
    if shape in (Shape.TEXT, Shape.LABEL):
        return [(asked, shape is Shape.TEXT)]
    head, tail = _join(asked, answer(row, shape))
    return [(head, False), (tail, True)]


def _turns(
    messages: Messages, first: int, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """A conversation as pieces; assistant turns from index `first` on are answers."""
    whole = render(tokenizer, messages, answering=False)
    pieces, at = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first:
            continue
        head = render(tokenizer, messages[:i], answering=True)
        turn = render(tokenizer, messages[: i + 1], answering=False)
        if not (whole.startswith(turn) and turn.startswith(head)):
            raise DataError(
                f"the chat template writes turn {i + 1} of a conversation differently once more "
                "follows, so its answers cannot be told apart; give each answer its own row, or "
                "another chat template."
            )
        # White space after an end-of-turn token is never generated, so it is not learned.
        end = turn.rstrip()
        if end.endswith(tuple(tokenizer.get_added_vocab())) and len(end) > len(head):
            turn = end
        pieces += [(whole[at : len(head)], False), (turn[len(head) :], True)]
        at = len(turn)
    return pieces


def _join(prompt: str, completion: str) -> tuple[str, str]:
    """Prompt and completion as one text, cut so that spaces between belong to the completion.

    Most tokenizers put the space into the first token of the next word.
    """
    apart = not prompt or not completion or prompt[-1].isspace() or completion[0].isspace()
    text = prompt + ("" if apart else " ") + completion
    head = prompt.rstrip(" ")
    return head, text[len(head) :]


def _segments(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool
) -> list[Ids]:
    """Ids of consecutive texts: what each adds to those before, or its own where they merge."""
    done: Ids = []
    segments: list[Ids] = []
    text = ""
    for piece in texts:
        text += piece
        ids = _ids(tokenizer, text, special=special)
        if not text:
            ids = _start(tokenizer)
        new = ids[len(done) :] if ids[: len(done)] == done else _ids(tokenizer, piece)
        segments.append(new)
        done = done + new
    return segments


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> Ids:
    ids = list(tokenizer.encode(text, add_special_tokens=special, verbose=False))
    end = tokenizer.eos_token
    if special and end and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(end):
        ids.pop()
    return ids


def _start(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """What stands for an empty prompt: BOS, else EOS."""
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [int(token) for token in tokens if token is not None][:1]


def _encode_all(row: Row, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    if shape is Shape.LABEL:
        ids = list(tokenizer.encode(row["text"], verbose=False))
        return ids, [IGNORED] * len(ids)
    pieces = _pieces(row, shape, tokenizer)
    plain = not is_conversation(row, shape) and isinstance(question(row, shape), str)
    segments = _segments(tokenizer, [text for text, _ in pieces], special=plain)
    if plain and shape is not Shape.TEXT:
        segments[-1] = [*segments[-1], _eos(tokenizer)]
    ids = [i for segment in segments for i in segment]
    labels = [
        i if learned else IGNORED
        for segment, (_, learned) in zip(segments, pieces, strict=True)
        for i in segment
    ]
    return ids, labels


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no EOS token, so a model trained on prompt and completion would "
            "never stop; set tokenizer.eos_token, or give rows with `text` only."
        )
    return int(tokenizer.eos_token_id)


def _cut(
    ids: Ids, labels: Ids, shape: Shape, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Ids, Ids]:
    if len(ids) <= max_length:
        return ids, labels
    if shape is Shape.TEXT:
        return ids[:max_length], labels[:max_length]
    if shape is Shape.LABEL:
        # The classifier reads the closing token, if its tokenizer writes one.
        close = ids[-1:] if ids[-1] in tokenizer.all_special_ids else []
        return ids[: max_length - len(close)] + close, [IGNORED] * max_length
    # An answer that alone is too long keeps its beginning, after one token of its prompt.
    last_asked = max(i for i, label in enumerate(labels) if label == IGNORED)
    end = min(len(ids), last_asked + max_length)
    bos = int(max_length > 1 and ids[0] == tokenizer.bos_token_id)
    begin = end - max_length + bos
    return ids[:bos] + ids[begin:end], labels[:bos] + labels[begin:end]
