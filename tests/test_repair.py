"""A model that was tuned elsewhere is taken back as far as its guards need."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import pico
from keeptune import repair as module
from keeptune.cli import app
from keeptune.errors import FolderError, ModelError, RecipeError
from keeptune.guard import Guard
from keeptune.progress import Silent
from keeptune.recipe_parts import BudgetRecipe
from keeptune.rows import read_rows

TEXTS = [{"text": f"the {word} sat on the mat and {word} again"} for word in "abcdefghijklmnopqrst"]


def guard(rows: list[dict[str, Any]] = TEXTS) -> Guard:
    return Guard("wiki", read_rows(rows), "perplexity")


def budget(**losses: Any) -> BudgetRecipe:
    return BudgetRecipe.model_validate(losses)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base model, and one tuned away from it so far that its guard is lost."""
    base = tmp_path / "base"
    shutil.move(pico.tiny_folder(tmp_path), base)
    shutil.copytree(base, tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    moved = {n: t + torch.randn(t.shape, generator=generator) for n, t in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
    return tmp_path


def run(home: Path, tuned: str = "tuned", **changes: Any) -> module.Repaired:
    settings: dict[str, Any] = {"guards": [guard()], "budget": budget(wiki=0.2), **changes}
    base, out = str(home / "base"), home / "out"
    return module.repair(base, str(home / tuned), out, progress=Silent(), **settings)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_step_taken_is_the_one_written_and_the_inputs_stay(home: Path) -> None:
    inputs = {name: bytes_of(home / name) for name in ("base", "tuned")}
    done = run(home, tasks=[Guard("new", read_rows(TEXTS[:9]), "perplexity")])
    step = done.frontier.mix
    assert 0 < step < 1
    before, after = weights(home / "base"), weights(home / "tuned")
    for name, got in weights(home / "out").items():
        torch.testing.assert_close(got, before[name] + step * (after[name] - before[name]))
    last = done.frontier.tried[-1]
    assert (last.mix, last.sample, last.inside) == (step, "fresh", True)
    assert [p.name for p in last.points] == ["new", "wiki"]
    assert {name: bytes_of(home / name) for name in inputs} == inputs
    told = json.loads((home / "out" / "repair.json").read_text())
    assert (told["mix"], told["budget"]["wiki"]) == (step, 0.2)
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "out")
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_all_of_the_tuning_is_bit_for_bit_the_tuned_model(home: Path) -> None:
    assert run(home, budget=budget(wiki=1e12)).frontier.mix == 1
    for name, got in weights(home / "out").items():
        assert torch.equal(got, weights(home / "tuned")[name])


def test_where_nothing_is_allowed_it_is_the_base_model(home: Path) -> None:
    assert run(home, budget=budget(wiki=0.0)).frontier.mix == 0
    for name, got in weights(home / "out").items():
        assert torch.equal(got, weights(home / "base")[name])


def test_half_precision_is_measured_as_it_is_written(home: Path) -> None:
    for name in ("base", "tuned"):
        file = home / name / "model.safetensors"
        halved = {n: t.bfloat16() for n, t in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})
    done = run(home)
    assert 0 < done.frontier.mix < 1
    assert {t.dtype for t in weights(home / "out").values()} == {torch.bfloat16}
    again = [guard()]
    fresh = transformers.AutoModelForCausalLM.from_pretrained(home / "out", dtype=torch.float32)
    fresh.save_pretrained(home / "read")
    shutil.copyfile(home / "base" / "tokenizer.json", home / "read" / "tokenizer.json")
    shutil.copyfile(
        home / "base" / "tokenizer_config.json", home / "read" / "tokenizer_config.json"
    )
    shutil.rmtree(home / "out")
    # The written model against itself: no change at all.
    same = module.repair(
        str(home / "read"), str(home / "read"), home / "out",
        guards=again, budget=budget(wiki=0.2), progress=Silent(),
    )  # fmt: skip
    assert same.frontier.tried[-1].points[0].score == pytest.approx(
        done.frontier.tried[-1].points[0].score, rel=1e-6
    )


def test_several_files_and_no_pickles(home: Path) -> None:
    for name in ("base", "tuned"):
        tensors = weights(home / name)
        half = len(tensors) // 2
        (home / name / "model.safetensors").unlink()
        for i, part in enumerate((list(tensors)[:half], list(tensors)[half:])):
            file = home / name / f"model-{i}.safetensors"
            save_file({n: tensors[n] for n in part}, file, metadata={"format": "pt"})
        index = {n: f"model-{i >= half:d}.safetensors" for i, n in enumerate(tensors)}
        index_file = home / name / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (home / "tuned" / "optimizer.pt").write_bytes(b"x")
    run(home, budget=budget(wiki=1e12))
    assert sorted(f.name for f in (home / "out").glob("model*")) == [
        "model-0.safetensors",
        "model-1.safetensors",
        "model.safetensors.index.json",
    ]
    assert not (home / "out" / "optimizer.pt").exists()


