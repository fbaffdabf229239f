"""A run's model as transformers and PEFT load it, without keeptune.

Whatever a strategy's `serve` sets up is written, loaded again from what was written, and asked the
same questions. Only if the answers are those of the run does the folder appear.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from keeptune.disk import is_taken, locked, new_folder, refuse_unwritable
from keeptune.errors import FolderError, MethodError, ModelError, suggest
from keeptune.folder import RunFolder
from keeptune.likelihood import evaluating
from keeptune.loop import Loop
from keeptune.method import Context, Ids, all_bits
from keeptune.model_card import Kind, model_card
from keeptune.progress import Silent
from keeptune.reading import base_model
from keeptune.recipe import in_one_process, load_recipe
from keeptune.runs import quiet, refuse_objects
from keeptune.serving import questions
from keeptune.session import Session, open_session, read_plan

PROBES = 4  # questions of each task by which an export is compared
ROUNDING = 1e-4  # how far merging an adapter may move a logit, as a share of the largest
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The folder.
        kind: "adapter" for PEFT, on a base model that is loaded by its name, or a whole "model".
        is_merged: Whether an adapter was added into the weights, which moves them by rounding.
    """

    path: Path
    kind: Kind
    is_merged: bool


def export(path: Path, out: Path, *, task: str | None = None, merged: bool = False) -> Exported:
    """Write what a run serves as a model or adapter that needs no keeptune.

    An adapter is written alone when its base model can be loaded by name. Otherwise (a GGUF file,
    the demo model, a classifier, whose head is new) and with `merged`, it is added into the weights
    and the whole model is written.

    Args:
        path: The run folder.
        out: A new folder.
        task: What to serve; None for a model that is not told the task.
        merged: Write the whole model.

    Raises:
        KeeptuneError: Anything a user can mend; nothing is written.
    """
    folder = RunFolder(path)
    refuse_objects(folder, "Save the model that `fit` gave back with its own save_pretrained.")
    folder.require_state()
    _refuse_full(out)
    _refuse_task(folder, task, [data.name for data in folder.info.tasks])
    recipe = load_recipe(folder.path / "recipe.yaml")
    # A run at work in the folder keeps files there, which loading its state would clear away.
    with locked(folder.path), quiet():
        session = open_session(read_plan(in_one_process(recipe)))
        done = Loop(session, folder, Silent(), Event()).load_last_state()
        learned = [item.name for item in session.plan.stream][:done]
        _refuse_task(folder, task, learned)
        ctx = session.context(done - 1)
        session.chain.serve(ctx, task)
        asked = _probes(session, learned if task is None else [task])
        _refuse_more_than_a_model(session, ctx, task, asked)
        probe = _Probe(session, asked, trust_remote_code=recipe.trust_remote_code)
        return _write(probe, folder, out, task, merged)


# -- what cannot be exported ----------------------------------------------------------------------


def _refuse_full(out: Path) -> None:
    if is_taken(out):
        raise FolderError(f"{out} is not empty, and an export overwrites nothing. Give a new OUT.")
    refuse_unwritable(out)


def _refuse_task(folder: RunFolder, task: str | None, learned: list[str]) -> None:
    if not learned:
        raise FolderError(
            f"{folder.path} has learned no task yet, so there is nothing to export. "
            "Go on with `keeptune run RECIPE --resume`."
        )
    if task is not None and task not in learned:
        raise FolderError(f"{folder.path} has learned no task {task!r}. {suggest(task, learned)}")


def _refuse_more_than_a_model(
    session: Session, ctx: Context, task: str | None, asked: list[Ids]
) -> None:
    """Refuse what does not answer by its weights alone."""
    room = session.plan.max_length
    away = [m.name() for m in session.chain if m.served == "keeptune"] or [
        m.name() for m in session.chain if any(m.prompt(ctx, ids, room) != ids for ids in asked)
    ]
    if away:
        raise MethodError(
            f"{' + '.join(away)} cannot be exported: answers need keeptune beside the model. "
            "Answer from the run folder, or run without it."
        )
    if task is None and session.chain.route(ctx, asked) is not None:
        raise MethodError(
            f"{session.chain.name} chooses a task for each question of unknown task, which a model "
            "alone cannot. Export one model for each task with --task NAME."
        )


# -- writing --------------------------------------------------------------------------------------


def _write(probe: _Probe, folder: RunFolder, out: Path, task: str | None, merged: bool) -> Exported:
    session = probe.session
    model: Any = session.model
    is_adapter = isinstance(model, peft.PeftModel)
    base = base_name(session) if is_adapter and sole_adapter(model) and not merged else None
    kind: Kind = "model" if base is None else "adapter"
    exported = Exported(out, kind, is_merged=is_adapter and base is None)
    whole = _merged(model) if exported.is_merged else model
    if session.caches is not None:
        base_model(whole).config.use_cache = session.caches
    try:
        with new_folder(out, replace=False) as files:
            write_model(whole, base, files)
            session.tokenizer.save_pretrained(files)
            apart = any(method.served == "per task" for method in session.chain)
            card = model_card(folder, kind, base=hub_name(session), task=task, apart=apart)
            (files / "README.md").write_text(card, "utf-8")
            probe.compare(files, kind, exact=not exported.is_merged)
    except OSError as error:
        _refuse_full(out)
        raise FolderError(
            f"The export cannot be written to {out} ({error.strerror or error})."
        ) from error
    return exported


