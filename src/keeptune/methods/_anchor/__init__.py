"""What the methods with a quadratic penalty share; each of them has its own file and card."""

from keeptune.methods._anchor.importance import ON, Examined, Weighted
from keeptune.methods._anchor.path import PathIntegral, Travelled
from keeptune.methods._anchor.penalty import (
    Anchored,
    Strength,
    is_measured,
    sum_of_squares,
)
from keeptune.methods._anchor.weights import Effective, Weights, blocks

__all__ = [
    "ON",
    "Anchored",
    "Effective",
    "Examined",
    "PathIntegral",
    "Strength",
    "Travelled",
    "Weighted",
    "Weights",
    "blocks",
    "is_measured",
    "sum_of_squares",
]
