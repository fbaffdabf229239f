"""What a recipe would do, and everything that is wrong with it, without training or writing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from keeptune.chain import Chain
from keeptune.errors import KeeptuneError
from keeptune.recipe import Recipe
from keeptune.runs import quiet
from keeptune.session import open_session, read_plan


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
            session = open_session(read_plan(recipe))
    except KeeptuneError as error:
        found.problems = str(error).splitlines()
        return found
    info = session.model_info()
    found.lines = [
        f"model     {info['name']}: {info['parameters']:,} weights, "
        f"{info['trainable']:,} of them trained ({info['adapter']})",
        f"strategy  {session.chain.name}",
        f"memory    about {_memory(info) / 2**30:.1f} GiB for weights, gradients and optimizer, "
        "and what one batch needs on top",
    ]
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


def _memory(info: dict[str, Any]) -> int:
    # float32 weights, one gradient and Adam's two moments for each trained one.
    return 4 * int(info["parameters"]) + 12 * int(info["trainable"])
