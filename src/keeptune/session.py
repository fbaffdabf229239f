"""Everything a run needs, loaded and checked: model, adapter, tokens, guards, methods, trainer."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from keeptune import registry, steering, tokens
from keeptune.chain import Chain
from keeptune.dressing import adapter_config, dress
from keeptune.errors import DataError, MethodError
from keeptune.evaluate import Scored, score_rows
from keeptune.guard import Guard
from keeptune.inputs import read_sources
from keeptune.likelihood import context_length
from keeptune.method import Context, Method
from keeptune.models import Loaded, load
from keeptune.privacy import Privacy, refusal
from keeptune.reading import base_model
from keeptune.recipe import Recipe
from keeptune.recipe_parts import BudgetRecipe, WatchRecipe
from keeptune.records import DataInfo, MethodInfo
from keeptune.rows import Rows, leaked
from keeptune.stream import Task, TaskStream, class_names, learned_by_heart
from keeptune.trainers import ClassifierTrainer, TextTrainer, build_trainer

DEFAULT_LENGTH = 1024


@dataclass
class Plan:
    """What is to be run, before any model is changed.

    Attributes:
        kind: "causal_lm" or "classification".
        adapter: A PEFT config, or None to train all weights.
        labels: For classification, the names of the classes in order.
        settings: Keys for the trainer's config.
        online: Whether each task is a stream seen once.
    """

    loaded: Loaded
    stream: TaskStream
    guards: list[Guard]
    methods: list[Method]
    kind: str = "causal_lm"
    adapter: Any = None
    labels: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    online: bool = False
    seed: int = 0
    max_length: int = DEFAULT_LENGTH
    eval_batch_size: int = 16
    checkpoint_minutes: float = 10.0
    privacy: Privacy = "open"
    watch: WatchRecipe | None = None
    budget: BudgetRecipe | None = None


@dataclass
class Session:
    """A plan with its model dressed and its rows tokenised.

    Attributes:
        caches: `use_cache` of the model's config, which transformers switches off for training.
    """

    plan: Plan
    model: nn.Module
    tokenised: list[tokens.Tokenised]
    chain: Chain
    trainer: TextTrainer | ClassifierTrainer
    caches: bool | None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.plan.loaded.tokenizer

    def context(self, index: int) -> Context:
        """A context for verbs outside training."""
        task = self.plan.stream[index]
        return Context(
            model=self.model,
            task=task.name,
            index=index,
            dataset=self.tokenised[index].dataset,
            collate=tokens.collate(self.tokenizer),
            seed=self.plan.seed,
            tokenizer=self.tokenizer,
            folder=self.trainer.files,
        )

    def score(self, rows: Rows, score: str, **how: Any) -> Scored:
        """Score the model as it stands, as it is trained; `how` is of `evaluate.score_rows`."""
        own = {"max_length": self.plan.max_length, "labels": self.plan.labels}
        how |= {"batch_size": self.plan.eval_batch_size, **own}
        with self.trainer.computing():
            return score_rows(self.model, self.tokenizer, rows, score, **how)

    def data_infos(self) -> list[DataInfo]:
        """The tasks as run.json lists them."""
        tasks = zip(self.plan.stream, self.tokenised, strict=True)
        return [_task_info(task, tokenised) for task, tokenised in tasks]

    def guard_infos(self) -> list[DataInfo]:
        """The guards as run.json lists them."""
        return [
            DataInfo(
                name=g.name,
                score=g.score,
                unit=g.unit,
                eval_rows=len(g.rows) if g.rows else 0,
                eval_sha256=g.rows.sha256 if g.rows else "",
                transfer_of=g.transfer_of,
                leaked_rows=learned_by_heart(g.rows, self.plan.stream) if g.rows else 0,
            )
            for g in self.plan.guards
        ]

    def method_infos(self) -> list[MethodInfo]:
        """The strategy as run.json lists it."""
        return [
            MethodInfo(
                name=m.name(),
                settings=m.model_dump(mode="json"),
                is_neutral=m.is_neutral(),
                proof=m.proof,
                active_from=m.active_from,
            )
            for m in self.chain
        ]

    def model_info(self) -> dict[str, Any]:
        """The model as run.json describes it."""
        every = list(self.model.parameters())
        adapter = self.plan.adapter
        return {
            "name": self.plan.loaded.name,
            "source": self.plan.loaded.source,
            "identity": self.plan.loaded.identity,
            "parameters": sum(p.numel() for p in every),
            "trainable": sum(p.numel() for p in every if p.requires_grad),
            "adapter": adapter.peft_type.value.lower() if adapter else "none",
            "kind": self.plan.kind,
        }


def _task_info(task: Task, tokenised: tokens.Tokenised) -> DataInfo:
    return DataInfo(
        name=task.name,
        score=task.score,
        unit=task.unit,
        train_rows=len(tokenised.dataset),
        train_tokens=tokenised.tokens,
        train_sha256=task.train.sha256,
        eval_rows=len(task.eval),
        eval_sha256=task.eval.sha256,
        recall=task.recall,
        leaked_rows=0 if task.recall else leaked(task.train, task.eval),
        truncated_rows=tokenised.truncated,
        dropped_rows=tokenised.dropped,
    )


# -- from a recipe --------------------------------------------------------------------------------


def read_plan(recipe: Recipe) -> Plan:
    """Load and check everything a recipe names.

    Raises:
        KeeptuneError: With every problem found, one line each.
    """
    tasks, guards = read_sources(recipe)
    labels = class_names(recipe.labels, tasks) if recipe.kind == "classification" else []
    loaded = load(recipe.model, labels=labels, trust_remote_code=recipe.trust_remote_code)
    return Plan(
        loaded=loaded,
        stream=TaskStream(tasks),
        guards=guards,
        methods=[registry.build(name, settings) for name, settings in recipe.strategy],
        kind=recipe.kind,
        adapter=adapter_config(recipe),
        labels=labels,
        settings=dict(recipe.trainer),
        online=recipe.online,
        seed=recipe.seed,
        max_length=context_length(loaded.model, recipe.max_length or DEFAULT_LENGTH),
        eval_batch_size=recipe.eval_batch_size,
        checkpoint_minutes=recipe.checkpoint_minutes,
        privacy=recipe.privacy,
        watch=recipe.watch,
        budget=recipe.budget,
    )


# -- dressed for training -------------------------------------------------------------------------


def open_session(plan: Plan) -> Session:
    """Put the adapter on, tokenise the rows and build the trainer; nothing is written yet.

    Raises:
        KeeptuneError: Rows that cannot be tokenised, or methods that do not fit.
    """
    if said := refusal(plan.methods, plan.privacy):
        raise MethodError(said)
    steering.refuse(plan)
    collate = tokens.collate(plan.loaded.tokenizer)
    tokenised = [_tokenised(plan, task) for task in plan.stream]
    _check_questions(plan)
    model = dress(plan.loaded.model, plan.adapter, plan.seed)
    caches = getattr(base_model(model).config, "use_cache", None)
    # The trainer makes its output folder at once, but nothing may be written before all is checked.
    # transformers fills in what `fsdp_config` leaves out.
    settings = {
        **copy.deepcopy(plan.settings),
        "seed": plan.seed,
        "output_dir": tempfile.gettempdir(),
    }
    trainer = build_trainer(
        plan.kind,
        model,
        plan.loaded.tokenizer,
        tokenised[0].dataset,
        plan.methods,
        settings,
        collate,
        online=plan.online,
    )
    return Session(plan, model, tokenised, trainer.strategy, trainer, caches)


def _tokenised(plan: Plan, task: Task) -> tokens.Tokenised:
    tokenizer = plan.loaded.tokenizer
    with _about(f"task {task.name!r}"):
        return tokens.tokenise(
            task.train, tokenizer, max_length=plan.max_length, labels=plan.labels
        )


def _check_questions(plan: Plan) -> None:
    """One question of each, or a template that is missing would be noticed after training only."""
    parts = [(f"task {task.name!r}", task.eval) for task in plan.stream]
    parts += [(f"guard {g.name!r}", g.rows) for g in plan.guards if g.rows is not None]
    for name, rows in parts:
        with _about(f"{name}, evaluation rows"):
            tokens.prompt_ids(rows.rows[0], rows.shape, plan.loaded.tokenizer)


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Say of which rows something is wrong."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
