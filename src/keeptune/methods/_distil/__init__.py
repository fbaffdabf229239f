"""Holding answers to those of another model, recorded or computed: what distillation shares."""

from keeptune.methods._distil.recorded import Recorded, Store, record, record_rows
from keeptune.methods._distil.sums import Sums
from keeptune.methods._distil.teachers import Frozen, without_adapter
from keeptune.methods._distil.terms import Teacher, TopK
from keeptune.methods._distil.texts import read_texts

__all__ = [
    "Frozen",
    "Recorded",
    "Store",
    "Sums",
    "Teacher",
    "TopK",
    "read_texts",
    "record",
    "record_rows",
    "without_adapter",
]
