"""One training step on tensors that have shapes but no memory: its bytes and operations, counted.

The model is built from its config alone and every operation is really called, so that what a step
holds and does is counted for any architecture, adapter, precision and loss, not derived from a
formula for each. A model of 70 billion weights is counted in seconds on a laptop.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from keeptune.dressing import dress
from keeptune.errors import ModelError
from keeptune.reading import base_model
from keeptune.trainers import leave_inputs_alone, loss_of

# A model of more layers is counted at these two depths: what a layer adds is the same for all.
SHALLOW, DEEP = 2, 4
LARGE = 2**25  # bytes of a piece of memory that a process gets from the system, page by page
WIDE = 4  # bytes of a weight, of a gradient and of each of Adam's moments: float32


@dataclass(frozen=True)
class Step:
    """What one step of a model needs, beside weights and optimizer state.

    Attributes:
        weights: Numbers in all weights, an adapter's included.
        trained: Those that are trained.
        matrices: Those in trained matrices, or in the matrices that an adapter changes.
        edges: Over the same matrices, the sum of rows + columns, times the smaller of the two.
        largest: Numbers in the largest of the layers that FSDP gathers one at a time.
        kept: Bytes that the forward keeps for the backward.
        top: Most bytes until the backward has reached the layers.
        lean: The same without the copies of weights that autocast makes for half precision.
        rest: Most bytes after that, all gradients included.
        forward_flops: Of the forward.
        backward_flops: Of the backward.
        forward_traffic: Bytes read and written by all operations but matrix products.
        backward_traffic: Likewise.
        forward_streamed: Of the traffic, bytes of operations that make large pieces of memory.
        backward_streamed: Likewise.
    """

    weights: float
    trained: float
    matrices: float
    edges: float
    largest: float
    kept: float
    top: float
    lean: float
    rest: float
    forward_flops: float
    backward_flops: float
    forward_traffic: float
    backward_traffic: float
    forward_streamed: float
    backward_streamed: float

    @property
    def peak(self) -> float:
        """Most bytes at any time."""
        return max(self.top, self.rest)


@dataclass(frozen=True)
class Batch:
    """What a step is counted for.

    Attributes:
        rows: Rows of a device at a time.
        length: Tokens of a row.
        half: Whether products are in bfloat16 (`bf16: true`).
        recompute: Whether layers are computed again in the backward (`gradient_checkpointing`).
        logits: Whether a method needs the logits of all positions at once.
        accumulated: Whether gradients of earlier batches are there when a batch begins.
    """

    rows: int = 8
    length: int = 512
    half: bool = False
    recompute: bool = False
    logits: bool = False
    accumulated: bool = False


def count(config: Any, adapter: Any, batch: Batch, *, kind: str = "causal_lm") -> Step:
    """Count one step of a model that is not there.

    Args:
        config: Of transformers.
        adapter: A PEFT config, or None to train all weights.
        batch: What is counted.
        kind: "causal_lm" or "classification".

    Raises:
        ModelError: What it does depends on values, or cannot be done without them.
    """
    logs = logging.getLogger("torch._subclasses.fake_tensor")
    level = logs.level
    logs.setLevel(logging.CRITICAL)
    try:
        return _count_layers(config, adapter, batch, kind)
    except Exception as error:  # whatever a model's own code says to tensors without values
        raise ModelError(
            f"What a step of this model ({config.model_type}) needs cannot be counted without its "
            f"weights: {str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        logs.setLevel(level)


def _count_layers(config: Any, adapter: Any, batch: Batch, kind: str) -> Step:
    layers = _depth(config, adapter)
    if layers is None:
        return _count(config, adapter, batch, kind)
    shallow, deep = (_count(_cut(config, depth), adapter, batch, kind) for depth in (SHALLOW, DEEP))
    values = {}
    for field in fields(Step):
        low, high = getattr(shallow, field.name), getattr(deep, field.name)
        if field.name == "rest":
            # It begins with all that is kept and ends with all gradients: of many layers the
            # peak is where a layer adds more.
            gradients = WIDE * (deep.trained - shallow.trained)
            low = high - max(deep.kept - shallow.kept, gradients)
        values[field.name] = high + (high - low) / (DEEP - SHALLOW) * (layers - DEEP)
    return Step(**values)


def _depth(config: Any, adapter: Any) -> int | None:
    """The number of layers where all are alike; None where all must be counted."""
    layers = getattr(config, "num_hidden_layers", 0)
    alike = len(set(getattr(config, "layer_types", None) or [""])) == 1
    chosen = getattr(adapter, "layers_to_transform", None) is not None
    return layers if layers > DEEP and alike and not chosen else None


def _cut(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _count(config: Any, adapter: Any, batch: Batch, kind: str) -> Step:
    auto = (
        transformers.AutoModelForSequenceClassification
        if kind == "classification"
        else transformers.AutoModelForCausalLM
    )
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        bare = auto.from_config(copy.deepcopy(config), dtype=torch.float32)
        model = dress(bare, copy.deepcopy(adapter), 0)
    matrices = _matrices(model)
    blocks = _blocks(model)
    fake = FakeTensorMode()
    _give_shapes(model, fake)
    model.train()
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] = loss_of(kind, model, batch.logits)
    if batch.recompute:
        _recompute(model)
    ledger = _Ledger(model.parameters())
    for parameter in blocks[-1].parameters() if blocks else ():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ledger.turn)  # type: ignore[no-untyped-call]
    low = torch.autocast("cpu", torch.bfloat16) if batch.half else nullcontext()
    with fake, ledger:
        ids = torch.ones(batch.rows, batch.length, dtype=torch.long)
        labels = ids if kind == "causal_lm" else ids[:, 0]
        with low:
            value = loss(model, {"input_ids": ids, "labels": labels})
        kept, flops = ledger.now, ledger.flops
        traffic, streamed = ledger.traffic, ledger.streamed
        value.backward()  # type: ignore[no-untyped-call]
    every = list(model.parameters())
    return Step(
        weights=sum(p.numel() for p in every),
        trained=sum(p.numel() for p in every if p.requires_grad),
        matrices=sum(m.numel() for m in matrices),
        edges=sum(min(m.shape[:2]) * sum(m.shape[:2]) for m in matrices),
        largest=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
        kept=kept,
        top=ledger.top or ledger.peak,
        lean=ledger.lean,
        rest=ledger.peak,
        forward_flops=flops,
        backward_flops=ledger.flops - flops,
        forward_traffic=traffic,
        backward_traffic=ledger.traffic - traffic,
        forward_streamed=streamed,
        backward_streamed=ledger.streamed - streamed,
    )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers: what stands in the longest list of modules."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _matrices(model: nn.Module) -> list[Tensor]:
    """The matrices that an adapter changes, or all that are trained."""
    modules: list[Any] = list(model.modules())
    adapted = [m.get_base_layer() for m in modules if hasattr(m, "get_base_layer")]
    found = [m.weight for m in adapted] or [p for p in model.parameters() if p.requires_grad]
    return [p for p in found if p.dim() > 1]


def _recompute(model: Any) -> None:
    leave_inputs_alone(model)
    base_model(model).activation_checkpointing_enable()


def _give_shapes(model: nn.Module, fake: FakeTensorMode) -> None:
    """Put CPU tensors without memory in the place of those on the meta device, tied ones once.

    transformers looks into masks that are on the meta device, and autocast passes them over.
    """
    made: dict[Tensor, Tensor] = {}
    with fake:
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in stores:
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    if tensor not in made:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        made[tensor] = (
                            nn.Parameter(empty, tensor.requires_grad)
                            if isinstance(tensor, nn.Parameter)
                            else empty
                        )
                    held[name] = made[tensor]


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all living storages, and what is done by operations.

    Args:
        known: Tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.top = self.lean = self.casts = 0
        self.flops = self.traffic = self.streamed = 0.0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._living = {storage._cdata for storage in self._known}
        self._weights = set(self._living)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        is_new = [self._is_new(t) for t in made]
        if func._overloadpacket is torch.ops.aten._to_copy and is_new[0]:
            self._note_cast(args[0], made[0])
        if not self.top:
            self.lean = max(self.lean, self.now - self.casts)
        product = _products(func)
        if product is not None:
            self.flops += product(*args, **kwargs, out_val=out)
        elif any(is_new) or func._schema.is_mutable:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in [*given, *made])
            self.traffic += moved
            if any(t.untyped_storage().nbytes() >= LARGE for t in made):
                self.streamed += moved
        return out

    def turn(self, parameter: Tensor) -> None:
        """The backward has reached the layers."""
        if not self.top:
            self.top, self.peak = self.peak, self.now

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._living:
            return False
        self._living.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)
        return True

    def _note_cast(self, weight: Tensor, cast: Tensor) -> None:
        if weight.untyped_storage()._cdata in self._weights:
            size = cast.untyped_storage().nbytes()
            self.casts += size
            weakref.finalize(cast.untyped_storage(), self._uncast, size)

    def _uncast(self, size: int) -> None:
        self.casts -= size

    def _free(self, key: int, size: int) -> None:
        self._living.discard(key)
        self.now -= size


def _products(func: Any) -> Callable[..., int] | None:
    """What counts the operations of a matrix product or of attention."""
    aten = torch.ops.aten
    more: dict[Any, Callable[..., int]] = {
        aten.addmm_: flop_registry[aten.addmm],
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    packet = func._overloadpacket
    found: Callable[..., int] | None = more.get(packet) or flop_registry.get(packet)
    return found


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return flops


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    flops: int = sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    return flops
