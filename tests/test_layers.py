"""Who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import keeptune

SOURCE = Path(keeptune.__file__).parent
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors"}
# What answers at once: command line, recipes, results and the report on them.
LIGHT = (
    "errors", "folder", "records", "recipe", "rows", "scorers", "stream", "progress",
    "metrics", "checks", "report", "cli", "terminal", "ranking", "failures", "jobs", "board",
    "engines", "engines.local",
)  # fmt: skip
METHODS_MAY = {
    "__future__", "bm25s", "datasets", "numpy", "peft", "pydantic", "pydantic_core", "torch",
    "keeptune.method", "keeptune.buffer", "keeptune.errors", "keeptune.methods._anchor",
    "keeptune.answers", "keeptune.head_pass", "keeptune.methods._distil", "keeptune.places",
    "keeptune.processes", "keeptune.bisection", "keeptune.layers",
    "keeptune.rowstore", "keeptune.methods._reference", "keeptune.methods._measure",
    "keeptune.methods._arrivals", "keeptune.methods._features",
    "keeptune.methods._writing",
    "keeptune.methods._isolate",
    "keeptune.methods._slow", "keeptune.methods._adapters", "keeptune.methods._stack",
    "keeptune.methods._subspace", "keeptune.methods._factors",
    "keeptune.methods._questions", "keeptune.methods._guarded", "keeptune.methods._thirds",
}  # fmt: skip
TRAINERS = ("keeptune.seams", "keeptune.loss_terms", "keeptune.trainers")


@dataclass
class Module:
    """The names a module imports: when it is loaded, and at any time."""

    on_load: set[str] = field(default_factory=set)
    ever: set[str] = field(default_factory=set)


def read(source: Path) -> dict[str, Module]:
    """Every module of a package by its name."""
    modules = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(["keeptune", *(part for part in parts if part != "__init__")])
        tree = ast.parse(path.read_text("utf-8"))
        on_load = {n for node in _at_top(tree.body) for n in _imported(node)}
        ever = {n for node in ast.walk(tree) for n in _imported(node)}
        modules[name] = Module(on_load, ever)
    return modules


def _at_top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is loaded: not those inside functions."""
    for node in body:
        yield node
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef) and not is_for_types:
            yield from _at_top([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])


def _imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def _within(name: str, homes: set[str]) -> bool:
    return any(name == home or name.startswith(home + ".") for home in homes)


def heavy_in_light(modules: dict[str, Module]) -> list[str]:
    """Ways by which something light would load torch."""
    found = []
    for name in LIGHT:
        todo, known = [(f"keeptune.{name}",)], set()
        while todo:
            path = todo.pop()
            for imported in modules[path[-1]].on_load if path[-1] in modules else ():
                if _within(imported, HEAVY):
                    found.append(" > ".join([*path, imported]))
                elif imported in modules and imported not in known:
                    known.add(imported)
                    todo.append((*path, imported))
    return found


def beyond_methods(modules: dict[str, Module]) -> list[str]:
    """What methods import and may not; `from x import y` counts as x."""
    return [
        f"{name} imports {imported}"
        for name, module in modules.items()
        if name.startswith("keeptune.methods.")
        for imported in sorted(module.ever)
        if not _within(imported, METHODS_MAY)
        and imported.partition(".")[0] not in sys.stdlib_module_names
        and imported != "keeptune"
    ]


def beside_seams(modules: dict[str, Module]) -> list[str]:
    """Who else knows a trainer; `recipe_checks`, when run, may ask TRL for its keys."""
    found = []
    for name, module in modules.items():
        if name in TRAINERS:
            continue
        seen = module.on_load if name == "keeptune.recipe_checks" else module.ever
        found += [
            f"{name} imports {i}"
            for i in sorted(seen)
            if _within(i, {"trl", "transformers.Trainer", "transformers.trainer"})
        ]
    return found


def above_cli(modules: dict[str, Module]) -> list[str]:
    """Who imports the command line, which is the top."""
    return [
        f"{name} imports keeptune.cli"
        for name, module in modules.items()
        if name != "keeptune.__main__" and any(_within(i, {"keeptune.cli"}) for i in module.ever)
    ]


RULES = (heavy_in_light, beyond_methods, beside_seams, above_cli)


@pytest.mark.parametrize("rule", RULES)
def test_the_layers_hold(rule: object) -> None:
    assert callable(rule)
    assert rule(read(SOURCE)) == []


def test_every_light_room_is_there() -> None:
    assert {f"keeptune.{name}" for name in LIGHT} <= set(read(SOURCE))


@pytest.mark.parametrize(
    ("rule", "files", "words"),
    [
        (heavy_in_light, {"metrics": "import torch"}, "keeptune.metrics > torch"),
        (
            heavy_in_light,
            {"rows": "from keeptune import tokens", "tokens": "from transformers import X"},
            "keeptune.rows > keeptune.tokens > transformers",
        ),
        (heavy_in_light, {"folder": "try:\n  import peft.x\nexcept E: pass"}, "peft.x"),
        (beyond_methods, {"methods/a": "def f():\n  from keeptune import loop"}, "keeptune.loop"),
        (beyond_methods, {"methods/a": "import transformers"}, "imports transformers"),
        (beyond_methods, {"methods/a": "from keeptune.methods.b import B"}, "methods.b"),
        (beside_seams, {"loop": "from transformers import Trainer"}, "transformers.Trainer"),
        (beside_seams, {"session": "def f():\n  import trl"}, "keeptune.session imports trl"),
        (above_cli, {"runs": "from keeptune.cli import main"}, "keeptune.runs imports"),
    ],
)
def test_a_planted_import_is_found(
    rule: object, files: dict[str, str], words: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert callable(rule)
    assert any(words in sentence for sentence in rule(read(tmp_path)))


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "metrics.py").write_text("import numpy\ndef f():\n  import torch")
    (tmp_path / "seams.py").write_text("from transformers import Trainer\nimport trl")
    (tmp_path / "methods/a.py").write_text(
        "import copy\nimport torch\nfrom keeptune.method import Method\nfrom peft import x"
    )
    assert [rule(read(tmp_path)) for rule in RULES] == [[], [], [], []]


def test_nothing_heavy_is_loaded_by_what_is_light() -> None:
    names = ", ".join(f"keeptune.{name}" for name in LIGHT)
    code = f"import sys, {names}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not HEAVY & set(done.stdout.split())
