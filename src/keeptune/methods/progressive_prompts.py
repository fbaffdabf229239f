"""Progressive prompts: each task's prompt stands before those of all earlier tasks.

Paper: Razdaibiedina et al. 2023, Progressive prompts: continual learning for language models,
    https://arxiv.org/abs/2301.12314
Equation: the decoder reads [P_k; P_{k−1}; …; P_1; E x] for task k, where E x are the embeddings of
    the tokens x and P_t are learned matrices [length, D]; only P_k is trained
Changes: begin_task, end_task, serve
Cost: length · D weights a task, D the hidden size. A text of task k is longer by k · length, in
    steps and when the model answers, and that much of the model's context is taken.
Use when: the task is known when the model answers, its answers must never change by one bit, and
    later tasks should build on earlier ones.
Not when: tasks are many, since all their prompts are read; the model is small, for which prompts
    fall behind; a new classifier's head is to be learned, which stays frozen with the rest; or the
    model reads in both directions.
Differs from the paper: prompts are trained as they are, without the paper's residual network over
    them. For an unknown task all prompts are served, as for the last one. Written without PEFT,
    whose prompts make the logits longer than the labels. Trains no adapter.
Status: contract tested
"""

from __future__ import annotations

from keeptune.methods._isolate.soft import SoftPrompts


class ProgressivePrompts(SoftPrompts):
    """Train one new prompt before all earlier ones; `serve` uses those up to the task's own."""

    def _answering(self, number: int | None) -> list[int]:
        last = len(self._numbers) - 1 if number is None else number
        return list(range(last, -1, -1))
