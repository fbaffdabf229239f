"""Published name → method class.

Every file in `keeptune/methods/` without a leading underscore is a method under its file's name.
Another package adds its own through the entry point group `keeptune.methods`:

    [project.entry-points."keeptune.methods"]
    mine = "my_package.mine:Mine"
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import keeptune.methods
from keeptune.errors import MethodError, suggest
from keeptune.method import Method

GROUP = "keeptune.methods"


def _own_names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(keeptune.methods.__path__) if m.name[0] != "_"]


def by_class_name() -> dict[str, type[Method]]:
    """The methods of this package by class name, as `from keeptune import EWC` needs."""
    return {get(name).__name__: get(name) for name in _own_names()}


def _foreign() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=GROUP)}


def names() -> list[str]:
    """All published names, sorted; third-party ones included."""
    return sorted({*_own_names(), *_foreign()})


@cache
def get(name: str) -> type[Method]:
    """The class behind a published name.

    Raises:
        MethodError: There is no such method; the message gives the nearest names.
    """
    if name in _own_names():
        module = importlib.import_module(f"keeptune.methods.{name}")
        own: list[type[Method]] = [
            v for v in vars(module).values() if _is_method_of(v, module.__name__)
        ]
        assert len(own) == 1, f"{module.__name__} must define one Method, found {own}"
        return own[0]
    foreign = _foreign()
    if name in foreign:
        return _load_foreign(foreign[name])
    raise MethodError(f"There is no method {name!r}. {suggest(name, names())}")


def _is_method_of(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and value.__module__ == module


def _load_foreign(entry: EntryPoint) -> type[Method]:
    try:
        cls: Any = entry.load()
    except (ImportError, AttributeError) as error:
        raise MethodError(
            f"The method {entry.name!r} of another package ({entry.value}) cannot be loaded: "
            f"{error}. Repair or uninstall that package."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise MethodError(f"The method {entry.name!r} ({entry.value}) is not a keeptune Method.")
    if cls.name() != entry.name:
        raise MethodError(
            f"The entry point {entry.name!r} ({entry.value}) is of a method that is called "
            f"{cls.name()!r} everywhere else. Give the entry point that name."
        )
    return cls


def build(name: str, settings: dict[str, Any] | None = None) -> Method:
    """Make a method from its name and settings, as a recipe gives them.

    Raises:
        MethodError: Unknown name or setting, or a value out of range.
    """
    return get(name)(**(settings or {}))
