"""The largest step from the weights before a task towards those after it that a budget allows.

The step is found by bisection on one half of the evaluation rows and confirmed on the other half;
where it is not confirmed, half of it is tried, and then a quarter. Each of these trials asks for so
much more confidence that together they keep to the one asked for. A step of 0 is the model from
before the task, which can always be had. From a confirmed step on, blocks of layers may go further.

WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903) with a step that is measured; by
blocks of layers: Lin et al. 2024 (HMA, https://arxiv.org/abs/2309.06256).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from keeptune.bisection import largest_share
from keeptune.changes import Scorer, point
from keeptune.intervals import Bounds
from keeptune.layers import blocks_of
from keeptune.lines import Line, halves
from keeptune.methods._factors import in_pairs, mix_factors
from keeptune.watchlog import Tried

TRIES = 3
Sample = Literal["search", "fresh"]
Steps = tuple[float, ...]  # one for all layers, or one for each block of them
Measure = Callable[[Steps, Sample], Tried]


def largest_step(measure: Measure, blocks: int = 1) -> tuple[Steps, list[Tried]]:
    """The largest step that is confirmed, if what is lost grows with the step.

    Blocks of layers go further where that is confirmed in its turn. It is asked for only after the
    common step was confirmed, so that this trial takes no confidence from the others: it can only
    be the first mistake where that was none (a fixed sequence of tests).

    Args:
        measure: Tries a step, 0 to 1, on one of the two samples.
        blocks: Of layers.

    Returns:
        The step, and all that was tried.
    """
    tried: list[Tried] = []

    def trial(steps: Steps, sample: Sample) -> Tried:
        tried.append(measure(steps, sample))
        return tried[-1]

    found = largest_share(lambda step: trial((step,), "search").inside)
    common = _confirmed(found, trial)
    if common < found or common == 1 or blocks == 1:
        return (common,), tried
    at_first = {t.sample: _learned(t) for t in tried if t.mix == common}
    steps, learned = (common,) * blocks, at_first.get("search", 0.0)
    for block in reversed(range(blocks)):
        steps, learned = _raised(steps, block, learned, trial)
    if max(steps) > common:
        last = trial(steps, "fresh")
        if last.inside and _learned(last) >= at_first.get("fresh", 0.0):
            return steps, tried
    return (common,), tried


def _confirmed(step: float, trial: Measure) -> float:
    """The step, or half or a quarter of it; 0 if none of them is inside on fresh rows."""
    for _ in range(TRIES if step else 0):
        if trial((step,), "fresh").inside:
            return step
        step /= 2
    return 0.0


def _raised(steps: Steps, block: int, learned: float, trial: Measure) -> tuple[Steps, float]:
    """One block's step as far up as keeps inside without learning less, and what it learns then."""
    best = steps, learned

    def holds(share: float) -> bool:
        nonlocal best
        step = steps[block] + share * (1 - steps[block])
        other = (*steps[:block], step, *steps[block + 1 :])
        tried = trial(other, "search")
        if is_good := tried.inside and _learned(tried) >= learned:
            best = other, _learned(tried)
        return is_good

    largest_share(holds)
    return best


def _learned(tried: Tried) -> float:
    return sum(point.change for point in tried.points if point.role == "learning")


def find_step(
    move: Callable[..., None],
    chosen: Sequence[Line],
    score: Scorer,
    before: Scorer,
    *,
    confidence: float,
    seed: int,
    tick: Callable[[int], None],
    blocks: int = 1,
) -> tuple[Steps, list[Tried]]:
    """The largest step whose loss is surely inside what the lines allow; it is taken.

    Args:
        move: Sets the model to a step, 0 to 1, or to one for each block of layers.
        chosen: What is held, and how far each may fall.
        score: Scores rows with what the model is now.
        before: Knows what they scored before.
        confidence: How sure it must be.
        seed: Divides the rows into those that find a step and those that confirm it.
        tick: Called with the number of trials so far.
        blocks: Of layers.

    Returns:
        The step, and all that was tried.
    """
    both = [halves(line, seed) for line in chosen]
    done = 0

    def measure(steps: Steps, sample: Sample) -> Tried:
        nonlocal done
        move(*steps)
        half = [part for parts in both if (part := parts[sample == "fresh"]).probes]
        level = 1 - (1 - confidence) / TRIES if sample == "fresh" else confidence

        def is_unsure(allowed: float, at: Callable[[float], Bounds]) -> bool:
            return at(level).low < -allowed

        points = [point(line, score, before, level, is_unsure) for line in half]
        done += 1
        tick(done)
        inside = not any(point.is_below for point in points)
        mix, mixes = shares(steps)
        return Tried(mix=mix, mixes=mixes, sample=sample, points=points, inside=inside)

    steps, tried = largest_step(measure, blocks)
    move(*steps)
    return steps, tried


def shares(steps: Steps) -> tuple[float, list[float] | None]:
    """The mean of a step over its blocks, and that of each block, if there are several."""
    return sum(steps) / len(steps), list(steps) if len(steps) > 1 else None


def snapshot(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of weights."""
    return {name: weight.detach().clone() for name, weight in weights.items()}


@torch.no_grad()
def put(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Give weights the values of a snapshot."""
    for name, weight in weights.items():
        weight.copy_(values[name])


class Between:
    """Puts a model's weights anywhere between two snapshots.

    Of a LoRA module the update ΔW moves in a straight line and is cut to the adapter's rank, since
    halfway between two pairs of factors is not halfway between their products. All other weights
    move themselves. Both ends are exact.

    Args:
        old: The weights before.
        weights: The weights after; these are moved.
        blocks: Blocks of layers that can be moved each by itself, at most.

    Attributes:
        cut: The largest relative error of an update by its cut so far.
        blocks: How many there are; no more than layers that are trained.
    """

    def __init__(
        self, old: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter], blocks: int = 1
    ) -> None:
        self._old, self._weights = old, weights
        self._new = snapshot(weights)
        places = blocks_of(list(weights), blocks, only_named=True)
        self._block = dict(zip(weights, places, strict=True))
        self.blocks = max(places) + 1
        self.cut = 0.0

    @torch.no_grad()
    def move(self, *mixes: float) -> None:
        """Set the weights to so large a share of the new ones, in all blocks or in each of them."""
        for name, partner in in_pairs(self._weights):
            weight, mix = self._weights[name], mixes[self._block[name] if len(mixes) > 1 else 0]
            if mix in (0.0, 1.0):
                own = [name] if partner is None else [name, partner]
                put({n: self._weights[n] for n in own}, self._new if mix else self._old)
            elif partner is not None:
                old = self._old[name], self._old[partner]
                new = self._new[name], self._new[partner]
                a, b, error = mix_factors(old, new, mix)
                weight.copy_(a)
                self._weights[partner].copy_(b)
                self.cut = max(self.cut, error)
            else:
                weight.copy_(self._old[name] + mix * (self._new[name] - self._old[name]))