def adapter(home: Path, **settings: Any) -> Path:
    """A LoRA adapter whose update is large."""
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "base")
    base.config.tie_word_embeddings = False  # peft warns of adapters on tied ones
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.save_pretrained(home / "base")
    config = peft.LoraConfig(r=4, target_modules=["v_proj", "lm_head"], **settings)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3.0, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(home / "adapter", save_embedding_layers=False)
    return home / "adapter"


def test_an_adapter_is_scaled(home: Path) -> None:
    before = load_file(adapter(home) / "adapter_model.safetensors")
    step = run(home, "adapter", budget=budget(wiki=0.2)).frontier.mix
    assert 0 < step < 1
    got = load_file(home / "out" / "adapter_model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(got[name], tensor * (step if "lora_B" in name else 1))
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "base")
    assert peft.PeftModel.from_pretrained(base, home / "out").peft_config["default"].r == 4


def test_an_adapter_that_cannot_be_scaled_is_refused(home: Path) -> None:
    adapter(home, use_dora=True)
    with pytest.raises(ModelError, match="has use_dora, and only a plain LoRA adapter can be sca"):
        run(home, "adapter")
    assert not (home / "out").exists()


def test_what_is_not_tuned_from_the_base_is_refused(home: Path) -> None:
    file = home / "tuned" / "model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first][:2]}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{first} has the shape .* A repair needs the same"):
        run(home)
    del tensors[first]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"do not hold the same weights .{first} is in one alone"):
        run(home)
    with pytest.raises(ModelError, match="'nobody/nothing' is no folder here and cannot be"):
        module.repair(
            str(home / "base"), "nobody/nothing", home / "out",
            guards=[guard()], budget=budget(wiki=0.2), progress=Silent(),
        )  # fmt: skip
    file.unlink()
    with pytest.raises(ModelError, match=r"holds no \.safetensors"):
        run(home)
    assert not (home / "out").exists()


def test_an_adapter_of_another_base_and_broken_files_are_refused(home: Path) -> None:
    folder = adapter(home)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t[:, :1].contiguous() for n, t in tensors.items()}, file)
    words = "cannot be read as a tuning of .*base: "
    with pytest.raises(ModelError, match=words + "Error.* size mismatch"):
        run(home, "adapter")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ModelError, match=words):
        run(home, "adapter")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=words):
        run(home, "adapter")
    with pytest.raises(ModelError, match=r"Model '.*/gone' is not there"):
        run(home, "gone")
    assert not (home / "out").exists()


def test_bad_requests_are_refused_before_anything_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.models, "load", pytest.fail)
    with pytest.raises(RecipeError, match=r"--budget names 'wikki', .* Did you mean"):
        run(home, budget=budget(wikki=1.0))
    with pytest.raises(RecipeError, match="one step in all layers: leave"):
        run(home, budget=budget(wiki=1.0, blocks=3))
    with pytest.raises(RecipeError, match="'wiki' has 5 rows, and a budget needs at least 16"):
        run(home, guards=[guard(TEXTS[:5])])
    (home / "out").mkdir()
    (home / "out" / "x").touch()
    with pytest.raises(FolderError, match="is not empty, and a repair overwrites nothing"):
        run(home)


def test_a_full_disk_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        run(home)
    assert not (home / "out").exists()
    assert not list(home.glob(".out*"))


def test_the_command(home: Path) -> None:
    text = home / "wiki.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    words = ["repair", str(home / "base"), str(home / "tuned"), str(home / "out")]
    result = CliRunner().invoke(app, [*words, "--guard", f"wiki={text}", "--budget", "wiki=1e12"])
    assert result.exit_code == 0, result.output
    assert "Repaired: " in result.output
    assert "100 % of the tuning" in result.output
    for bad in ("wiki", "wiki=x", "wiki=-1"):
        result = CliRunner().invoke(app, [*words, "--guard", "capitals", "--budget", bad])
        assert f"--budget {bad}: give NAME=LOSS" in str(result.exception)
    for bad in ("wiki=", f"={text}"):
        result = CliRunner().invoke(app, [*words, "--guard", bad, "--budget", "wiki=1"])
        assert str(result.exception).startswith(f"--guard {bad}: give NAME=FILE")
    result = CliRunner().invoke(app, [*words, "--guard", f"wiki={text}", "--budget", "blocks=3"])
    assert str(result.exception) == (
        "--budget blocks=3: blocks is a setting of budgets. Give the guard another name."
    )


def test_probes_are_found_again_by_their_place(home: Path) -> None:
    # Two guards of one group are told apart by their position, not by their rows.
    pair = [dataclasses.replace(guard(), name=name) for name in ("a", "b")]
    done = run(home, guards=pair, budget=budget(a=1e12, b=1e12))
    assert [p.name for p in done.frontier.tried[0].points] == ["a", "b"]
