"""What keeps a run inside its lines: looks while a task is learned, and the step after it.

A trainer asks this at both ends of a task and after each step (see `seams.Overseer`). It scores the
weights that are trained, as they stand, with the model's mode and all random numbers put back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from keeptune import lines, registry, state, watchlog
from keeptune.budget import Between, find_step, put, shares, snapshot
from keeptune.changes import Earlier
from keeptune.controller import LARGEST
from keeptune.errors import RecipeError
from keeptune.folder import RunFolder
from keeptune.lines import Probe
from keeptune.method import Context, Method
from keeptune.processes import launched
from keeptune.progress import Progress
from keeptune.recipe_parts import BudgetRecipe, WatchRecipe
from keeptune.records import Example, Phase
from keeptune.watch import Clock, Watch
from keeptune.watchlog import Frontier, Look
from keeptune.wording import number, unit_of

if TYPE_CHECKING:
    from keeptune.session import Plan, Session


def refuse(plan: Plan) -> None:
    """Refuse a watch or a budget that cannot be kept.

    Raises:
        RecipeError: Names that no guard has, methods that it does not go together with, none that
            can be strengthened, or several processes.
    """
    for field, settings in (("watch", plan.watch), ("budget", plan.budget)):
        if settings is not None and launched() > 1:
            raise RecipeError(
                f"{field} looks at the model of one process, but keeptune was started as "
                f"{launched()}. Leave it out, or start one process."
            )
        for method in plan.methods if settings is not None else ():
            if why := _clash(settings, method):
                raise RecipeError(
                    f"{field} cannot be used with the method {method.name()!r}, which {why}. "
                    "Remove one of them."
                )
    if plan.watch is not None and plan.watch.on_drop == "strengthen":
        _require_steered(plan.methods)
    lines.refuse_unknown(plan.watch, plan.budget, plan.stream, plan.guards)


def _require_steered(methods: Sequence[Method]) -> None:
    if not any(method.steered and not method.is_neutral() for method in methods):
        able = [name for name in registry.names() if registry.get(name).steered]
        raise RecipeError(
            "watch.on_drop: strengthen raises how hard methods hold, and none here can be raised "
            f"({', '.join(m.name() for m in methods) or 'plain'}). Add one of "
            f"{', '.join(able)}, or choose warn, stop or rollback."
        )


def _clash(settings: WatchRecipe | BudgetRecipe | None, method: Method) -> str:
    if type(method).serve is not Method.serve:
        return "answers with other weights or questions than those that are trained"
    is_budget = isinstance(settings, BudgetRecipe)
    takes_back = is_budget or (isinstance(settings, WatchRecipe) and settings.on_drop == "rollback")
    if takes_back and "path" in method.traits:
        return "adds up over the steps of a task, of which some would be taken back"
    if is_budget:
        if method.traits & {"structure", "restart"}:
            return "does not go on from the weights before a task"
        if "moves" in method.traits:
            return "sets the weights anew when a task ends"
    return ""


class Steering:
    """Watches and holds one run.

    Args:
        session: What runs.
        folder: Where its results are.
        progress: Who is told.
        stop: Once set, nothing is begun any more.
        clock: Seconds that only ever grow.

    Attributes:
        seconds: What looks and the budget took in the present task, of what this process did.
    """

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        progress: Progress,
        stop: Event,
        clock: Clock = time.monotonic,
    ) -> None:
        self.session, self.folder, self.progress, self.stop = session, folder, progress, stop
        self._clock = clock
        self._watch: Watch | None = None
        self._before = Earlier(folder)
        self._old: dict[str, Tensor] = {}
        self._good: dict[str, Tensor] = {}
        self.seconds = 0.0

    @property
    def ended(self) -> bool:
        """Whether the present task was ended before its last step."""
        return self._watch is not None and self._watch.ended

    # -- what a trainer asks ------------------------------------------------------------------

    def begin(self, ctx: Context) -> None:
        """A task begins: its first weights are kept where they may be wanted again."""
        plan, self._watch, self.seconds = self.session.plan, None, 0.0
        self.session.chain.hold(1.0)  # until a look says otherwise
        self._before = Earlier(self.folder)
        goes_back = plan.watch is not None and plan.watch.on_drop == "rollback"
        kept = snapshot(ctx.trainable()) if goes_back or plan.budget is not None else {}
        self._old = kept if plan.budget is not None else {}
        self._good = kept
        if plan.watch is not None:
            chosen = lines.watched(
                plan.watch, plan.budget, plan.stream, plan.guards, ctx.index, plan.seed
            )
            self._watch = Watch(plan.watch, chosen, self._before, ctx.task, ctx.index, self._clock)

    def start(self, step: int, steps: int) -> None:
        """Training begins, or goes on after a step."""
        if self._watch is None:
            return
        watchlog.cut(self.folder, self._watch.index, step if step else -1)
        if not step:
            look = self._watch.start(steps)
            self.session.chain.hold(look.effort or 1.0)
            watchlog.add(self.folder, look)
        self._watch.pace.start()

    def after_step(self, ctx: Context, step: int, steps: int) -> dict[str, float]:
        """Look, where it is time to, and act.

        Returns:
            What a tracker is told; nothing where there was no look.
        """
        if self._watch is None:
            return {}
        with kept_random():
            look = self._watch.after_step(step, steps, self._score)
        if look is None:
            return {}
        self.seconds += look.seconds
        if self._watch.ended and look.action == "rollback":
            put(ctx.trainable(), self._good)
        elif self._watch.good_step == step and self._watch.settings.on_drop == "rollback":
            self._good = snapshot(ctx.trainable())
        told = {f"watch/{p.name}": p.score for p in look.points}
        told |= {f"watch_change/{p.name}": p.change for p in look.points}
        if look.effort is not None:
            self.session.chain.hold(look.effort)
            told["watch_effort"] = look.effort
        watchlog.add(self.folder, look)
        self._tell(look)
        return told

    def end(self, ctx: Context) -> None:
        """A task is trained: take as much of it as the budget allows."""
        budget = self.session.plan.budget
        self._add_cost("watch", ctx.task, self.seconds)
        if self.stop.is_set():
            return
        if budget is not None:
            began = self._clock()
            with kept_random():
                frontier = self._hold(ctx, began)
            watchlog.write_frontier(self.folder, frontier)
            self._add_cost("budget", ctx.task, frontier.seconds)
            self.seconds += frontier.seconds
        self._old = self._good = {}

    def write(self, folder: Path | None) -> None:
        """Keep what a resumed run needs beside the state of a trainer."""
        if self._watch is None:
            return
        state.write_tensors(folder and folder / "watch.safetensors", self._good)
        if folder is not None:
            state.write_json(folder / "watch.json", self._watch.state())

    def read(self, folder: Path) -> None:
        """Take back what `write` kept; the task has begun."""
        if self._watch is None:
            return
        self._watch.restore(state.read_json(folder / "watch.json"))
        if self._watch.controller is not None:
            self.session.chain.hold(self._watch.controller.effort)
        device = next(self.session.model.parameters()).device
        kept = load_file(folder / "watch.safetensors")
        self._good = {name: tensor.to(device) for name, tensor in kept.items()}

    # -- looks --------------------------------------------------------------------------------

    def _score(self, probe: Probe) -> Sequence[Example]:
        item = probe.item
        return self.session.score(probe.rows, item.score, max_new_tokens=item.max_new_tokens)

    def _tell(self, look: Look) -> None:
        self.progress.advance(look.step, **{f"{p.name}_{p.unit}": p.score for p in look.points})
        if look.action:
            self.progress.warn(said(look))

    # -- budget -------------------------------------------------------------------------------

    def _hold(self, ctx: Context, began: float) -> Frontier:
        plan = self.session.plan
        assert plan.budget is not None
        between = Between(self._old, ctx.trainable(), plan.budget.blocks)
        chosen = lines.held(plan.budget, plan.stream, plan.guards, ctx.index)
        self.progress.phase(f"the step inside the budget after {ctx.task}", 0, "trials")
        steps, tried = find_step(
            between.move,
            chosen,
            self._score,
            self._before,
            confidence=plan.budget.confidence,
            seed=plan.seed,
            tick=self.progress.advance,
            blocks=between.blocks,
        )
        mix, mixes = shares(steps)
        self.progress.note(f"{ctx.task}: {100 * mix:.0f} % of the step is inside the budget")
        return Frontier(
            task=ctx.task,
            index=ctx.index,
            mix=mix,
            mixes=mixes,
            cut=between.cut,
            tried=tried,
            seconds=self._clock() - began,
        )

    def _add_cost(self, phase: str, task: str, seconds: float) -> None:
        if seconds:
            self.folder.add_phase(Phase(phase=phase, task=task, seconds=seconds))


def said(look: Look) -> str:
    """One sentence on what fell, and what was done about it."""
    fallen = [point for point in look.points if point.is_below]
    parts = []
    for point in fallen:
        shown: Literal["points", "relative"] = "points" if point.unit == "share" else "relative"
        fall = point.change if point.unit == "share" else float(np.expm1(-point.change))
        parts.append(f"{point.name!r} ({number(fall, shown)}{unit_of(shown)})")
    sentence = (
        f"Step {look.step} of {look.steps} of task {look.task!r}: {', '.join(parts)} fell below "
        f"{'its line' if len(parts) == 1 else 'their lines'}"
    )
    if look.action == "warn":
        return f"{sentence}."
    if look.effort is not None:
        most = ", which is the most" if look.effort >= LARGEST else ""
        return f"{sentence}; the methods now hold {look.effort:.3g} times as hard{most}."
    back = f" with the weights of step {look.back_to}" if look.action == "rollback" else ""
    return f"{sentence}; the task ends here{back}."


@contextmanager
def kept_random() -> Iterator[None]:
    """Puts the global random numbers back."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
