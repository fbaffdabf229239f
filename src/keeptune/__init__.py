"""keeptune: fine-tune language models on one task after another and keep what they knew.

    from keeptune import fit, EWC, Replay

Every method is exported under its class name.
"""

from __future__ import annotations

import importlib
from typing import Any

# Nothing heavy is imported until it is asked for: `keeptune --help` must answer at once.
_HOMES = {
    "Chain": "keeptune.chain",
    "Context": "keeptune.method",
    "Guard": "keeptune.guard",
    "Method": "keeptune.method",
    "Recipe": "keeptune.recipe",
    "RunFolder": "keeptune.folder",
    "Seams": "keeptune.seams",
    "State": "keeptune.method",
    "Task": "keeptune.stream",
    "fit": "keeptune.notebook",
    "forget": "keeptune.forgetting",
    "learn": "keeptune.runs",
    "load_recipe": "keeptune.recipe",
    "run": "keeptune.runs",
    "summarise": "keeptune.metrics",
    "tokenise": "keeptune.tokens",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    # `from keeptune import formulas` asks here first; a submodule must not wake the registry
    if name[:1].isupper():
        registry = importlib.import_module("keeptune.registry")
        if (method := registry.by_class_name().get(name)) is not None:
            return method
    raise AttributeError(f"module 'keeptune' has no attribute {name!r}")


def __dir__() -> list[str]:
    registry = importlib.import_module("keeptune.registry")
    return sorted([*_HOMES, *registry.by_class_name()])
