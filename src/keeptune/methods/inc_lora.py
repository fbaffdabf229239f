"""Each task learns a LoRA adapter of its own on top of the frozen ones before it; one model.

Paper: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685 ; one after another, as the baseline
    IncLoRA of Wang et al. 2023, https://arxiv.org/abs/2310.14152
Equation: W_t = W_0 + Σ_{i≤t} scale · B_i A_i, of which only B_t and A_t are trained in task t
Changes: begin_task, end_task
Cost: one adapter more with each task, rank · (in + out) floats for each adapted matrix, which every
    forward and backward goes through as well: a step takes longer with each task. Merge the
    adapters into the base for fast answers.
Use when: old updates must stay as they are and the task is not known when the model answers.
Not when: the task is known (task_lora forgets nothing), or tasks are many and steps must stay fast.
Differs from the paper: frozen adapters see no dropout. A classifier's head is trained in all tasks
    and not frozen.
Status: contract tested
"""

from __future__ import annotations

from keeptune.methods._stack import Stacked


class IncLoRA(Stacked):
    """Stack a new adapter on the frozen ones with each task."""
