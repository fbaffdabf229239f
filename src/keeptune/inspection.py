"""What a recipe would do, and everything that is wrong with it, without training or writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from keeptune.chain import Chain
from keeptune.errors import KeeptuneError, ModelError
from keeptune.method import Method
from keeptune.recipe import Recipe, in_one_process
from keeptune.runs import quiet
from keeptune.session import Session, open_session, read_plan
from keeptune.sizing import DEVICES, Sizer, measure_speed

GIB = 2**30


@dataclass
class Inspection:
    """What a recipe would do.

    Attributes:
        lines: What would be trained, in words.
        problems: Every problem found; empty when the recipe can run.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect(recipe: Recipe) -> Inspection:
    """Load everything a recipe names, tokenise its rows, and say what it would do."""
    found = Inspection()
    try:
        with quiet():
            session = open_session(read_plan(in_one_process(recipe)))
    except KeeptuneError as error:
        found.problems = str(error).splitlines()
        return found
    info = session.model_info()
    found.lines = [
        f"model     {info['name']}: {info['parameters']:,} weights, "
        f"{info['trainable']:,} of them trained ({info['adapter']})",
        f"strategy  {session.chain.name}",
    ]
    try:
        found.lines += sizing_lines(
            sizer_of(session), list(session.chain), len(session.tokenised) - 1
        )
    except ModelError as error:
        found.lines.append(f"memory    {error}")
    for task in session.data_infos():
        cut = f", {task.truncated_rows} cut to {session.plan.max_length}" * bool(
            task.truncated_rows
        )
        cut += f", {task.dropped_rows} left out" * bool(task.dropped_rows)
        found.lines.append(
            f"task      {task.name}: {task.train_rows:,} rows, {task.train_tokens:,} tokens{cut}; "
            f"{task.eval_rows:,} to evaluate by {task.score}"
        )
    found.lines += [
        f"guard     {g.name}: {g.eval_rows:,} to evaluate by {g.score}"
        for g in session.guard_infos()
    ]
    found.lines.append(f"export    {exports(session.chain)}")
    found.lines += [f"warning   {warning}" for warning in session.plan.stream.leaks()]
    return found


def exports(chain: Chain) -> str:
    """What `keeptune export` can write of a run with these methods, in words."""
    away = [method.name() for method in chain if method.served == "keeptune"]
    if away:
        return f"none: answers of {' + '.join(away)} need keeptune beside the model"
    if any(method.served == "per task" for method in chain):
        return "one model for each task"
    return "one model for all tasks"


def sizer_of(session: Session) -> Sizer:
    """What sizes a session's runs."""
    plan = session.plan
    config = plan.loaded.model.config
    return Sizer.of(config, plan.adapter, plan.settings, session.tokenised, kind=plan.kind)


def sizing_lines(sizer: Sizer, methods: Sequence[Method], past: int) -> list[str]:
    """What a run needs while its last task is learned, in words.

    Args:
        sizer: Of the model and its trainer.
        methods: The strategy.
        past: Tasks before the last one.
    """
    found, plain = sizer.need(methods, past), sizer.need([], past)
    speed = measure_speed(sizer.case)
    seconds, bare = found.seconds(speed), plain.seconds(speed)
    batch = sizer.case.batch
    fsdp = " ".join(f"{found.fsdp(n) / GIB:8.2f}" for n in DEVICES)
    ddp = " ".join(f"{found.ddp(n) / GIB:8.2f}" for n in DEVICES)
    return [
        f"memory    about {gib(found.memory)}: {gib(found.weights)} weights, "
        f"{gib(found.optimizer)} optimizer, {gib(found.peak)} gradients and activations of "
        f"{batch.rows} rows of {batch.length} tokens, {gib(found.spread + found.whole)} methods",
        f"          on a CPU up to {gib(found.resident)}, as freed pieces stay with the process",
        f"time      about {seconds:.2g} s a step on this machine, {seconds / bare:.2f} × plain; "
        f"for each new row {found.rows:g} are trained on",
        f"disk      about {gib(found.state)} in a saved state",
        f"devices   {' '.join(f'{n:8}' for n in DEVICES)}   (GiB on each)",
        f"  DDP     {ddp}",
        f"  FSDP2   {fsdp}",
    ]


def gib(size: float) -> str:
    """Bytes as GiB, or as MiB where there are few."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 2 else f"{size / 2**20:.0f} MiB"
