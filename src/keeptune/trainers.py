"""The two trainers of `keeptune run`, with checkpoints that are whole and hold no pickle.

Together with `seams` the only file that knows `transformers.Trainer` and TRL.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from keeptune import state
from keeptune.demands import ONLINE
from keeptune.errors import RecipeError
from keeptune.method import Method
from keeptune.processes import any_says, is_first, launched
from keeptune.reading import base_model
from keeptune.seams import Seams

Report = Callable[[int, int, dict[str, float]], None]


class Checkpoints(Seams):
    """Replaces the Trainer's pickled checkpoints by whole folders of safetensors and JSON.

    Set `progress_root` before `learn`. The newest folder in it is a full state in the middle of
    a task; `learn(resume=folder)` goes on from there bit for bit.
    """

    progress_root: Path
    tokens_trained: Tensor | int = 0

    def save_methods(self) -> None:
        """Nothing: `_save_checkpoint` keeps the methods' state with the rest."""

    def watch(self, report: Report, minutes: float, stop: Event) -> None:
        """Report progress, save a state every so often, and stop when asked.

        Args:
            report: Called with (steps done, steps in all, figures) after each step.
            minutes: Wall-clock minutes between two saved states of a task; 0 saves at each step.
            stop: Once set, training saves a state at the next step and ends.
        """
        self.add_callback(_Looks(self))
        self.add_callback(_Watch(self, report, minutes * 60, stop))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Counts the tokens trained on, beside what `Seams` does."""
        self.tokens_trained = self.tokens_trained + inputs["attention_mask"].sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.ctx is not None
        older = list(self.progress_root.glob("[0-9]*-[0-9]*"))
        name = f"{self.ctx.index:03d}-{self.state.global_step:09d}"
        with self.folder_to_fill(self.progress_root / name) as folder:
            weights = state.own_tensors(self.ctx.model)
            state.write_tensors(folder and folder / "weights.safetensors", weights)
            state.write_methods(folder, self.strategy)
            if self.overseer is not None:
                self.overseer.write(folder)
            state.write_optimizer(folder, self.optimizer)
            state.write_random(folder)
            if folder is None:
                return
            rows = {"rows": self.ctx.rows_in_step, "task_rows": len(self.ctx.dataset)}
            state.write_json(folder / "step.json", rows)
            state.write_json(folder / "scheduler.json", self.lr_scheduler.state_dict())
            if self.accelerator.scaler is not None:
                state.write_json(folder / "scaler.json", self.accelerator.scaler.state_dict())
            self.state.save_to_json(str(folder / "trainer_state.json"))
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)

    def _restore_methods(self, checkpoint: Path) -> None:
        assert self.ctx is not None
        state.read_methods(checkpoint, self.strategy, self.ctx)

    def _restore(self, checkpoint: Path) -> None:
        super()._restore(checkpoint)
        assert self.ctx is not None
        rows = state.read_json(checkpoint / "step.json")["rows"]
        if rows != self.ctx.rows_in_step:
            raise RecipeError(
                f"Task {self.ctx.task!r} was stopped in its middle with {rows} rows in a step, and "
                f"would go on with {self.ctx.rows_in_step}. Start as many processes as before, or "
                "change trainer.per_device_train_batch_size or "
                "trainer.gradient_accumulation_steps so that their product is the same."
            )
        weights = load_file(checkpoint / "weights.safetensors")
        state.put_tensors(self.ctx.model, weights)
        if self.overseer is not None:
            self.overseer.read(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `_restore` has put the weights back already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state.read_optimizer(Path(checkpoint), self.optimizer)
        self.lr_scheduler.load_state_dict(state.read_json(Path(checkpoint, "scheduler.json")))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            kept = state.read_json(Path(checkpoint, "scaler.json"))
            self.accelerator.scaler.load_state_dict(kept)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.read_random(Path(checkpoint))


class _Looks(TrainerCallback):
    """Lets the overseer look after each step, and ends the task when it says so."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.overseer is not None:
            self.trainer.overseer.start(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.overseer is None:
            return
        seen = trainer.overseer.after_step(trainer.ctx, state.global_step, state.max_steps)
        if seen:
            wanted = control.should_log
            # TRL's own would take the means of its figures since the last log, and begin anew.
            Trainer.log(trainer, seen)
            control.should_log = wanted
        if trainer.overseer.ended:
            control.should_training_stop = True


class _Watch(TrainerCallback):
    """Progress, saved states and the stop signal of `Checkpoints.watch`."""

    def __init__(self, trainer: Any, report: Report, seconds: float, stop: Event) -> None:
        self.trainer, self.report, self.seconds, self.stop = trainer, report, seconds, stop
        self.saved_at = time.monotonic()
        self.last = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = time.monotonic()
        self.last = (self.saved_at, int(self.trainer.tokens_trained) * args.world_size)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if "loss" not in logs:
            return
        # Other processes have other rows, of about as many tokens.
        now, tokens = time.monotonic(), int(self.trainer.tokens_trained) * args.world_size
        figures = {
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm", 0.0),
            "tokens_per_second": (tokens - self.last[1]) / max(now - self.last[0], 1e-9),
        }
        self.last = (now, tokens)
        self.report(state.global_step, state.max_steps, figures)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, state.max_steps, {})
        is_due = is_first() and time.monotonic() - self.saved_at >= self.seconds
        is_over, is_due = any_says([self.stop.is_set(), is_due], args.device)
        if is_over:
            self.stop.set()
            control.should_save = control.should_training_stop = True
        elif is_due:
            control.should_save = True
            self.saved_at = time.monotonic()


