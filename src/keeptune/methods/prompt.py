"""Prompt tuning: a few vectors for each task before what the model reads.

Paper: Lester et al. 2021, The power of scale for parameter-efficient prompt tuning,
    https://arxiv.org/abs/2104.08691
Equation: the decoder reads [P_t; E x] for task t, where E x are the embeddings of the tokens x and
    P_t is a learned matrix [length, D]; only P_t is trained
Changes: begin_task, end_task, serve
Cost: length · D weights a task, D the hidden size. Each text is longer by `length`, in steps and
    when the model answers, and that much of the model's context is taken.
Use when: the task is known when the model answers, its answers must never change by one bit, and
    next to nothing may be kept for it.
Not when: the model is small, for which the paper finds prompts far behind tuning the model; a new
    classifier's head is to be learned, which stays frozen with the rest; or the model reads in
    both directions.
Differs from the paper: the vectors start as embeddings of any tokens, not of the commonest ones.
    For an unknown task the last one's prompt is served. Written without PEFT, whose prompts make
    the logits longer than the labels. Trains no adapter.
Status: contract tested
"""

from __future__ import annotations

from keeptune.methods._isolate.soft import SoftPrompts


class PromptTuning(SoftPrompts):
    """One prompt for each task, alone; `serve` picks it by the task's name."""

    def _answering(self, number: int | None) -> list[int]:
        return [len(self._numbers) - 1 if number is None else number]
