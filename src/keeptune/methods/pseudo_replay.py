"""Pseudo-rehearsal: the model writes rows of its old tasks itself; no row of data is kept.

Paper: Sun et al. 2020, LAMOL, https://arxiv.org/abs/1909.03329 ; `distil` as in LAMOL_KD: Zheng et
    al. 2024, https://arxiv.org/abs/2312.07887 ; `general` as in Magpie: Xu et al. 2024,
    https://arxiv.org/abs/2406.08464
Equation: L_QA + strength · L_LM. L_QA is the mean loss of the answers of D_t and of
    round(ratio |D_t|) rows that the model before the task wrote, shared out evenly among the old
    tasks; to the loss of an answer that was written comes distil · T² KL(p_old(· | x; T) ‖ p_w(· |
    x; T)). L_LM is the mean loss of the same rows as texts "Example of TASK: question ◊ answer ◊".
Changes: begin_task, data, loss, end_task
Cost: before a task the writing of its rows, one forward a token for 32 of them at a time; then two
    rows for each one (the whole texts) and their cross-entropy once more, and 2.2 bytes a token of
    what was written (of large vocabularies 4.2). distil: a copy of the trained weights, one more
    forward of the written rows.
Use when: no old row may be kept, and a model can make the rows up: labels, intents, dialogues.
    `general`: a chat model shall stay as it is, and there are no data that show how.
Not when: tasks are facts to be known by heart: a model writes only what it has not forgotten.
Differs from the paper: the task is named in words and the mark ◊ is a word that is there already,
    so no embedding is added or resized; what is no row, or there already, is written again, up to
    four texts for a row. Of a conversation the last answer is learned. Losses are means over the
    task, not over a batch. LAMOL_KD's KL is added to the rows' loss instead of replacing it. Not
    private as such: a model can write by heart what it learned; `probe` counts such copies.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from pydantic import Field, PrivateAttr
from torch import Tensor

from keeptune.method import Batch, Context, Method, State
from keeptune.methods._distil import Sums
from keeptune.methods._writing.before import Before, softened_kl
from keeptune.methods._writing.chats import Turns
from keeptune.methods._writing.mixture import Mixture
from keeptune.methods._writing.rehearsal import Sieve, copies, of_chats, of_task, written
from keeptune.methods._writing.sampling import require_writer
from keeptune.methods._writing.stock import Stock

CHATS = "(chats)"  # whom rows stand for that belong to no task


class PseudoReplay(Method):
    """Before a task, let the model write rows of the tasks before, and mix them in."""

    ratio: float = Field(0.2, ge=0, le=100, description="rows of old tasks for each new row; γ")
    general: float = Field(0.0, ge=0, le=100, description="chats of its own for each new row")
    strength: float = Field(0.25, ge=0, description="weight of learning to write rows; λ")
    top_k: int = Field(20, ge=1, description="likeliest tokens that are drawn from")
    longest: int = Field(256, ge=4, description="tokens of a text, learned or written, at most")
    perplexity: float = Field(50.0, gt=1, description="of a text to the model itself, at most")
    distil: float = Field(0.0, ge=0, description="weight of the old model's answers on these rows")
    temperature: float = Field(2.0, gt=0, description="softening of both distributions; T")
    probe: int = Field(0, ge=0, description="texts written at a task's end to count copies")

    neutral: ClassVar[dict[str, Any]] = {"ratio": 0.0, "general": 0.0}
    proof: ClassVar[str] = "rows_generated"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    excludes: ClassVar[frozenset[str]] = frozenset({"structure", "restart"})

    _longest: dict[str, int] = PrivateAttr(default_factory=dict)  # text of each task, in tokens
    _stock: Stock = PrivateAttr(default_factory=Stock)
    _mixture: Mixture = PrivateAttr(default_factory=Mixture)
    _before: Before = PrivateAttr(default_factory=Before)
    _sums: Sums = PrivateAttr(default_factory=lambda: Sums(2))

    @property
    def _sieve(self) -> Sieve:
        return Sieve(self.longest, self.perplexity, self.top_k)

    def begin_task(self, ctx: Context) -> None:
        """Refuse what cannot write.

        Raises:
            MethodError: A classifier, no tokenizer or chat template, or sharded weights.
        """
        self._sums = Sums(2, ctx.device)
        if not self.is_neutral():
            require_writer(ctx, self.name())
        if self.general:
            Turns.of(ctx.tokenizer, self.name())

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        """The rows given, rows written by the model, and the tasks' rows as whole texts."""
        if self.is_neutral():
            return dataset
        if self._stock.of != ctx.index:
            self._write(ctx)
        rows = self._stock.rows(ctx.dataset)
        texts = self.longest if self.ratio and self.strength else 0
        self._mixture = Mixture.of(ctx, dataset, rows, texts, self.strength)
        self._longest[ctx.task] = self._mixture.longest
        self._evidence["rows_as_texts"] = len(self._mixture.texts)
        return self._mixture.dataset

    def _write(self, ctx: Context) -> None:
        """Let the rows be written; a resumed run has them in its state."""
        new = len(ctx.dataset)
        tasks = {
            task: of_task(ctx, task, most, self._sieve)
            for task, most in self._longest.items()
            if most
        }
        chats = {}
        if self.general:
            chats[CHATS] = of_chats(ctx, Turns.of(ctx.tokenizer, self.name()), self._sieve)
        wanted = (round(self.ratio * new), tasks), (round(self.general * new), chats)
        rows, shown = written(ctx, *wanted)
        self._stock = Stock()
        self._stock.fill(ctx, rows)
        self._evidence.update(shown)

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        """What the losses' weights add to the trainer's own, and the old model's answers."""
        if self.is_neutral():
            return None
        term, is_old = self._mixture.reweighted(ctx, batch, outputs.logits)
        if self.distil and len(self._mixture.old):
            self._before.take_once(ctx)
            if is_old.any():
                old = {key: value[is_old] for key, value in batch.items()}
                kl = softened_kl(
                    ctx.answer_logits(outputs.logits[is_old], old),
                    ctx.answer_logits(self._before.logits(ctx, old), old),
                    self.temperature,
                )
                self._sums.add(0, kl.detach().sum())
                self._sums.add(1, kl.numel())
                weight = self.distil * self._mixture.weights[0]
                term = term + weight * ctx.mean_over_answers(kl)
        return term

    def evidence(self) -> dict[str, Any]:
        """Rows by task, what became of the texts written, and the mean KL in nats."""
        total, answers = self._sums.values()
        return self._evidence | ({"kl": total / max(answers, 1)} if self.distil else {})

    def end_task(self, ctx: Context) -> None:
        """Count copies in what it would write of this task, and drop what it wrote."""
        self._sums.total()
        if self.probe and (most := self._longest.get(ctx.task, 0)):
            attempt = of_task(ctx, ctx.task, most, self._sieve)
            self._evidence |= copies(ctx, self.probe, attempt)
        self._stock, self._mixture, self._before = Stock(), Mixture(), Before()

    def state(self) -> State:
        """The longest text of each task; during a task what was written, and the old weights."""
        stock, mixture = self._stock.state(), self._mixture.tensors()
        old = {f"before/{n}": t for n, t in self._before.weights.items()}
        tensors = stock.tensors | mixture | old | {"sums": self._sums.total()}
        return State(tensors, {"stock": stock.values, "longest": dict(self._longest)})

    def restore(self, ctx: Context, state: State) -> None:
        """Take the rows and the old weights back; `data` mixes them anew."""
        self._longest = dict(state.values["longest"])
        self._sums = Sums.of(state.tensors["sums"], ctx.device)
        self._before = Before.of(state.tensors, ctx.device)
        self._stock.restore(State(state.tensors, state.values["stock"]))

    def declared_bytes(self, ctx: Context) -> int:
        """During a task, of each token written its id and a bit; distil: the trained weights."""
        parts = self._stock.nbytes, self._mixture.nbytes, self._before.nbytes
        return sum(parts) + self._sums.nbytes
