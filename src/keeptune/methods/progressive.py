"""Progressive networks: a narrow column for each task beside the model, reading all earlier ones.

Paper: Rusu et al. 2016, Progressive neural networks, https://arxiv.org/abs/1606.04671
Equation: c_i^k = c_{i−1}^k + σ(A_i^k h_i / rms(h_i) + W_i^k c_{i−1}^k
    + U_i^k σ(α_i^k V_i^k [c_{i−1}^1; …; c_{i−1}^{k−1}])) with σ = max(·, 0) and h_i the model's
    hidden state after layer i; the last one becomes h_N + rms(h_N) B^k c_N^k
Changes: begin_task, end_task, serve
Cost: for each layer rank · (D + 2 rank + k rank) weights in column k, which grow with its number;
    D · rank for the way back. A token passes columns 1 to k once: the share of the model's own
    work is in the evidence. Steps are cheaper than plain: no backward through the model.
Use when: the task is known when the model answers, its answers must never change by one bit, and
    later tasks should build on earlier ones.
Not when: tasks are many, since their weights and time to answer add up; a task changes how the
    model attends, which a column beside it cannot; or a new classifier's head is to be learned,
    which stays frozen with the rest.
Differs from the paper: the first column is the pretrained model, and those of tasks are of low
    rank, without attention, residual from layer to layer, and read the same layer of the model;
    they feed into its last layer only, so that one pass through the model serves all columns. For
    an unknown task the mean of what all columns say is served. Trains no adapter.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from keeptune.method import ADDED, Context, Method, State
from keeptune.methods._isolate import layers
from keeptune.methods._isolate.columns import Columns


class Progressive(Method):
    """Train one new column; the model and all earlier columns stay."""

    rank: int = Field(16, ge=1, description="size of each column")

    proof: ClassVar[str] = "way_back"
    active_from: ClassVar[int] = 0
    traits: ClassVar[frozenset[str]] = frozenset({"isolation", "structure"})
    excludes: ClassVar[frozenset[str]] = frozenset({"anchor", "freeze", "restart", "structure"})
    served: ClassVar[Literal["one model", "per task", "keeptune"]] = "keeptune"

    _numbers: dict[str, int] = PrivateAttr(default_factory=dict)

    def begin_task(self, ctx: Context) -> None:
        """Freeze all there is, and add a column."""
        columns = self._columns(ctx)
        ctx.model.requires_grad_(False)
        columns.add(ctx).requires_grad_(True)
        self._numbers[ctx.task] = len(self._numbers)
        columns.answering = [self._numbers[ctx.task]]

    def _columns(self, ctx: Context) -> Columns:
        """The model's columns; made when there are none."""
        found = getattr(ctx.model, ADDED, None)
        if found is None:
            _, stack = layers(ctx.model, self.name())
            config: Any = ctx.model.config
            found = Columns(len(stack), config.get_text_config().hidden_size, self.rank)
            found.attach(ctx.model, stack)
        assert isinstance(found, Columns)
        return found

    def end_task(self, ctx: Context) -> None:
        """Show what the column costs."""
        columns, every = self._columns(ctx), sum(p.numel() for p in ctx.model.parameters())
        own, total = list(columns)[-1], sum(p.numel() for p in columns.parameters())
        self._evidence.update(
            columns=len(self._numbers),
            way_back=float(own.up.detach().norm()),
            parameters=sum(p.numel() for p in own.parameters()),
            parameters_of_all=total,
            # A token meets each weight of a column once, as it does those of the model.
            cost_share=total / (every - total),
        )

    def serve(self, ctx: Context, task: str | None) -> None:
        """The task's column; for an unknown task the mean of all."""
        number = self._numbers.get(task or "")
        every = list(range(len(self._numbers)))
        self._columns(ctx).answering = every if number is None else [number]

    def state(self) -> State:
        """Which column belongs to which task; their weights are the model's."""
        return State(values={"numbers": self._numbers})

    def restore(self, ctx: Context, state: State) -> None:
        """Add the columns again; their weights are loaded after this."""
        self._numbers = dict(state.values["numbers"])
        columns = self._columns(ctx)
        for _ in range(len(self._numbers) - len(columns.columns)):
            columns.add(ctx).requires_grad_(False)
