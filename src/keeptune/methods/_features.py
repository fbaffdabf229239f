"""What enters one module of a model: taken down, put in its place, and the weights below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn

from keeptune.buffer import Order
from keeptune.errors import MethodError
from keeptune.method import IGNORED, Batch, Context
from keeptune.methods._anchor.undisturbed import undisturbed
from keeptune.rowstore import COLUMNS

BATCH = 8  # rows in one forward when features are taken down
FEATURES = "features"  # of a batch: what enters the module in place of what comes from below


def named(model: nn.Module, name: str) -> nn.Module:
    """The module of this name; what an adapter puts in front of names may be left out.

    Raises:
        MethodError: There is none, or several.
    """
    found: dict[str, nn.Module] = {
        n: m for n, m in model.named_modules() if f".{n}".endswith(f".{name}")
    }
    exact = found.get(name)
    if exact is None and len(found) != 1:
        other = f"they are {', '.join(found)}" if found else "see model.named_modules()"
        raise MethodError(
            f"FeatureReplay.module: {len(found)} modules of {type(model).__name__} are called "
            f"{name!r}; {other}. Give the whole name of one."
        )
    return exact if exact is not None else next(iter(found.values()))


def layer_of(model: nn.Module, layer: int | None) -> nn.Module:
    """One of a transformer's layers.

    Args:
        model: With or without an adapter.
        layer: Its number from 0; None for the middle one.

    Raises:
        MethodError: The model has no stack of layers, or not so many.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not count or not stacks:
        raise MethodError(
            f"{type(model).__name__} has no stack of layers to count. Set FeatureReplay.module to "
            "the name of the module whose input shall be kept."
        )
    layer = count // 2 if layer is None else layer
    if layer >= count:
        raise MethodError(
            f"FeatureReplay.layer is {layer}, but the model has the layers 0 to {count - 1}. Give "
            "one of them, or leave it out for the middle one."
        )
    chosen: nn.Module = stacks[0][layer]
    return chosen


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | int, Tensor]:
    """Where among a module's arguments its input stands, and the input."""
    return (0, args[0]) if args else ("hidden_states", kwargs["hidden_states"])


@contextmanager
def taken_down(module: nn.Module) -> Iterator[list[Tensor]]:
    """What enters the module, one tensor for each forward."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(input_of(args, kwargs)[1])

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def put_in(module: nn.Module) -> Iterator[Callable[[Context, Batch], Tensor]]:
    """Gives the logits of a batch whose `FEATURES` enter the module, whatever comes from below.

    Masks and positions stay those of the batch. It holds for a backward too, in which layers that
    recompute their activations run once more.
    """
    given: list[Tensor] = []

    def logits_of(ctx: Context, batch: Batch) -> Tensor:
        given[:] = [batch[FEATURES]]
        inputs = {key: value for key, value in batch.items() if key != FEATURES}
        logits: Tensor = ctx.outputs(inputs).logits
        return logits

    def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where, own = input_of(args, kwargs)
        swapped = given[0].to(own).view(own.shape)
        if where == 0:
            return (swapped, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": swapped}

    handle = module.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield logits_of
    finally:
        handle.remove()


def weights_below(ctx: Context, module: nn.Module) -> list[str]:
    """Names of the trained weights on which what enters the module depends, by autograd."""
    trained = ctx.trainable()
    with undisturbed(ctx, trained), taken_down(module) as seen:
        ctx.outputs(ctx.batch([ctx.dataset[0]]))
        if not seen[0].requires_grad:
            return []
        found = torch.autograd.grad(seen[0].float().sum(), [*trained.values()], allow_unused=True)
    return [name for name, one in zip(trained, found, strict=True) if one is not None]


# -- features as they are kept --------------------------------------------------------------------


def mask_of(batch: Batch) -> Tensor:
    """Which tokens are there: [B, L]."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"]))


def without_inputs(ctx: Context) -> Dataset:
    """The task's rows with one id in place of all that are no answer, and not the padding's."""
    config: Any = getattr(ctx.model, "config", None)
    blank = int(getattr(config, "pad_token_id", None) == 0)
    rows = ctx.dataset.select_columns(COLUMNS)

    def ids(row: dict[str, Any]) -> list[int]:
        if not isinstance(row["labels"], list):
            return [blank] * len(row["input_ids"])
        return [blank if label == IGNORED else label for label in row["labels"]]

    columns = {"input_ids": [ids(row) for row in rows], "labels": rows["labels"][:]}
    return Dataset.from_dict(columns, rows.features)


@torch.no_grad()
def features(ctx: Context, module: nn.Module, numbers: Order) -> list[NDArray[np.float16]]:
    """What enters the module for rows of the task, one array a row: see `of_each_row`.

    Raises:
        MethodError: Some value is beyond the range of float16.
    """
    kept: list[NDArray[np.float16]] = []
    with undisturbed(ctx, {}), torch.no_grad(), taken_down(module) as seen:
        for begin in range(0, len(numbers), BATCH):
            batch = ctx.batch(list(ctx.dataset.select(numbers[begin : begin + BATCH])))
            ctx.outputs(batch)
            kept += of_each_row(seen.pop(), mask_of(batch))
    if not all(np.isfinite(values).all() for values in kept):
        raise MethodError(
            "The features that 'feature_replay' would keep are beyond the range of float16. Give "
            "another `layer`."
        )
    return kept


def of_each_row(entering: Tensor, mask: Tensor) -> list[NDArray[np.float16]]:
    """What is kept of a batch: each row's [tokens, D] of [B, L, D], or its [1, D] of [B, D]."""
    if entering.dim() == 2:
        entering, mask = entering[:, None], torch.ones_like(mask[:, :1])
    pairs = zip(entering.to(torch.float16).cpu(), mask.bool().cpu(), strict=True)
    return [states[there].numpy() for states, there in pairs]


def as_batch(values: Tensor, mask: Tensor) -> Tensor:
    """All rows' values of `of_each_row` in a line, back to [B, L, D], or to [B, D] if one a row."""
    if len(values) == len(mask):
        return values
    laid = values.new_zeros(*mask.shape, values.shape[-1])
    laid[mask.bool()] = values
    return laid
