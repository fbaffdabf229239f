"""From the score matrix R to one number: pure numpy, one function per published metric.

R has shape [..., T + 1, T]: `R[t, i]` is the goodness of task i after t tasks were learned, and row
0 is before any training. Goodness grows as the model gets better: a share (0 to 1) as it is, a
perplexity as minus its logarithm. Leading axes are draws of a bootstrap, so that one call gives the
value and another its interval.

NaN means "not evaluated" (a task that `learn` added later has no early rows; a column that another
unit needs apart is masked): what is NaN is left out of an average, an average of nothing is NaN.
In the equations tasks count from 1, as in the papers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean(values: Array, axis: int = -1) -> Array:
    """Mean of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def learned(R: Array) -> Array:
    """Each task right after it was learned: R[i, i]. Shape [..., T]."""
    return np.asarray(np.diagonal(R[..., 1:, :], axis1=-2, axis2=-1))


def before(R: Array) -> Array:
    """Each task before it was learned: R[0, i], or its first known row. Shape [..., T].

    A task that `learn` added has no row 0; the first row in which it was evaluated stands for it.
    """
    size = R.shape[-1]
    first = np.full((*R.shape[:-2], size), np.nan)
    for task in range(size):
        for row in range(task + 1):
            known = first[..., task]
            first[..., task] = np.where(np.isnan(known), R[..., row, task], known)
    return first


def average_accuracy(R: Array) -> Array:
    """Mean over all tasks after the last one: ACC = 1/T Σ_i R[T, i].

    Source: Lopez-Paz and Ranzato 2017, Gradient episodic memory, eq. 2.
    """
    return mean(R[..., -1, :])


def average_incremental_accuracy(R: Array) -> Array:
    """Mean over the stream of the accuracy on the tasks so far: 1/T Σ_t 1/t Σ_{i≤t} R[t, i].

    Source: Rebuffi et al. 2017, iCaRL, section 4.1.
    """
    so_far = [mean(R[..., row, :row]) for row in range(1, R.shape[-2])]
    return mean(np.stack(so_far, axis=-1))


def learning_accuracy(R: Array) -> Array:
    """Mean of each task right after it was learned: LA = 1/T Σ_i R[i, i].

    Source: Riemer et al. 2019, Learning to learn without forgetting (MER), section 5.
    """
    return mean(learned(R))


def learning_gain(R: Array) -> Array:
    """What training on each task added to it: 1/T Σ_i (R[i, i] − R[0, i]).

    Learning accuracy minus the same mean before any training. A model that learns nothing has
    nothing to forget, so every other number is read beside this one.
    """
    return mean(learned(R) - before(R))


def backward_transfer(R: Array) -> Array:
    """How earlier tasks changed since they were learned: BWT = 1/(T−1) Σ_{i<T} (R[T, i] − R[i, i]).

    Negative is forgetting. NaN for a single task. Source: Lopez-Paz and Ranzato 2017, eq. 3.
    """
    return mean((R[..., -1, :] - learned(R))[..., :-1])


def forward_transfer(R: Array) -> Array:
    """How tasks changed before their own training: FWT = 1/(T−1) Σ_{i>1} (R[i−1, i] − R[0, i]).

    The baseline is the model before any training. The paper takes a random initialisation instead,
    which no pretrained model has. NaN for a single task. Source: Lopez-Paz and Ranzato 2017, eq. 4.
    """
    untrained = np.diagonal(R[..., :-1, :], axis1=-2, axis2=-1)
    return mean((untrained - R[..., 0, :])[..., 1:])


def forgetting(R: Array) -> Array:
    """Mean loss from each earlier task's best: F = 1/(T−1) Σ_{i<T} (max_l R[l, i] − R[T, i]).

    l runs over i … T−1. Never below −BWT; the maximum also picks up noise, so that F of a model
    that forgets nothing lies a little above 0. NaN for a single task.
    Source: Chaudhry et al. 2018, Riemannian walk, eq. 3, whose l starts at 1.
    """
    tasks = R.shape[-1]
    best = [np.fmax.reduce(R[..., i + 1 : tasks, i], axis=-1) for i in range(tasks - 1)]
    if not best:
        return np.full(R.shape[:-2], np.nan)
    return mean(np.stack(best, axis=-1) - R[..., -1, :-1])


def intransigence(R: Array, joint: Array) -> Array:
    """What a joint run learns more: 1/T Σ_k (J[k, k] − R[k, k]), J trained on tasks 1 … k at once.

    Negative is positive forward transfer. Source: Chaudhry et al. 2018, eq. 5.

    Args:
        R: Goodness of the run, [..., T + 1, T].
        joint: Goodness of the joint run on the same tasks in the same order, same shape.
    """
    return mean(learned(joint) - learned(R))


def guard_change(G: Array) -> Array:
    """Mean change of the guards since before training: 1/M Σ_m (G[T, m] − G[0, m]).

    Args:
        G: Goodness of M guards over the stream, [..., T + 1, M].
    """
    return mean(G[..., -1, :] - G[..., 0, :])


def share_kept(G: Array) -> Array:
    """What is left of the guards' scores: Σ_m G[T, m] / Σ_m G[0, m], for shares only.

    A ratio of sums: a guard that starts near 0 moves it little, where it would rule a mean of
    ratios (Luo et al. 2023, arXiv 2308.08747, take that mean). NaN where all start at 0.
    """
    both = ~np.isnan(G[..., -1, :] + G[..., 0, :])
    first = np.where(both, G[..., 0, :], 0.0).sum(axis=-1)
    last = np.where(both, G[..., -1, :], 0.0).sum(axis=-1)
    return np.asarray(np.divide(last, first, out=np.full(first.shape, np.nan), where=first > 0))
