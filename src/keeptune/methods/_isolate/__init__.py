"""What methods share that keep tasks apart: a model's layers, embeddings, held weights."""

from keeptune.methods._isolate.frozen import freeze, give_free, refuse_shards, size
from keeptune.methods._isolate.layers import below, embeddings, layers, units

__all__ = [
    "below",
    "embeddings",
    "freeze",
    "give_free",
    "layers",
    "refuse_shards",
    "size",
    "units",
]
