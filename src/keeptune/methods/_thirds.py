"""A number for the whole model, or one for each third of its layers."""

from __future__ import annotations

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
