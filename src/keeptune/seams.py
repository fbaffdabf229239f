"""Puts the verbs of training into any `transformers.Trainer` or TRL trainer.

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

With several processes every verb runs on every process. Under DDP each has all weights, under FSDP2
its shards of them, from the first `begin_task` on; gradients are those of the global batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from keeptune import state
from keeptune.chain import Chain
from keeptune.demands import require_of
from keeptune.disk import new_folder
from keeptune.errors import DataError, MethodError, TrainingError
from keeptune.loss_terms import LossTerms
from keeptune.method import OPTIONS, Context, Method
from keeptune.overseer import Overseer
from keeptune.reading import base_model


class Seams(LossTerms):
    """Mix into any `transformers.Trainer` subclass, left of it.

    Args:
        methods: The strategy; empty is plain fine-tuning.
        online: Each task is a stream seen once, batch by batch, in the order of its rows.

    Raises:
        MethodError: Methods clash, or need what this trainer cannot give.
        RecipeError: It is online, and the trainer's arguments are not; or they recompute layers in
            PyTorch's old way.
    """

    def __init__(
        self, *args: Any, methods: Sequence[Method] = (), online: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        base = base_model(self.accelerator.unwrap_model(self.model))
        if not getattr(base, "can_generate", lambda: True)():
            # Classifiers take the number of rows in a step, but their loss is the mean of its own.
            self.model_accepts_loss_kwargs = False
        self.strategy = Chain(methods)
        self.online = online
        self.ctx: Context | None = None
        self.model: Any
        self.train_dataset: Any
        self.tasks_learned = 0
        self.end_task_seconds = 0.0
        self.files: Path | None = None  # where methods may keep files
        self.overseer: Overseer | None = None
        self._learned: set[str] = set()
        self._first_scale: dict[str, Any] = {}
        require_of(self)
        self._require_logits()
        self.add_callback(_Verbs(self))

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
            DataError: The rows are not tokenised, or the name is an earlier task's where each task
                has a part of its own.
            TrainingError: The loss is not a number.
        """
        prepared: list[str] = [c for c in self.train_dataset.column_names if c != OPTIONS]
        if missing := set(prepared) - set(dataset.column_names):
            raise DataError(
                f"The rows of task {task!r} have no column {sorted(missing)[0]!r}. Give them as "
                f"this trainer prepares its own, with {', '.join(prepared)}; for text, "
                "keeptune.tokenise does that."
            )
        if task in self._learned and any("isolation" in m.traits for m in self.strategy):
            raise DataError(
                f"A task {task!r} was learned before, and {self.strategy.name} keeps a part of the "
                "model for each task by its name. Give this one another name."
            )
        index = self.tasks_learned if index is None else index
        seed = (self.args.seed + 7919 * index) % 2**32
        # Each task starts from its own random state, so that it does not matter what ran before.
        set_seed(seed)
        self.ctx = Context(
            model=self.ready(),
            task=task,
            index=index,
            dataset=dataset,
            collate=self.data_collator,
            seed=self.args.seed,
            tokenizer=self.processing_class,
            folder=self.files,
            online=self.online,
            rows_in_step=self._rows_in_step(),
        )
        if resume is True:
            resume = get_last_checkpoint(self.args.output_dir)
        self.strategy.begin_task(self.ctx)
        self._cover_new_weights()
        if self.overseer is not None:
            self.overseer.begin(self.ctx)
        if resume:
            # Rows that a method had the model write are to be those of the run that was stopped.
            self._restore_methods(Path(resume))
        self.train_dataset = self.strategy.data(self.ctx, dataset.select_columns(prepared))
        if resume:
            self._restore(Path(resume))
        # Adam's moments of the last task must not leak into this one, nor its loss scale.
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        if (scaler := self.accelerator.scaler) is not None:
            self._first_scale = self._first_scale or scaler.state_dict()
            scaler.load_state_dict(self._first_scale)
        output = None
        if not (resume and self._is_trained(Path(resume))):
            output = super().train(resume_from_checkpoint=str(resume) if resume else None)
        self._let_go_of_the_optimizer()
        if self.overseer is not None:
            self.overseer.end(self.ctx)
        ended = time.monotonic()
        self.strategy.end_task(self.ctx)
        self.end_task_seconds = time.monotonic() - ended
        self.tasks_learned = index + 1
        self._learned.add(task)
        return output

    def _let_go_of_the_optimizer(self) -> None:
        """Adam's moments are twice the weights, and what a task's end does needs memory too."""
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.accelerator.free_memory()

    def _is_trained(self, checkpoint: Path) -> bool:
        """Whether a checkpoint was taken at the last step.

        transformers 5.23 would take one step more when the last step is in the middle of an epoch.
        """
        kept = state.read_json(checkpoint / "trainer_state.json")
        is_last = kept["global_step"] >= kept["max_steps"]
        return bool(is_last or (self.overseer is not None and self.overseer.ended))

    def _rows_in_step(self) -> int:
        each = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return int(each * self.args.world_size)

    def ready(self) -> nn.Module:
        """The model that methods see: in the precision of training, and sharded if FSDP is wanted.

        `train` would see to both after `begin_task`, and methods would meet whole weights in
        float32 first, and shards in bfloat16 later. Doing it twice changes nothing.
        """
        if self.is_fsdp_enabled:
            if not isinstance(next(self.model.parameters()), DTensor):
                self._spread()
        elif self.accelerator.native_amp and not self.args.torch_compile:
            self._in_half()
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def in_float32(self) -> nn.Module:
        """The model in the precision of its weights, which no training is to follow."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return model

    def computing(self) -> AbstractContextManager[None]:
        """The precision of training, for whatever a model is asked outside of it.

        A model's own forward has it from `ready` on. `generate` of a PEFT model goes around that.
        """
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def _in_half(self) -> None:
        """Let the model's forward compute in half precision, as `train` would."""
        if "_original_forward" not in vars(self.model):  # accelerate's mark of that
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
            # Or accelerate would take it as prepared for training, and leave out DDP.
            del self.model._is_accelerate_prepared

    def _spread(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Accelerate shards no model without an optimizer; the real one is made by `train`.
        self.model, _ = self.accelerator.prepare(self.model, torch.optim.SGD(trained))
        self.model_wrapped = self.model
        # It would put a second recomputation around the first, under other names, at each `train`.
        self.accelerator.state.fsdp_plugin.activation_checkpointing = False

    def _cover_new_weights(self) -> None:
        assert self.ctx is not None
        if not self.is_fsdp_enabled:
            if any(m.traits & {"structure", "freeze", "isolation"} for m in self.strategy):
                # DDP knows only the weights that were there, and trained, when it was made.
                self.model_wrapped = self.model
        elif not all(isinstance(p, DTensor) for p in self.ctx.trainable().values()):
            raise MethodError(
                f"The methods {self.strategy.name} add weights to a model that FSDP has sharded, "
                "and their gradients would differ between processes. Train with DDP (leave `fsdp` "
                "out), or remove the method that adds them."
            )

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Learn `train_dataset` as the next task; `learn` names it and takes other rows."""
        task = f"task {self.tasks_learned + 1}"
        return self.learn(task, self.train_dataset, resume=resume_from_checkpoint)

    def _restore(self, checkpoint: Path) -> None:
        """Put everything back that `train` does not; again, since `data` may have changed it."""
        self._restore_methods(checkpoint)

    def _restore_methods(self, checkpoint: Path) -> None:
        assert self.ctx is not None
        folder = checkpoint / "keeptune"
        if folder.is_dir():
            state.read_methods(folder, self.strategy, self.ctx)

    def save_methods(self) -> None:
        """Write the methods' state beside the trainer's own checkpoint."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", "keeptune")
        if self.ctx is not None:
            with self.folder_to_fill(folder) as files:
                state.write_methods(files, self.strategy)

    def folder_to_fill(self, path: Path) -> AbstractContextManager[Path | None]:
        """A new folder in the first process; None in the others, which help to gather."""
        return new_folder(path) if self.is_world_process_zero() else nullcontext()

    # -- the verbs inside a step --------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One micro batch; after the last one of a step the methods edit the gradients."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.ctx is None:
            return loss
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss became {loss.item()} in task {self.ctx.task!r} at step "
                f"{self.state.global_step + 1}. The weights from before this task are kept. Run "
                "with a lower trainer.learning_rate or method's strength into another --out."
            )
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.ctx.step = self.state.global_step
            self.ctx.grad_scale = 1.0 if scaler is None else scaler.get_scale()
            self.ctx.may_overflow = scaler is not None
            self.strategy.gradients(self.ctx)
        return loss


class _Verbs(TrainerCallback):
    """Calls `after_step`, and keeps the methods' state beside the trainer's checkpoints."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ctx is not None:
            self.trainer.ctx.steps = state.max_steps

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        ctx = self.trainer.ctx
        # fp16 leaves out a step whose gradients overflowed.
        if ctx is None or self.trainer.accelerator.optimizer_step_was_skipped:
            return
        # The scheduler moves after this call.
        ctx.learning_rate = float(optimizer.param_groups[0]["lr"])
        self.trainer.strategy.after_step(ctx)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_methods()
