"""Guards by EleutherAI's lm-evaluation-harness, on the model in memory (extra `eval`)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from keeptune.errors import DataError
from keeptune.records import Example

if TYPE_CHECKING:
    from keeptune.guard import Guard

# The first of these that a task reports is its score; all are shares.
METRICS = ("acc_norm", "acc", "exact_match", "f1", "rougeL", "mcc")


def task_manager(guard: Guard) -> Any:
    """What finds a guard's task for lm-eval.

    Raises:
        DataError: lm-eval is not installed, or does not know the task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DataError(
            f"The guard {guard.name!r} needs lm-eval: pip install 'keeptune[eval]'."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = str(guard.include_path) if guard.include_path else None
    manager = TaskManager(include_path=own, include_defaults=own is None)
    if guard.name not in manager.all_tasks:
        place = f"in {own}" if own else "among lm-eval's own tasks"
        raise DataError(f"There is no lm-eval task {guard.name!r} {place}. See `lm_eval ls tasks`.")
    return manager


def score_lm_eval(model: Any, tokenizer: Any, guard: Guard, batch_size: int) -> list[Example]:
    """Score a model on one lm-eval task, or on all of a group, example by example.

    Args:
        model: A causal LM, with or without adapters; its mode is left as it was.
        tokenizer: The model's.
        guard: Its name is the lm-eval task's.
        batch_size: Sequences at a time.

    Raises:
        DataError: lm-eval is not installed, does not know the task, or gives no usable score.
    """
    manager = task_manager(guard)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    was_training, kind = model.training, model.device.type
    # lm-eval would leave the precision that it is called in.
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                mixed_precision_dtype=precision,
            ),
            tasks=[guard.name],
            task_manager=manager,
            limit=guard.limit,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    except (OSError, ConnectionError) as error:
        raise DataError(
            f"The data of the lm-eval task {guard.name!r} cannot be had: {error}. Without a "
            "connection, use tasks on local files (include_path)."
        ) from error
    finally:
        model.train(was_training)
    samples = [sample for of_task in results["samples"].values() for sample in _once(of_task)]
    return [_example(i, sample, guard.name) for i, sample in enumerate(samples)]


def _once(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each question once: a task with several filters lists it under each of them."""
    return [sample for sample in samples if sample.get("filter") == samples[0].get("filter")]


def _example(number: int, sample: dict[str, Any], task: str) -> Example:
    metric = next((m for m in METRICS if isinstance(sample.get(m), int | float)), None)
    if metric is None:
        raise DataError(
            f"The lm-eval task {task!r} scores no example by any of {', '.join(METRICS)}. "
            "Use another task, or rows of your own as a guard."
        )
    asked = sample["arguments"]
    first = asked["gen_args_0"]["arg_0"] if isinstance(asked, dict) else asked[0][0]
    return Example(
        id=number,
        prompt=str(first),
        expected=str(sample["target"]),
        answer=str(sample["filtered_resps"]),
        score=float(sample[metric]),
    )
