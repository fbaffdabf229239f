"""Why a method's setting is refused, in one sentence."""

from __future__ import annotations

from typing import Any

from keeptune.errors import suggest


def sentence(cls: Any, error: dict[str, Any]) -> str:
    """Turn one pydantic error about a method into: name, got, allowed, what to do."""
    # Beyond a setting's name, names in `loc` are pydantic's own for the branches of a union.
    place = [str(p) for i, p in enumerate(error["loc"]) if i == 0 or isinstance(p, int)]
    where = ".".join([cls.__name__, *place])
    if error["type"] == "extra_forbidden":
        names = list(cls.model_fields)
        known = suggest(str(error["loc"][0]), names) if names else "It has no settings."
        return f"{where} is not a setting. {known}"
    if error["type"] == "missing":
        return f"{where} must be given."
    bound = error.get("ctx", {})
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    allowed = [f"{words[k]} {v}" for k, v in bound.items() if k in words]
    rule = f"must be {allowed[0]}" if allowed else error["msg"][0].lower() + error["msg"][1:]
    default = cls.model_fields[str(error["loc"][0])].default if error["loc"] else None
    off = cls.neutral.get(str(error["loc"][0])) if error["loc"] else None
    hint = f"Leave it out for the default, {default!r}"
    hint += f", or use {off!r} for plain fine-tuning." if off is not None else "."
    return f"{where}: {rule}, got {error['input']!r}. {hint}"
