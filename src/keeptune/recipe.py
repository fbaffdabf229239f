"""The recipe: what is trained, on which tasks, with which methods; one YAML file, all checked.

Relative paths in a recipe start from the current directory, as with other trainers' configs.
Whether a method, a score, a trainer key or an adapter exists is asked of those who know, in
`recipe_checks`; this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from keeptune import yamltext
from keeptune.errors import RecipeError
from keeptune.recipe_checks import (
    check_adapter,
    check_methods,
    check_recipe,
    check_scores,
    check_trainer,
)
from keeptune.recipe_errors import sentences
from keeptune.recipe_parts import (
    Adapter,
    AdapterRecipe,
    BudgetRecipe,
    GuardRecipe,
    LmEvalGuard,
    MethodRecipe,
    Part,
    RowsGuard,
    TaskRecipe,
    Text,
    TextGuard,
    WatchRecipe,
    names_of,
)
from keeptune.yamltext import Document

__all__ = [
    "FREE",
    "Adapter",
    "BudgetRecipe",
    "GuardRecipe",
    "LmEvalGuard",
    "Recipe",
    "RowsGuard",
    "TaskRecipe",
    "TextGuard",
    "WatchRecipe",
    "check_adapter",
    "check_methods",
    "check_recipe",
    "check_scores",
    "check_trainer",
    "dump",
    "load_recipe",
    "parse_recipe",
    "resolve",
    "schema",
]

# Fields that say where a run goes and how fast, never what it learns.
FREE = ("out", "checkpoint_minutes", "eval_batch_size")

NOWHERE = Document()


class Recipe(Part):
    """A whole run: one model, a stream of tasks, guards, and a strategy of methods."""

    model: Text
    """Hub id, folder, .gguf file, or demo."""
    kind: Literal["causal_lm", "classification"] = "causal_lm"
    """causal_lm answers in text; classification puts a label on a text."""
    labels: list[Text] = Field([])
    """For classification: every label, those of tasks yet to come too; default: those found."""
    adapter: AdapterRecipe = Field(default_factory=Adapter)
    """A PEFT adapter, or none to train all weights."""
    tasks: list[TaskRecipe] = Field(min_length=1)
    """The stream: learned one after another, in this order."""
    guards: list[GuardRecipe] = Field([])
    """Abilities outside the stream that must not drop: names of ready-made ones, or own data."""
    methods: list[MethodRecipe] = Field([])
    """The strategy: methods that run together, each a name or {name: {setting: value}}."""
    trainer: dict[str, Any] = Field({})
    """Goes as it is to TRL's SFTConfig (for classification: transformers.TrainingArguments)."""
    online: bool = False
    """Each task is a stream seen once: its rows are learned in their order, in one pass."""
    validation: float | None = Field(None, gt=0, lt=1)
    """Share of each task's training rows held out and scored in place of its evaluation rows, and \
of each guard's rows used: for choosing settings. The same for all seeds."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Every random choice of the run follows from it."""
    out: Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)] | None = None
    """The run folder; default: runs/ and the recipe's file name."""
    eval_batch_size: int = Field(16, ge=1)
    """Rows scored at a time; changes speed and memory only."""
    max_length: int | None = Field(None, ge=8)
    """Longest row in tokens, longer ones are cut; default: 1024 or the model's own limit."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """Minutes between two saved states inside a task; 0 saves after every step."""
    privacy: Literal["open", "strict"] = "open"
    """strict: no method may keep training rows, and results are kept without any text."""
    watch: WatchRecipe | None = None
    """Look at guards and earlier tasks while a task is learned, and act when they fall."""
    budget: BudgetRecipe | None = None
    """What may be lost: after each task only so large a step is taken."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for models whose code you have read."""

    _document: Document = PrivateAttr(NOWHERE)

    @field_validator("tasks", "guards", "methods")
    @classmethod
    def _each_once(cls, parts: list[Any]) -> list[Any]:
        seen: dict[str, int] = {}
        for index, part in enumerate(parts):
            for name in names_of(part):
                if name in seen:
                    raise PydanticCustomError(
                        "said",
                        "{field} has the name {name}, which position {first} of the list has "
                        "already; names must differ.",
                        {"name": repr(name), "first": seen[name], "at": (index,)},
                    )
                seen[name] = index
        return parts

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        tasks = {task.name for task in self.tasks}
        for index, guard in enumerate(self.guards):
            for name in tasks.intersection(names_of(guard)):
                raise PydanticCustomError(
                    "said",
                    "{field} is called {name}, like a task; give the guard another name.",
                    {"name": repr(name), "at": ("guards", index)},
                )
        if self.labels and self.kind != "classification":
            raise PydanticCustomError(
                "said",
                "{field} is only used with `kind: classification`, but kind is {kind}; "
                "remove the labels or change the kind.",
                {"kind": self.kind, "at": ("labels",)},
            )
        return self

    @property
    def strategy(self) -> list[tuple[str, dict[str, Any]]]:
        """The methods as (name, settings), in order."""
        return [item for method in self.methods for item in method.items()]

    def where(self, *path: str | int) -> str:
        """`recipe.yaml:4: tasks.0.score` for messages about one value of this recipe."""
        return f"{self._document.where(path)}: {'.'.join(map(str, path))}"


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, base: Path | None = None
) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: The YAML file.
        overrides: Dotted assignments, applied in order: "trainer.learning_rate=1e-4",
            "tasks.0.score=choice", "methods.1.ewc.strength=10".
        base: Folder from which relative paths in the recipe start; default: the current one.

    Raises:
        RecipeError: With every problem of shape at once, one line each: file, line, field, what
            was got and what is allowed.
    """
    name = str(path)
    try:
        text = Path(path).read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise RecipeError(f"{name}: there is no such recipe file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name}: not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror or error}.") from error
    document = yamltext.read(text, name)
    for override in overrides:
        document = document.override(override)
    recipe = parse_recipe(document.values(), document)
    return recipe if base is None else _rebased(recipe, base)


def parse_recipe(values: Mapping[str, Any], document: Document = NOWHERE) -> Recipe:
    """Check a recipe given as plain values.

    Args:
        values: What the YAML file would hold.
        document: Where they were written, for messages.

    Raises:
        RecipeError: As `load_recipe`.
    """
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(sentences(error, Recipe, document)) from error
    recipe._document = document
    return recipe


def resolve(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values (what JSON can hold) with every default filled in."""
    return recipe.model_dump(mode="json")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in; `load_recipe` reads it back unchanged."""
    return yamltext.write(resolve(recipe))


def schema() -> dict[str, Any]:
    """JSON schema of the recipe, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "keeptune recipe",
    }


def _rebased(recipe: Recipe, base: Path) -> Recipe:
    """Relative paths joined to `base` where that exists; hub ids and names stay as they are."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            paths = ("model", "train", "eval", "text", "include_path", "out", "tasks", "guards")
            return {key: moved(item) if key in paths else item for key, item in value.items()}
        if isinstance(value, list):
            return [moved(item) if isinstance(item, dict) else item for item in value]
        return str(base / value) if isinstance(value, str) and (base / value).exists() else value

    return parse_recipe({**moved(resolve(recipe))}, recipe._document)


def in_one_process(recipe: Recipe) -> Recipe:
    """The recipe for one process: without FSDP, which spreads a model and changes no answer."""
    kept = {k: v for k, v in recipe.trainer.items() if k not in ("fsdp", "fsdp_config")}
    return recipe.model_copy(update={"trainer": kept})
