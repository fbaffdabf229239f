"""Which block of a model's layers a weight belongs to, by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence


def blocks_of(names: Sequence[str], count: int, *, only_named: bool = False) -> list[int]:
    """The block of layers that each weight is in, from 0 for the lowest.

    Args:
        names: In the model's order; a layer's number is the first one in a name. What comes before
            all layers belongs to the lowest block, what comes after them to the highest.
        count: Blocks, as equal as can be.
        only_named: Divide the layers that names have, in place of all up to the highest of them;
            there are no more blocks then than such layers.
    """
    found = [re.search(r"\.(\d+)\.", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    layers = sorted(set(numbers)) if only_named else list(range(max(numbers, default=0) + 1))
    count = min(count, max(len(layers), 1)) if only_named else count
    place = {layer: count * at // len(layers) for at, layer in enumerate(layers)}
    blocks, met = [], False
    for match in found:
        met = met or match is not None
        blocks.append(place[int(match[1])] if match else (count - 1) * met)
    return blocks
