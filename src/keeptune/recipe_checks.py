"""What only the libraries behind a recipe know: do its methods, trainer keys and scores exist?

Each function imports what it asks, so that reading a recipe stays fast.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from keeptune.errors import KeeptuneError, RecipeError, suggest

if TYPE_CHECKING:
    from keeptune.recipe import Adapter, Recipe

# Trainer keys that keeptune sets itself, by pattern: what to do instead.
_OWNED = {
    "output_dir": "use `out` at the top of the recipe",
    "seed|data_seed": "use `seed` at the top of the recipe",
    "max_length|truncation_mode": "use `max_length` at the top of the recipe",
    "trust_remote_code": "use `trust_remote_code` at the top of the recipe",
    "per_device_eval_batch_size": "use `eval_batch_size` at the top of the recipe",
    r"save_\w+|enable_jit_checkpoint": "use `checkpoint_minutes` at the top of the recipe",
    r"eval_\w+|do_eval|batch_eval_metrics|prediction_loss_only|include_for_metrics|"
    r"\w+_full_eval|load_best_model_at_end|metric_for_best_model|greater_is_better|do_predict": (
        "keeptune evaluates after each task on the tasks' `eval` rows; leave it out"
    ),
    "resume_from_checkpoint|ignore_data_skip|restore_callback_states_from_checkpoint|do_train": (
        "continue a run with `keeptune run RECIPE --resume`"
    ),
    r"push_to_hub|hub_\w+": "upload the run folder yourself once you have read its report",
    "model_init_kwargs": "keeptune loads the model; leave it out",
    r"dataset_\w+|completion_only_loss|assistant_only_loss|chat_template_path|eos_token|pad_token|"
    r"packing|packing_strategy|padding_free|shuffle_dataset|remove_unused_columns|label_names|"
    "length_column_name": "keeptune turns rows into tokens itself; leave it out",
    "deepspeed": "DeepSpeed hides the gradients that methods need; use `fsdp` instead",
}
# Values that the trainer would stumble over in its first step only.
_LEAST = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0,
    "num_train_epochs": 0, "weight_decay": 0, "warmup_steps": 0, "max_grad_norm": 0,
}  # fmt: skip
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
}
_PEFT_NAMES = {
    "rank": ("r",),
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout",),
    "target_modules": ("target_modules",),
    "layers": ("layers_to_transform",),
}


def check_recipe(recipe: Recipe) -> None:
    """Check everything that the libraries know about a recipe.

    Raises:
        RecipeError: With all problems found, one line each.
    """
    _raise(line for find in _FINDERS for line in find(recipe))


def check_methods(recipe: Recipe) -> None:
    """Check that every method exists and that its settings are in range.

    Raises:
        RecipeError: With all problems found, one line each.
    """
    _raise(_method_problems(recipe))


def check_trainer(recipe: Recipe) -> None:
    """Check that every `trainer` key exists, is the user's to set, and has a value of its type.

    Raises:
        RecipeError: With all problems found, one line each.
    """
    _raise(_trainer_problems(recipe))


def check_scores(recipe: Recipe) -> None:
    """Check that every score exists.

    Raises:
        RecipeError: With all problems found, one line each.
    """
    _raise(_score_problems(recipe))


def check_adapter(recipe: Recipe) -> None:
    """Check that PEFT knows the adapter's kind and each of its settings.

    Raises:
        RecipeError: With all problems found, one line each.
    """
    _raise(_adapter_problems(recipe))


def peft_settings(adapter: Adapter) -> tuple[type[Any], dict[str, Any]]:
    """The PEFT config class for an adapter, and the arguments to build it with.

    Args:
        adapter: The recipe's adapter; its `task_type` is left to the caller.

    Raises:
        RecipeError: PEFT has no such kind, or the kind no such setting.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {
        str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if adapter.kind not in kinds:
        raise RecipeError(
            f"kind {adapter.kind!r} is no PEFT adapter. {suggest(adapter.kind, kinds)}"
        )
    config = kinds[adapter.kind]
    settings = _renamed(adapter, config)
    if adapter.layers is not None and not isinstance(adapter.target_modules, list):
        raise RecipeError(
            "layers needs target_modules as a list of module names, such as [q_proj, v_proj], "
            f"got {adapter.target_modules!r}."
        )
    try:
        config(**settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"options are refused by PEFT: {error}") from error
    return config, settings


def _renamed(adapter: Adapter, config: type[Any]) -> dict[str, Any]:
    """An adapter's settings under the names that its PEFT config has for them."""
    known = {field.name for field in dataclasses.fields(config) if field.init}
    settings = dict(adapter.options)
    for name in settings:
        if name not in known:
            raise RecipeError(
                f"options has {name!r}, which {config.__name__} does not know. "
                f"{suggest(name, known)}"
            )
    for ours, theirs in _PEFT_NAMES.items():
        value = getattr(adapter, ours)
        name = next((name for name in theirs if name in known), "")
        if value is not None and not name:
            raise RecipeError(f"{ours} means nothing to kind {adapter.kind!r}; leave it out.")
        if name in adapter.options:
            raise RecipeError(f"options has {name!r}; write it as adapter.{ours} instead.")
        if value is not None:
            settings[name] = value
    return settings


def _raise(problems: Iterator[str]) -> None:
    lines = list(problems)
    if lines:
        raise RecipeError("\n".join(lines))


def _method_problems(recipe: Recipe) -> Iterator[str]:
    from keeptune import privacy, registry
    from keeptune.chain import Chain

    built = []
    for index, (name, settings) in enumerate(recipe.strategy):
        try:
            built.append(registry.build(name, settings))
        except KeeptuneError as error:
            named = [key for key in settings if f".{key}" in str(error)][:1]
            yield f"{recipe.where('methods', index, name, *named)}: {error}"
    try:
        Chain(built)
    except KeeptuneError as error:
        yield f"{recipe.where('methods')}: {error}"
    if said := privacy.refusal(built, recipe.privacy):
        yield f"{recipe.where('methods')}: {said}"


def _trainer_problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.trainer:
        return
    from keeptune.demands import ONLINE

    hints = _trainer_types(recipe.kind)
    for key, value in recipe.trainer.items():
        where = recipe.where("trainer", key)
        instead = next((say for keys, say in _OWNED.items() if re.fullmatch(keys, key)), None)
        if instead is not None:
            yield f"{where} is not yours to set: {instead}."
        elif key not in hints:
            free = [k for k in hints if not any(re.fullmatch(owned, k) for owned in _OWNED)]
            yield f"{where} is no key of the trainer's config. {_nearest(key, free)}"
        elif (wanted := _mismatch(hints[key], value)) is not None:
            yield f"{where} must be {wanted}, got {value!r}."
        elif key in _LEAST and value is not None and value < _LEAST[key]:
            yield f"{where} must be at least {_LEAST[key]}, got {value!r}."
        elif recipe.online and value != ONLINE.get(key, value):
            yield (
                f"{where} is {value!r}, but with `online: true` each row is learned once, in its "
                f"order, which needs {ONLINE[key]!r}. Leave it out, or leave `online` out."
            )


def _trainer_types(kind: str) -> dict[str, Any]:
    """Type of each argument of the config class that `trainer` is passed to."""
    import transformers
    import trl

    config = transformers.TrainingArguments if kind == "classification" else trl.SFTConfig
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config) if f.init}


