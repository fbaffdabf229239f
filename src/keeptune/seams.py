"""The only file that knows `transformers.Trainer` and TRL: it puts the seven verbs into them.

    class MyTrainer(Seams, SFTTrainer): ...
    trainer = MyTrainer(model=model, methods=[EWC(), Replay()], ...)
    trainer.learn("first", first_rows)
    trainer.learn("second", second_rows)

Where each verb sits, and why there:

* `loss` in `compute_loss`, as a mean over the answers of the whole accumulated batch, so that the
  number of micro batches does not change its weight.
* `gradients` in `training_step`, after the last micro batch's backward and before clipping, times
  the fp16 scale. transformers' own `on_pre_optimizer_step` fires after clipping, and a penalty in
  `compute_loss` would be paid once per micro batch and fail on sharded tensors.
* `after_step` in the public callback `on_optimizer_step`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from keeptune import state
from keeptune.errors import DataError, MethodError, RecipeError, TrainingError
from keeptune.folder import new_folder
from keeptune.method import IGNORED, Batch, Chain, Context, Method

Report = Callable[[int, int, dict[str, float]], None]


# At run time the trainer comes from the class that mixes this in.
_Base: Any = object


class Seams(_Base):
    """Mix into any `transformers.Trainer` subclass, left of it.

    Args:
        methods: The strategy; empty is plain fine-tuning.

    Raises:
        MethodError: Methods clash, or need what this trainer cannot give.
    """

    def __init__(self, *args: Any, methods: Sequence[Method] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strategy = Chain(methods)
        self.ctx: Context | None = None
        self.tasks_learned = 0
        self.tokens_trained: Tensor | int = 0
        if self.is_deepspeed_enabled:
            raise MethodError(
                "keeptune cannot reach the gradients under DeepSpeed, which steps inside its own "
                "backward. Use FSDP2 instead (`fsdp: true` in the trainer's settings)."
            )
        self._require_logits()
        self.add_callback(_Verbs(self))

    def _require_logits(self) -> None:
        below = getattr(super().compute_loss, "__func__", None)
        native = below in (Trainer.compute_loss, SFTTrainer.compute_loss)
        plain_loss = getattr(self.args, "loss_type", "nll") == "nll"
        if "logits" in self.strategy.needs and not (native and plain_loss):
            who = [m.name() for m in self.strategy if "logits" in m.needs]
            raise MethodError(
                f"The method {who[0]!r} needs the model's logits, which only the ordinary "
                "language-model or classification loss gives. Remove it, or use loss_type: nll."
            )

    # -- one task -----------------------------------------------------------------------------

    def learn(
        self, task: str, dataset: Dataset, *, index: int | None = None, resume: Any = None
    ) -> Any:
        """Learn one task: begin_task, data, train, end_task.

        Args:
            task: Its name.
            dataset: Its tokenised rows: `input_ids` and `labels`.
            index: Its position in the stream; default: after those learned by this trainer.
            resume: A checkpoint inside this task (path, or True for the trainer's last).

        Returns:
            The trainer's TrainOutput; None when the checkpoint was the task's last step.

        Raises:
            DataError: The rows are not tokenised.
            TrainingError: The loss is not a number.
        """
        if "input_ids" not in dataset.column_names:
            raise DataError(
                f"The rows of task {task!r} have the columns {dataset.column_names}, not "
                "`input_ids` and `labels`. Tokenise them with keeptune.tokens.tokenise first."
            )
        index = self.tasks_learned if index is None else index
        seed = (self.args.seed + 7919 * index) % 2**32
        # Each task starts from its own random state, so that it does not matter what ran before.
        set_seed(seed)
        self.ctx = Context(
            model=self.accelerator.unwrap_model(self.model),
            task=task,
            index=index,
            dataset=dataset,
            collate=self.data_collator,
            seed=self.args.seed,
        )
        self.strategy.begin_task(self.ctx)
        self.train_dataset = self.strategy.data(self.ctx, dataset)
        if resume is True:
            resume = get_last_checkpoint(self.args.output_dir)
        if resume:
            self._restore(Path(resume))
        # Adam's moments of the last task must not leak into this one.
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        output = None
        if not (resume and _is_trained(Path(resume))):
            output = super().train(resume_from_checkpoint=str(resume) if resume else None)
        self.strategy.end_task(self.ctx)
        self.tasks_learned = index + 1
        return output

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Learn `train_dataset` as the next task; `learn` names it and takes other rows."""
        task = f"task {self.tasks_learned + 1}"
        return self.learn(task, self.train_dataset, resume=resume_from_checkpoint)

    def _restore(self, checkpoint: Path) -> None:
        assert self.ctx is not None
        folder = checkpoint / "keeptune"
        if folder.is_dir():
            state.read_methods(folder, self.strategy, self.ctx)

    def save_methods(self) -> None:
        """Write the methods' state beside the trainer's own checkpoint."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", "keeptune")
        if self.is_world_process_zero() and self.ctx is not None:
            with new_folder(folder) as files:
                state.write_methods(files, self.strategy)

    # -- the verbs inside a step --------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss plus the methods' terms."""
        if self.ctx is None or not model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch: Batch = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        outputs = None
        if "logits" in self.strategy.needs:
            # TRL's own loss fuses the head and has no logits; this is the same loss without it.
            loss, outputs = Trainer.compute_loss(
                self, model, {**inputs, **self._no_cache()}, True, num_items_in_batch
            )
        else:
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        self.ctx.answers_in_step = self._answers(batch, num_items_in_batch)
        self.ctx.step = self.state.global_step
        term = self.strategy.loss(self.ctx, batch, outputs)
        return loss if term is None else loss + term

    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if isinstance(self, SFTTrainer) else {}

    def _answers(self, batch: Batch, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        # What a sum over this micro batch's answers is divided by. Where the trainer normalises
        # by the whole accumulated batch it adds micro batches up; else it averages them.
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs
        if scaled and num_items_in_batch is not None:
            averaged = self.args.average_tokens_across_devices
            return num_items_in_batch / (self.accelerator.num_processes if averaged else 1)
        labels = batch["labels"]
        labels = labels if labels.dim() == 1 else labels[:, 1:]
        return (labels != IGNORED).sum().clamp(min=1)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One micro batch; after the last one of a step the methods edit the gradients."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.ctx is None:
            return loss
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss became {loss.item()} in task {self.ctx.task!r} at step "
                f"{self.state.global_step + 1}. The weights from before this task are kept; lower "
                "trainer.learning_rate or a method's strength, and run again with --resume."
            )
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.ctx.step = self.state.global_step
            self.ctx.grad_scale = 1.0 if scaler is None else scaler.get_scale()
            self.strategy.gradients(self.ctx)
        return loss


def _is_trained(checkpoint: Path) -> bool:
    """Whether a checkpoint was taken at the last step.

    transformers 5.23 would take one step more when the last step is in the middle of an epoch.
    """
    kept = state.read_json(checkpoint / "trainer_state.json")
    return bool(kept["global_step"] >= kept["max_steps"])


class _Verbs(TrainerCallback):
    """Calls `after_step`, and keeps the methods' state beside the trainer's checkpoints."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ctx is not None:
            self.trainer.strategy.after_step(self.trainer.ctx)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not isinstance(self.trainer, Checkpoints):
            self.trainer.save_methods()


class Checkpoints(Seams):
    """Replaces the Trainer's pickled checkpoints by whole folders of safetensors and JSON.

    Set `progress_root` before `learn`. The newest folder in it is a full state in the middle of
    a task; `learn(resume=folder)` goes on from there bit for bit.
    """

    progress_root: Path

    def watch(self, report: Report, minutes: float, stop: Event) -> None:
        """Report progress, save a state every so often, and stop when asked.

        Args:
            report: Called with (steps done, steps in all, figures) after each step.
            minutes: Wall-clock minutes between two saved states of a task; 0 saves at each step.
            stop: Once set, training saves a state at the next step and ends.
        """
        self.add_callback(_Watch(self, report, minutes * 60, stop))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Counts the tokens trained on, beside what `Seams` does."""
        self.tokens_trained = self.tokens_trained + inputs["attention_mask"].sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.ctx is not None
        if not self.is_world_process_zero():
            return
        older = list(self.progress_root.glob("[0-9]*-[0-9]*"))
        name = f"{self.ctx.index:03d}-{self.state.global_step:09d}"
        with new_folder(self.progress_root / name) as folder:
            state.write_tensors(folder / "weights.safetensors", state.own_tensors(self.ctx.model))
            state.write_methods(folder, self.strategy)
            state.write_optimizer(folder, self.optimizer)
            state.write_random(folder)
            state.write_json(folder / "scheduler.json", self.lr_scheduler.state_dict())
            if self.accelerator.scaler is not None:
                state.write_json(folder / "scaler.json", self.accelerator.scaler.state_dict())
            self.state.save_to_json(str(folder / "trainer_state.json"))
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)

    def _restore(self, checkpoint: Path) -> None:
        assert self.ctx is not None
        state.read_methods(checkpoint, self.strategy, self.ctx)
        weights = load_file(checkpoint / "weights.safetensors")
        state.put_tensors(self.ctx.model, weights)

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


