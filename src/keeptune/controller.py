"""How hard the methods of a run hold while a task is learned: raised and lowered by what is lost.

Neither the model nor a trainer is known here: what looks show goes in, and out comes the effort, by
which the settings of the methods are multiplied. 1 is what the recipe says, and the least.

It is dual ascent on the logarithm of the effort, with a proportional part against swinging (a PI
controller: Stooke, Achiam, Abbeel 2020, https://arxiv.org/abs/2007.03964):

    e = (loss − edge) / error,   edge = max(allowed − z · error, z · error)
                                 of the worst line, held within −1 and MOST_SURE
    I ← I + RAISE · e over 0, I + LOWER · e under 0,   held within 0 and ln LARGEST
    effort = exp(I + AT_ONCE · e over 0),              at most LARGEST

A line counts in standard errors of its loss. It asks for more when it is no longer z of them inside
what is allowed, and the loss itself is larger than z; so little is done about noise: z is such that
at a look all lines together are above it by chance once in 1 / CHANCE times. Where every line is
inside its edge, effort is given back.

Differs from the paper: the multiplier's logarithm is moved, since strengths of use differ by powers
of ten; and effort is given back more slowly than it is raised, since what was lost does not come
back as readily. So it settles a little inside the edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from keeptune.watchlog import Point

RAISE = 0.4  # by which one look can add to the logarithm, for each standard error
LOWER = 0.1
AT_ONCE = 0.4
MOST_SURE = 2.0  # standard errors, beyond which evidence is not stronger
LARGEST = 100.0
CHANCE = 0.1


class Controller:
    """Finds the effort at which the worst line stays inside what it may lose.

    Attributes:
        effort: How hard the methods hold, as a multiple of what they are set to: 1 to LARGEST.
    """

    def __init__(self) -> None:
        self.effort = 1.0
        self._sum = 0.0

    def update(self, points: Sequence[Point]) -> float:
        """The effort after another look.

        Args:
            points: What the look showed; those without an allowance have no say.
        """
        held = [point for point in points if point.allowed is not None]
        z = NormalDist().inv_cdf(1 - CHANCE / max(len(held), 1))
        worst = max((excess(point, z) for point in held), default=0.0)
        most = math.log(LARGEST)
        # Held within its range, so that no past is too long to be turned (anti-windup).
        self._sum += (RAISE if worst > 0 else LOWER) * worst
        self._sum = min(max(self._sum, 0.0), most)
        self.effort = math.exp(min(self._sum + AT_ONCE * max(worst, 0.0), most))
        return self.effort

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"effort": self.effort, "sum": self._sum}

    def restore(self, state: dict[str, float]) -> None:
        """Take back what `state` gave."""
        self.effort, self._sum = state["effort"], state["sum"]


def excess(point: Point, z: float) -> float:
    """By how many standard errors more is lost than shall be; below 0 there is room.

    Args:
        point: With an allowance and a standard error.
        z: Standard errors that a line keeps away from what is allowed, and that are not noise.
    """
    assert point.allowed is not None
    assert point.error is not None
    error = max(point.error, 1e-12)
    beyond = (-point.change - max(point.allowed - z * error, z * error)) / error
    return min(max(beyond, -1.0), MOST_SURE)
