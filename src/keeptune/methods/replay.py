"""Experience replay: keep a few old rows and mix them into every new task.

Paper: Robins 1995, https://doi.org/10.1080/09540099550039318 ; Chaudhry et al. 2019, On tiny
    episodic memories in continual learning, https://arxiv.org/abs/1902.10486 ; herding: Rebuffi et
    al. 2017, https://arxiv.org/abs/1611.07725 ; surprise: Hazard et al. 2025 (SuRe),
    https://arxiv.org/abs/2511.22367
Equation: train on D_t plus round(ratio |D_t|) rows drawn from what is kept of D_1 … D_{t-1};
    online each step's batch holds ratio old rows for each new one, drawn from a reservoir of all
    rows seen in the steps before, the present task's too; strengthened, see below
Changes: data, gradients, end_task
Cost: for at most `size` rows 2.2 bytes a token for vocabularies of at most 65,536, else 4.2; in a
    run folder all but the newest 8192 of them lie in files. Training rows grow by `ratio`.
    surprise, herding and diversity: one forward pass over the task's rows at its end; the last two
    hold hidden size × 4 bytes a row meanwhile.
Use when: old training rows may be kept. A few per cent usually remove most of the forgetting.
Not when: old data must not be stored, or only knowledge of the base model is at stake, for which
    there are no rows to keep.
Differs from the paper: rows are mixed into the task's data set and shuffled with it, instead of one
    memory batch beside each new batch; rows are chosen when a task ends, by the model that has
    learned it. herding goes by the mean last hidden state of a row; surprise is the choice of rows
    only, without SuRe's slow and fast adapters. Online it is the paper's, but that a batch of one
    size holds both kinds of rows. Strengthened (`watch.on_drop`) to e times its ratio while a task
    is learned, a step adds (e − 1) ratio / (1 + ratio) times the mean loss of other old rows: as
    many as the higher ratio would have put beside, at most as many as the step has.
Status: contract tested
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from datasets import Dataset
from pydantic import Field, PrivateAttr

from keeptune.buffer import Buffer, Policy, Unit
from keeptune.errors import MethodError
from keeptune.method import Context, Method, State
from keeptune.methods._arrivals import mixed
from keeptune.methods._measure import features, losses
from keeptune.methods._reference import mean_gradient, moved_weights

MORE = "rows_replayed_more"  # evidence: rows beside those mixed in
Weight = Annotated[float, Field(ge=0)]


def amount_to_replay(new: int, ratio: float) -> int:
    """How many old rows, or tokens, go with `new` new ones: round(ratio · new)."""
    return round(ratio * new)


class Replay(Method):
    """Mix rows of earlier tasks into each new task.

    When less is kept than `ratio` asks for, all of it is used once and the shortfall is reported;
    only with `repeats` does a row come twice.
    """

    policy: Policy = Field("reservoir", description="which rows are kept")
    ratio: float = Field(0.2, ge=0, le=100, description="old rows, or tokens, for each new one")
    count: Unit = Field("rows", description="what `ratio` counts")
    size: int = Field(2000, ge=1, description="rows kept over all earlier tasks")
    task_weights: dict[str, Weight] = Field(
        {}, description="how likely a task's rows are drawn; 1 where not named, 0 for never"
    )
    repeats: bool = Field(False, description="whether a row may be drawn more than once a task")

    neutral: ClassVar[dict[str, Any]] = {"ratio": 0.0}
    proof: ClassVar[str] = "rows_replayed"
    traits: ClassVar[frozenset[str]] = frozenset({"buffer"})
    keeps_order: ClassVar[bool] = True
    steered: ClassVar[str] = "ratio"

    _buffer: Buffer = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Start with an empty buffer."""
        super().model_post_init(context)
        self._buffer = Buffer(self.size, self.policy)

    def begin_task(self, ctx: Context) -> None:
        """Refuse what goes by the whole of a task, which is not known online.

        Raises:
            MethodError: A setting does.
        """
        if not ctx.online or not self.ratio:
            return
        for setting, only in (("policy", "reservoir"), ("count", "rows"), ("task_weights", {})):
            if (got := getattr(self, setting)) != only:
                raise MethodError(
                    f"Replay.{setting} is {got!r}, but online rows are drawn evenly from a "
                    "reservoir. Leave it out, or leave `online` out."
                )

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        """The rows given, plus rows drawn from the buffer; online, those between them."""
        if ctx.online:
            dataset, evidence = mixed(self._buffer, ctx, dataset, self.ratio, repeats=self.repeats)
            self._evidence.update(evidence)
            return dataset
        new = len(ctx.dataset)
        if self.count == "tokens":
            new = sum(len(ids) for ids in ctx.dataset["input_ids"])
        wanted = amount_to_replay(new, self.ratio)
        drawn = self._buffer.draw(
            wanted,
            ctx.random("replay"),
            unit=self.count,
            weights=self.task_weights,
            repeats=self.repeats,
        )
        got = len(drawn) if self.count == "rows" else self._buffer.tokens(drawn)
        short = max(0, wanted - got) if len(self._buffer) else 0
        self._evidence.update(
            {
                "rows_replayed": len(drawn),
                "rows_by_task": self._buffer.tasks(drawn),
                "rows_repeated": len(drawn) - len(set(drawn)),
                "rows_new": len(ctx.dataset),
                "rows_kept": len(self._buffer),
                "bytes_on_disk": self._buffer.on_disk(),
                f"{self.count}_short": short,
            }
        )
        if not drawn:
            return dataset
        return self._buffer.beside(dataset, drawn)

    def gradients(self, ctx: Context) -> None:
        """Strengthened while a task is learned, add the gradient of further old rows."""
        share = (self._effort - 1) * self.ratio / (1 + self.ratio)
        amount = min(math.ceil(share * ctx.rows_in_step), ctx.rows_in_step)
        random = ctx.random("replay", "more", ctx.step)
        drawn = self._buffer.draw(amount, random, weights=self.task_weights) if amount else []
        if not drawn:
            return
        weights, rows = moved_weights(ctx), self._buffer.examples(drawn)
        found = mean_gradient(ctx, weights, rows, "dropout", "replay", ctx.step)
        for weight, gradient in zip(weights, found, strict=True):
            assert weight.grad is not None
            weight.grad.add_(gradient, alpha=share)
        self._evidence[MORE] = self._evidence.get(MORE, 0) + len(drawn)

    def end_task(self, ctx: Context) -> None:
        """Show the task's rows to the buffer."""
        values = None
        if self.policy == "surprise":
            values = losses(ctx)
        elif self.policy in ("herding", "diversity"):
            values = features(ctx)
        random = ctx.random(self.policy)
        self._buffer.add(ctx.dataset, ctx.task, random, values, folder=ctx.folder)

    def state(self) -> State:
        """The buffer, and what was counted."""
        own = self._buffer.state()
        return State(own.tensors, {k: v for k, v in self._evidence.items() if k == MORE}, own.files)

    def restore(self, ctx: Context, state: State) -> None:
        """Take the buffer back."""
        self._buffer.restore(state, ctx.folder)
        self._evidence |= state.values

    def declared_bytes(self, ctx: Context) -> int:
        """Of each token its id and a bit; of each row its length, task, class and rank."""
        return self._buffer.nbytes()
