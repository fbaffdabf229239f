"""A model writes on: in batches, with its keys and values cached, the same however it is batched.

Each text has random numbers of its own, so that neither the batch nor the number of processes
changes what is written, but for rounding. Several processes take a share each and end with all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._anchor.undisturbed import undisturbed
from keeptune.processes import processes

BATCH = 32  # texts that are written at a time
Ids = list[int]
Ended = Callable[[Ids], bool]


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    Attributes:
        ids: The tokens, with those that ended it.
        nats: Their negative log-likelihood under the whole distribution, summed.
        ended: Whether it came to an end before its tokens were used up.
    """

    ids: Ids
    nats: float
    ended: bool

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token; 0 of nothing."""
        return self.nats / max(len(self.ids), 1)


def require_writer(ctx: Context, name: str) -> None:
    """Refuse what cannot write: a classifier, a model without tokenizer, sharded weights.

    Args:
        ctx: The task.
        name: The method's, for the message.

    Raises:
        MethodError: It is one of these.
    """
    if len(ctx.dataset) and isinstance(ctx.dataset[0]["labels"], int):
        raise MethodError(
            f"The method {name!r} lets the model write rows, but a classifier writes no text. "
            "Remove it; lwf and replay work on classifiers."
        )
    if ctx.tokenizer is None:
        raise MethodError(
            f"The method {name!r} lets the model write rows and needs its tokenizer. Give the "
            "trainer `processing_class=tokenizer`."
        )
    why = "cannot let the model write while FSDP spreads its weights over processes"
    refuse_shards(ctx, name, why)


@torch.no_grad()
def write(
    ctx: Context,
    prompts: Sequence[Ids],
    most: Sequence[int],
    ended: Ended,
    randoms: Sequence[np.random.Generator],
    *,
    top_k: int,
) -> list[Written]:
    """Let the model go on from each prompt.

    Args:
        ctx: The task; the model is asked as it is, without dropout.
        prompts: Token ids, none of them empty.
        most: Tokens that may be written after each prompt, 1 or more.
        ended: Whether what was written so far is whole.
        randoms: Of each prompt, what its tokens are drawn with.
        top_k: Only the so many likeliest tokens are drawn; 1 always takes the likeliest.

    Returns:
        What was written after each prompt, in their order; the same in all processes.
    """
    rank, world = processes()
    # Prompts of like length side by side, so that little is padded.
    own = sorted(range(rank, len(prompts), world), key=lambda i: (len(prompts[i]), most[i]))
    found: dict[int, Written] = {}
    with undisturbed(ctx, {}), torch.no_grad():
        for begin in range(0, len(own), BATCH):
            some = own[begin : begin + BATCH]
            batch = _Batch(ctx, [prompts[i] for i in some], [randoms[i] for i in some], top_k)
            done = batch.run([most[i] for i in some], ended)
            found.update(zip(some, done, strict=True))
    if world > 1:
        shares: list[dict[int, Written]] = [{} for _ in range(world)]
        distributed.all_gather_object(shares, found)
        found = {i: one for share in shares for i, one in share.items()}
    return [found[i] for i in range(len(prompts))]


class _Batch:
    """Some texts that are written side by side."""

    def __init__(
        self,
        ctx: Context,
        prompts: Sequence[Ids],
        randoms: Sequence[np.random.Generator],
        top_k: int,
    ) -> None:
        self.ctx, self.randoms, self.top_k = ctx, randoms, top_k
        width = max(map(len, prompts))
        rows = [[0] * (width - len(p)) + p for p in prompts]
        there = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        self.ids = torch.tensor(rows, device=ctx.device)
        self.mask = torch.tensor(there, device=ctx.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache: Any = None
        model: Any = ctx.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.takes = inspect.signature(inner.forward).parameters

    def run(self, most: Sequence[int], ended: Ended) -> list[Written]:
        """Write until every text has ended or used up its tokens."""
        texts: list[Ids] = [[] for _ in most]
        nats = [0.0] * len(most)
        whole = [False] * len(most)
        for _ in range(max(most)):
            chosen, costs = self._next()
            for i, (token, cost) in enumerate(zip(chosen.tolist(), costs.tolist(), strict=True)):
                if whole[i] or len(texts[i]) == most[i]:
                    continue
                texts[i].append(token)
                nats[i] += cost
                whole[i] = ended(texts[i])
            if all(w or len(t) == m for w, t, m in zip(whole, texts, most, strict=True)):
                break
            self._step(chosen)
        return [Written(*one) for one in zip(texts, nats, whole, strict=True)]

    def _next(self) -> tuple[Tensor, Tensor]:
        """The next token of each text, and its negative log-likelihood."""
        more = {"position_ids": self.positions, "logits_to_keep": 1}
        outputs = self.ctx.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **{key: value for key, value in more.items() if key in self.takes},
        )
        self.cache = getattr(outputs, "past_key_values", None)
        if self.cache is None:
            raise MethodError(
                f"{type(self.ctx.model).__name__} keeps no keys and values, without which it "
                "cannot write rows in bearable time. Remove the methods that let it write."
            )
        log_p = outputs.logits[:, -1].float().log_softmax(-1)
        top = log_p.topk(min(self.top_k, log_p.shape[-1]))
        heights = top.values.double().softmax(-1).cumsum(-1)
        aims = [[random.random()] for random in self.randoms]
        at = torch.searchsorted(
            heights, torch.tensor(aims, dtype=torch.float64, device=log_p.device)
        )
        at = at.clamp(max=heights.shape[-1] - 1)  # where the sum is below 1 by rounding
        return top.indices.gather(1, at)[:, 0], -top.values.gather(1, at)[:, 0]

    def _step(self, chosen: Tensor) -> None:
        self.ids = chosen[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)
        self.positions = self.positions[:, -1:] + 1
