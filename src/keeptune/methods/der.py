"""Dark experience replay: kept rows are to be answered as they were when they were kept.

Paper: Buzzega et al. 2020, Dark experience for general continual learning: a strong, simple
    baseline, https://arxiv.org/abs/2004.07211
Equation: L(w) + strength · E over kept (x, q) of KL(q ‖ p_w(· | x)), q the answers recorded with x;
    for a classifier L(w) + strength · E over kept (x, z) of mean_c (z_c − h_w(x)_c)²
Changes: gradients, end_task
Cost: at most `size` rows, each with its tokens (2.2 or 4.2 bytes) and 4 top_k + 4 bytes for each
    answer token (260 at top_k 64, for vocabularies of at most 65,536; else 6 top_k + 4); one
    forward and backward over `rows` rows at each step, one gradient's memory meanwhile; at a task's
    end one forward over the rows that are newly kept.
Use when: old rows may be kept, and what the model says about all answers, not only the right one,
    shall survive.
Not when: old rows must not be stored. DER does store them, raw, though it is sometimes said to make
    do without; what it adds is the outputs. For private data use pseudo_replay. Nor when old labels
    matter more than old outputs: der_pp, replay.
Differs from the paper: outputs are recorded when a task ends, of rows chosen then, not while it is
    learned: they are those of a model that has learned the task, and task ends must be known. For a
    language model KL instead of squared logits, whose sum over 50,000 entries is mostly about
    entries that are never said, and which k entries and a bucket for the rest could not give; it is
    what squared logits become for soft answers (Hinton et al. 2015). Of squares
    the mean over classes is taken, as in the authors' code, not the sum.
Status: contract tested
"""

from __future__ import annotations

from keeptune.methods._distil.rehearsed import Rehearsed


class DER(Rehearsed):
    """Rehearse kept rows with the answers recorded beside them."""
