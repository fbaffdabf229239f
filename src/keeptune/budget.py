"""The largest step from the weights before a task towards those after it that a budget allows.

The step is found by bisection on one half of the evaluation rows and confirmed on the other half;
where it is not confirmed, half of it is tried, and then a quarter. Each of these trials asks for so
much more confidence that together they keep to the one asked for. A step of 0 is the model from
before the task, which can always be had.

WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903) with a step that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from keeptune.bisection import largest_share
from keeptune.changes import Scorer, point
from keeptune.intervals import Bounds
from keeptune.lines import Line, halves
from keeptune.methods._factors import in_pairs, mix_factors
from keeptune.watchlog import Tried

TRIES = 3
Measure = Callable[[float, Literal["search", "fresh"]], Tried]


def largest_step(measure: Measure) -> tuple[float, list[Tried]]:
    """The largest step that is confirmed, if what is lost grows with the step.

    Args:
        measure: Tries a step, 0 to 1, on one of the two samples.

    Returns:
        The step, and all that was tried.
    """
    tried: list[Tried] = []

    def is_inside(step: float) -> bool:
        tried.append(measure(step, "search"))
        return tried[-1].inside

    step = largest_share(is_inside)
    for _ in range(TRIES if step else 0):
        tried.append(measure(step, "fresh"))
        if tried[-1].inside:
            return step, tried
        step /= 2
    return 0.0, tried


def find_step(
    move: Callable[[float], None],
    chosen: Sequence[Line],
    score: Scorer,
    before: Scorer,
    *,
    confidence: float,
    seed: int,
    tick: Callable[[int], None],
) -> tuple[float, list[Tried]]:
    """The largest step whose loss is surely inside what the lines allow; it is taken.

    Args:
        move: Sets the model to a step, 0 to 1.
        chosen: What is held, and how far each may fall.
        score: Scores rows with what the model is now.
        before: Knows what they scored before.
        confidence: How sure it must be.
        seed: Divides the rows into those that find a step and those that confirm it.
        tick: Called with the number of trials so far.

    Returns:
        The step, and all that was tried.
    """
    both = [halves(line, seed) for line in chosen]
    done = 0

    def measure(mix: float, sample: Literal["search", "fresh"]) -> Tried:
        nonlocal done
        move(mix)
        half = [part for parts in both if (part := parts[sample == "fresh"]).probes]
        level = 1 - (1 - confidence) / TRIES if sample == "fresh" else confidence

        def is_unsure(allowed: float, at: Callable[[float], Bounds]) -> bool:
            return at(level).low < -allowed

        points = [point(line, score, before, level, is_unsure) for line in half]
        done += 1
        tick(done)
        inside = not any(point.is_below for point in points)
        return Tried(mix=mix, sample=sample, points=points, inside=inside)

    mix, tried = largest_step(measure)
    move(mix)
    return mix, tried


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

    Attributes:
        cut: The largest relative error of an update by its cut so far.
    """

    def __init__(self, old: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> None:
        self._old, self._weights = old, weights
        self._new = snapshot(weights)
        self.cut = 0.0

    @torch.no_grad()
    def move(self, mix: float) -> None:
        """Set the weights to so large a share of the new ones."""
        if mix in (0.0, 1.0):
            put(self._weights, self._new if mix else self._old)
            return
        for name, partner in in_pairs(self._weights):
            weight = self._weights[name]
            if partner is not None:
                old = self._old[name], self._old[partner]
                new = self._new[name], self._new[partner]
                a, b, error = mix_factors(old, new, mix)
                weight.copy_(a)
                self._weights[partner].copy_(b)
                self.cut = max(self.cut, error)
            else:
                weight.copy_(self._old[name] + mix * (self._new[name] - self._old[name]))
