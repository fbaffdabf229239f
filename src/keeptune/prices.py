"""What each method adds to plain training: bytes, passes over rows, and rows.

One entry a method, each the formula of the card's "Cost" line. `benchmarks/sizing.py` sets them
against measured runs, and the other benchmarks say what the single parts cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keeptune.phantom import WIDE, Batch, Step

IN_MEMORY = 8192  # rows of a buffer that are not in files (kept.py)
UINT16 = 2**16  # vocabularies up to which a token id is two bytes
# A frozen adapter's share of a LoRA step (lowrank benchmark: 0.03 for one, 0.45 for four).
FROZEN_ADAPTER = 0.1


@dataclass(frozen=True)
class Case:
    """What a price depends on.

    Attributes:
        step: Of plain training.
        batch: Rows and their length.
        layers: Of the model.
        hidden: Its hidden size.
        vocabulary: Its tokens.
        adapted: Whether an adapter is trained.
        moments: Bytes that the optimizer keeps of a trained weight; Adam's two moments are 8.
        past: Tasks learned before this one.
        rows: Training rows of a task.
        tokens: Tokens of a row, on average.
        answers: Tokens of a row that are learned.
    """

    step: Step
    batch: Batch
    layers: int
    hidden: int
    vocabulary: int
    adapted: bool
    moments: float = 2 * WIDE
    past: int = 1
    rows: int = 1000
    tokens: float = 128.0
    answers: float = 64.0

    @property
    def weights(self) -> float:
        """Bytes of the trained weights."""
        return WIDE * self.step.trained

    @property
    def head(self) -> float:
        """Bytes of the gradient of the head's weights."""
        return 0.0 if self.adapted else WIDE * float(self.hidden * self.vocabulary)

    def kept_rows(self, size: float) -> float:
        """Rows that a buffer of this size holds."""
        return min(size, self.past * self.rows)

    def row(self, extra: float = 0.0) -> float:
        """Bytes of a kept row: of each token its id and a bit, and so many more."""
        return self.tokens * (2.2 if self.vocabulary <= UINT16 else 4.2) + 16 + extra

    def recorded(self, top_k: int) -> float:
        """Bytes of what a model said at a row's answers: its likeliest entries and the rest."""
        return self.answers * ((4 if self.vocabulary <= UINT16 else 6) * top_k + 4)


@dataclass(frozen=True)
class Price:
    """What a method adds to plain training.

    Attributes:
        spread: Bytes for weights, held while a task is learned; FSDP divides them.
        whole: Other bytes held.
        passing: Bytes for weights that are there for a part of each step.
        kept: Bytes of its own in a saved state.
        forwards: Forward passes over a batch, in each step.
        passes: Forward and backward passes over a batch, in each step.
        moved: Bytes read and written in each step.
        rows: Training rows for each new row.
        idle: Share of the trained weights that gets no gradient in a task.
        skipped: Share of the backward that is not run.
        own: Numbers in weights of its own that are trained.
    """

    spread: float = 0.0
    whole: float = 0.0
    passing: float = 0.0
    kept: float = 0.0
    forwards: float = 0.0
    passes: float = 0.0
    moved: float = 0.0
    rows: float = 1.0
    idle: float = 0.0
    skipped: float = 0.0
    own: float = 0.0


def _buffer(c: Case, size: float, extra: float = 0.0) -> dict[str, float]:
    rows = c.kept_rows(size)
    return {"whole": min(rows, IN_MEMORY) * c.row(extra), "kept": rows * c.row(extra)}


def _importance(m: Any, c: Case) -> Price:
    """Anchor and importance of each held weight; on: effective, of each adapted one."""
    numbers = c.step.matrices if m.on == "effective" and c.adapted else c.step.trained
    each = WIDE + {"float32": 4, "bfloat16": 2, "uint8": 1 + 1 / 64}[m.precision]
    # Reads gradient, importance, anchor and weight, and writes the gradient.
    return Price(spread=each * numbers, kept=each * numbers, moved=(16 + each - WIDE) * numbers)


