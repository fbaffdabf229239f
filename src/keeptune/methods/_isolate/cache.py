"""What frozen bottom layers give, computed once for each row and read from a file after that.

A batch's rows are known by their token ids, so that any collator, sampler or method that adds rows
will do. A row is computed alone and rounded to bfloat16, so that what it gives does not depend on
the rows beside it, nor on whether it was computed or read.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keeptune.errors import MethodError
from keeptune.method import Context

# With any of these a row's states do not follow from its own ids alone.
BEYOND_IDS = ("inputs_embeds", "past_key_values", "position_ids", "token_type_ids")
BYTES = 2  # of a bfloat16


class _EnoughError(Exception):
    """Ends a forward pass above the frozen layers."""


class Store:
    """Rows of bfloat16 states in a mapped file, which is gone when it is closed.

    Args:
        limit: Most bytes; what does not fit is not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file, path = tempfile.mkstemp()
        self._end = weakref.finalize(self, os.close, self._file)
        os.unlink(path)  # gone with the process, however that ends
        # No space is taken by what is not written yet.
        os.truncate(self._file, limit)
        self._map = mmap.mmap(self._file, limit, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, key: bytes, into: NDArray[np.int16]) -> bool:
        """Copy a row's states [L, D], as bits; False when they are not there."""
        if key not in self._places:
            return False
        offset, size = self._places[key]
        into[:] = np.frombuffer(self._map, np.int16, size, offset).reshape(into.shape)
        return True

    def write(self, key: bytes, states: NDArray[np.int16]) -> None:
        """Keep a row's states if there is room."""
        if self.used + states.nbytes > self.limit:
            return
        try:
            # A full disk is an error here, and in a mapped page the end of the process.
            os.pwrite(self._file, states.tobytes(), self.used)
        except OSError:
            self.limit = self.used
            return
        self._places[key] = (self.used, states.size)
        self.used += states.nbytes

    def close(self) -> None:
        """Give the space back."""
        self._map.close()
        self._end()


class Bottom:
    """The frozen layers of a model, which are skipped while it is trained.

    Args:
        ctx: Its `model` is changed until `detach`.
        blocks: The model's layers.
        count: How many at the bottom are frozen.
        store: Where states are kept.

    Raises:
        MethodError: Below the top of the frozen layers something is trained or drops values.
    """

    def __init__(self, ctx: Context, blocks: nn.ModuleList, count: int, store: Store) -> None:
        self.model, self.blocks, self.store = ctx.model, list(blocks)[:count], store
        self.busy = False
        self.states: Tensor | None = None
        self.in_tuple = False
        with self._called() as called:
            row = torch.tensor(ctx.dataset[0]["input_ids"], device=ctx.device)
            self.width = self._compute(row, {}).shape[-1]
        self._check(called)
        self.own = [vars(block).get("forward") for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = self._skipping(block.forward, is_last=index == count - 1)
        self.handle = self.model.register_forward_pre_hook(self._look, with_kwargs=True)

    def detach(self) -> None:
        """Leave the model as it was found."""
        self.handle.remove()
        for block, own in zip(self.blocks, self.own, strict=True):
            del block.forward
            if own is not None:
                block.forward = own

    @contextmanager
    def _called(self) -> Iterator[list[nn.Module]]:
        """The modules that run meanwhile."""
        called: list[nn.Module] = []
        handles = [
            module.register_forward_pre_hook(lambda module, _: called.append(module))
            for module in self.model.modules()
        ]
        yield called
        for handle in handles:
            handle.remove()

    def _check(self, called: list[nn.Module]) -> None:
        names = {module: name for name, module in self.model.named_modules()}
        for module in called:
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                raise MethodError(
                    f"Freeze.cache: {names[module]}, below the frozen layers, is trained, so that "
                    "what they give changes. Set embeddings: true, or name it in patterns."
                )
            drops = [m.p for m in module.children() if isinstance(m, nn.Dropout)]
            drops += [m.p for m in (module,) if isinstance(m, nn.Dropout)]
            if max([*drops, getattr(module, "attention_dropout", 0.0)]) > 0:
                raise MethodError(
                    f"Freeze.cache: {names[module]}, in the frozen part, drops values at random, "
                    "which a cache would do once and for all. Set its dropout to 0 (for LoRA "
                    "lora_dropout), or leave cache out."
                )

    def _compute(self, ids: Tensor, more: dict[str, Any]) -> Tensor:
        """What the frozen layers give for one row: [L] to [L, D] in bfloat16, on the CPU."""
        found: list[Tensor] = []
        if any(getattr(m, "neftune_noise_alpha", None) for m in self.model.modules()):
            raise MethodError(
                "Freeze.cache: trainer.neftune_noise_alpha adds noise below the frozen layers, "
                "which a cache would draw once and for all. Leave the noise or the cache out."
            )

        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            self.in_tuple = isinstance(output, tuple)
            found.append(output[0] if self.in_tuple else output)
            raise _EnoughError

        handle = self.blocks[-1].register_forward_hook(stop)
        self.busy = True
        try:
            with torch.no_grad():
                self.model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), **more)
        except _EnoughError:
            pass
        finally:
            self.busy = False
            handle.remove()
        return found[0][0].to("cpu", torch.bfloat16).contiguous()

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a forward: find the states of its rows, if it is one of training."""
        if self.busy:
            return
        self.states = None
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if args or ids is None or any(kwargs.get(key) is not None for key in BEYOND_IDS):
            return
        if not (self.model.training and torch.is_grad_enabled()):
            return
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        if mask is not None and any(
            not row[:n].all() for row, n in zip(mask, lengths, strict=True)
        ):
            return  # not padded on the right: positions would be others
        more = {key: kwargs[key] for key in ("use_cache",) if key in kwargs}
        states = torch.zeros(*ids.shape, self.width, dtype=torch.bfloat16)
        bits = states.view(torch.int16).numpy()
        for row, (tokens, n) in enumerate(zip(ids, lengths, strict=True)):
            key = blake2b(tokens[:n].cpu().numpy().tobytes(), digest_size=16).digest()
            if not self.store.read(key, bits[row, :n]):
                states[row, :n] = self._compute(tokens[:n], more)
                self.store.write(key, bits[row, :n])
        self.states = states.to(ids.device)

    def _skipping(self, own: Callable[..., Any], *, is_last: bool) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.states is None or self.busy:
                return own(hidden_states, *args, **kwargs)
            out = hidden_states
            if is_last:
                out, self.states = self.states.to(hidden_states.dtype), None
            return (out,) if self.in_tuple else out

        return forward


def keep_activations(
    ctx: Context, blocks: nn.ModuleList, count: int, store: Store
) -> tuple[int, Callable[[], None]]:
    """Let the frozen layers be skipped in training.

    Returns:
        The width of their output, and what puts the model back as it was.
    """
    bottom = Bottom(ctx, blocks, count, store)
    return bottom.width, bottom.detach
