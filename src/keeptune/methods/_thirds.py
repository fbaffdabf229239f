"""A number for the whole model, or one for each third of its layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class OneOrThree:
    """Validates a number between `ge` and `le`, or three of them."""

    ge: float = 0.0
    le: float = 1.0

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The two, told apart by the value."""
        one = core_schema.float_schema(ge=self.ge, le=self.le, allow_inf_nan=False)
        three = core_schema.tuple_schema([one, one, one])
        return core_schema.tagged_union_schema(
            {"one": one, "three": three},
            lambda value: "three" if isinstance(value, list | tuple) else "one",
        )


def thirds(names: Sequence[str]) -> list[int]:
    """Whether each weight is in the lower (0), middle (1) or upper (2) third of the layers.

    Args:
        names: In the model's order; a layer's number is the first one in a name. What comes before
            all layers belongs to the lower third, what comes after them to the upper one.
    """
    found = [re.search(r"\.(\d+)\.", name) for name in names]
    layers = 1 + max((int(match[1]) for match in found if match), default=0)
    blocks, met = [], False
    for match in found:
        met = met or match is not None
        blocks.append(3 * int(match[1]) // layers if match else 2 * met)
    return blocks
