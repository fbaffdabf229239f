"""Synaptic intelligence: hold back the weights that did the most for earlier tasks' loss.

Paper: Zenke, Poole, Ganguli 2017, Continual learning through synaptic intelligence,
    https://arxiv.org/abs/1703.04200
Equation: L(w) + strength/2 Σ_i Ω_i (w_i − w*_i)²; Ω_i = Σ over tasks of
    max(0, −Σ_steps g_i Δw_i) / (d_i² + damping), g the task's own gradient, Δw the optimizer's
    real step, d the way from the task's start to its end, w* the weights at the last task's end
Changes: gradients, after_step, end_task, begin_task
Cost: 3 floats per trained weight (anchor, importance, path) for any number of tasks, and a copy of
    the gradient between backward and step; no extra forward or backward pass.
Use when: the passes of ewc over the data at a task's end are too dear, or the data are gone then.
Not when: tasks are so short that the path is mostly noise, or old rows may be kept (replay keeps
    more).
Differs from the paper: strength/2, so the paper's c is strength / 2. What is below 0 is set to 0,
    which not all implementations do; the evidence says how much that was. Terms that other methods
    add to the loss count as the task's. In fine-tuning d² is far below the damping, so Ω ≈ path /
    damping, and published values of c mean nothing here: leave strength at auto.
Status: contract tested
"""

from __future__ import annotations

from keeptune.methods._anchor import Travelled


class SI(Travelled):
    """A quadratic pull towards the weights after earlier tasks, by what each did on its way."""