def write_model(model: Any, base: str | None, files: Path) -> None:
    """Write a model as it stands, or the one adapter that is active in it.

    Args:
        model: A transformers model, or a PEFT model when `base` is given.
        base: What loads the adapter's base model; None writes the whole model.
        files: An empty folder.
    """
    if base is None:
        model.save_pretrained(files)
        return
    active = sole_adapter(model)
    tensors = peft.get_peft_model_state_dict(
        model, adapter_name=active, save_embedding_layers=False
    )
    # PEFT would put an adapter that is not called "default" into a folder of its own.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, files / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[active])
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(files)
    base_model(model).generation_config.save_pretrained(files)


def sole_adapter(model: Any) -> str | None:
    """The one adapter that answers in every layer, or None where there are several."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    names = {name for layer in layers for name in layer.active_adapters}
    names = names or set(model.active_adapters)  # a soft prompt is in no layer
    return names.pop() if len(names) == 1 else None


def _merged(model: Any) -> Any:
    if not hasattr(model, "merge_and_unload"):
        kind = model.active_peft_config.peft_type.value.lower()
        raise ModelError(
            f"An adapter of the kind {kind} is no change of weights and cannot be merged into "
            "them. Export it without --merged, from a run whose model is a hub id or a folder."
        )
    return model.merge_and_unload()


def base_name(session: Session) -> str | None:
    """What loads the whole base model of an adapter anew, or None: a hub id or a folder."""
    source = session.plan.loaded.source
    if session.plan.kind == "classification":
        return None  # the base has no head, or another one
    return source if Path(source).is_dir() else hub_name(session)


def hub_name(session: Session) -> str | None:
    """The base model's name on the hub, or None."""
    source = session.plan.loaded.source
    return source if _HUB_ID.fullmatch(source) else None


# -- comparing ------------------------------------------------------------------------------------


def _probes(session: Session, tasks: list[str]) -> list[Ids]:
    """A few questions of each of these tasks."""
    every = [item.eval for item in session.plan.stream if item.name in tasks]
    return [ids for rows in every for ids in questions(session, rows)[:PROBES]]


class _Probe:
    """Questions, and what the run answers to them.

    Args:
        session: The run, set up to answer.
        asked: The questions.
        trust_remote_code: Run Python code that comes with the model.
    """

    def __init__(self, session: Session, asked: list[Ids], *, trust_remote_code: bool) -> None:
        self.session = session
        self.asked = asked
        self.settings = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
        self.wanted = self._logits(session.trainer.in_float32())

    @torch.no_grad()
    def _logits(self, model: Any) -> list[Tensor]:
        """[L, V] or [classes] for each question, one at a time, so that nothing is padded."""
        device = next(model.parameters()).device
        with evaluating(model), all_bits():
            return [
                model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu()
                for ids in self.asked
            ]

    def compare(self, files: Path, kind: Kind, *, exact: bool) -> None:
        """Load what was written as anyone would, and see that it answers as the run does.

        Raises:
            MethodError: It does not.
        """
        classes = self.session.plan.kind == "classification"
        device = next(self.session.model.parameters()).device
        self.session.model.cpu()  # it has answered, and two may be more than a GPU holds
        again = load_model(files, kind, classes=classes, **self.settings).to(device)
        pairs = list(zip(self._logits(again), self.wanted, strict=True))
        apart = max(float((got - want).abs().max()) for got, want in pairs)
        allowed = 0.0 if exact else ROUNDING * max(float(want.abs().max()) for _, want in pairs)
        if not apart <= allowed:
            raise MethodError(
                f"What {self.session.chain.name} serves cannot be exported: loaded again without "
                f"keeptune it answers otherwise (logits differ by {apart:.2g}, {allowed:.2g} is "
                "allowed). A method must be changing answers outside the weights; leave it out."
            )


def load_model(files: Path, kind: Kind, *, classes: bool, **settings: Any) -> Any:
    """Load an export by the libraries' own functions alone."""
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if classes
        else transformers.AutoModelForCausalLM
    )
    if kind == "model":
        return auto.from_pretrained(files, **settings)
    config = peft.PeftConfig.from_pretrained(str(files))
    base = auto.from_pretrained(config.base_model_name_or_path, **settings)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 by a name that transformers is about to retire.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return peft.PeftModel.from_pretrained(base, str(files))
