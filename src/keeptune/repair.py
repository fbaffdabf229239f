"""Repair a model that was tuned elsewhere: take as much of the tuning as a budget allows.

Between the base model and the tuned one lies a line of models; the one furthest along it is taken
whose guards have surely lost no more than they may, as `budget` does after each task of a run. The
inputs are only read. Weights are mixed tensor by tensor from the files, so that beside the one
model that is asked memory holds two tensors at a time.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keeptune import lines, models
from keeptune.budget import Steps, find_step
from keeptune.disk import is_taken, new_folder, refuse_unwritable, write_atomic
from keeptune.errors import FolderError, ModelError, RecipeError
from keeptune.evaluate import score_rows
from keeptune.guard import Guard
from keeptune.likelihood import context_length
from keeptune.lines import FEWEST, Line, Probe
from keeptune.machine import fastest
from keeptune.progress import Progress
from keeptune.recipe_parts import BudgetRecipe
from keeptune.records import Example
from keeptune.session import DEFAULT_LENGTH
from keeptune.watchlog import Frontier, Tried

WEIGHTS = "*.safetensors"
ADAPTER = "adapter_config.json"
# Pickles can run code when read, and other forms would hold the model from before the repair.
LEFT_OUT = (WEIGHTS, "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")


@dataclass(frozen=True)
class Repaired:
    """What came of a repair.

    Attributes:
        path: The new model.
        frontier: The step that was taken, 0 to 1, and what was tried.
    """

    path: Path
    frontier: Frontier


class Mix(Protocol):
    """Models between the base and the tuned one."""

    model: Any

    def move(self, mix: float) -> None:
        """Set the model to so large a share of the tuning."""

    def mixed(self, name: str, mix: float) -> Tensor:
        """A tensor of the tuned model's files at that share, in its own dtype."""


def repair(
    base: str,
    tuned: str,
    out: Path,
    *,
    guards: Sequence[Guard],
    tasks: Sequence[Guard] = (),
    budget: BudgetRecipe,
    seed: int = 0,
    batch_size: int = 16,
    trust_remote_code: bool = False,
    progress: Progress,
) -> Repaired:
    """Write the largest step from `base` towards `tuned` that keeps inside a budget.

    Args:
        base: The model before tuning: a hub id, a folder, or "demo".
        tuned: The model after it, or its LoRA adapter: a hub id or a folder.
        out: A new folder.
        guards: What must not get worse; half of the rows find the step, the others confirm it.
        tasks: What was tuned for; shown for each step.
        budget: What each guard may lose against the base model.
        seed: Divides the rows.
        batch_size: Rows at a time.
        trust_remote_code: Run Python code that comes with the base model.
        progress: Who is told.

    Raises:
        KeeptuneError: Anything a user can mend; nothing is written.
    """
    if is_taken(out):
        raise FolderError(f"{out} is not empty, and a repair overwrites nothing. Give a new OUT.")
    refuse_unwritable(out)
    began, chosen = time.monotonic(), _lines(guards, tasks, budget)
    folder = _folder_of(tuned)
    loaded = models.load(base, trust_remote_code=trust_remote_code)
    loaded.model.to(fastest())
    with ExitStack() as files:
        is_adapter = (folder / ADAPTER).is_file()
        with _explained(base, tuned):
            mix: Mix = (
                Adapter(loaded.model, folder, files)
                if is_adapter
                else Whole(loaded.model, _folder_of(base), folder, files)
            )
        (step,), tried = _find(mix, loaded.tokenizer, chosen, budget, seed, batch_size, progress)
        name = Path(tuned).name or tuned
        seconds = time.monotonic() - began
        frontier = Frontier(task=name, index=0, mix=step, cut=0.0, tried=tried, seconds=seconds)
        with new_folder(out, replace=False) as filled:
            for file in sorted(folder.glob(WEIGHTS)):
                write_like(file, filled / file.name, lambda name: mix.mixed(name, step))
            _copy_the_rest(folder, filled)
            said = {"base": base, "tuned": tuned, "budget": budget.model_dump()}
            told = {**said, **frontier.model_dump(mode="json")}
            write_atomic(filled / "repair.json", json.dumps(told, indent=1).encode())
    return Repaired(out, frontier)


def _find(
    mix: Mix,
    tokenizer: Any,
    chosen: Sequence[Line],
    budget: BudgetRecipe,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> tuple[Steps, list[Tried]]:
    """The step inside the budget, and all that was tried."""

    def score(probe: Probe) -> list[Example]:
        return score_rows(
            mix.model,
            tokenizer,
            probe.rows,
            probe.item.score,
            batch_size=batch_size,
            max_new_tokens=probe.item.max_new_tokens,
            max_length=context_length(mix.model, DEFAULT_LENGTH),
        )

    progress.phase("the base model's scores", 0, "trials")
    mix.move(0.0)
    before = {(probe.kind, probe.index): score(probe) for line in chosen for probe in line.probes}
    progress.phase("the step inside the budget", 0, "trials")
    return find_step(
        mix.move,
        chosen,
        score,
        lambda probe: [before[probe.kind, probe.index][i] for i in probe.ids],
        confidence=budget.confidence,
        seed=seed,
        tick=progress.advance,
    )


def _lines(guards: Sequence[Guard], tasks: Sequence[Guard], budget: BudgetRecipe) -> list[Line]:
    """The lines of a budget; what was tuned for comes first, and is not judged."""
    lines.refuse_unknown_names("--budget", list(budget.guards), guards)
    if budget.blocks > 1:
        raise RecipeError("A repair takes one step in all layers: leave budget.blocks out.")
    chosen = [
        Line(task.name, "learning", [Probe("task", i, task, range(task.size), 0)], None)
        for i, task in enumerate(tasks)
    ]
    for name, loss in budget.guards.items():
        chosen += lines.guard_lines(name, guards, 0, loss)
    few = [line for line in chosen if line.allowed is not None and line.size < 2 * FEWEST]
    if few:
        raise RecipeError(
            f"The guard {few[0].name!r} has {few[0].size} rows, and a budget needs at least "
            f"{2 * FEWEST}: half of them to find a step, half to confirm it. Give it more rows."
        )
    return chosen


def _folder_of(model: str) -> Path:
    """Where a model's files are.

    Raises:
        ModelError: It is not there, or has no safetensors.
    """
    folder = models.files_of(model, without=LEFT_OUT[1:])
    if not any(folder.glob(WEIGHTS)):
        raise ModelError(f"{model} holds no .safetensors, which a repair reads and writes.")
    return folder


@contextmanager
def _explained(base: str, tuned: str) -> Iterator[None]:
    """Put what the libraries say of files that do not fit into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        raise ModelError(f"{tuned} cannot be read as a tuning of {base}: {reason}.") from error


def _copy_the_rest(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in LEFT_OUT):
            shutil.copyfile(file, target / file.name)


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
