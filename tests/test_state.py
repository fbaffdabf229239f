"""What is written comes back bit for bit, without a pickle."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import pico
from keeptune import state


def test_an_optimizer_comes_back_bit_for_bit(tmp_path: Path) -> None:
    def trained(steps: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.full((1, 4), step / 7)).sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    trained(3, model, optimizer)
    state.write_optimizer(tmp_path, optimizer)
    twin = torch.nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(twin.parameters(), lr=5.0)
    state.read_optimizer(tmp_path, other)
    assert other.param_groups[0]["betas"] == (0.8, 0.9)
    trained(3, model, optimizer)
    trained(3, twin, other)
    assert torch.equal(model.weight, twin.weight)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    state.write_random(tmp_path)
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    state.read_random(tmp_path)
    again = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    assert first == again


def test_all_weights_come_back_and_a_tied_one_is_kept_once(tmp_path: Path) -> None:
    model = pico.causal_lm(seed=1)
    tensors = state.own_tensors(model)
    assert "lm_head.weight" not in tensors
    state.write_tensors(tmp_path / "w.safetensors", tensors)
    other = pico.causal_lm(seed=2)
    state.put_tensors(other, state.load_file(tmp_path / "w.safetensors"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_adapters_are_kept_without_their_base(tmp_path: Path) -> None:
    def dressed(seed: int) -> peft.PeftModel:
        torch.manual_seed(seed)
        model = pico.adapted(pico.causal_lm(), peft.LoraConfig(r=2, target_modules="all-linear"))
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
        return model

    model, other = dressed(0), dressed(1)
    tensors = state.own_tensors(model)
    assert {name.partition("/")[0] for name in tensors} == {"default", "second"}
    state.put_tensors(other, tensors)
    for name, tensor in state.own_tensors(other).items():
        assert torch.equal(tensor, tensors[name])


def test_weights_of_another_structure_are_refused() -> None:
    tensors = state.own_tensors(pico.causal_lm())
    tensors.pop(next(iter(tensors)))
    with pytest.raises(KeyError, match="differ in"):
        state.put_tensors(pico.causal_lm(), tensors)
