"""Two tasks one after another, in plain torch: the loop that keeptune runs, without keeptune.

    python docs/start/by_hand.py

A model of 60,000 weights, made on the spot, learns to write the letters after those it is given,
and then to write a word backwards. It learns them once plainly and once with a few rows of the
first task among those of the second. A test holds these numbers to those of the library.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefgh"
TASKS: dict[str, Callable[[str], str]] = {
    "next": lambda word: "".join(LETTERS[(LETTERS.index(c) + 1) % 8] for c in word),
    "back": lambda word: word[::-1],
}
EPOCHS, BATCH, RATE, CLIP = 20, 16, 3e-3, 1.0
RATIO = 0.25
SEED = 0

Row = dict[str, str]


def rows(task: str) -> tuple[list[Row], list[Row]]:
    """192 rows to learn and 100 others to score."""
    words = ["".join(letters) for letters in product(LETTERS, repeat=3)]
    random.Random(task).shuffle(words)
    made = [{"prompt": f"{task} {w}:", "completion": f" {TASKS[task](w)}"} for w in words]
    return made[:192], made[192:292]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    characters = ["<pad>", "</s>", *sorted({c for t in TASKS for c in t} | set(LETTERS + " :"))]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True) for t in characters[:2]])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with two layers of width 48."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=None,
        eos_token_id=1, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, some: list[Row]) -> tuple[Tensor, Tensor]:
    """Ids and labels, both [rows, length]; the loss is on the answer and the end token only."""
    prompts = [tokenizer.encode(r["prompt"]) for r in some]
    answers = [[*tokenizer.encode(r["completion"]), tokenizer.eos_token_id] for r in some]
    ids = [p + a for p, a in zip(prompts, answers, strict=True)]
    labels = [[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)]
    return torch.tensor(ids), torch.tensor(labels)


def loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the answers' tokens."""
    logits = model(input_ids=ids).logits[:, :-1]
    keep = labels[:, 1:] != -100
    return F.cross_entropy(logits[keep], labels[:, 1:][keep])


def drawn(count: int, kept: int, index: int) -> list[int]:
    """Positions of `count` of the rows kept, the same on every machine."""
    words = repr((SEED, index, "replay")).encode()
    random_numbers = np.random.default_rng(list(hashlib.sha256(words).digest()))
    return [int(i) for i in random_numbers.permutation(kept)[:count]]


def learn(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> None:
    """Train on some rows, in their order."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for _ in range(EPOCHS):
        for start in range(0, len(ids), BATCH):
            optimizer.zero_grad()
            loss(model, ids[start : start + BATCH], labels[start : start + BATCH]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()


@torch.no_grad()
def score(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> float:
    """Share of rows whose every answer token, and the end, is the model's first choice."""
    model.eval()
    length = int((labels[0] != -100).sum())
    written = ids[:, :-length]
    for _ in range(length):
        best = model(input_ids=written).logits[:, -1].argmax(-1, keepdim=True)
        written = torch.cat([written, best], dim=1)
    return float((written == ids).all(dim=1).float().mean())


def by_hand(model: LlamaForCausalLM, tokenizer: Any, ratio: float) -> list[list[float]]:
    """Learn all tasks in turn; R[t][i] is the score on task i after t tasks."""
    data = {task: [encode(tokenizer, part) for part in rows(task)] for task in TASKS}
    R = [[score(model, *test) for _, test in data.values()]]
    old: list[tuple[Tensor, Tensor]] = []
    for index, ((ids, labels), _) in enumerate(data.values()):
        mixed = [(ids, labels)]
        for old_ids, old_labels in old:
            # Two tasks need no reservoir; for more, keeptune keeps `size` rows over all of them.
            chosen = drawn(round(ratio * len(ids)), len(old_ids), index)
            mixed.append((old_ids[chosen], old_labels[chosen]))
        learn(model, torch.cat([i for i, _ in mixed]), torch.cat([w for _, w in mixed]))
        old.append((ids, labels))
        R.append([score(model, *test) for _, test in data.values()])
    return R


def main() -> None:
    """Print R without protection and with it."""
    for ratio in (0.0, RATIO):
        tokenizer = make_tokenizer()
        R = by_hand(make_model(tokenizer), tokenizer, ratio)
        print(f"replay, ratio {ratio}" if ratio else "plain")
        print(f"  {'':12}", "  ".join(TASKS))
        for when, scores in zip(["before", *(f"after {t}" for t in TASKS)], R, strict=True):
            print(f"  {when:12}", "  ".join(f"{s:4.2f}" for s in scores))
        print(f"  forgotten of {next(iter(TASKS))!r}: {R[1][0] - R[2][0]:.2f}\n")


if __name__ == "__main__":
    main()
