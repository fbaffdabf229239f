"""Pydantic's complaints about a recipe as plain sentences: file, line, field, got, allowed."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Tag, ValidationError

from keeptune.errors import suggest
from keeptune.yamltext import Document

_WANTED = {
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping (key: value)",
    "model_type": "must be a mapping (key: value)",
    "model_attributes_type": "must be a mapping (key: value)",
    "path_type": "must be a path",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "either": "must be text or a list of texts",
    "too_short": "must have at least {min_length} entry",
}
_GUARD_KEYS = ("eval", "lm_eval", "text")


def sentences(error: ValidationError, model: type[BaseModel], document: Document) -> str:
    """One line per problem, each once, in the order of the recipe's lines.

    Args:
        error: What pydantic raised.
        model: The model it was validating.
        document: Where the values were written.
    """
    lines: dict[str, int] = {}
    for problem in error.errors(include_url=False):
        more = problem.get("ctx", {}).get("at", ())
        tagged = (*problem["loc"], *more)
        path = [p for p in tagged if not (isinstance(p, str) and p.startswith(_TAGS))]
        for branch in _EITHER:  # pydantic names the kinds that a value could have had
            if "target_modules" in path and branch in path:
                if path[-1] == branch:
                    problem["type"] = "either"
                path.remove(branch)
        line = f"{document.where(path)}: {_sentence(dict(problem), path, model)}"
        lines[line] = document.line(path)
    return "\n".join(sorted(lines, key=lines.__getitem__))


_TAGS = ("guard-", "adapter-")
_EITHER = ("str", "list[str]")


def _sentence(problem: dict[str, Any], path: list[Any], model: type[BaseModel]) -> str:
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    field = ".".join(map(str, path))
    if kind == "said":
        return str(problem["msg"]).replace("{field}", field)
    if kind == "extra_forbidden":
        allowed = _keys(model, problem["loc"][:-1])
        of = f" in {'.'.join(map(str, path[:-1]))}" if path[:-1] else ""
        return f"there is no key {path[-1]!r}{of}. {suggest(str(path[-1]), allowed)}"
    if kind == "missing":
        return f"{field} is missing{_meaning(model, problem['loc'])}."
    if kind == "union_tag_not_found":
        return _unknown_guard(field, given)
    if kind == "too_short" and isinstance(given, dict):
        return f"{field} is an empty mapping; write the method's name."
    if kind == "too_short" and isinstance(given, str):
        kind = "string_too_short"
    if kind == "literal_error" and path == ["adapter"]:
        return (
            f"adapter must be none or a mapping, got {given!r}; write {{kind: {given}}} or "
            "{kind: lora, rank: 16}."
        )
    wanted = _WANTED.get(kind)
    bounds = {k: int(v) if v in (0.0, 1.0) else v for k, v in context.items()}
    says = wanted.format(**bounds) if wanted else str(problem["msg"])
    hint = ""
    if kind == "literal_error":
        hint = " " + suggest(str(given), str(context["expected"]).replace("'", "").split(" or "))
    elif kind == "string_type" and isinstance(given, bool | float):
        hint = " Put it in quotes."
    return f"{field} {says}, got {_short(given)}.{hint}"


def _unknown_guard(field: str, given: Any) -> str:
    needs = "a ready-made guard's name, or a mapping with `text`, `eval` or `lm_eval`"
    if not isinstance(given, dict):
        return f"{field} must be {needs}, got {_short(given)}."
    odd = [key for key in given if key not in ("name", "score", "limit", "include_path")]
    hint = " " + suggest(odd[0], _GUARD_KEYS) if odd else ""
    return f"{field} must be {needs}, got the keys {', '.join(given) or 'none'}.{hint}"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    shown = ("true" if value else "false") if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The field names of the model part that a pydantic location points into."""
    return list(_part(model, path).model_fields)


def _meaning(model: type[BaseModel], path: tuple[Any, ...]) -> str:
    field = _part(model, path[:-1]).model_fields.get(str(path[-1]))
    if field is None or not field.description:
        return ""
    return f" ({field.description[0].lower()}{field.description[1:].rstrip('.')})"


def _part(model: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel]:
    part, rest = model, list(path)
    while rest:
        name = rest.pop(0)
        field = part.model_fields.get(str(name))
        if field is None:
            continue
        parts = dict(_models(field.annotation, None))
        tag = next((p for p in rest if p in parts), None)
        part = parts.get(tag) or next(iter(parts.values()), part)
    return part


def _models(annotation: Any, tag: str | None) -> Iterator[tuple[str | None, type[BaseModel]]]:
    """Every model class inside a type annotation, with the union tag it stands under."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield tag, annotation
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *marks = typing.get_args(annotation)
        tag = next((mark.tag for mark in marks if isinstance(mark, Tag)), tag)
        yield from _models(inner, tag)
    elif typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _models(inner, tag)
