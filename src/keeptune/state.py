"""What must survive a killed process: weights, methods, optimizer, random numbers.

All of it is safetensors and JSON; loading runs no code of the file. A state is a folder made by
`disk.new_folder`: whole or absent, with a hash of each file. Files always hold whole tensors: where
several processes share them (FSDP2), all must call the functions that write, in the same order, and
all but one give None for the place, which is to help and write nothing.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keeptune.chain import Chain
from keeptune.disk import link, write_atomic
from keeptune.method import ADDED, Context, State
from keeptune.processes import gathered, processes, spread_like

Tensors = dict[str, Tensor]


def write_json(path: Path, values: Any) -> None:
    """Write JSON whole or not at all."""
    write_atomic(path, json.dumps(values).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of a verified state."""
    return json.loads(path.read_text("utf-8"))


def write_tensors(path: Path | None, tensors: Tensors) -> int:
    """Write tensors to one safetensors file; returns the bytes written."""
    plain: Tensors = {}
    for name, tensor in tensors.items():
        # One at a time: a helping process must not hold the whole model.
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if path is not None:
            plain[name] = full.detach().contiguous().cpu()
    if path is not None:
        save_file(plain, path)
    return sum(t.nbytes for t in plain.values())


# -- weights --------------------------------------------------------------------------------------


def own_tensors(model: nn.Module) -> Tensors:
    """The tensors in which this model differs from its base.

    Under PEFT those of every adapter, as "adapter name/key", and those that a method added; else
    all parameters and persistent buffers, a tied one once.
    """
    if isinstance(model, peft.PeftModel):
        added = {n: p for n, p in model.named_parameters() if n.startswith(f"{ADDED}.")}
        return added | {
            f"{adapter}/{key}": tensor
            for adapter in model.peft_config
            for key, tensor in peft.get_peft_model_state_dict(
                model, adapter_name=adapter, save_embedding_layers=False
            ).items()
        }
    once = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t for n, t in model.state_dict().items() if n in once}


@torch.no_grad()
def put_tensors(model: nn.Module, tensors: Tensors) -> None:
    """Give a model of the same structure the tensors of `own_tensors`.

    Raises:
        KeyError: The structure differs.
    """
    target = own_tensors(model)
    tensors = {n: spread_like(t, target.get(n, t)) for n, t in tensors.items()}
    if isinstance(model, peft.PeftModel):
        for adapter in model.peft_config:
            own = {
                n.removeprefix(f"{adapter}/"): t
                for n, t in tensors.items()
                if n.startswith(f"{adapter}/")
            }
            peft.set_peft_model_state_dict(model, own, adapter_name=adapter)
        target = {n: t for n, t in target.items() if n.startswith(f"{ADDED}.")}
        tensors = {n: t for n, t in tensors.items() if n.startswith(f"{ADDED}.")}
    if missing := set(target) ^ set(tensors):
        raise KeyError(f"the saved weights and the model differ in {sorted(missing)[:3]}")
    for name, tensor in tensors.items():
        target[name].copy_(tensor)


# -- methods --------------------------------------------------------------------------------------


def write_methods(folder: Path | None, chain: Chain) -> dict[str, int]:
    """Write every method's state; returns the bytes written by method name."""
    sizes: dict[str, int] = {}
    for index, method in enumerate(chain):
        state = method.state()
        if folder is None:
            write_tensors(None, state.tensors)  # helps to gather
            continue
        stem = f"method-{index}-{method.name()}"
        # In the middle of a task the evidence so far is state too.
        sizes[method.name()] = write_method(folder, stem, state, method._evidence)
    return sizes


def write_method(folder: Path, stem: str, state: State, evidence: dict[str, Any]) -> int:
    """Write one method's state and evidence; returns the bytes written or linked."""
    size = write_tensors(folder / f"{stem}.safetensors", state.tensors)
    files = {name: f"{stem}-{name.replace('/', '-')}" for name in state.files}
    for name, file in files.items():
        link(state.files[name], folder / file)
        size += (folder / file).stat().st_size
    kept = {"values": state.values, "evidence": evidence, "files": files}
    write_json(folder / f"{stem}.json", kept)
    return size


def read_methods(folder: Path, chain: Chain, ctx: Context) -> None:
    """Give every method back the state that `write_methods` wrote."""
    for index, method in enumerate(chain):
        stem = f"method-{index}-{method.name()}"
        method.restore(ctx, read_method(folder, stem))
        method._evidence.clear()
        method._evidence.update(read_json(folder / f"{stem}.json")["evidence"])


def read_method(folder: Path, stem: str) -> State:
    """One method's state, of which files are only named."""
    tensors = load_file(folder / f"{stem}.safetensors")
    kept = read_json(folder / f"{stem}.json")
    files = {name: folder / file for name, file in kept["files"].items()}
    return State(tensors, kept["values"], files)


def method_stems(folder: Path) -> list[str]:
    """What the names of each method's files begin with: "method-", its number and its name."""
    return sorted(file.stem for file in folder.glob("method-*.json"))


# -- the middle of a task -------------------------------------------------------------------------


def write_optimizer(folder: Path | None, optimizer: torch.optim.Optimizer) -> None:
    """Write an optimizer's state: its tensors and its numbers apart."""
    full = optimizer.state_dict()
    tensors: Tensors = {}
    values: dict[str, Any] = {}
    for index, slots in full["state"].items():
        for key, value in slots.items():
            kind: dict[str, Any] = tensors if isinstance(value, Tensor) else values
            kind[f"{index}/{key}"] = value
    write_tensors(folder and folder / "optimizer.safetensors", tensors)
    if folder is not None:
        write_json(folder / "optimizer.json", {"values": values, "groups": full["param_groups"]})


def read_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Take back what `write_optimizer` wrote."""
    kept = read_json(folder / "optimizer.json")
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for source in (load_file(folder / "optimizer.safetensors"), kept["values"]):
        for name, value in source.items():
            index, _, key = name.partition("/")
            if isinstance(value, Tensor) and value.shape == weights[int(index)].shape:
                value = spread_like(value, weights[int(index)])
            state.setdefault(int(index), {})[key] = value
    # JSON has no tuples; torch's own groups say which values are.
    for group, own in zip(kept["groups"], optimizer.state_dict()["param_groups"], strict=True):
        for key, value in group.items():
            if isinstance(own.get(key), tuple):
                group[key] = tuple(value)
    optimizer.load_state_dict({"state": state, "param_groups": kept["groups"]})


def write_random(folder: Path | None) -> None:
    """Write the state of every global random number generator, of each process its own."""
    states = gathered(_random_state())
    if folder is None:
        return
    for number, (tensors, numbers) in enumerate(states):
        write_tensors(folder / f"random-{number}.safetensors", tensors)
        write_json(folder / f"random-{number}.json", numbers)


def _random_state() -> tuple[Tensors, dict[str, Any]]:
    tensors = {"torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda/{index}"] = torch.cuda.get_rng_state(index)
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    numbers = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }
    return tensors, numbers


def read_random(folder: Path) -> None:
    """Take back what `write_random` wrote; a process that was not there, what the first had."""
    number = processes()[0]
    if not (folder / f"random-{number}.json").is_file():
        number = 0
    tensors = load_file(folder / f"random-{number}.safetensors")
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda/{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda/{index}"], index)
    numbers = read_json(folder / f"random-{number}.json")
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = numbers["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
