"""A moving average of the weights answers; the weights themselves go on learning.

Paper: Polyak & Juditsky 1992, Acceleration of stochastic approximation by averaging,
    https://doi.org/10.1137/0330046 ; Tarvainen & Valpola 2017, Mean teachers,
    https://arxiv.org/abs/1703.01780 ; against forgetting: Arani et al. 2022 (CLS-ER),
    https://arxiv.org/abs/2201.12604
Equation: after each step s ← decay · s + (1 − decay) · w, from s = w before the first one; the
    model answers with s
Changes: gradients, after_step, end_task, serve
Cost: a copy of the trained weights in float32 (adapters only, under LoRA), which reads and writes
    12 bytes a weight in each step; beside it, while the model answers, another copy.
Use when: a nearly free protection is wanted that needs no old data: the slow weights lag behind
    and keep more of earlier tasks.
Not when: tasks are shorter than about 1 / (1 − decay) steps, in which the slow weights learn little
    of them.
Differs from the paper: the slow weights answer, and take no part in training (in Mean teachers they
    give targets; for that see ilora). They are kept over the tasks. Under LoRA the factors A and B
    are averaged, not their product. `start: slow` begins each later task from the average.
Status: contract tested
"""

from __future__ import annotations

from keeptune.methods._slow import Slow


class EMA(Slow):
    """Answer with an exponential moving average of the trained weights."""