def _path(m: Any, c: Case) -> Price:
    """Anchor, importance and path, and the task's own gradient from backward to step."""
    numbers = c.step.matrices if m.on == "effective" and c.adapted else c.step.trained
    held = WIDE * numbers
    return Price(spread=3 * held, passing=held, kept=2 * held, moved=48 * numbers)


def _replay(m: Any, c: Case) -> Price:
    return Price(**_buffer(c, m.size), rows=1 + m.ratio * (c.past > 0))


def _reference(m: Any, c: Case) -> Price:
    """A gradient of old rows beside the step's own."""
    there = c.past > 0
    share = m.rows / c.batch.rows * there
    return Price(**_buffer(c, m.size), passing=c.weights * there, passes=share)


def _outputs(m: Any, c: Case) -> Price:
    there = c.past > 0
    buffer = _buffer(c, m.size, c.recorded(m.top_k))
    return Price(**buffer, passing=c.weights * there, passes=m.rows / c.batch.rows * there)


def _gem(m: Any, c: Case) -> Price:
    buffer = _buffer(c, m.size * c.past)
    share = m.rows / c.batch.rows * c.past
    return Price(**buffer, passing=c.weights * c.past, passes=share)


def _features(m: Any, c: Case) -> Price:
    """Old rows enter in the middle: half a forward, half a backward; what is below is frozen."""
    share = m.rows / c.batch.rows / 2 * (c.past > 0)
    buffer = _buffer(c, m.size, 2 * c.hidden * c.tokens)
    return Price(**buffer, passing=c.weights / 2 * (c.past > 0), passes=share)


def _ilora(m: Any, c: Case) -> Price:
    share = m.rows / c.batch.rows * (c.past > 0)
    kept = _buffer(c, m.size)
    return Price(
        spread=c.weights, whole=kept["whole"], kept=kept["kept"] + c.weights,
        passes=share, forwards=share, moved=12 * c.step.trained,
    )  # fmt: skip


def _joint(m: Any, c: Case) -> Price:
    buffer = _buffer(c, float("inf"))
    return Price(
        spread=c.weights, whole=buffer["whole"], kept=buffer["kept"] + c.weights, rows=1 + c.past
    )


def _lwf(m: Any, c: Case) -> Price:
    if m.targets == "recorded":
        return Price(whole=c.rows * c.recorded(m.top_k))
    return Price(spread=c.weights, forwards=1)


def _kl_base(m: Any, c: Case) -> Price:
    base = 0.0 if c.adapted else c.weights
    if not m.texts:
        return Price(spread=base, kept=base, forwards=1)
    share = m.rows * m.length / (c.batch.rows * c.batch.length)
    if m.direction == "forward":
        return Price(passing=c.weights, passes=share)
    return Price(spread=base, kept=base, passing=c.weights, passes=share, forwards=share)


def _l2sp(m: Any, c: Case) -> Price:
    moved = (12 if m.decoupled else 16) * c.step.trained
    return Price(spread=c.weights, kept=c.weights, moved=moved)


def _share(value: float, layers: int) -> float:
    return value if value < 1 else min(value / layers, 1.0)


def _freeze(m: Any, c: Case) -> Price:
    """Nothing is differentiated below the lowest trained layer."""
    share = _share(m.layers, c.layers)
    return Price(idle=share, skipped=share)


def _half(m: Any, c: Case) -> Price:
    """Half of a backward is for the gradients of weights, and that of `share` is left out."""
    return Price(idle=m.share, skipped=m.share / 2)


def _osf(m: Any, c: Case) -> Price:
    """Of each matrix k (in + out) numbers, and 2.7 k / tokens of the step's own arithmetic."""
    ratio = min(m.ratio + m.grow * c.past, 1.0)
    k = ratio * c.hidden
    return Price(
        spread=WIDE * ratio * c.step.edges, passes=2.7 * k / (c.batch.rows * c.batch.length)
    )


