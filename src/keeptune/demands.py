"""What a strategy demands of the trainer that it is to work in."""

from __future__ import annotations

from typing import Any

from keeptune.errors import MethodError, RecipeError
from keeptune.method import Method
from keeptune.reading import base_model

# What a stream that is seen once needs of the trainer's arguments.
ONLINE = {"num_train_epochs": 1, "max_steps": -1, "train_sampling_strategy": "sequential"}


def require_of(trainer: Any) -> None:
    """Refuse a trainer in which its methods could not work.

    Args:
        trainer: With its `strategy` and whether it is `online`.

    Raises:
        MethodError: Methods need what this trainer cannot give.
        RecipeError: Its arguments are not as they must be.
    """
    _require_one_gpu(trainer)
    _require_gradients(trainer)
    _require_adapter(trainer)
    _require_classifier(trainer)
    if trainer.online:
        _require_order(trainer)


def _require_gradients(trainer: Any) -> None:
    if trainer.is_deepspeed_enabled:
        raise MethodError(
            "keeptune cannot reach the gradients under DeepSpeed, which steps inside its own "
            "backward. Use FSDP2 instead (`fsdp: true` in the trainer's settings)."
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise MethodError(
            "keeptune cannot tell weights apart under FSDP1, which joins them into one. "
            "Leave `version` out of `fsdp_config`: the default is FSDP2."
        )
    again = trainer.args.activation_checkpointing_kwargs or {}
    if trainer.args.activation_checkpointing and again.get("use_reentrant"):
        raise RecipeError(
            "trainer.activation_checkpointing_kwargs has use_reentrant: true. Then only a "
            "step's loss can be differentiated, and nothing above frozen layers; methods need "
            "more. Leave it out: the other way to recompute layers gives the same gradients."
        )


def _require_adapter(trainer: Any) -> None:
    found = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})
    is_lora = bool(found) and all(config.peft_type == "LORA" for config in found.values())
    if "adapter" in trainer.strategy.needs and not is_lora:
        who = [m.name() for m in trainer.strategy if "adapter" in m.needs]
        trained = "another kind of adapter is" if found else "all weights are"
        raise MethodError(
            f"The method {who[0]!r} needs a LoRA adapter, but {trained} trained here. "
            "Set `adapter: {kind: lora, rank: 16}` in the recipe, or remove the method."
        )


def _require_classifier(trainer: Any) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = base_model(model)
    if "classifier" in trainer.strategy.needs and base.can_generate():
        who = [m.name() for m in trainer.strategy if "classifier" in m.needs]
        raise MethodError(
            f"The method {who[0]!r} needs a sequence classifier, but {type(base).__name__} is "
            "a language model. Set `kind: classification` in the recipe, or remove the method."
        )


def _require_one_gpu(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise RecipeError(
            f"This process sees {trainer.args.n_gpu} GPUs, over which transformers would copy the "
            "model at each step, and methods would not meet the copies. Start one process for "
            f"each (`torchrun --nproc_per_node {trainer.args.n_gpu} ...`), or set "
            "CUDA_VISIBLE_DEVICES=0."
        )


def _require_order(trainer: Any) -> None:
    for key, wanted in ONLINE.items():
        if (got := getattr(trainer.args, key)) != wanted:
            raise RecipeError(
                f"trainer.{key} is {got!r}, but online each row is learned once, in its order, "
                f"which needs {wanted!r}. Leave the key out, or leave `online` out."
            )
    for method in trainer.strategy:
        if type(method).data is not Method.data and not method.keeps_order:
            raise MethodError(
                f"The method {method.name()!r} chooses among all rows of a task before it is "
                "learned, and online they come one after another. Remove the method, or leave "
                "`online` out."
            )
