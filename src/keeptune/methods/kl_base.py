"""KL to the base model: stay near what it says, on the task's rows or on texts of your own.

Paper: Shenfeld, Pari, Agrawal 2025, RL's razor: why online reinforcement learning forgets less,
    https://arxiv.org/abs/2509.04259 (forgetting follows this KL); the penalty as in Ouyang et al.
    2022, https://arxiv.org/abs/2203.02155
Equation: L(w) + strength · T² · mean over answers of KL(p_base ‖ p_w), or reverse: of KL(p_w ‖
    p_base), both softened by T; over the batch, or over `rows` texts drawn anew at each step
Changes: data, loss or gradients
Cost: one extra forward per batch; with `texts` one forward and one backward over `rows` texts at
    each step. Under LoRA the base model is the model with its adapter switched off: no memory. With
    all weights trained, a copy of the base weights for good; but forward with `texts` records the
    base model's answers once, 4 top_k + 4 bytes for each token (for vocabularies of at most 65,536;
    else 6 top_k + 4), and holds no copy.
Use when: what the base model can do must outlive every task, and no old row may be kept. Forward
    keeps all that it would say likely, reverse keeps the model from saying what it would not.
Not when: earlier tasks shall be kept as well: lwf holds to the model before each task, and on the
    rows of a task the base model is a poor example.
Differs from the paper: there the KL is measured, and penalised in reinforcement learning only, on
    what the model writes itself; here it is on given rows. Recorded answers are the top_k likeliest
    entries and one bucket for all others.
Status: contract tested
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from datasets import Dataset
from pydantic import Field, PrivateAttr
from torch import Tensor

from keeptune.errors import MethodError
from keeptune.method import Batch, Context, Method, State
from keeptune.methods._adapters import BASE, refuse_biases
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._distil import Frozen, Store, Sums, Teacher, TopK, read_texts
from keeptune.methods._distil.teachers import without_adapter
from keeptune.methods._reference import add_gradient


class KLBase(Method):
    """Hold the model to the base model's answers."""

    strength: float = Field(1.0, ge=0, description="weight of the term")
    direction: Literal["forward", "reverse"] = Field(
        "forward", description="KL(base ‖ model), or KL(model ‖ base)"
    )
    temperature: float = Field(1.0, gt=0, description="softening of both distributions; T")
    texts: str = Field("", description="file of texts, one a line, to be near on instead of rows")
    rows: int = Field(4, ge=1, description="texts at each step")
    length: int = Field(256, ge=2, description="tokens of a text, at most")
    top_k: int = Field(64, ge=1, description="entries kept of a recorded answer")

    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    proof: ClassVar[str] = "kl"
    active_from: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"answers"})
    steered: ClassVar[str] = "strength"

    _base: Frozen = PrivateAttr(default_factory=lambda: Frozen({}))
    _store: Store = PrivateAttr(default_factory=Store)
    _texts: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _sums: Sums = PrivateAttr(default_factory=lambda: Sums(3))

    def begin_task(self, ctx: Context) -> None:
        """Read the texts.

        Raises:
            MethodError: The weights are spread over processes, or there are no texts.
        """
        self._sums = Sums(3, ctx.device)
        if not self.strength:
            return
        why = "cannot run a second model while FSDP spreads the weights over processes"
        refuse_shards(ctx, self.name(), why)
        if hasattr(ctx.model, "disable_adapter"):
            refuse_biases(ctx, self.name(), BASE)
        if self.texts:
            self._texts = read_texts(ctx, Path(self.texts), self.length, "KLBase.texts")

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        """Before anything is learned, keep of the base model what will not be had later."""
        if not self.strength or hasattr(ctx.model, "disable_adapter"):
            return dataset
        if self.texts and self.direction == "forward":
            if not len(self._store):
                rows = Dataset.from_list(self._texts)
                self._store = Store.of(ctx, rows, self.top_k, self.temperature)
            else:
                self._require_recorded(ctx)
        else:
            # In each task, as it may train what was not trained so far.
            new = {n: p for n, p in ctx.trainable().items() if n not in self._base.weights}
            self._base.weights |= {n: p.detach().clone() for n, p in new.items()}
        return dataset

    def _require_recorded(self, ctx: Context) -> None:
        """Refuse texts that came after the base model had answered."""
        new = sum(not self._store.find(ctx.batch([row]))[1].any() for row in self._texts)
        if new:
            raise MethodError(
                f"KLBase.texts: {new} of {len(self._texts)} texts in {self.texts} were not there "
                "when the base model's answers were kept, and it is not there any more. Put the "
                "old file back."
            )

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        """Add the term of one micro batch."""
        if self.strength and not self.texts:
            assert ctx.answers is not None
            weight = self.strength * self._effort / ctx.answers_in_step
            ctx.answers.add(self._term(ctx, batch), weight, self._note)
            self._sums.add(2, len(batch["labels"]))
        return None

    def gradients(self, ctx: Context) -> None:
        """Add the gradient of the term on some texts."""
        if not self.strength or not self.texts:
            return
        order = ctx.random("kl_base", ctx.step).permutation(len(self._texts))
        batch = ctx.batch([self._texts[i] for i in order[: self.rows]])
        total = ctx.answer_labels(batch).numel()

        def mean(part: Batch) -> Tensor:
            answers = ctx.read(part)
            weight = self.strength * self._effort / total
            answers.add(self._term(ctx, part), weight, self._note)
            self._sums.add(2, len(part["labels"]))
            value = answers.total()
            assert value is not None
            return value

        add_gradient(ctx, batch, mean, "kl_base", "dropout", ctx.step)

    def _term(self, ctx: Context, batch: Batch) -> TopK | Teacher:
        if len(self._store):
            kept, _ = self._store.find(batch)
            return kept.term(self.temperature, ctx.device)
        base = without_adapter if not self._base.weights else self._base.answers
        return Teacher(base(ctx, batch), self.temperature, self.direction == "reverse")

    def _note(self, kl: Tensor) -> None:
        self._sums.add(0, kl.sum())
        self._sums.add(1, kl.numel())

    def end_task(self, ctx: Context) -> None:
        """Count over all processes."""
        self._sums.total()

    def evidence(self) -> dict[str, Any]:
        """Mean of the term over all answers that were held, in nats."""
        total, answers, rows = self._sums.values()
        return {
            "kl": total / max(answers, 1),
            "answers": int(answers),
            "extra_forward_rows": int(rows),
        }

    def state(self) -> State:
        """What is kept of the base model."""
        tensors = {f"base/{n}": t for n, t in self._base.weights.items()}
        tensors |= {f"store/{n}": t for n, t in self._store.tensors().items()}
        return State(tensors | {"sums": self._sums.total()})

    def restore(self, ctx: Context, state: State) -> None:
        """Take it back."""
        self._sums = Sums.of(state.tensors["sums"], ctx.device)
        base = state.part("base").tensors
        self._base = Frozen({n: t.to(ctx.device) for n, t in base.items()})
        self._store = Store.from_tensors(state.part("store").tensors)

    def declared_bytes(self, ctx: Context) -> int:
        """A copy of the base weights, or the recorded answers, or nothing; and three sums."""
        return self._base.nbytes + self._store.nbytes + self._sums.nbytes
