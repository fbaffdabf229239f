"""Learn tasks with model and data objects, without a recipe file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftConfig
from torch import nn

from keeptune.errors import RecipeError
from keeptune.folder import RunFolder, refuse_full
from keeptune.guard import Guard
from keeptune.method import Method
from keeptune.models import Loaded
from keeptune.progress import Silent
from keeptune.recipe import Recipe, check_trainer, parse_recipe
from keeptune.rows import read_rows
from keeptune.runs import OBJECT, finish, quiet, start
from keeptune.session import DEFAULT_LENGTH, Plan, open_session
from keeptune.stream import Task, TaskStream, class_names

Item = TypeVar("Item", Task, Guard)


@dataclass(frozen=True)
class Fitted:
    """What `fit` gives back.

    Attributes:
        model: After the last task, with its adapter if any.
        folder: The run folder.
    """

    model: nn.Module
    folder: RunFolder


def fit(
    model: nn.Module,
    tasks: Mapping[str, tuple[Any, Any]] | Sequence[Task],
    *,
    tokenizer: Any,
    out: str | Path,
    methods: Sequence[Method] = (),
    guards: Mapping[str, Any] | Sequence[Guard] = (),
    adapter: Any = None,
    **settings: Any,
) -> Fitted:
    """Learn tasks one after another with model and data objects, without a recipe.

    Example:
        fitted = fit(model, {"a": (train_a, test_a)}, tokenizer=tok, methods=[EWC()], out="runs/a")

    Args:
        model: A transformers model, causal or for sequence classification.
        tasks: Name to (training rows, evaluation rows): lists of dictionaries, data sets, paths;
            or `Task` objects, which also choose a score.
        tokenizer: The model's.
        out: A new folder for the run.
        methods: The strategy; empty is plain fine-tuning.
        guards: Name to evaluation rows that must not get worse, or `Guard` objects.
        adapter: A PEFT config; None trains all weights.
        **settings: `trainer`, `online`, `seed`, `max_length`, `eval_batch_size`,
            `checkpoint_minutes`, `privacy`, `watch`, `budget`, `progress`, each as in a recipe.

    Raises:
        KeeptuneError: Anything a user can mend.
    """
    allowed = {
        "trainer", "online", "seed", "max_length", "eval_batch_size", "checkpoint_minutes",
        "privacy", "watch", "budget", "progress",
    }  # fmt: skip
    if unknown := set(settings) - allowed:
        raise RecipeError(f"fit has no setting {sorted(unknown)[0]!r}. Allowed: {sorted(allowed)}.")
    progress = settings.pop("progress", None) or Silent()
    settings = {key: value for key, value in settings.items() if value is not None}
    out = Path(out)
    refuse_full(out)
    _refuse_names_for_objects(model, tokenizer, methods, adapter)
    stream, kept = TaskStream(_tasks(tasks)), _guards(guards)
    plan = _plan(model, tokenizer, stream, kept, methods, adapter, settings)
    recipe = _described(plan, settings)
    check_trainer(recipe)
    plan.watch, plan.budget = recipe.watch, recipe.budget
    with quiet():
        session = open_session(plan)
    folder = start(out, session, recipe)
    return Fitted(session.model, finish(session, folder, progress))


def _refuse_names_for_objects(model: Any, tokenizer: Any, methods: Any, adapter: Any) -> None:
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"fit: `model` is {_shown(model)}; give a loaded transformers model. Names of models "
            "are for recipes."
        )
    if not callable(tokenizer):
        raise RecipeError(
            f"fit: `tokenizer` is {_shown(tokenizer)}; give the model's, as "
            "AutoTokenizer.from_pretrained makes it."
        )
    if not isinstance(methods, Sequence) or isinstance(methods, str):
        raise RecipeError(f"fit: `methods` is {_shown(methods)}; give a list, as [EWC()].")
    for method in methods:
        if not isinstance(method, Method):
            raise RecipeError(
                f"fit: `methods` holds {_shown(method)}; give objects of methods, as "
                "keeptune.Replay(ratio=0.2)."
            )
    if adapter is not None and not isinstance(adapter, PeftConfig):
        raise RecipeError(
            f"fit: `adapter` is {_shown(adapter)}; give a PEFT config, as peft.LoraConfig(r=16), "
            "or None."
        )


def _tasks(given: Any) -> list[Task]:
    """Named pairs of rows, or `Task` objects, as tasks."""
    named = dict(given) if isinstance(given, Mapping) else {}
    for name, pair in named.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(name, str):
            raise RecipeError(
                f"fit: task {name!r} is {_shown(pair)}; give its name as text, and a pair of "
                "training rows and evaluation rows."
            )
    if named:
        return [Task(name, read_rows(a), read_rows(b)) for name, (a, b) in named.items()]
    return _all_of(Task, "tasks", given)


def _guards(given: Any) -> list[Guard]:
    """Named rows, or `Guard` objects, as guards."""
    if isinstance(given, Mapping):
        return [Guard(name, read_rows(rows)) for name, rows in given.items()]
    return _all_of(Guard, "guards", given)


def _all_of(kind: type[Item], what: str, given: Any) -> list[Item]:
    items = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for item in items:
        if not isinstance(item, kind):
            raise RecipeError(
                f"fit: `{what}` holds {_shown(item)}; give names with their rows, as a dictionary, "
                f"or {kind.__name__} objects."
            )
    return items


def _shown(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def _plan(
    model: nn.Module,
    tokenizer: Any,
    stream: TaskStream,
    guards: list[Guard],
    methods: Sequence[Method],
    adapter: Any,
    settings: dict[str, Any],
) -> Plan:
    is_classifier = stream[0].train.shape.value == "label"
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "")) or "in memory"
    plan = Plan(
        loaded=Loaded(model=model, tokenizer=tokenizer, name=name, source=OBJECT, identity=""),
        stream=stream,
        guards=guards,
        methods=list(methods),
        kind="classification" if is_classifier else "causal_lm",
        adapter=adapter,
        labels=class_names([], list(stream)) if is_classifier else [],
        settings=dict(settings.get("trainer", {})),
        max_length=settings.get("max_length") or DEFAULT_LENGTH,
    )
    for key in ("online", "seed", "eval_batch_size", "checkpoint_minutes", "privacy"):
        if key in settings:
            setattr(plan, key, settings[key])
    return plan


def _described(plan: Plan, settings: dict[str, Any]) -> Recipe:
    """The recipe that says what `fit` was given, for the run folder."""
    return parse_recipe(
        {
            **settings,
            "model": plan.loaded.name,
            "kind": plan.kind,
            "adapter": {"kind": plan.adapter.peft_type.value.lower()} if plan.adapter else "none",
            "labels": plan.labels,
            "tasks": [
                {"name": t.name, "train": t.train.source, "eval": t.eval.source, "score": t.score}
                for t in plan.stream
            ],
            "methods": [{m.name(): m.model_dump(mode="json")} for m in plan.methods],
        }
    )
