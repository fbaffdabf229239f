"""Plain fine-tuning, one task after another: the floor that every method must beat.

Paper: McCloskey & Cohen 1989, Catastrophic interference in connectionist networks,
    https://doi.org/10.1016/S0079-7421(08)60536-8
Equation: minimise L_t(w), the loss of the present task alone
Changes: nothing
Cost: none
Use when: you need the baseline, or nothing that the model knew matters.
Not when: old tasks or general knowledge must stay.
Differs from the paper: no difference.
Status: contract tested
"""

from __future__ import annotations

from keeptune.method import Method


class Plain(Method):
    """Does nothing; the same as an empty list of methods."""

    def is_neutral(self) -> bool:
        """Always."""
        return True
