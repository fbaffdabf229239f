"""Tensors at rest: what is read back is what was kept, as exactly as was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from keeptune.methods._anchor.kept import Kept, Place, Precision, dequantise, quantise

CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "uint8")
PLACES: tuple[Place, ...] = ("device", "cpu", "disk")


def importances(*shape: int) -> Tensor:
    """Squares of normal numbers over ten decades, as a Fisher's are."""
    generator = torch.Generator().manual_seed(0)
    decades = torch.rand(shape, generator=generator) * 5
    return (torch.randn(shape, generator=generator) * 10**-decades).square()


def test_codes_by_hand() -> None:
    # Roots 0, 1, 2, 5.1: the scale is 5.1/255 = 0.02 and the codes are 0, 50, 100, 255.
    codes, scales = quantise(torch.tensor([0.0, 1.0, 4.0, 26.01]))
    assert codes.tolist() == [0, 50, 100, 255]
    torch.testing.assert_close(scales, torch.tensor([0.02]))
    torch.testing.assert_close(dequantise(codes, scales), torch.tensor([0.0, 1.0, 4.0, 26.01]))


def test_every_block_of_256_has_its_own_scale() -> None:
    values = torch.cat([torch.full((256,), 1e6), torch.full((256,), 1e-6), torch.tensor([3.0])])
    codes, scales = quantise(values)
    assert codes.dtype == torch.uint8
    assert codes.shape == (513,)
    assert scales.shape == (3,)
    assert (codes == 255).all()
    torch.testing.assert_close(dequantise(codes, scales), values)


def test_the_error_is_within_the_stated_bound() -> None:
    values = importances(100 * 256)
    back = dequantise(*quantise(values))
    top = values.view(-1, 256).amax(1).repeat_interleave(256)
    bound = (values * top).sqrt() / 255 + top / 510**2
    assert ((back - values).abs() <= bound * 1.0001).all()
    assert (back[values < top / 510**2 * 0.9999] == 0).all()


def test_the_largest_of_a_block_are_within_a_127th() -> None:
    values = torch.linspace(0.5, 1.0, 2560)
    back = dequantise(*quantise(values))
    top = values.view(-1, 256).amax(1).repeat_interleave(256)
    near = values > 0.9 * top
    assert near.sum() > 1000
    assert ((back - values).abs()[near] <= values[near] / 127).all()


def test_zero_stays_zero() -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, 1.0]).repeat_interleave(256)
    back = dequantise(*quantise(values))
    assert (back[:512] == 0).all()
    assert (back[512:768] > 0).all()


def test_what_was_read_back_is_kept_the_same_again() -> None:
    codes, _ = quantise(importances(5000))
    again, _ = quantise(dequantise(*quantise(importances(5000))))
    assert torch.equal(codes, again)


@pytest.mark.parametrize("bad", [-1e-30, float("nan"), float("inf")])
def test_only_finite_values_from_0_fit_in_8_bits(bad: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Kept(torch.tensor([1.0, bad]), "uint8")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (16, 16), (601, 1000)])
def test_it_comes_back_in_its_shape_and_block_by_block(
    shape: tuple[int, ...], precision: Precision, place: Place
) -> None:
    values = importances(*shape)
    kept = Kept(values, precision, place)
    full = kept.full(CPU)
    tolerance = {"float32": 0.0, "bfloat16": 2**-8, "uint8": 1 / 127}[precision]
    largest = values.max().item() if values.numel() else 0.0
    torch.testing.assert_close(full, values, rtol=tolerance, atol=tolerance * largest)
    assert (kept.shape, kept.numel) == (values.shape, values.numel())
    parts = [kept.block(i, i + 512, CPU) for i in range(0, kept.numel, 512)]
    assert torch.equal(torch.cat([*parts, torch.empty(0)]), full.view(-1))


@pytest.mark.parametrize(("precision", "per_weight"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_per_weight(precision: Precision, per_weight: int) -> None:
    assert Kept(torch.zeros(10, 100), precision).nbytes == per_weight * 1000


@pytest.mark.parametrize("place", PLACES)
def test_8_bits_are_one_byte_and_a_64th_per_weight(place: Place) -> None:
    assert Kept(torch.zeros(256 * 64), "uint8", place).nbytes == 256 * 64 * (1 + 1 / 64)


@pytest.mark.parametrize("place", PLACES)
def test_float32_means_as_exact_as_the_tensor_is(place: Place) -> None:
    third = torch.full((300,), 1 / 3, dtype=torch.float64)
    assert torch.equal(Kept(third, "float32", place).full(CPU), third)


def test_a_block_of_an_exact_tensor_is_no_copy() -> None:
    kept = Kept(torch.arange(600.0))
    assert kept.block(256, 512, CPU).data_ptr() == kept.full(CPU).data_ptr() + 256 * 4


def test_what_is_kept_is_not_the_tensor_itself() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    kept = Kept(weight)
    with torch.no_grad():
        weight.zero_()
    assert (kept.full(CPU) == 1).all()
    assert not kept.full(CPU).requires_grad


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_can_be_replaced_in_the_same_memory(precision: Precision, place: Place) -> None:
    kept = Kept(torch.zeros(30, 40), precision, place)
    before = [part.data_ptr() for part in kept.tensors().values()]
    kept.replace(torch.full((40, 30), 4.0).t())
    torch.testing.assert_close(kept.full(CPU), torch.full((30, 40), 4.0))
    kept.write(256, torch.full((256,), 9.0))
    torch.testing.assert_close(kept.block(256, 512, CPU), torch.full((256,), 9.0))
    torch.testing.assert_close(kept.block(512, 1200, CPU), torch.full((688,), 4.0))
    assert [part.data_ptr() for part in kept.tensors().values()] == before


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="got one of"):
        Kept(torch.zeros(2, 3)).replace(torch.zeros(3, 2))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_survives_a_file_bit_for_bit(precision: Precision, place: Place, tmp_path: Path) -> None:
    kept = Kept(importances(77, 10), precision, place)
    # An empty name is possible only with something in front of it.
    named = {f"importance/{name}": tensor for name, tensor in kept.tensors().items()}
    save_file(named, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    tensors = {name.removeprefix("importance/"): tensor for name, tensor in loaded.items()}
    again = Kept.restored(tensors, kept.shape, precision, place, CPU)
    assert torch.equal(again.full(CPU), kept.full(CPU))
    assert again.nbytes == kept.nbytes
    again.replace(torch.ones(77, 10))
    torch.testing.assert_close(again.full(CPU), torch.ones(77, 10))


def test_on_disk_it_leaves_no_file_and_holds_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    open_before = len(os.listdir("/proc/self/fd"))
    kept = [Kept(torch.ones(1000), precision, "disk") for precision in PRECISIONS]
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_before
    mapped = Path("/proc/self/maps").read_text("utf-8")
    assert mapped.count(str(tmp_path)) >= 4  # one file each, and one for the scales
    assert all((one.full(CPU) - 1).abs().max() < 1e-6 for one in kept)


def test_off_the_device_means_on_the_cpu() -> None:
    there = torch.ones(4, device="meta")
    assert Kept(there, "bfloat16").tensors()[""].device.type == "meta"
    assert Kept(torch.ones(4), "float32", "cpu").tensors()[""].device == CPU
