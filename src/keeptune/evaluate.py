"""A model and rows to one result per row: greedy answers, likelihoods of choices, classes.

Rows are sorted by length and batched; results come back in row order and, up to float rounding,
do not depend on the batch size. The model's mode, its settings and the global RNG stay as found.
Several processes that each have the whole model share the batches, and all have all results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from keeptune.errors import DataError, ModelError
from keeptune.likelihood import (
    NO_LIMIT,
    context_length,
    evaluating,
    most_tokens,
    option_losses,
    padded,
    plain_generation,
    sequence_guesses,
    sequence_losses,
)
from keeptune.method import IGNORED, Ids
from keeptune.processes import gathered, is_sharded, processes
from keeptune.reading import base_model
from keeptune.records import Example
from keeptune.rows import Rows, Shape, answer, as_text, label_id, options, question
from keeptune.scorers import check_score, text_score
from keeptune.tokens import (
    cut_left,
    encode,
    learned,
    option_ids,
    pad_id,
    prompt_ids,
    render,
)

Prompt = Callable[[Ids, int], Ids]
Result = TypeVar("Result")
SPARE_TOKENS = 8  # beyond the expected answer, where no limit of new tokens is given


class Scored(list[Example]):
    """One example per row, in row order.

    Attributes:
        truncated: Rows that were longer than the model's context. Questions lost their beginning,
            text its end.
    """

    truncated: int = 0


@dataclass
class _Job:
    """What every way of scoring needs."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    batch_size: int
    context: int
    tick: Callable[[int], None]
    prompt: Prompt
    truncated: int = 0

    @property
    def processes(self) -> tuple[int, int]:
        """This process's number among those that share the rows, and how many they are."""
        # Where the weights are spread no process can go forward without the others.
        return (0, 1) if is_sharded(self.model) else processes()

    def asked(self, ids: Ids, room: int) -> Ids:
        """What stands in for a question, in at most `room` tokens."""
        ids = self.prompt(ids, room)
        self.truncated += len(ids) > room
        return cut_left(ids, self.tokenizer, room)

    def batches(self, sizes: Sequence[int], most: int) -> Iterator[list[int]]:
        """Row numbers in batches, longest first; a batch's padded size stays within `most`.

        Of several processes each has the batches of its turn.
        """
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        turn, (number, count) = 0, self.processes
        while order:
            n = max(1, min(self.batch_size, most // max(sizes[order[0]], 1)))
            if turn % count == number:
                yield order[:n]
            self.tick(n if n < len(order) else len(order))
            order, turn = order[n:], turn + 1

    def all(self, found: dict[int, Result]) -> list[Result]:
        """The results of all processes, in row order."""
        shares = [found] if self.processes[1] == 1 else gathered(found)
        every = {i: result for share in shares for i, result in share.items()}
        return [every[i] for i in range(len(self.rows))]

    def example(self, i: int, answered: str, score: float, weight: float = 1.0) -> Example:
        """The result of row `i`."""
        row, shape = self.rows.rows[i], self.rows.shape
        return Example(
            id=i,
            prompt=as_text(question(row, shape)),
            expected=answer(row, shape),
            answer=answered,
            score=score,
            weight=weight,
        )


def score_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    score: str,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = 64,
    max_length: int | None = None,
    labels: Sequence[str] = (),
    tick: Callable[[int], None] = lambda n: None,
    prompt: Prompt = lambda ids, room: ids,
) -> Scored:
    """Score a model on rows.

    Args:
        model: A causal LM, or a sequence classifier for the score "accuracy"; with or without
            PEFT adapters.
        tokenizer: The model's.
        rows: What to score on.
        score: A name of `scorers.SHAPES` or "package.module:function".
        batch_size: Rows at a time; fewer where their logits would not fit.
        max_new_tokens: Longest generated answer; None is the expected one plus 8.
        max_length: Longest sequence in tokens, if less than the model's context.
        labels: Names of the classes in the order of their ids.
        tick: Called with the number of rows that were just scored.
        prompt: What a language model is asked in place of a question, in so many tokens at most.

    Returns:
        Examples in row order. Shares score 0 to 1 with weight 1; perplexity scores the mean
        negative log-likelihood in nats with the number of tokens as weight.

    Raises:
        DataError: The score does not fit the rows, or the tokenizer lacks what they need.
        ModelError: The model is of the wrong kind for the score.
    """
    check_score(score, rows)
    _check_model(model, score)
    job = _Job(model, tokenizer, rows, batch_size, context_length(model, max_length), tick, prompt)
    # FSDP cannot put weights back together in inference mode and train with them afterwards.
    with evaluating(model), torch.no_grad() if is_sharded(model) else torch.inference_mode():
        if score == "accuracy":
            examples = _classify(job, labels)
        elif score == "perplexity":
            examples = _perplexity(job)
        elif score == "choice":
            examples = _choose(job)
        elif score == "greedy_match":
            examples = _match(job)
        else:
            examples = _generate(job, score, max_new_tokens)
    scored = Scored(examples)
    scored.truncated = job.truncated
    return scored


def _perplexity(job: _Job) -> list[Example]:
    full = [encode(row, job.rows.shape, job.tokenizer, NO_LIMIT) for row in job.rows.rows]
    job.truncated = sum(len(ids) > job.context for ids, _ in full)
    pairs = [
        pair
        if len(pair[0]) <= job.context
        else encode(row, job.rows.shape, job.tokenizer, job.context)
        for row, pair in zip(job.rows.rows, full, strict=True)
    ]
    if job.rows.shape is not Shape.TEXT:
        pairs = [_asked_pair(job, *pair) for pair in pairs]
    counts = [learned(labels) for _, labels in pairs]
    if not any(counts):
        raise DataError(f"no row of {job.rows.source} has a token whose likelihood can be had.")
    losses: dict[int, float] = {}
    for batch in job.batches([len(ids) for ids, _ in pairs], most_tokens(job.model)):
        some = sequence_losses(job.model, [pairs[i] for i in batch], pad_id(job.tokenizer))
        for i, loss in zip(batch, some, strict=True):
            losses[i] = loss / max(counts[i], 1)
    return [
        job.example(i, "", loss, float(n))
        for i, (loss, n) in enumerate(zip(job.all(losses), counts, strict=True))
    ]


def _asked_pair(job: _Job, ids: Ids, labels: Ids) -> tuple[Ids, Ids]:
    """A row with what stands in for all before its first answer; it fits already."""
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    head = job.prompt(ids[:first], job.context - len(ids) + first)
    return head + ids[first:], [IGNORED] * len(head) + labels[first:]


def _match(job: _Job) -> list[Example]:
    """Whether greedy generation would begin with the expected answer.

    The accuracy of LAMBADA (Paperno et al. 2016). Greedy generation begins with an answer exactly
    when each of its tokens is the likeliest after the ones before it, so that one forward over the
    whole answer decides, and no end of the answer need be generated.
    """
    rows, shape = job.rows.rows, job.rows.shape
    pairs: list[tuple[Ids, Ids]] = []
    for row in rows:
        head, (tail,) = option_ids(row, shape, job.tokenizer, [answer(row, shape)])
        head = job.asked(head, max(job.context - len(tail), 1))
        pairs.append((head + tail, [IGNORED] * len(head) + tail))
    examples: dict[int, Example] = {}
    for batch in job.batches([len(ids) for ids, _ in pairs], most_tokens(job.model)):
        guesses = sequence_guesses(job.model, [pairs[i] for i in batch], pad_id(job.tokenizer))
        for i, guess in zip(batch, guesses, strict=True):
            right = [label for label in pairs[i][1] if label != IGNORED]
            # From the first wrong token on, the model was told what it would not have said.
            wrong = [k for k, said in enumerate(guess) if said != right[k]][:1]
            said = guess[: wrong[0] + 1] if wrong else guess
            text = job.tokenizer.decode(said).strip() + (" …" if wrong else "")
            examples[i] = job.example(i, text, float(not wrong))
    return job.all(examples)


def _choose(job: _Job) -> list[Example]:
    """Rank the options by log-likelihood per token of the option."""
    rows, shape = job.rows.rows, job.rows.shape
    choices = [chosen for row in rows if (chosen := options(row, shape)) is not None]
    encoded = [
        option_ids(row, shape, job.tokenizer, texts)
        for row, (texts, _) in zip(rows, choices, strict=True)
    ]
    heads: list[Ids] = []
    for head, tails in encoded:
        heads.append(job.asked(head, max(job.context - max(map(len, tails)), 1)))
    examples: dict[int, Example] = {}
    sizes = [max(len(h), sum(map(len, t))) for h, (_, t) in zip(heads, encoded, strict=True)]
    for batch in job.batches(sizes, most_tokens(job.model)):
        asked, answers = [heads[i] for i in batch], [encoded[i][1] for i in batch]
        losses = option_losses(job.model, asked, answers, pad_id(job.tokenizer))
        for i, nats in zip(batch, losses, strict=True):
            mean = [n / len(ids) for n, ids in zip(nats, encoded[i][1], strict=True)]
            texts, right = choices[i]
            best = mean.index(min(mean))
            examples[i] = job.example(i, texts[best], float(best == right))
    return job.all(examples)


# ---- generation -----------------------------------------------------------------------------


def _generate(job: _Job, score: str, max_new_tokens: int | None) -> list[Example]:
    rows, shape = job.rows.rows, job.rows.shape
    judge = text_score(score, shape)
    stops = _stops(job)
    prompts, limits = [], []
    for row in rows:
        asked, limit = prompt_ids(row, shape, job.tokenizer), max_new_tokens
        if limit is None:
            wanted = job.tokenizer.encode(answer(row, shape), add_special_tokens=False)
            limit = len(wanted) + SPARE_TOKENS
        limit = max(1, min(limit, job.context - 1))
        prompts.append(job.asked(asked, max(1, job.context - limit)))
        limits.append(limit)
    examples: dict[int, Example] = {}
    sizes = [len(p) + limit for p, limit in zip(prompts, limits, strict=True)]
    for batch in _within(job.batches(sizes, NO_LIMIT), prompts, limits, job.context):
        ids, mask = padded([prompts[i] for i in batch], pad_id(job.tokenizer), job.model, left=True)
        config = GenerationConfig(
            max_new_tokens=max(limits[i] for i in batch),
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_id(job.tokenizer),
            eos_token_id=sorted(stops) or None,
        )
        with plain_generation(job.model):
            out = job.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for i, new in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            text = _text(job.tokenizer, new[: limits[i]], stops)
            examples[i] = job.example(i, text, judge(text, rows[i]))
    return job.all(examples)


def _within(
    batches: Iterable[list[int]], prompts: Sequence[Ids], limits: Sequence[int], context: int
) -> Iterator[list[int]]:
    """Smaller batches where the longest question and the longest answer pass the context.

    All rows of a batch are written as far as the longest, in positions that a model may not have.
    """
    for batch in batches:
        part: list[int] = []
        for i in batch:
            both = [*part, i]
            asked, written = max(len(prompts[j]) for j in both), max(limits[j] for j in both)
            if part and asked + written > context:
                yield part
                part = []
            part.append(i)
        yield part


def _text(tokenizer: PreTrainedTokenizerBase, ids: Ids, stops: set[int]) -> str:
    end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def _stops(job: _Job) -> set[int]:
    """Ids that end an answer: EOS, the model's own ends, and the template's end of a turn."""
    ends = getattr(base_model(job.model).generation_config, "eos_token_id", None)
    stops = set(ends if isinstance(ends, list) else [ends]) | {job.tokenizer.eos_token_id}
    first = question(job.rows.rows[0], job.rows.shape)
    if not isinstance(first, str):
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "keeptune"}]
        tail = render(job.tokenizer, probe, answering=False).rpartition("keeptune")[2]
        after = job.tokenizer.encode(tail, add_special_tokens=False)
        if after and after[0] in job.tokenizer.get_added_vocab().values():
            stops.add(after[0])
    return {int(stop) for stop in stops if stop is not None}


