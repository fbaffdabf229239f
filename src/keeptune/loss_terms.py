"""The verb `loss` inside a trainer: the trainer's own loss and the methods' terms.

A method that needs logits is given those of the whole micro batch. One that needs answers adds its
terms to `ctx.answers`; they and cross-entropy are then computed in one pass over the head, if the
head is known, and else from the logits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

from keeptune.answers import Answers
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.head_pass import CrossEntropy
from keeptune.method import IGNORED, Batch, Context, Method
from keeptune.reading import find_head

_OUTPUTS = {"logits", "answers"}
# At run time the trainer comes from the class that mixes this in.
_Base: Any = object


class LossTerms(_Base):
    """The part of `Seams` that computes a micro batch's loss."""

    strategy: Chain
    ctx: Context | None

    def _require_logits(self) -> None:
        below = getattr(super().compute_loss, "__func__", None)
        native = below in (Trainer.compute_loss, SFTTrainer.compute_loss)
        plain_loss = getattr(self.args, "loss_type", "nll") == "nll"
        if self.strategy.needs & _OUTPUTS and not (native and plain_loss):
            who = [m.name() for m in self.strategy if m.needs & _OUTPUTS]
            raise MethodError(
                f"The method {who[0]!r} needs the model's logits, which only the ordinary "
                "language-model or classification loss gives. Remove it, or use loss_type: nll."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss plus the methods' terms."""
        if self.ctx is None or not model.training or return_outputs or not self._has_terms():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch: Batch = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        ctx, needs = self.ctx, self.strategy.needs
        ctx.answers_in_step = self._answers(batch, num_items_in_batch)
        ctx.step = self.state.global_step
        loss = outputs = answers = None
        if "answers" in needs and "logits" not in needs and self._can_read(batch):
            given = {k: v for k, v in inputs.items() if k != "labels"} | self._no_cache()
            answers = ctx.read(batch, lambda: model(**given))
            answers.add(CrossEntropy(ctx.answer_labels(batch)), 1 / ctx.answers_in_step)
        elif needs & _OUTPUTS:
            # TRL's own loss fuses the head and has no logits; this is the same loss without it.
            loss, outputs = Trainer.compute_loss(
                self, model, {**inputs, **self._no_cache()}, True, num_items_in_batch
            )
            if "answers" in needs:
                answers = Answers(ctx.answer_logits(outputs.logits, batch))
        else:
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        ctx.answers = answers
        parts = [loss, self.strategy.loss(ctx, batch, outputs)]
        if answers is not None:
            parts.append(answers.total())
        ctx.answers = None
        return sum(part for part in parts if part is not None)

    def _can_read(self, batch: Batch) -> bool:
        """Whether the loss is cross-entropy of a known head's logits, and nothing else.

        Under FSDP a head has its weights only inside the model's forward.
        """
        assert self.ctx is not None
        whole: Any = self.ctx.model
        return (
            find_head(whole) is not None
            and batch["labels"].dim() == 2
            and not getattr(whole.config.get_text_config(), "output_router_logits", False)
            and not self.is_fsdp_enabled
            and not self.args.torch_compile
            and self.label_smoother is None
            and self.compute_loss_func is None
        )

    def _has_terms(self) -> bool:
        return any(type(m).loss is not Method.loss for m in self.strategy)

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
        if "labels" not in batch:
            raise MethodError(
                f"The methods {self.strategy.name} add to the loss of each answer, but this "
                "trainer's batches have no labels. Use SFTTrainer or a classifier."
            )
        labels = batch["labels"]
        labels = labels if labels.dim() == 1 else labels[:, 1:]
        return (labels != IGNORED).sum().clamp(min=1)
