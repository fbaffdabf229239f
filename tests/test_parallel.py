"""The same numbers on one process and on two, and however a step is computed."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

import parallel_driver as driver
from keeptune import registry
from keeptune.errors import MethodError
from parallel_driver import CASES, PLACES, PROCESSES, REFUSED, Tensors

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "many-gpus.md"
PATIENCE = 180  # seconds without a new result, for two processes on a busy machine
PAIRS = [(name, place) for name, case in CASES.items() for place in case.places]


# For the session: in another module's turn a module's own would be made anew.
@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found for every strategy: a file for each process."""
    path = tmp_path_factory.mktemp("parallel")
    logs = [path / f"{rank}.log" for rank in range(PROCESSES)]
    running = []
    for rank, log in enumerate(logs):
        arguments = [driver.__file__, str(rank), f"file://{path}/meeting", str(path)]
        with log.open("w") as out:
            command = [sys.executable, "-W", "error", *arguments]
            running.append(subprocess.Popen(command, stdout=out, stderr=out))
    ended = _wait(running, path)
    assert ended == [0] * PROCESSES, "\n".join(log.read_text()[-3000:] for log in logs)
    return path


def _wait(running: list[subprocess.Popen[bytes]], results: Path) -> list[int | None]:
    """Their exit codes; when one fails the others would wait for it for ever, and are killed."""
    end, found = time.monotonic() + PATIENCE, 0
    while time.monotonic() < end and {p.poll() for p in running} <= {None, 0}:
        if all(p.poll() == 0 for p in running):
            break
        if (now := len(list(results.iterdir()))) > found:
            end, found = time.monotonic() + PATIENCE, now
        time.sleep(0.1)
    codes = [p.poll() for p in running]
    for process in running:
        process.kill()
        process.wait()
    return codes


@cache
def alone(name: str, place: str = "single") -> Tensors:
    """What this process finds."""
    with TemporaryDirectory() as output:
        return driver.run(CASES[name], PLACES[place], Path(output))


def joined(tensors: Tensors, start: str) -> Tensor:
    """All tensors whose names start so, as one vector."""
    return torch.cat(
        [tensors[n].double().flatten() for n in sorted(tensors) if n.startswith(start)]
    )


def effect(name: str) -> float:
    """How far the methods moved the weights in two tasks.

    For methods that move none, how far training did; for weights that they add, how large these
    became.
    """
    case, end = CASES[name], "1/weights/"
    got, without = joined(alone(name), end), alone("plain, LoRA" if case.lora else "plain")
    for start in (end, "start/weights/"):
        reference = joined(without, start)
        if reference.shape == got.shape and not torch.equal(reference, got):
            return float((got - reference).norm())
    return float(got.norm())


@pytest.mark.parametrize(("name", "place"), PAIRS)
def test_weights_and_states_are_those_of_one_process(
    name: str, place: str, request: pytest.FixtureRequest
) -> None:
    limits = PLACES[place]
    if limits.processes == 1:
        got = alone(name, place)
    else:
        folder = request.getfixturevalue("folder")
        got, *others = [
            load_file(folder / f"{name}.{place}.{r}.safetensors") for r in range(PROCESSES)
        ]
        for other in others:
            assert all(torch.equal(tensor, other[key]) for key, tensor in got.items())
    want = alone(name)
    assert {key: t.shape for key, t in got.items()} == {key: t.shape for key, t in want.items()}
    for task in (0, 1):
        off = (joined(got, f"{task}/weights/") - joined(want, f"{task}/weights/")).norm()
        assert off < limits.near * effect(name)
    for kind in kinds(want):
        off = (joined(got, kind) - joined(want, kind)).norm()
        assert off <= limits.kept * joined(want, kind).norm(), kind


def kinds(tensors: Tensors) -> set[str]:
    """The starts of the names of what methods keep, as "1/ewc/anchor/"."""
    return {"/".join(key.split("/")[:3]) for key in tensors if key.split("/")[1] != "weights"}


