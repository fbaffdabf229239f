"""Feature replay: rehearse what old examples look like halfway up the model, not the examples.

Paper: Pellegrini et al. 2020, Latent replay for real-time continual learning,
    https://arxiv.org/abs/1912.01100 ; Hayes et al. 2020 (REMIND), https://arxiv.org/abs/1910.02509
Equation: L_t(w) + strength · mean over answers of −log p(y | h; w_above), with h what entered the
    layer for a few rows drawn from a reservoir of D_1 … D_{t-1}
Changes: begin_task, gradients, end_task
Cost: for each kept row 2 bytes · hidden size · tokens (a classifier that keeps one vector a row:
    2 bytes · width), beside its labels. At each step a forward of `rows` rows, and a backward
    through the layers above. One forward over the task's rows at its end.
Use when: the lower layers shall stay as they are anyway; or old inputs may not be kept as they
    are, and their answers may.
Not when: raw text may be kept: replay needs hundreds of times less place and trains all layers. It
    is no protection of privacy: features can be turned back into much of the input, the less the
    higher the layer; the labels of a language model are its answers, word for word; and `keeptune
    forget` finds a row by its task or its answer, not by what was asked, which is not kept.
Differs from the paper: features are float16, not quantised by a codebook as in REMIND; the weights
    below are frozen from the second task on, not slowed down; old and new examples are two terms,
    not one batch. What lies below is found by differentiation, so that tied weights are frozen too.
    Not for models whose upper layers read token ids, nor with batch norm below.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import nn

from keeptune.buffer import Buffer
from keeptune.errors import MethodError
from keeptune.method import Context, Method, State
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._features import (
    FEATURES,
    as_batch,
    features,
    layer_of,
    mask_of,
    named,
    put_in,
    weights_below,
    without_inputs,
)
from keeptune.methods._reference import batch_gradient, moved_weights


class FeatureReplay(Method):
    """Train the upper layers on kept features of earlier tasks beside the new task."""

    strength: float = Field(1.0, ge=0, description="weight of the rehearsal beside the task's loss")
    rows: int = Field(8, ge=1, description="old rows rehearsed in each step")
    size: int = Field(2000, ge=1, description="rows kept over all earlier tasks")
    layer: int | None = Field(
        None, ge=0, description="number of the layer whose input is kept; default: the middle one"
    )
    module: str = Field(
        "", description="name of the module whose input is kept, where layers cannot be counted"
    )

    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    proof: ClassVar[str] = "rows_rehearsed"
    traits: ClassVar[frozenset[str]] = frozenset({"buffer", "freeze"})
    excludes: ClassVar[frozenset[str]] = frozenset({"restart"})
    steered: ClassVar[str] = "strength"

    _buffer: Buffer = PrivateAttr()
    _frozen: list[str] = PrivateAttr(default_factory=list)

    def model_post_init(self, context: Any, /) -> None:
        """Start with nothing kept."""
        super().model_post_init(context)
        self._buffer = Buffer(self.size)

    def _module(self, ctx: Context) -> nn.Module:
        return named(ctx.model, self.module) if self.module else layer_of(ctx.model, self.layer)

    def begin_task(self, ctx: Context) -> None:
        """Freeze what lies below, once there are features that rest on it.

        Raises:
            MethodError: No such layer, nothing is trained above it, or the weights are sharded.
        """
        if not self.strength:
            return
        why = "cannot freeze layers while FSDP spreads the weights over processes"
        refuse_shards(ctx, self.name(), why)
        module = self._module(ctx)
        if not len(self._buffer):
            return
        trained = ctx.trainable()
        self._frozen = weights_below(ctx, module)
        if len(self._frozen) == len(trained):
            raise MethodError(
                "The method 'feature_replay' would leave nothing to train: all trained weights lie "
                "below the features it keeps. Give a lower `layer`, or adapt higher ones."
            )
        for name in self._frozen:
            trained[name].requires_grad_(False)
        self._evidence["weights_frozen"] = sum(trained[name].numel() for name in self._frozen)

    def gradients(self, ctx: Context) -> None:
        """Add the gradient of the rehearsal."""
        if not self.strength or not len(self._buffer):
            return
        module, weights = self._module(ctx), moved_weights(ctx)
        if ctx.step == 0 and weights_below(ctx, module):
            raise MethodError(
                f"Weights below the features that 'feature_replay' keeps are trained in task "
                f"{ctx.task!r}, though it froze them. Remove the method that trains them."
            )
        drawn = self._buffer.draw(self.rows, ctx.random("feature_replay", ctx.step))
        batch = ctx.batch(self._buffer.examples(drawn))
        values = torch.from_numpy(self._buffer.extras(drawn)["features"]).to(ctx.device)
        batch[FEATURES] = as_batch(values, mask_of(batch))
        with put_in(module) as logits_of:
            words = ("dropout", "feature_replay", ctx.step)
            found = batch_gradient(ctx, weights, batch, lambda part: logits_of(ctx, part), *words)
        for weight, gradient in zip(weights, found, strict=True):
            assert weight.grad is not None
            weight.grad.add_(gradient, alpha=self.strength * self._effort)
        shown = self._evidence
        shown["rows_rehearsed"] = shown.get("rows_rehearsed", 0) + len(drawn)

    def end_task(self, ctx: Context) -> None:
        """Take down features of the task's rows, and train again what was trained before."""
        if self.strength:
            self._buffer.add(
                without_inputs(ctx),
                ctx.task,
                ctx.random("reservoir"),
                extras=lambda numbers: {"features": features(ctx, self._module(ctx), numbers)},
                folder=ctx.folder,
            )
            self._evidence["rows_kept"] = len(self._buffer)
        for name in self._frozen:
            ctx.model.get_parameter(name).requires_grad_(True)
        self._frozen = []

    def state(self) -> State:
        """The kept features and labels."""
        return self._buffer.state()

    def restore(self, ctx: Context, state: State) -> None:
        """Take them back."""
        self._buffer.restore(state, ctx.folder)

    def declared_bytes(self, ctx: Context) -> int:
        """Of each token its features in 16 bits, its label and a bit; of each row its length."""
        return self._buffer.nbytes()
