"""Sums over examples of squared or absolute gradients: what Fisher diagonals and MAS are made of.

`example_sums` is exact, whatever the batch size. `sign_sums` is unbiased and as cheap as training.
`batched_sums` is what most implementations compute instead, kept to compare with.

With several processes each takes its share of the rows and all end with the same sums. Of sharded
weights (FSDP2) every process has the sums of its own shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from keeptune.errors import MethodError
from keeptune.method import OPTIONS, Batch, Context
from keeptune.methods._anchor.hooks import ExampleHooks, Power, Uncovered, add_raised, raised
from keeptune.methods._anchor.objectives import Objective, choices
from keeptune.methods._anchor.shards import local
from keeptune.methods._anchor.undisturbed import undisturbed
from keeptune.processes import processes

Weights = dict[str, nn.Parameter]
Sums = dict[str, Tensor]


def example_sums(
    ctx: Context,
    weights: Weights,
    rows: Sequence[int],
    objective: Objective,
    power: Power,
    *,
    batch: int = 8,
) -> tuple[Sums, str]:
    """Σ over rows, and over the objective's tensors, of (∂/∂w)² or |∂/∂w|, one row at a time.

    Batched wherever `hooks` has rules for all the weights and agrees with plain autograd on the
    longest and the shortest row; else by one backward a row. The model, its gradients and the
    random state are left as they were; dropout is off.

    Args:
        ctx: The task.
        weights: By name; they need not be trained (the base weights under an adapter).
        rows: Numbers of rows of `ctx.dataset`.
        objective: What is differentiated.
        power: What is summed.
        batch: Rows in one forward; does not change the result beyond rounding.

    Returns:
        Sums by name, of the shape of the weight (or of its shard), in float32 at least; and how
        they were had: "hooks" or "loop".

    Raises:
        MethodError: A sharded weight is frozen, so that it has no gradient.
    """
    return _Pass(ctx, weights, objective, _collating(ctx)).exactly(rows, power, batch)


def choice_sums(ctx: Context, weights: Weights, rows: Sequence[int]) -> tuple[Sums, str]:
    """Σ over rows of Σ_c p(c) (∂ log p(c) / ∂w)², over the choices c of each row.

    Args:
        ctx: The task; its rows have the column `options`.
        weights: As in `example_sums`, as is what is returned.
        rows: Numbers of rows of `ctx.dataset`.

    Raises:
        MethodError: The rows have no choices.
    """
    if OPTIONS not in ctx.dataset.column_names:
        raise MethodError(
            f"The rows of task {ctx.task!r} have no choices, so there is no sum over all answers. "
            "Give every row `choices`, or use `fisher: sampled`."
        )

    def collate(one: Sequence[int]) -> Batch:
        return ctx.batch(ctx.dataset[one[0]][OPTIONS])

    return _Pass(ctx, weights, choices, collate).exactly(rows, "square", 1)


def require_answers(ctx: Context, *, every: bool) -> None:
    """Refuse rows whose answers a pass at the task's end could not look at.

    Args:
        ctx: The task.
        every: Whether all possible answers are needed, not only the true one.

    Raises:
        MethodError: The rows have no labels; or not all answers can be known.
    """
    if "labels" not in ctx.dataset.column_names:
        raise MethodError(
            f"The rows of task {ctx.task!r} have no labels, so there is no answer to look at. "
            "Methods that need it work with SFTTrainer and with classifiers."
        )
    is_text = isinstance(ctx.dataset[0]["labels"], list)
    if every and is_text and OPTIONS not in ctx.dataset.column_names:
        raise MethodError(
            f"The rows of task {ctx.task!r} have no choices, so the exact Fisher cannot go through "
            "every possible answer. Give every row `choices`, or use `fisher: sampled`."
        )


def sign_sums(
    ctx: Context, weights: Weights, rows: Sequence[int], objective: Objective, *, batch: int = 8
) -> Sums:
    """An unbiased estimate of the sums of squares: Σ over batches of (Σ_b ± g_b)².

    The signs are drawn independently, so the cross terms vanish on average. One ordinary backward
    a batch, for any architecture; noisy: take tens of batches.

    Args:
        ctx: The task.
        weights: As in `example_sums`.
        rows: Numbers of rows of `ctx.dataset`.
        objective: What is differentiated; each of its tensors gets its own signs.
        batch: Rows in one forward; it changes which signs are drawn.
    """
    measure = _Pass(ctx, weights, objective, _collating(ctx))
    rank, world = processes() if _may_differ(weights) else (0, 1)
    scale = float(world if measure.sharded else 1)  # FSDP takes the mean over the processes
    sums = measure.zeros()
    with undisturbed(ctx, weights):
        for number, begin in enumerate(range(0, len(rows), batch * world)):
            chunk = rows[begin : begin + batch * world]
            # With shards a process must take part even when no row is left for it.
            mine = list(chunk[rank::world]) or list(chunk[:1] if measure.sharded else ())
            weight = scale if len(chunk) > rank else 0.0
            random = ctx.random("signs", number * world + rank)
            total = torch.zeros((), device=ctx.device)
            for value in measure.values(mine) if mine else ():
                signs = torch.as_tensor(random.integers(0, 2, len(mine)) * 2.0 - 1.0)
                total = total + (value * signs.to(value)).sum()
            measure.add(sums, weight * total, "square")
    return measure.gathered(sums)


def batched_sums(
    ctx: Context, weights: Weights, rows: Sequence[int], objective: Objective, *, batch: int = 8
) -> Sums:
    """Σ over batches of (the mean gradient of the batch)² times its rows: not a Fisher.

    Opposite gradients cancel within a batch, so the result depends on its size: van de Ven 2025,
    https://arxiv.org/abs/2502.11756.

    Args:
        ctx: The task.
        weights: As in `example_sums`.
        rows: Numbers of rows of `ctx.dataset`.
        objective: What is differentiated.
        batch: Rows that share one gradient.
    """
    measure = _Pass(ctx, weights, objective, _collating(ctx))
    rank, world = (0, 1) if measure.sharded else processes()
    sums = measure.zeros()
    with undisturbed(ctx, weights):
        for begin in range(0, len(rows), batch)[rank::world]:
            chunk = rows[begin : begin + batch]
            for total, again in measure.totals(chunk):
                # n · (Σ g / n)² = (Σ g / √n)²
                measure.add(sums, total / len(chunk) ** 0.5, "square", again=again)
    return measure.gathered(sums)


@dataclass(frozen=True)
class _Pass:
    """One pass over rows: what is differentiated, by which weights."""

    ctx: Context
    weights: Weights
    objective: Objective
    collate: Callable[[Sequence[int]], Batch]

    @property
    def sharded(self) -> bool:
        return any(isinstance(weight, DTensor) for weight in self.weights.values())

    # -- exactly ----------------------------------------------------------------------------------

    def exactly(self, rows: Sequence[int], power: Power, batch: int) -> tuple[Sums, str]:
        if self.sharded:
            # Gradients become means over the processes: with the same row in all, that row's.
            return self._by_loop(rows, power), "loop"
        rank, world = processes()
        mine = _longest_first(self.ctx, rows)[rank::world]
        sums = self._by_hooks(mine, power, batch)
        looped = torch.tensor(float(sums is None), device=self.ctx.device)
        sums = self._by_loop(mine, power) if sums is None else sums
        self.gathered({"": looped})
        return self.gathered(sums), "loop" if looped else "hooks"

    def _by_loop(self, rows: Sequence[int], power: Power) -> Sums:
        sums = self.zeros()
        with undisturbed(self.ctx, self.weights):
            for row in rows:
                for total, again in self.totals([row]):
                    self.add(sums, total, power, again=again)
        return sums

    def _by_hooks(self, rows: Sequence[int], power: Power, batch: int) -> Sums | None:
        """The sums, or None where hooks cannot be right."""
        sums = self.zeros()
        try:
            by_weight = {weight: sums[name] for name, weight in self.weights.items()}
            hooks = ExampleHooks(self.ctx.model, by_weight, power)
            # The longest and the shortest row: the second is padded.
            probe = [rows[0], rows[-1]][: min(batch, len(rows))] if rows else []
            batch = self._run(sums, hooks, probe, batch)
            if not self._agrees(sums, probe, power, hooks.rounding):
                return None
            self._run(sums, hooks, rows, batch)
        except Uncovered:
            return None
        return sums

    def _run(self, sums: Sums, hooks: ExampleHooks, rows: Sequence[int], batch: int) -> int:
        """Add to sums of zeros; fewer rows at a time where memory is short. Returns how many."""
        while not self._fits(hooks, rows, batch):
            # The longest rows come first, so little is done twice.
            batch //= 2
            for values in sums.values():
                values.zero_()
            torch.cuda.empty_cache()
        return batch

    def _fits(self, hooks: ExampleHooks, rows: Sequence[int], batch: int) -> bool:
        with undisturbed(self.ctx, {}), hooks:
            try:
                for begin in range(0, len(rows), batch):
                    chunk = rows[begin : begin + batch]
                    for total, again in self.totals(chunk, hooks):
                        hooks.backward(total, again=again)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                return False
        return True

    def _agrees(self, sums: Sums, rows: Sequence[int], power: Power, rounding: float) -> bool:
        """Whether the sums are those of plain autograd over these rows; leaves zeros.

        It subtracts in place, to need no more memory than the gradients.
        """
        largest = {name: float(values.max()) for name, values in sums.items()}
        with undisturbed(self.ctx, self.weights):
            for row in rows:
                for total, again in self.totals([row]):
                    for name, gradient in self._gradients(total, again=again):
                        sums[name].sub_(raised(gradient.to(sums[name].dtype), power))
        tolerance = max(1e-4, 16 * rounding)
        # A gradient that is rounding only, as a key's bias has it under softmax, agrees with none.
        noise = (10 * rounding) ** (2 if power == "square" else 1) * max(
            largest.values(), default=0.0
        )
        agree = all(
            float(values.abs_().max()) <= tolerance * largest[name] + noise
            for name, values in sums.items()
        )
        for values in sums.values():
            values.zero_()
        return agree

    # -- parts of every pass ----------------------------------------------------------------------

    def zeros(self) -> Sums:
        return {
            name: torch.zeros_like(local(w), dtype=torch.promote_types(w.dtype, torch.float32))
            for name, w in self.weights.items()
        }

    def values(self, rows: Sequence[int], hooks: ExampleHooks | None = None) -> list[Tensor]:
        """The objective's tensors for these rows."""
        batch = self.collate(rows)
        if hooks is not None:
            hooks.expect(len(rows), len(next(iter(batch.values()))))
        return list(self.objective(batch, self.ctx.outputs(batch).logits, rows))

    def totals(
        self, rows: Sequence[int], hooks: ExampleHooks | None = None
    ) -> Iterator[tuple[Tensor, bool]]:
        """The scalars to differentiate, and whether another of the same graph follows."""
        values = self.values(rows, hooks)
        for i in range(len(values)):
            if i and self.sharded:
                values = self.values(rows)  # FSDP frees the weights in a backward
            yield values[i].sum(), i + 1 < len(values) and not self.sharded

    def add(self, sums: Sums, total: Tensor, power: Power, *, again: bool = False) -> None:
        """Add the gradient of a scalar, raised."""
        for name, gradient in self._gradients(total, again=again):
            add_raised(sums[name], gradient, power)

    def _gradients(self, total: Tensor, *, again: bool) -> Iterator[tuple[str, Tensor]]:
        if not total.requires_grad:
            return
        if self.sharded:
            total.backward()  # type: ignore[no-untyped-call]
            for name, weight in self.weights.items():
                if weight.grad is not None:
                    yield name, local(weight.grad)
            self.ctx.model.zero_grad()
            return
        weights = list(self.weights.values())
        found = torch.autograd.grad(total, weights, allow_unused=True, retain_graph=again)
        for name, gradient in zip(self.weights, found, strict=True):
            if gradient is not None:
                yield name, gradient

    def gathered(self, sums: Sums) -> Sums:
        """Add up what the processes have, in place, unless each has its own shards."""
        if not self.sharded and processes()[1] > 1:
            for values in sums.values():
                distributed.all_reduce(values)
        return sums


def _collating(ctx: Context) -> Callable[[Sequence[int]], Batch]:
    def collate(rows: Sequence[int]) -> Batch:
        return ctx.batch([ctx.dataset[int(row)] for row in rows])

    return collate


def _longest_first(ctx: Context, rows: Sequence[int]) -> list[int]:
    """Rows of like length side by side, so that little is padded."""
    numbers = [int(row) for row in rows]
    if "input_ids" not in ctx.dataset.column_names:
        return numbers
    lengths = [len(ids) for ids in ctx.dataset.select(numbers)["input_ids"]]
    order = sorted(range(len(numbers)), key=lambda i: -lengths[i])
    return [numbers[i] for i in order]


def _may_differ(weights: Weights) -> bool:
    """Whether processes may see different rows: gradients then are of one process, or the mean."""
    sharded = [weight for weight in weights.values() if isinstance(weight, DTensor)]
    one_line = all(weight.device_mesh.ndim == 1 for weight in sharded)
    return not sharded or (one_line and len(sharded) == len(weights))
