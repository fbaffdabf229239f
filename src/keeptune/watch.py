"""Looks at samples while a task is learned: when there is time for one, and what follows from it.

Neither the model nor the trainer is known here; `steering` gives both.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from keeptune.changes import Scorer, point
from keeptune.controller import Controller
from keeptune.intervals import Bounds
from keeptune.lines import Line
from keeptune.recipe_parts import WatchRecipe
from keeptune.watchlog import Action, Look, Point

Clock = Callable[[], float]


class Pace:
    """Keeps looks within their share of the time.

    A look is taken only if, were it to last as long as the longest one so far, looks would still
    have had no more than their share. The first look's length is not known before.

    Args:
        every: Steps between two looks.
        max_overhead: Largest share.
        clock: Seconds that only ever grow.
    """

    def __init__(self, every: int, max_overhead: float, clock: Clock = time.monotonic) -> None:
        self.every, self.max_overhead, self._clock = every, max_overhead, clock
        self.spent = self.longest = self._trained = 0.0
        self._since = clock()

    def start(self) -> None:
        """Training begins, or goes on."""
        self._since = self._clock()

    @property
    def trained(self) -> float:
        """Seconds of training so far, without the looks."""
        return self._trained + self._clock() - self._since

    @property
    def overhead(self) -> float:
        """Share of the time that looks have taken so far."""
        whole = self.spent + self.trained
        return self.spent / whole if whole else 0.0

    def allows(self, step: int, steps: int) -> bool:
        """Whether to look after this step: every so often, and at the end."""
        if step % self.every and step != steps:
            return False
        spent = self.spent + self.longest
        return spent <= self.max_overhead * (spent + self.trained)

    @contextmanager
    def look(self) -> Iterator[None]:
        """Measures a look."""
        began = self._clock()
        self._trained += began - self._since
        yield
        self._since = self._clock()
        self.spent += self._since - began
        self.longest = max(self.longest, self._since - began)

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"spent": self.spent, "longest": self.longest, "trained": self.trained}

    def restore(self, state: dict[str, float]) -> None:
        """Take back what `state` gave."""
        self.spent, self.longest = state["spent"], state["longest"]
        self._trained, self._since = state["trained"], self._clock()


class Watch:
    """The looks of one task.

    A line has fallen when it is sure that it fell by more than it may. A task has many looks at
    many lines, and each would have its own chance of a false alarm; so each look asks for so much
    more confidence that all of them together keep to the one that was asked for (Bonferroni).

    Args:
        settings: The recipe's.
        lines: What is looked at.
        before: Knows what rows scored before the task.
        task: The task's name.
        index: Its position in the stream.
        clock: Seconds that only ever grow.

    Attributes:
        controller: Finds how hard the methods shall hold; None where that is not steered.
    """

    def __init__(
        self,
        settings: WatchRecipe,
        lines: Sequence[Line],
        before: Scorer,
        task: str,
        index: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self.settings, self.lines, self._before = settings, lines, before
        self.task, self.index = task, index
        self.pace = Pace(settings.every, settings.max_overhead, clock)
        self.fallen: list[str] = []
        self.ended = False
        self.good_step = 0
        self.controller = Controller() if settings.on_drop == "strengthen" else None

    def start(self, steps: int) -> Look:
        """The look before the first step, at scores that are known already."""
        before = self._before
        look = self._look(0, steps, lambda p: before(dataclasses.replace(p, before=self.index)))
        return self._steered(look)

    def after_step(self, step: int, steps: int, score: Scorer) -> Look | None:
        """Look, where it is time to; says in `action` what must be done.

        Args:
            step: Steps done.
            steps: Steps planned.
            score: Scores a probe's rows.
        """
        if self.ended or not self.pace.allows(step, steps):
            return None
        spent = self.pace.spent
        with self.pace.look():
            look = self._look(step, steps, score)
        seconds = self.pace.spent - spent
        look = look.model_copy(update={"seconds": seconds, "overhead": self.pace.overhead})
        return self._steered(look.model_copy(update=self._judge(look)))

    def _steered(self, look: Look) -> Look:
        if self.controller is None:
            return look
        return look.model_copy(update={"effort": self.controller.update(look.points)})

    def _judge(self, look: Look) -> dict[str, Any]:
        fallen = [p.name for p in look.points if p.is_below]
        if not fallen:
            self.good_step = look.step
            return {}
        action: Action = self.settings.on_drop
        if action in ("warn", "strengthen"):
            new = set(fallen) - set(self.fallen)
            self.fallen = sorted({*fallen, *self.fallen})
            return {"action": action if new else ""}
        self.fallen, self.ended = fallen, True
        return {"action": action, "back_to": self.good_step if action == "rollback" else None}

    def _look(self, step: int, steps: int, score: Scorer) -> Look:
        judged = sum(line.allowed is not None for line in self.lines)
        chances = max(1, judged * (steps // self.settings.every + 1))
        strict = 1 - (1 - self.settings.confidence) / chances

        def is_below(allowed: float, at: Callable[[float], Bounds]) -> bool:
            # The strict bound takes many draws, and is not needed where the wide one does not fall.
            return at(self.settings.confidence).high < -allowed and at(strict).high < -allowed

        points: list[Point] = [
            point(line, score, self._before, self.settings.confidence, is_below)
            for line in self.lines
        ]
        return Look(
            task=self.task,
            index=self.index,
            step=step,
            steps=steps,
            seconds=0.0,
            overhead=0.0,
            points=points,
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "pace": self.pace.state(),
            "fallen": self.fallen,
            "ended": self.ended,
            "good_step": self.good_step,
            "controller": None if self.controller is None else self.controller.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.pace.restore(state["pace"])
        self.fallen, self.ended = list(state["fallen"]), bool(state["ended"])
        self.good_step = int(state["good_step"])
        if self.controller is not None:
            self.controller.restore(state["controller"])
