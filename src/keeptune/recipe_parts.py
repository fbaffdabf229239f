"""The parts of a recipe: adapter, task, guard and method entries as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _text(value: Any) -> Any:
    """A whole number is a fine name or label: `name: 7`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]


class Part(BaseModel):
    """Base of all parts: unknown keys, infinities and wrong types are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Adapter(Part):
    """A PEFT adapter; the base weights stay as they are.

    What is left out takes, for LoRA, the defaults named here, and for any other kind PEFT's own.
    """

    kind: str = "lora"
    """Any PEFT method in lower case: lora, ia3, loha, lokr, randlora, vera, ..."""
    rank: int | None = Field(None, ge=1, le=1024, json_schema_extra={"default": 16})
    """Rank of the update; LoRA's default is 16."""
    alpha: float | None = Field(None, gt=0)
    """Scale of the update times rank; LoRA's default is twice the rank."""
    dropout: float | None = Field(None, ge=0, lt=1, json_schema_extra={"default": 0.0})
    """Share of the adapter's inputs dropped while training; LoRA's default is 0."""
    target_modules: str | list[str] | None = Field(
        None, json_schema_extra={"default": "all-linear"}
    )
    """Module names, a regular expression, or all-linear, which is LoRA's default."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of the layers that get an adapter (PEFT's layers_to_transform); default: all."""
    options: dict[str, Any] = {}
    """Any other key of the PEFT config of this kind, as it is; first values that change the \
model's own weights (PiSSA and its like) are refused."""

    @model_validator(mode="before")
    @classmethod
    def _lora_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("kind", "lora") != "lora":
            return values
        filled = {"rank": 16, "dropout": 0.0, "target_modules": "all-linear"}
        filled |= {key: value for key, value in values.items() if value is not None}
        if isinstance(filled["rank"], int) and filled["rank"] > 0:
            filled.setdefault("alpha", 2.0 * filled["rank"])
        return filled


class TaskRecipe(Part):
    """One task: named training and evaluation data with a score."""

    name: Text
    """How the task is called in the report; unique."""
    train: Text
    """Training rows: a .jsonl, .json, .csv or .parquet file, or a hub data set's id."""
    eval: Text
    """Evaluation rows, from the same kinds of source; never trained on."""
    score: str | None = None
    """exact_match, greedy_match, choice, token_f1, rouge_l, perplexity, accuracy or \
package.module:function; default: by the rows' shape."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest generated answer, in tokens; default: the expected answer's length plus 8."""
    recall: bool = False
    """The evaluation rows are training rows on purpose: facts to be known by heart."""


class TextGuard(Part):
    """A guard on a text file: the model's perplexity on it."""

    name: Text
    """How the guard is called in the report; unique."""
    text: Text
    """A .txt file, or rows with a `text` column."""


class RowsGuard(Part):
    """A guard on evaluation rows of one's own."""

    name: Text
    """How the guard is called in the report; unique."""
    eval: Text
    """Evaluation rows, as for a task."""
    score: str | None = None
    """As for a task."""
    max_new_tokens: int | None = Field(None, ge=1)
    """As for a task."""
    transfer_of: str | None = None
    """The task whose facts these rows ask in another way; shown, but not part of what was kept."""


class LmEvalGuard(Part):
    """Guards by lm-eval, one for each of its tasks; needs `pip install 'keeptune[eval]'`."""

    lm_eval: list[Text] = Field(min_length=1)
    """Names of lm-eval tasks."""
    limit: int | None = Field(None, ge=1)
    """Examples per lm-eval task; default: all."""
    include_path: str | None = None
    """Folder with lm-eval task YAML of one's own."""


def _guard_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "guard-name"
    for key in ("lm_eval", "text", "eval"):
        if (isinstance(value, dict) and key in value) or hasattr(value, key):
            return f"guard-{key}"
    return None