def _mismatch(hint: Any, value: Any) -> str | None:
    """What a value should have been, where its type is one of bool, int and float (or None)."""
    types = [t for t in (typing.get_args(hint) or (hint,)) if t is not type(None)]
    if len(types) != 1 or types[0] not in _KINDS or (value is None and hint is not types[0]):
        return None
    wanted, allowed = _KINDS[types[0]]
    right = isinstance(value, allowed) and isinstance(value, bool) == (types[0] is bool)
    if right and not math.isfinite(value):
        return "a finite number"
    return None if right else wanted


def _nearest(key: str, allowed: list[str]) -> str:
    hint = suggest(key, allowed)
    return hint if hint.startswith("Did") else "See the documentation of TRL's SFTConfig."


def _score_problems(recipe: Recipe) -> Iterator[str]:
    from keeptune.scorers import SHAPES

    parts: list[tuple[str, int, Any]] = [("tasks", i, task) for i, task in enumerate(recipe.tasks)]
    parts += [("guards", i, guard) for i, guard in enumerate(recipe.guards)]
    for kind, index, part in parts:
        score = getattr(part, "score", None)
        if score is not None and ":" not in score and score not in SHAPES:
            yield (
                f"{recipe.where(kind, index, 'score')}: there is no score {score!r}. "
                f"{suggest(score, SHAPES)} A function of your own is package.module:function."
            )


def _adapter_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.adapter != "none":
        try:
            peft_settings(recipe.adapter)
        except RecipeError as error:
            key = str(error).split(" ", 1)[0]
            yield f"{recipe.where('adapter', key).rpartition(':')[0]}: adapter.{error}"


_FINDERS: tuple[Callable[[Recipe], Iterator[str]], ...] = (
    _adapter_problems,
    _score_problems,
    _method_problems,
    _trainer_problems,
)