def _packnet(m: Any, c: Case) -> Price:
    """A byte for each weight; after the first task a mask and a copy as well."""
    spread = c.step.trained * (1 if not c.past else 2 + WIDE)
    return Price(spread=spread, kept=c.step.trained, moved=9 * c.step.trained)


def _stacked(m: Any, c: Case) -> Price:
    """The frozen adapters of earlier tasks, through which each step goes."""
    adapters = c.weights * c.past
    return Price(spread=adapters, kept=adapters, passes=FROZEN_ADAPTER * c.past)


def _apart(m: Any, c: Case) -> Price:
    """The adapters of earlier tasks, which no step goes through."""
    return Price(spread=c.weights * c.past, kept=c.weights * c.past)


def _modules(numbers: float, c: Case, *, skipped: float = 0.5, longer: float = 0.0) -> Price:
    """Modules of its own beside a frozen model, of whose weights no gradient is taken."""
    past = WIDE * numbers * c.past
    return Price(
        spread=past, kept=past + WIDE * numbers, idle=1, skipped=skipped, own=numbers,
        passes=longer / c.batch.length,
    )  # fmt: skip


def _adapters(m: Any, c: Case) -> Price:
    return _modules(c.layers * (2 * m.rank * c.hidden + m.rank + c.hidden), c)


def _progressive(m: Any, c: Case) -> Price:
    """No backward through the model; columns read all earlier ones."""
    column = c.layers * m.rank * (c.hidden + (2 + c.past) * m.rank) + c.hidden * m.rank
    return _modules(column, c, skipped=1.0)


def _prompt(m: Any, c: Case) -> Price:
    return _modules(m.length * c.hidden, c, longer=m.length)


def _prompts(m: Any, c: Case) -> Price:
    return _modules(m.length * c.hidden, c, longer=m.length * (c.past + 1))


def _pseudo(m: Any, c: Case) -> Price:
    """Each row is learned as a row and as a whole text; distil: a copy, and one more forward."""
    written = m.ratio * (c.past > 0) + m.general
    copy = c.weights if m.distil else 0.0
    return Price(
        spread=copy,
        whole=written * c.rows * c.row(),
        rows=(2 if m.ratio else 1) * (1 + written),
        forwards=written / (1 + written) / 2 if m.distil else 0.0,
    )


def _merge(m: Any, c: Case) -> Price:
    copies = c.weights * (1 + c.past)
    return Price(spread=copies, kept=copies + c.weights)


def _seq_star(m: Any, c: Case) -> Price:
    """From the second task on only the head is trained."""
    return Price(idle=float(c.past > 0), skipped=float(c.past > 0))


def _nothing(m: Any, c: Case) -> Price:
    """A few numbers."""
    return Price()


PRICES: dict[str, Callable[[Any, Case], Price]] = {
    "adapters": _adapters,
    "agem": _reference,
    "der": _outputs,
    "der_pp": _outputs,
    "eaft": _nothing,
    "ema": lambda m, c: Price(spread=c.weights, kept=c.weights, moved=12 * c.step.trained),
    "ewc": _importance,
    "feature_replay": _features,
    "freeze": _freeze,
    "gem": _gem,
    "half": _half,
    "hierarchical": _path,
    "ilora": _ilora,
    "inc_lora": _stacked,
    "joint": _joint,
    "kl_base": _kl_base,
    "l2sp": _l2sp,
    "label_smoothing": _nothing,
    "lwf": _lwf,
    "mas": _importance,
    "merge": _merge,
    "mixture": _stacked,
    "olora": _stacked,
    "osf": _osf,
    "packnet": _packnet,
    "plain": _nothing,
    "progressive": _progressive,
    "progressive_prompts": _prompts,
    "prompt": _prompt,
    "pseudo_replay": _pseudo,
    "replay": _replay,
    "retrieval": lambda m, c: Price(**_buffer(c, m.size)),
    "self_rewrite": lambda m, c: Price(whole=m.ratio * c.rows * c.row()),
    "seq_star": _seq_star,
    "si": _path,
    "task_lora": _apart,
    "wise": lambda m, c: Price(spread=c.weights),
}