GuardRecipe = Annotated[
    Annotated[str, Tag("guard-name")]
    | Annotated[TextGuard, Tag("guard-text")]
    | Annotated[RowsGuard, Tag("guard-eval")]
    | Annotated[LmEvalGuard, Tag("guard-lm_eval")],
    Discriminator(_guard_kind),
]


def _adapter_kind(value: Any) -> str:
    return "adapter-none" if isinstance(value, str) else "adapter-peft"


AdapterRecipe = Annotated[
    Annotated[Literal["none"], Tag("adapter-none")] | Annotated[Adapter, Tag("adapter-peft")],
    Discriminator(_adapter_kind),
]


def _method(value: Any) -> Any:
    """`ewc`, `{ewc: }` and `{ewc: {}}` mean the same: every setting at its default."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict) and len(value) == 1:
        return {name: {} if settings is None else settings for name, settings in value.items()}
    if isinstance(value, dict) and value:
        name = next(iter(value))
        raise PydanticCustomError(
            "said",
            "{field} has the keys {keys}, but one entry is one method; indent the settings below "
            "the method's name, or write {shape}.",
            {"keys": ", ".join(value), "shape": f"{{{name}: {{setting: value}}}}"},
        )
    return value


MethodRecipe = Annotated[
    dict[str, dict[str, Any]],
    BeforeValidator(_method),
    Field(min_length=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "minProperties": 1,
                    "maxProperties": 1,
                    "additionalProperties": {"type": ["object", "null"]},
                },
            ]
        }
    ),
]


Limit = Annotated[float, Field(ge=0)]


class WatchRecipe(Part):
    """Small fixed samples of guards and tasks, scored again and again while a task is learned."""

    every: int = Field(50, ge=1)
    """Optimizer steps between two looks, if there is time."""
    items: int = Field(64, ge=8)
    """Examples of each guard and each task, drawn once from its evaluation rows."""
    guards: list[Text] | None = None
    """Guards to look at; default: all that have rows."""
    tasks: Literal["past", "none"] = "past"
    """Look at the tasks learned before, or at no earlier task."""
    max_overhead: float = Field(0.1, gt=0, le=1)
    """Largest share of the time of training that looks may take; 1 never leaves one out."""
    on_drop: Literal["warn", "stop", "rollback", "strengthen"] = "warn"
    """When something falls below its line: say so, end the task, or end it at the last weights \
that were seen inside all lines; strengthen: let the methods hold as hard as keeps all inside."""
    lines: dict[Text, Limit] = {}
    """Points that a guard, or past_tasks, may fall while a task is learned (for a perplexity, its \
relative rise); default: 0, so that any sure loss counts."""
    confidence: float = Field(0.95, ge=0.5, lt=1)
    """How sure a fall must be, over all looks of a task together."""


class BudgetRecipe(Part):
    """What may be lost; after each task the largest step is taken that keeps inside.

    Any further key is the name of a guard, and its value the points that it may fall in all (for a
    perplexity, its relative rise).
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Limit] = Field(init=False)

    past_tasks: Limit | None = None
    """Points that the tasks learned before may fall, all their rows together."""
    blocks: int = Field(1, ge=1, le=100)
    """Blocks of layers, each of which may take a larger step than all together can."""
    confidence: float = Field(0.95, ge=0.5, lt=1)
    """How sure it must be that the budget is kept."""

    @model_validator(mode="after")
    def _names_something(self) -> BudgetRecipe:
        if self.past_tasks is None and not self.guards:
            raise PydanticCustomError(
                "said",
                "{field} says nothing that may be lost; name a guard or past_tasks: "
                "{facts: 1.0, past_tasks: 2.0}.",
            )
        return self

    @property
    def guards(self) -> dict[str, float]:
        """What each guard may lose."""
        return dict(self.__pydantic_extra__ or {})


def names_of(part: Any) -> list[str]:
    """The names under which a task, guard or method appears in results."""
    if isinstance(part, LmEvalGuard):
        return part.lm_eval
    if isinstance(part, dict):
        return list(part)
    return [part if isinstance(part, str) else part.name]
