"""Whole runs on two processes give what one gives, in one run folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import pico
from keeptune import runs
from keeptune.cli import app
from keeptune.errors import FolderError, RecipeError
from keeptune.folder import ReadOnlyFolder, RunFolder
from keeptune.recipe import load_recipe

HERE = Path(__file__).parent
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
NEAR = 1e-4  # of each tensor's largest value


def write_recipe(root: Path, name: str, **trainer: Any) -> None:
    files = [str(root / f"task{task}.jsonl") for task in range(2)]
    values = {
        "model": str(root / "tiny"),
        "adapter": "none",
        "tasks": [{"name": f"t{i}", "train": n, "eval": n} for i, n in enumerate(files)],
        "guards": [
            {"name": "said", "eval": files[0], "score": "token_f1"},
            {"name": "likely", "eval": files[1], "score": "perplexity"},
        ],
        "methods": [{"ewc": {"strength": 10}}, {"replay": {"ratio": 0.5}}],
        "trainer": {
            "max_steps": 6,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            # Or Adam makes whole steps of the rounding of gradients that are next to 0.
            "adam_epsilon": 1e-3,
            **trainer,
        },
        "eval_batch_size": 3,
        "out": str(root / name),
    }
    (root / f"{name}.yaml").write_text(yaml.safe_dump(values))


# For the session: in another module's turn a module's own would be made anew.
@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of one process and of two."""
    root = tmp_path_factory.mktemp("spread")
    pico.tiny_folder(root)
    for task in range(3):
        file = root / f"task{task}.jsonl"
        pico.write_rows(file, pico.questions(task, 16))
    write_recipe(root, "one", per_device_train_batch_size=4)
    for name in ("ddp", "stopped"):
        write_recipe(root, name, per_device_train_batch_size=2)
    for name in ("fsdp", "stopped-fsdp"):
        write_recipe(root, name, per_device_train_batch_size=2, **FSDP)
    runs.run(load_recipe(root / "one.yaml"))
    runs.run(load_recipe(root / "one.yaml", [f"out={root}/alone"]))
    shutil.copytree(root / "one", root / "more")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(HERE / "spread_driver.py"), str(root)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def assert_same(root: Path, name: str, other: str = "one", tasks: int = 2) -> None:
    """Weights and what methods keep are near, R is the same."""
    last = f"state/task-{tasks:03d}"
    files = sorted((root / other / last).glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        want, got = load_file(file), load_file(root / name / last / file.name)
        assert want.keys() == got.keys()
        for key, tensor in want.items():
            if not tensor.is_floating_point():
                assert torch.equal(got[key], tensor)
                continue
            scale = float(tensor.abs().max()) if tensor.numel() else 0.0
            torch.testing.assert_close(got[key], tensor, rtol=0, atol=NEAR * scale)
    for kind in ("task", "guard"):
        want, got = (RunFolder(root / n).matrix(kind) for n in (other, name))  # type: ignore[arg-type]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["fsdp", "stopped-fsdp"])
def test_two_processes_give_what_one_gives(root: Path, name: str) -> None:
    assert_same(root, name)
    info = RunFolder(root / name).info
    assert info.status == "done"
    assert info.provenance["processes"] == 2


def test_a_next_task_is_learned_by_both(root: Path) -> None:
    runs.learn(root / "more", str(root / "task2.jsonl"), name="t2")
    assert_same(root, "ddp", "more", tasks=3)


def test_every_step_is_told_once(root: Path) -> None:
    lines = (root / "fsdp" / "steps.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert not list((root / "fsdp" / "state").glob("files*"))


def test_one_process_goes_on_where_two_were_stopped(root: Path) -> None:
    assert RunFolder(root / "stopped").info.status == "stopped"
    with pytest.raises(FolderError, match="started with 4 rows in a step, and would go on with 2"):
        runs.run(load_recipe(root / "stopped.yaml"), resume=True)
    sizes = ["trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=4"]
    runs.run(load_recipe(root / "stopped.yaml", sizes), resume=True)
    assert_same(root, "stopped", "alone")


def test_two_processes_refuse_another_number_of_rows(root: Path) -> None:
    for rank in range(2):
        assert (
            "with 4 rows in a step, and would go on with 8"
            in (root / f"refused-{rank}").read_text()
        )


def test_a_read_only_folder_writes_nothing(root: Path) -> None:
    before = {f: f.read_bytes() for f in (root / "alone").rglob("*") if f.is_file()}
    folder = ReadOnlyFolder(root / "alone")
    folder.info = folder.info.model_copy(update={"status": "failed"})
    folder.save_info()
    folder.write_cost(folder.cost())
    folder.log_step(task="t0", step=1)
    assert {f: f.read_bytes() for f in (root / "alone").rglob("*") if f.is_file()} == before


def test_other_commands_are_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["report", "x"])
    assert "`keeptune report` is one process, but was started as 2" in str(result.exception)


@pytest.mark.parametrize(
    "change", ["watch={'every': 2}", "budget={'said': 1.0}"], ids=["watch", "budget"]
)
def test_what_looks_while_training_is_one_process(
    change: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"looks at the model of one process, but .* as 2"):
        runs.run(load_recipe(root / "one.yaml", [change, f"out={tmp_path}/new"]))
    assert not (tmp_path / "new").exists()


def test_fsdp_with_one_process_is_refused(root: Path, tmp_path: Path) -> None:
    from keeptune.errors import RecipeError

    with pytest.raises(RecipeError, match="spreads a model over several processes, and this is"):
        runs.run(load_recipe(root / "fsdp.yaml", [f"out={tmp_path}/new"]))
    assert not (tmp_path / "new").exists()