class TextTrainer(Checkpoints, SFTTrainer):
    """What `keeptune run` trains language models with."""


class ClassifierTrainer(Checkpoints, Trainer):
    """What `keeptune run` trains sequence classifiers with."""


OWN_KEYS = {
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    # A loss that is not a number must be seen, not averaged away.
    "logging_nan_inf_filter": False,
}


def build_trainer(
    kind: str,
    model: nn.Module,
    tokenizer: Any,
    first_rows: Dataset,
    methods: Sequence[Method],
    settings: dict[str, Any],
    collate: Callable[..., Any],
    *,
    online: bool = False,
) -> TextTrainer | ClassifierTrainer:
    """The trainer of a run.

    Args:
        kind: "causal_lm" or "classification".
        model: With its adapter, if any.
        tokenizer: The model's.
        first_rows: The first task's tokenised rows.
        methods: The strategy.
        settings: Keys of SFTConfig or TrainingArguments, `output_dir` and `seed` included.
        collate: Rows to a padded batch.
        online: Each task is a stream seen once; the settings that this needs are filled in.

    Raises:
        RecipeError: The settings contradict each other; the message is the library's own.
    """
    own: dict[str, Any] = dict(OWN_KEYS) | (ONLINE if online else {})
    if not torch.cuda.is_available():
        # TRL's defaults are for GPUs; on a CPU bfloat16 and recomputation only cost.
        own |= {"bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}
    if not torch.accelerator.is_available():
        own["use_cpu"] = True  # or several processes would not meet, and each train alone
    with _in_words():
        if kind == "classification":
            arguments: Any = TrainingArguments(**{**own, **settings})
        else:
            # Rows come tokenised and cut; TRL must not cut them again.
            arguments = SFTConfig(**{**own, "max_length": None, **settings})
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or transformers would copy the model to all of them at each step
    if arguments.activation_checkpointing:
        leave_inputs_alone(model)
    trainer_class = ClassifierTrainer if kind == "classification" else TextTrainer
    if arguments.world_size != launched():
        raise RecipeError(
            f"keeptune was started as {launched()} processes, but trainer.* lets "
            f"{arguments.world_size} train together. Leave `use_cpu` and `ddp_backend` out, or "
            "start one process."
        )
    if arguments.fsdp and arguments.world_size == 1:
        raise RecipeError(
            "trainer.fsdp spreads a model over several processes, and this is one. Start "
            "`torchrun --nproc_per_node N -m keeptune run RECIPE`, or leave `fsdp` out."
        )
    with _in_words():
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=first_rows,
            processing_class=tokenizer,
            data_collator=collate,
            methods=methods,
            online=online,
        )
        trainer.remove_callback(PrinterCallback)
        _try_optimizer(trainer)
    return trainer


@contextmanager
def _in_words() -> Iterator[None]:
    """Say what the libraries have against some settings."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, ImportError, OSError, RuntimeError) as error:
        raise RecipeError(f"trainer: {error}") from error


def _try_optimizer(trainer: Any) -> None:
    """Build the first task's optimizer and let go of it, to hear at once what is wrong with it."""
    if trainer.is_fsdp_enabled:
        return  # it is to be of shards
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.optimizer = trainer.lr_scheduler = None


def leave_inputs_alone(model: Any) -> None:
    """Keep transformers from asking for gradients of the input when it recomputes layers.

    Only reentrant recomputation needs them. With them all frozen layers below the first trained one
    are computed again and differentiated, though nobody wants to know.
    """
    base_model(model).enable_input_require_grads = _nothing


def _nothing() -> None:
    """A model's attribute must be a function with a name, for copies of it."""


def loss_of(kind: str, model: nn.Module, logits: bool) -> Callable[..., Tensor]:
    """How the trainers compute a plain loss, outside a trainer.

    Args:
        kind: "causal_lm" or "classification".
        model: With its adapter, if any; it may be changed for this.
        logits: Whether a method needs the logits of all positions.

    Returns:
        Takes the model and a batch with labels.
    """
    if kind == "classification" or logits:
        return lambda model, batch: model(**batch).loss
    add_fused_lm_head(base_model(model), outputs=("log_probs", "entropy", "is_top1"))
    return lambda model, batch: model(**batch, use_cache=False, fused_lm_head=True).loss
