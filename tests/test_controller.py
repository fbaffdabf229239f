"""The controller on plants of a few lines: it settles inside, is still, and turns after a drop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from keeptune import controller
from keeptune.controller import LARGEST, Controller, excess
from keeptune.watchlog import Point

ERROR = 0.01


def seen(loss: float, allowed: float | None, error: float = ERROR, name: str = "g") -> Point:
    return Point(
        name=name, role="guard", unit="share", n=64, score=0.5, change=-loss, low=0, high=0,
        allowed=allowed, is_below=False, error=error,
    )  # fmt: skip


class Plant:
    """What is lost goes, step by step, to where the task's pull and the methods' are even.

    Args:
        top: Where it would go with nothing to hold it.
        weak: How weak the methods are set: at an effort of so much, half of it is lost.
        rate: Share of the way from one look to the next.
        noise: Standard deviation of a look.
    """

    def __init__(self, top: float, weak: float, rate: float, noise: float, seed: int = 0) -> None:
        self.top, self.weak, self.rate, self.noise = top, weak, rate, noise
        self.loss, self._rng = 0.0, np.random.default_rng(seed)

    def look(self, effort: float) -> float:
        self.loss += self.rate * (self.top / (1 + effort / self.weak) - self.loss)
        return self.loss + self.noise * self._rng.standard_normal()


def follow(
    plant: Plant,
    update: Callable[[Sequence[Point]], float],
    allowed: float,
    looks: int = 100,
    drop: dict[int, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """True losses and efforts at each look; `drop` adds to what is lost at some."""
    losses, efforts, effort = [], [], 1.0
    for number in range(looks):
        plant.loss += (drop or {}).get(number, 0.0)
        effort = update([seen(plant.look(effort), allowed)])
        losses.append(plant.loss)
        efforts.append(effort)
    return np.array(losses), np.array(efforts)


PLANTS = [
    {"top": 0.5, "weak": weak, "rate": rate} for weak in (1.0, 5.0) for rate in (0.1, 0.3, 0.9)
]


def settled(
    update: Callable[[Sequence[Point]], float], plant: dict[str, float], seed: int = 0
) -> str:
    """What is wrong with how a controller holds a plant to 0.06; empty if nothing is."""
    losses, efforts = follow(Plant(**plant, noise=ERROR, seed=seed), update, 0.06, looks=120)
    late, held = losses[60:], efforts[60:]
    if losses[40] > 0.06:
        return "it comes too late"
    # Standard deviations: a look's own error for losses, a factor of 2 for efforts.
    swing = float(np.exp(np.log(held).std()))
    if late.std() > ERROR or swing > 2:
        return f"it swings: losses by {late.std():.3f}, efforts by a factor of {swing:.1f}"
    if np.mean(late > 0.06) > 0.05:
        return f"it settles at a loss of {late.mean():.3f}"
    if late.mean() < 0.02:
        return f"it holds too hard, {held.mean():.0f} times"
    return ""


@pytest.mark.parametrize("plant", PLANTS)
def test_it_settles_inside_and_is_still(plant: dict[str, float]) -> None:
    assert [settled(Controller().update, plant, seed) for seed in range(4)] == [""] * 4


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
def test_it_turns_after_a_planted_drop_and_gives_back(rate: float) -> None:
    plant = Plant(0.5, 1.0, rate, ERROR)
    drop = 0.3 / (1 - rate)  # of which the first look sees 0.3
    losses, efforts = follow(plant, Controller().update, 0.06, looks=160, drop={80: drop})
    assert losses[80] > 0.3
    assert efforts[80:86].max() > 2 * efforts[70:80].max()
    # As fast as the plant can: it is held with all there is.
    (inside,) = np.flatnonzero(losses[80:] < 0.06)[:1]
    assert inside <= 3 / rate
    assert efforts[-1] < 0.5 * efforts[80:100].max()


def test_what_needs_no_help_gets_none() -> None:
    losses, efforts = follow(Plant(0.015, 1e9, 0.3, ERROR), Controller().update, 0.06)
    assert losses[-1] > 0.01
    assert efforts.max() == 1.0


def test_little_is_done_about_noise() -> None:
    """Of nothing lost and nothing allowed to be lost, with errors drawn once or at each look."""
    once, each = [], []
    for seed in range(40):
        rng, fixed, fresh = np.random.default_rng(seed), Controller(), Controller()
        biased = [seen(x, 0.0) for x in ERROR * rng.standard_normal(4)]
        for _ in range(20):
            fixed.update(biased)
            fresh.update([seen(x, 0.0) for x in ERROR * rng.standard_normal(4)])
        once.append(fixed.effort)
        each.append(fresh.effort)
    assert np.mean(np.array(once) > 1) <= controller.CHANCE + 0.1
    assert max(each) < 3


def test_an_unreachable_line_gets_the_most_and_is_let_go_of_without_delay() -> None:
    found = Controller()
    for _ in range(200):
        found.update([seen(0.5, 0.0)])
    assert found.effort == pytest.approx(LARGEST)
    found.update([seen(0.0, 0.1)])
    assert found.effort < LARGEST
    for _ in range(200):
        found.update([seen(0.0, 0.1)])
    assert found.effort == 1.0
    assert found.update([seen(0.5, 0.1)]) > 1.0


def test_the_worst_line_decides_and_lines_without_an_allowance_do_not() -> None:
    one, both = Controller(), Controller()
    one.update([seen(0.2, 0.1)])
    both.update([seen(0.0, 0.1, name="h"), seen(0.2, 0.1), seen(0.9, None)])
    assert both.effort == pytest.approx(one.effort)
    assert Controller().update([]) == Controller().update([seen(1.0, None)]) == 1.0


@pytest.mark.parametrize(
    ("loss", "allowed", "expected"),
    [
        (0.09, 0.1, 0.0),  # one error inside of z = 1, from where it is asked for
        (0.10, 0.1, 1.0),
        (0.20, 0.1, 2.0),
        (0.085, 0.1, -0.5),
        (0.0, 0.1, -1.0),
        (0.01, 0.0, 0.0),  # no more than noise
        (0.02, 0.0, 1.0),
        (0.0, 0.0, -1.0),
    ],
)
def test_what_a_line_asks_for(loss: float, allowed: float, expected: float) -> None:
    assert excess(seen(loss, allowed), 1.0) == pytest.approx(expected)


def test_a_line_without_any_error_is_judged_as_it_stands() -> None:
    assert excess(seen(0.2, 0.1, error=0.0), 1.0) == controller.MOST_SURE
    assert excess(seen(0.05, 0.1, error=0.0), 1.0) == -1.0


def test_what_it_knows_survives_an_interruption() -> None:
    looks = [0.0, 0.2, 0.3, 0.05, 0.0, 0.1]
    whole, first, second = Controller(), Controller(), Controller()
    expected = [whole.update([seen(loss, 0.1)]) for loss in looks]
    for loss in looks[:3]:
        first.update([seen(loss, 0.1)])
    second.restore(first.state())
    assert [second.update([seen(loss, 0.1)]) for loss in looks[3:]] == expected[3:]


# -- planted faults -------------------------------------------------------------------------------


class Reversed(Controller):
    """Lets go where it should hold."""

    def update(self, points: Sequence[Point]) -> float:
        turned = [p.model_copy(update={"change": 2 * -(p.allowed or 0) - p.change}) for p in points]
        return super().update(turned)


class Unbounded(Controller):
    """Without anti-windup: what was asked for in vain is added up without end."""

    def update(self, points: Sequence[Point]) -> float:
        worst = max(excess(point, 1.28) for point in points)
        self._sum += (controller.RAISE if worst > 0 else controller.LOWER) * worst
        self.effort = math.exp(min(max(self._sum, 0.0), math.log(LARGEST)))
        return self.effort


class Hasty(Controller):
    """Raises in leaps and gives all back at once."""

    def update(self, points: Sequence[Point]) -> float:
        worst = max(excess(point, 1.28) for point in points)
        self._sum = min(max(self._sum + 3 * worst, 0.0), math.log(LARGEST))
        self.effort = math.exp(self._sum)
        return self.effort


@pytest.mark.parametrize(
    ("cls", "words"),
    [(Reversed, "holds too hard"), (Unbounded, "too late"), (Hasty, "swings")],
)
def test_a_faulty_controller_is_caught(cls: type[Controller], words: str) -> None:
    found = cls()
    for _ in range(400):  # a long time with room before the plant begins
        found.update([seen(0.0, 0.06)])
    assert words in settled(found.update, PLANTS[1])
    # A right one is not disturbed by that time.
    right = Controller()
    for _ in range(400):
        right.update([seen(0.0, 0.06)])
    assert settled(right.update, PLANTS[1]) == ""