@pytest.mark.parametrize("place", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", driver.BROKEN)
def test_a_break_in_the_middle_of_a_task_changes_no_bit(
    name: str, place: str, folder: Path
) -> None:
    for rank in range(PROCESSES):
        without = load_file(folder / f"{name}.{place}.{rank}.safetensors")
        for key, tensor in load_file(folder / f"break.{name}.{place}.{rank}.safetensors").items():
            assert torch.equal(tensor, without[key]), key


@pytest.mark.parametrize("name", REFUSED)
def test_what_sharded_weights_cannot_do_is_refused(name: str, folder: Path) -> None:
    for rank in range(PROCESSES):
        assert REFUSED[name] in (folder / f"refused.{name}.{rank}").read_text()


def places_table() -> str:
    """What the tests above hold for each method, on all weights and with LoRA."""
    lines = ["| method | DDP | FSDP2 |", "|---|---|---|"]
    for name in registry.names():
        cases = {c: case for c, case in CASES.items() if name in _names(case)}
        cells = []
        for place in ("ddp", "fsdp"):
            same = [_setting(c, case) for c, case in cases.items() if place in case.places]
            never = [_setting(c, case) for c, case in cases.items() if c in REFUSED]
            said = {"same": same, "refused": never if place == "fsdp" else []}
            cells.append("; ".join(f"{k} ({', '.join(v)})" for k, v in said.items() if v))
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _names(case: driver.Case) -> list[str]:
    return [method.name() for method in case.methods()] or ["plain"]


def _setting(name: str, case: driver.Case) -> str:
    """What sets a case apart from others of its method, after the comma of its name."""
    return name.partition(", ")[2] or ("LoRA" if case.lora else "all weights")


def test_the_page_says_what_works_where() -> None:
    text = PAGE.read_text("utf-8")
    shown = text.partition("<!-- begin places -->")[2].partition("<!-- end places -->")[0]
    assert shown.strip() == places_table(), f"put this between the page's marks:\n{places_table()}"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"is_deepspeed_enabled": True}, "under DeepSpeed.*Use FSDP2 instead"),
        ({"is_fsdp_enabled": True}, "under FSDP1.*the default is FSDP2"),
    ],
)
def test_what_hides_gradients_is_refused_before_any_compute(
    found: dict[str, bool], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trainer.create_accelerator_and_postprocess

    def found_by_accelerate(self: Any) -> None:
        # Neither can be had here: it is as if Accelerate had found them.
        own(self)
        vars(self).update(found)
        self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", found_by_accelerate)
    monkeypatch.setattr(torch.nn.Module, "__call__", pytest.fail)
    with driver.fresh_accelerator(fsdp=False), pytest.raises(MethodError, match=words):
        driver.trainer_of(CASES["plain"], PLACES["single"], tmp_path)


def rates(folder: Path, scaler: torch.amp.GradScaler | None = None) -> list[float]:
    """The learning rates that a method meets in `after_step`, one for each call."""
    with driver.fresh_accelerator(fsdp=False):
        trainer = driver.trainer_of(CASES["spring"], PLACES["single"], folder)
        if scaler is not None:
            trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
            trainer.accelerator.state._mixed_precision = "fp16"
        trainer.learn("only", driver.rows(0))
    (spring,) = trainer.strategy
    found: list[float] = spring.evidence()["rates"]
    return found


def test_after_step_knows_the_rate_of_the_step_that_was_taken(tmp_path: Path) -> None:
    left = [1 - step / driver.STEPS for step in range(driver.STEPS)]
    assert rates(tmp_path) == pytest.approx([driver.RATE * share for share in left])


def test_after_step_is_left_out_with_a_step_that_overflowed(tmp_path: Path) -> None:
    # The first scaled loss is above the largest float32; then the scale is small.
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-38)
    assert len(rates(tmp_path, scaler)) == driver.STEPS - 1
