"""Soft prompts: vectors before the embeddings of what a model reads, cut off again before its head.

Nobody outside the decoder sees them: its inputs and its outputs have the lengths that they have
without. Positions begin with the prompt, and tokens that are masked on the left take none, so that
padding changes nothing. A cache keeps the prompt's keys and values like all others'.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from keeptune.errors import MethodError
from keeptune.method import Context, wide
from keeptune.methods._isolate.grown import Grown, Parts


def decoder(ctx: Context, who: str) -> Any:
    """What turns tokens into the hidden states that a head reads.

    Raises:
        MethodError: Its layers look at what comes after, or it is none of transformers' models.
    """
    model: Any = ctx.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(inner, "base_model", inner)
    if not any(getattr(module, "is_causal", False) is True for module in found.modules()):
        raise MethodError(
            f"The method {who!r} needs a model that reads from left to right, as a Llama does, but "
            f"this is a {type(inner).__name__}. Use the method 'adapters' instead."
        )
    return found


class Prompt(nn.Module):
    """One task's vectors.

    Args:
        rows: What they are at first, [K, D].
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)


class Prompts(Parts):
    """All tasks' prompts; those that answer stand before the input, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self._takes: tuple[str, ...] = ()  # names of what the decoder takes
        self._put = 0  # positions before the input of the forward that runs

    def before(self, model: nn.Module) -> None:
        """Stand before what a decoder reads from now on."""
        self._takes = tuple(inspect.signature(model.forward).parameters)
        model.register_forward_pre_hook(self._prepend, with_kwargs=True)
        model.register_forward_hook(self._cut)

    def _prepend(self, model: Any, args: Any, given: dict[str, Any]) -> Any:
        self._put = 0
        if not self.answering:
            return None
        given = dict(zip(self._takes, args, strict=False)) | given
        rows = torch.cat([prompt.rows for prompt in self.chosen()])
        cache = given.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            self._put = len(rows)
            own = given.get("inputs_embeds")
            if own is None:
                own = model.get_input_embeddings()(given["input_ids"])
            _require_room(model, own.shape[1], len(rows))
            first = rows.to(own.dtype).expand(len(own), -1, -1)
            given |= {"input_ids": None, "inputs_embeds": torch.cat([first, own], 1)}
        if (mask := given.get("attention_mask")) is not None:
            given["attention_mask"] = _longer(mask, len(rows))
        if "position_ids" in self._takes:
            given["position_ids"] = self._positions(given, len(rows))
        return (), given

    def _positions(self, given: Mapping[str, Any], count: int) -> Tensor | None:
        """Where the input stands after `count` vectors; None for one after the other."""
        own, mask = given.get("position_ids"), given.get("attention_mask")
        if own is not None:
            first = torch.arange(self._put, device=own.device).expand(len(own), -1)
            return torch.cat([first, own + count], 1)
        if mask is None:
            return None
        key = "input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"
        found: Tensor = (mask.long().cumsum(1) - 1)[:, -given[key].shape[1] :]
        return found

    def _cut(self, model: nn.Module, args: Any, output: Any) -> Any:
        if self._put:
            output["last_hidden_state"] = output.last_hidden_state[:, self._put :]
            if (every := output.get("hidden_states")) is not None:
                output["hidden_states"] = tuple(states[:, self._put :] for states in every)
        return output


def _require_room(model: Any, tokens: int, count: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and tokens + count > most:
        raise MethodError(
            f"A row of {tokens} tokens and {count} vectors before it are more than the "
            f"{most} positions that the model has. Set max_length to {most - count} or less."
        )


def _longer(mask: Any, count: int) -> Tensor:
    """A mask [B, L] that lets `count` positions more be seen, before all others."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise MethodError(
            "Soft prompts need an attention mask of rows and tokens, but got one that is worked "
            "out for every pair of positions. Leave `cache_implementation` out when the model "
            "generates."
        )
    return torch.cat([mask.new_ones(len(mask), count), mask], 1)


class SoftPrompts(Grown):
    """Trains the newest prompt; the model and all earlier prompts stay."""

    length: int = Field(10, ge=1, description="vectors of each prompt")

    proof: ClassVar[str] = "moved"

    def _attached(self, ctx: Context) -> Parts:
        found = Prompts()
        found.before(decoder(ctx, self.name()))
        return found.attach(ctx.model)

    def _start(self, ctx: Context) -> Tensor:
        """Embeddings of random tokens, [K, D] in float32 at least."""
        words = decoder(ctx, self.name()).get_input_embeddings()
        chosen = ctx.random("prompt").integers(len(words.weight), size=self.length)
        with torch.no_grad():  # through the module, which may scale what it looks up
            return wide(words(torch.from_numpy(chosen).to(words.weight.device)))

    def _part(self, ctx: Context) -> Prompt:
        return Prompt(self._start(ctx))

    def end_task(self, ctx: Context) -> None:
        """Show how far the prompt moved, and what it costs."""
        parts = self._parts(ctx)
        own = list(parts)[-1].rows.detach()
        self._evidence.update(
            prompts=len(self._numbers),
            moved=float((own - self._start(ctx)).norm()),
            parameters=own.numel(),
            parameters_of_all=sum(p.numel() for p in parts.parameters()),
            tokens_before=self.length * len(parts.answering),
        )
