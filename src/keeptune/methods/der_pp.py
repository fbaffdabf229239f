"""DER++: dark experience replay, and the labels of other kept rows.

Paper: Buzzega et al. 2020, Dark experience for general continual learning: a strong, simple
    baseline, https://arxiv.org/abs/2004.07211
Equation: L(w) + strength · E over kept (x, q) of KL(q ‖ p_w(· | x)) + label_strength · E over kept
    (x', y') of −log p_w(y' | x'), the two drawn independently; squared logits for a classifier
Changes: gradients, end_task
Cost: as der. `rows` is for both draws together, so that a step with as many old rows as new ones
    costs twice a plain one, not three times.
Use when: as der, and the old labels are right.
Not when: old rows must not be stored. DER++ does store them, raw, though it is sometimes said to
    make do without. For private data use pseudo_replay.
Differs from the paper: as der. Half of `rows` is drawn for the outputs and half for the labels,
    where the paper draws a full batch for each.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from keeptune.methods._distil.rehearsed import Rehearsed


class DERpp(Rehearsed):
    """Rehearse kept rows, some with the answers recorded beside them, some with their labels."""

    label_strength: float = Field(0.5, ge=0, description="weight of old labels; the paper's β")

    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0, "label_strength": 0.0}

    def _amounts(self) -> dict[str, int]:
        half = self.rows // 2
        if not self.strength or not self.label_strength:
            half = self.rows if self.label_strength else 0
        return {"outputs": self.rows - half, "labels": half}

    def _label_weight(self) -> float:
        return self.label_strength