class _Watch(TrainerCallback):
    """Progress, saved states and the stop signal of `Checkpoints.watch`."""

    def __init__(self, trainer: Any, report: Report, seconds: float, stop: Event) -> None:
        self.trainer, self.report, self.seconds, self.stop = trainer, report, seconds, stop
        self.saved_at = time.monotonic()
        self.figures: dict[str, float] = {}
        self.last = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = time.monotonic()
        self.last = (self.saved_at, int(self.trainer.tokens_trained))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if "loss" not in logs:
            return
        now, tokens = time.monotonic(), int(self.trainer.tokens_trained)
        self.figures = {
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm", 0.0),
            "tokens_per_second": (tokens - self.last[1]) / max(now - self.last[0], 1e-9),
        }
        self.last = (now, tokens)
        self.report(state.global_step, state.max_steps, self.figures)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, state.max_steps, {})
        if self.stop.is_set():
            control.should_save = control.should_training_stop = True
        elif time.monotonic() - self.saved_at >= self.seconds:
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

    Raises:
        RecipeError: The settings contradict each other; the message is the library's own.
    """
    own: dict[str, Any] = dict(OWN_KEYS)
    if not torch.cuda.is_available():
        # TRL's defaults are for GPUs; on a CPU bfloat16 and recomputation only cost.
        own |= {"bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}
    try:
        if kind == "classification":
            arguments: Any = TrainingArguments(**{**own, **settings})
        else:
            # Rows come tokenised and cut; TRL must not cut them again.
            arguments = SFTConfig(**{**own, "max_length": None, **settings})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"trainer: {error}") from error
    trainer_class = ClassifierTrainer if kind == "classification" else TextTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=first_rows,
        processing_class=tokenizer,
        data_collator=collate,
        methods=methods,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
