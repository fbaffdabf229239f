"""Models between a base and one that was tuned from it, mixed from their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
from safetensors import safe_open
from torch import Tensor

from keeptune.errors import ModelError

WEIGHTS = "*.safetensors"
ADAPTER = "adapter_config.json"


class Mix(Protocol):
    """Models between the base and the tuned one."""

    model: Any

    def move(self, mix: float) -> None:
        """Set the model to so large a share of the tuning."""

    def mixed(self, name: str, mix: float) -> Tensor:
        """A tensor of the tuned model's files at that share, in its own dtype."""


# -- whole models ---------------------------------------------------------------------------------


class Whole:
    """All weights between those of two folders.

    Args:
        model: Of the base; its weights are moved.
        base: The base model's folder.
        tuned: The tuned model's folder.
        files: Closes the files.

    Raises:
        ModelError: The two differ in more than values.
    """

    def __init__(self, model: Any, base: Path, tuned: Path, files: ExitStack) -> None:
        self.model = model
        self._tuned = tuned
        self._before, self._after = (_opened(folder, files) for folder in (base, tuned))
        self._targets: dict[str, Tensor] = model.state_dict()
        self._refuse_others()

    def _refuse_others(self) -> None:
        names = set(self._after)
        if odd := sorted(names ^ set(self._before)):
            raise ModelError(
                f"{self._tuned} and its base do not hold the same weights ({odd[0]} is in one "
                "alone). Give the model that it was tuned from, saved in the same form."
            )
        if odd := sorted(names - set(self._targets)):
            raise ModelError(
                f"{self._tuned} keeps {odd[0]} under a name that transformers gives it no more. "
                "Load and save both models with transformers, and repair those."
            )
        for name in sorted(names):
            shapes = [list(self._read(name, side).shape) for side in (self._before, self._after)]
            if shapes[0] != shapes[1]:
                raise ModelError(
                    f"{name} has the shape {shapes[1]} in {self._tuned} and {shapes[0]} in its "
                    "base. A repair needs the same shapes; a vocabulary that grew must be cut back."
                )

    @staticmethod
    def _read(name: str, side: dict[str, Any]) -> Tensor:
        tensor: Tensor = side[name].get_tensor(name)
        return tensor

    def mixed(self, name: str, mix: float) -> Tensor:
        """A weight, between those of both files."""
        after = self._read(name, self._after)
        if mix == 1 or not after.is_floating_point():
            return after
        before = self._read(name, self._before)
        if mix == 0:
            return before.to(after.dtype)
        start = before.float()
        return (start + mix * (after.float() - start)).to(after.dtype)

    @torch.no_grad()
    def move(self, mix: float) -> None:
        """Set the model's weights; in the precision in which they would be written."""
        for name in self._after:
            self._targets[name].copy_(self.mixed(name, mix))


def _opened(folder: Path, files: ExitStack) -> dict[str, Any]:
    """For each tensor the open file that it is in."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob(WEIGHTS)):
        handle = files.enter_context(safe_open(file, framework="pt"))
        found |= dict.fromkeys(handle.keys(), handle)
    return found


# -- adapters -------------------------------------------------------------------------------------


class Adapter:
    """A LoRA adapter whose update is scaled: ΔW is linear in B, so no cut is needed.

    Args:
        model: The base.
        tuned: The adapter's folder.
        files: Closes the files.

    Raises:
        ModelError: Its update is not linear in B.
    """

    def __init__(self, model: Any, tuned: Path, files: ExitStack) -> None:
        config = json.loads((tuned / ADAPTER).read_text("utf-8"))
        odd = [key for key in ("modules_to_save", "use_dora") if config.get(key)]
        odd += ["bias"] if config.get("bias", "none") != "none" else []
        if config.get("peft_type") != "LORA" or odd:
            what = f"has {odd[0]}" if odd else f"is of the type {config.get('peft_type')}"
            raise ModelError(
                f"{tuned} {what}, and only a plain LoRA adapter can be scaled. Merge it into its "
                "base model (merge_and_unload), save that, and give its folder."
            )
        self._after = _opened(tuned, files)
        self.model = peft.PeftModel.from_pretrained(model, tuned)
        names = {_in_file(name): p for name, p in self.model.named_parameters()}
        self._targets = {n: p for n, p in names.items() if n in self._after and _is_scaled(n)}

    def mixed(self, name: str, mix: float) -> Tensor:
        """A factor; B times the share."""
        tensor: Tensor = self._after[name].get_tensor(name)
        return (tensor.float() * mix).to(tensor.dtype) if _is_scaled(name) else tensor

    @torch.no_grad()
    def move(self, mix: float) -> None:
        """Scale the update."""
        for name, parameter in self._targets.items():
            parameter.copy_(self.mixed(name, mix))


def _in_file(name: str) -> str:
    return name.replace(".default", "")


def _is_scaled(name: str) -> bool:
    return ".lora_B" in name or ".lora_embedding_B" in name


# -- files ----------------------------------------------------------------------------------------


def write_like(source: Path, target: Path, tensor: Callable[[str], Tensor]) -> None:
    """Write a safetensors file with the header of another, one tensor at a time.

    https://github.com/huggingface/safetensors#format: the header's length in 8 bytes, the header in
    JSON, and the tensors' bytes at its offsets.

    Args:
        source: The file to be like.
        target: The new file.
        tensor: Gives each tensor by its name, in the shape and dtype of the header.
    """
    with source.open("rb") as read, target.open("wb") as written:
        length = read.read(8)
        header = read.read(int.from_bytes(length, "little"))
        written.write(length + header)
        for name in _in_order(json.loads(header)):
            written.write(tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _in_order(header: dict[str, Any]) -> Iterator[str]:
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    yield from sorted(entries, key=lambda name: entries[name]["data_offsets"][0])