# ---- classes --------------------------------------------------------------------------------


def _classify(job: _Job, labels: Sequence[str]) -> list[Example]:
    rows, tokenizer = job.rows.rows, job.tokenizer
    wanted = [label_id(row["label"], labels) for row in rows]
    full = [encode(row, Shape.LABEL, tokenizer, NO_LIMIT)[0] for row in rows]
    job.truncated = sum(len(ids) > job.context for ids in full)
    encoded = [encode(row, Shape.LABEL, tokenizer, job.context)[0] for row in rows]
    # A decoder's classifier finds the last token by the pad id of its own config.
    padding = getattr(job.model.config, "pad_token_id", None)
    if padding is None:
        job.batch_size, padding = 1, 0
    examples: dict[int, Example] = {}
    for batch in job.batches([len(ids) for ids in encoded], NO_LIMIT):
        ids, mask = padded([encoded[i] for i in batch], padding, job.model)
        logits = job.model(input_ids=ids, attention_mask=mask).logits
        for i, guess in zip(batch, logits.argmax(-1).tolist(), strict=True):
            if wanted[i] >= logits.shape[-1]:
                raise DataError(
                    f"label {rows[i]['label']!r} is class {wanted[i]}, but the model has the "
                    f"classes 0 to {logits.shape[-1] - 1}."
                )
            name = labels[guess] if guess < len(labels) else str(guess)
            examples[i] = job.example(i, name, float(guess == wanted[i]))
    return job.all(examples)


def _check_model(model: Any, score: str) -> None:
    base = base_model(model)
    generates = base.can_generate()
    if generates == (score == "accuracy"):
        wanted = "a sequence classifier" if generates else "a causal language model"
        raise ModelError(f"score {score!r} needs {wanted}, but the model is {type(base).__name__}.")
