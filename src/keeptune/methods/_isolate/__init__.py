"""What methods share that keep tasks apart: a model's layers, embeddings, held weights."""

from keeptune.methods._isolate.frozen import SETTLED, freeze, give_free, size
from keeptune.methods._isolate.layers import below, embeddings, layers, lowest, units

__all__ = [
    "SETTLED",
    "below",
    "embeddings",
    "freeze",
    "give_free",
    "layers",
    "lowest",
    "size",
    "units",
]
