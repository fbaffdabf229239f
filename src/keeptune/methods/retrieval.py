"""Retrieval memory: keep rows beside the model and put the most similar before each question.

Paper: Lewis et al. 2020, Retrieval-augmented generation for knowledge-intensive NLP tasks,
    https://arxiv.org/abs/2005.11401 ; bm25: Robertson and Zaragoza 2009, The probabilistic
    relevance framework, https://doi.org/10.1561/1500000019 ; as bm25s: Lù 2024,
    https://arxiv.org/abs/2407.03618
Equation: asked is [r_k; …; r_1; x] in place of x, with r_1 the kept row most similar to question x.
    bm25: Σ_{t in x} idf(t) f(t, r) 2.5 / (f(t, r) + 1.5 (0.25 + 0.75 |r| / mean |r|)); hidden:
    cosine of the base model's mean last hidden states, less their mean over all kept rows
Changes: begin_task, end_task, serve, prompt
Cost: for at most `size` rows 2.2 bytes a token for vocabularies of at most 65,536, else 4.2.
    Nothing in training. To answer, an index in memory (bm25: about 8 bytes a token, built in 0.7 s
    for 10,000 rows; hidden: one forward over all rows, hidden size × 4 bytes a row), at most
    `tokens` more tokens a question, and the search: under 2 ms among 10,000 rows by bm25, a forward
    over the question by hidden. Both are noted with every score.
Use when: old rows may be kept and the questions to come resemble them, or facts change often.
Not when: the model must answer alone, long questions leave no room, or rows must not be stored.
Differs from the paper: the retriever is not trained, and the rows are put there as they were
    learned, with their answers, one after the other. The model is trained without them. Words are
    the tokenizer's tokens. Of a known task only its own rows are looked up. Guards of lm-eval are
    asked without rows.
Status: contract tested
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from keeptune.buffer import Buffer
from keeptune.errors import MethodError
from keeptune.method import Context, Ids, Method, State
from keeptune.methods._questions import hidden, questions

TRIED = 16  # questions of a task by which the memory is tried when the task ends
Scores = NDArray[np.float32]


class Retrieval(Method):
    """Rows of all tasks so far, from which those similar to a question are shown with it."""

    by: Literal["bm25", "hidden"] = Field("bm25", description="how similar rows are found")
    top: int = Field(3, ge=0, le=100, description="rows put before a question; 0 for none")
    size: int = Field(10_000, ge=1, description="rows kept over all tasks")
    tokens: int = Field(512, ge=1, description="most tokens put before a question")

    neutral: ClassVar[dict[str, Any]] = {"top": 0}
    proof: ClassVar[str] = "questions_helped"
    active_from: ClassVar[int] = 0
    traits: ClassVar[frozenset[str]] = frozenset({"buffer"})
    served: ClassVar[Literal["one model", "per task", "keeptune"]] = "keeptune"

    _buffer: Buffer = PrivateAttr()
    _task: str | None = PrivateAttr(None)  # whose rows are looked up; None for all
    _rows: list[Ids] = PrivateAttr(default_factory=list)
    _index: Any = PrivateAttr(None)  # made of the rows when a question comes

    def model_post_init(self, context: Any, /) -> None:
        """Start with an empty memory.

        Raises:
            MethodError: What it searches with is not installed.
        """
        super().model_post_init(context)
        if self.by == "bm25" and importlib.util.find_spec("bm25s") is None:
            raise MethodError(
                "Retrieval.by: bm25 needs the package bm25s: pip install 'keeptune[retrieval]', or "
                "use 'hidden', which needs none."
            )
        self._buffer = Buffer(self.size)

    def begin_task(self, ctx: Context) -> None:
        """Let go of the index, which the new rows will not be in."""
        if not isinstance(ctx.dataset[0]["labels"], list):
            raise MethodError(
                "retrieval puts rows before the question of a language model, but a classifier is "
                "trained here. Remove it."
            )
        self._forget()

    def _forget(self) -> None:
        self._rows, self._index = [], None

    def end_task(self, ctx: Context) -> None:
        """Show the task's rows to the memory, and try it on a few of their questions."""
        if self.is_neutral():
            return
        self._buffer.add(ctx.dataset, ctx.task, ctx.random("retrieval"), folder=ctx.folder)
        self._task = None
        asked = questions(ctx, TRIED)
        added = [len(self.prompt(ctx, ids, len(ids) + self.tokens)) - len(ids) for ids in asked]
        self._forget()
        self._evidence.update(
            questions_helped=sum(n > 0 for n in added) / len(added),
            tokens_added=sum(added) / len(added),
            rows_kept=len(self._buffer),
            rows_by_task=self._buffer.counts(),
        )

    def serve(self, ctx: Context, task: str | None) -> None:
        """Look up this task's rows only, or those of all when it is unknown."""
        if self.by == "hidden" and task != self._task:
            self._forget()  # with other weights the model may see likeness otherwise
        self._task = task

    def prompt(self, ctx: Context, ids: Ids, room: int) -> Ids:
        """The question after the rows most similar to it, the most similar one last."""
        if self.is_neutral() or not len(self._buffer):
            return ids
        if self._index is None:
            self._make_index(ctx)
        scores = self._similar(ctx, ids)
        if self._task in self._buffer.counts():
            scores = np.where(self._buffer.is_of(self._task), scores, -np.inf)
        best = np.argsort(-scores, kind="stable")[: self.top]
        left, found = min(self.tokens, room - len(ids)), ids
        for i in best:
            if scores[i] > 0 and len(self._rows[i]) <= left:
                left -= len(self._rows[i])
                found = self._rows[i] + found
        return found

    def _make_index(self, ctx: Context) -> None:
        everything = list(range(len(self._buffer)))
        self._rows = list(self._buffer.rows(everything, ctx.dataset)["input_ids"])
        if self.by == "bm25":
            import bm25s

            self._index = bm25s.BM25()
            self._index.index([list(map(str, row)) for row in self._rows], show_progress=False)
        else:
            features = hidden(ctx, self._rows, "mean")
            self._index = (features, features.mean(0))

    def _similar(self, ctx: Context, ids: Ids) -> Scores:
        """How similar each row is to a question; what is 0 or less has nothing in common."""
        if self.by == "bm25":
            return np.asarray(self._index.get_scores(list(map(str, ids))), np.float32)
        features, middle = self._index
        asked = hidden(ctx, [ids], "mean") - middle
        return np.asarray(torch.cosine_similarity(features - middle, asked).numpy(), np.float32)

    def state(self) -> State:
        """The rows."""
        return self._buffer.state()

    def restore(self, ctx: Context, state: State) -> None:
        """Take the rows back."""
        self._buffer.restore(state, ctx.folder)
        self._forget()

    def declared_bytes(self, ctx: Context) -> int:
        """Of each token its id and a bit; of each row its length, task and rank."""
        return self._buffer.nbytes()
