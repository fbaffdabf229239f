"""Writes what the documentation takes from the code: cards, tables, command help, the schema.

python docs/generate.py            # write
python docs/generate.py --check    # exit 1 when a file is stale, and say which
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from keeptune import (
    checks,
    folder,
    guards,
    metrics,
    recipe,
    recipe_parts,
    records,
    registry,
    rows,
    scorers,
    watchlog,
)
from keeptune.cards import card
from keeptune.cli import app
from keeptune.method import Method
from keeptune.terminal import export_text, method_settings

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by docs/generate.py from the code; do not edit. -->\n\n"


def row(*cells: str) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join([row(*head), "|---" * len(head) + "|", *(row(*line) for line in lines)]) + "\n"


def page(title: str, *parts: str) -> str:
    """A generated page."""
    return NOTE + f"# {title}\n\n" + "\n".join(parts)


# -- methods --------------------------------------------------------------------------------------


def own_methods() -> list[type[Method]]:
    """The project's own methods by name; a plug-in that is installed here is no part of them."""
    classes = (registry.get(name) for name in registry.names())
    return [c for c in classes if c.__module__.startswith("keeptune.")]


def methods_table(folder_of_cards: str) -> str:
    """Name, what it does, and the verbs it uses."""
    lines = []
    for cls in own_methods():
        shown = card(cls)
        link = f"[`{cls.name()}`]({folder_of_cards}/{cls.name()}.md)"
        lines.append((link, shown.title, shown.fields["Use when"]))
    return table(("method", "what it does", "use when"), lines)


QUOTES = '""'  # an empty text, in YAML


def method_page(cls: type[Method]) -> str:
    """A method's card with its settings and what proves that it was active."""
    shown = card(cls)
    parts = [shown.title + "\n"]
    for key, value in shown.fields.items():
        parts.append(f"**{key}**: " + (f"`{value}`" if key == "Equation" else linked(value)) + "\n")
    parts.append(f"**Export**: {export_text(cls)}\n")
    settings = [(f"`{n}`", f"`{d}`", a, m) for n, d, a, m in method_settings(cls)]
    parts.append("## Settings\n")
    if settings:
        parts.append(table(("setting", "default", "allowed", "meaning"), settings))
        example = ", ".join(f"{n}: {d or QUOTES}" for n, d, _, _ in method_settings(cls))
        parts.append(f"```yaml\nmethods:\n  - {cls.name()}: {{{example}}}\n```\n")
    else:
        parts.append(f"None.\n\n```yaml\nmethods: [{cls.name()}]\n```\n")
    parts.append(f"In Python: `from keeptune import {cls.__name__}`.\n")
    parts.append("## Proof of activity\n\n" + proof(cls))
    return page(f"`{cls.name()}`", *parts)


def linked(text: str) -> str:
    """Bare addresses as links."""
    return re.sub(r"(https?://[^\s;,]*[^\s;,.])", r"<\1>", text)


def proof(cls: type[Method]) -> str:
    """What check KT001 asks of this method."""
    if not cls.proof:
        return "None is needed: it does nothing.\n"
    text = (
        f"Its evidence `{cls.proof}` must be above 0 from task {cls.active_from + 1} of the stream "
        "on, or check [KT001](../reference/checks.md) fails."
    )
    if cls.neutral:
        neutral = " and ".join(f"`{key}: {value}`" for key, value in cls.neutral.items())
        text += f" With {neutral} it equals plain fine-tuning, and nothing is asked."
    return text + "\n"


def guards_list() -> str:
    """The ready-made guards, and what groups of them hold."""
    lines = [f"- `{name}`" for name in guards.GUARDS]
    lines += [f"- `{name}`: {', '.join(parts)} together" for name, parts in guards.GROUPS.items()]
    return "\n".join(lines) + "\n"


# -- reference ------------------------------------------------------------------------------------


def cli_page() -> str:
    """The help of every command."""
    group: Any = typer.main.get_command(app)
    parts = [" ".join((group.help or "").split()) + "\n"]
    for name, command in group.commands.items():
        parts.append(f"## keeptune {name}\n\n" + inspect.cleandoc(command.help or "") + "\n")
        lines = [parameter(p) for p in command.params if p.name != "help"]
        if lines:
            parts.append(table(("parameter", "meaning"), lines))
    parts.append(
        "## Exit codes\n\n0: done. 1: another program closed the pipe. 2: something to mend, said "
        "in one sentence on standard error. 130: stopped with Ctrl-C; the run can be resumed.\n"
    )
    return page("Commands", *parts)


def parameter(p: Any) -> tuple[str, str]:
    """One argument or option of a command."""
    shown = p.metavar or p.name.upper()
    if p.opts[0].startswith("--"):
        either = ", ".join([*p.opts, *p.secondary_opts])
        shown = either if p.is_flag else f"{p.opts[0]} {shown}"
    meaning = p.help or ""
    if p.required:
        meaning += " Required."
    elif p.default not in (None, False) and not callable(p.default) and str(p.default) not in "()":
        meaning += f" Default: `{p.default}`."
    return f"`{shown}`", meaning


def recipe_page() -> str:
    """Every field of a recipe."""
    parts = [
        "One YAML file. Relative paths start from the current directory. The JSON schema for "
        "editors is [recipe.schema.json](recipe.schema.json): put "
        "`# yaml-language-server: $schema=recipe.schema.json` on the first line of a recipe, with "
        "the path to that file.\n",
        "Any value can be changed on the command line: `--set trainer.learning_rate=1e-4`, "
        "`--set tasks.0.score=choice`, `--set methods.1.ewc.strength=10`.\n",
    ]
    parts.append("## Recipe\n\n" + fields(recipe.Recipe))
    titles = {
        recipe_parts.Adapter: "adapter",
        recipe_parts.TaskRecipe: "tasks",
        recipe_parts.TextGuard: "guards: a text",
        recipe_parts.RowsGuard: "guards: rows",
        recipe_parts.LmEvalGuard: "guards: lm-eval",
        recipe_parts.WatchRecipe: "watch",
        recipe_parts.BudgetRecipe: "budget",
    }
    for model, title in titles.items():
        doc = " ".join((inspect.getdoc(model) or "").split())
        parts.append(f"## {title}\n\n{doc}\n\n" + fields(model))
    return page("Recipe", *parts)


def fields(model: type[BaseModel]) -> str:
    """Name, type, default and meaning of a model's fields."""
    described = model.model_json_schema()
    lines = []
    for name, schema in described["properties"].items():
        default = schema.get("default")
        shown = "**required**" if name in described.get("required", ()) else ""
        if default is not None and default not in ({}, []):
            shown = f"`{json.dumps(default)}`"
        lines.append((f"`{name}`", type_words(schema), shown, schema.get("description", "")))
    return table(("field", "type", "default", "meaning"), lines)


def type_words(schema: dict[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    choices = schema.get("anyOf") or schema.get("oneOf") or []
    if choices:
        words = [type_words(choice) for choice in choices if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if "$ref" in schema:
        return "mapping"
    names = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    kind = str(schema.get("type", "any"))
    words = names.get(kind, {"array": "list", "object": "mapping"}.get(kind, kind))
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return ", ".join([words, *bounds])


def checks_page() -> str:
    """Codes, titles and gravity of all checks."""
    lines = [(c.code, c.title, c.severity, "one run") for c in checks.CHECKS]
    lines += [(c.code, c.title, c.severity, "runs together") for c in checks.COMPARISONS]
    return page(
        "Checks",
        "Every report runs them. An error voids the results, a warning says to read them with "
        "care, a note is for your information. What each one looks for, and why: "
        "[evidence and checks](../why/evidence.md).\n",
        table(("code", "what is wrong", "gravity", "about"), sorted(lines)),
    )


def metrics_page() -> str:
    """Names, formulas and meaning of all metrics."""
    every = (*metrics.DEFINITIONS, metrics.INTRANSIGENCE)
    lines = [(f"`{d.key}`", d.title[0], f"`{d.source}`", d.meaning) for d in every]
    return page(
        "Metrics",
        "`R[t,i]` is the score on task i after t tasks; row 0 is before training. G is the same "
        "for guards. Perplexities have metrics of their own, with `_perplexity` at the end of the "
        "key, taken on the logarithm. How to read them: [forgetting](../why/forgetting.md).\n",
        table(("key", "name", "formula and source", "meaning"), lines),
    )


def rows_page() -> str:
    """Shapes of rows, and the scores that fit them."""
    shapes = "\n".join(line for line in (rows.__doc__ or "").splitlines() if line[:1] == "|")
    shapes = re.sub(r" {2,}", " ", shapes)
    usual = {score: [] for score in scorers.SHAPES}
    for shape, score in scorers.DEFAULTS.items():
        usual[score].append(shape.value)
    lines = [
        (
            f"`{score}`",
            ", ".join(s.value for s in fit),
            ", ".join(usual[score]),
            "perplexity" if scorers.unit(score) == "perplexity" else "share, 0 to 1",
        )
        for score, fit in scorers.SHAPES.items()
    ]
    return page(
        "Rows and scores",
        "## Shapes of rows\n\nA shape is found by the columns; the first that fits counts.\n",
        shapes + "\n",
        "## Scores\n",
        table(("score", "fits", "the usual one for", "unit"), lines),
        "A function of your own is named `package.module:function`; it gets the answer and the "
        "row, and gives a number from 0 to 1.\n",
    )


def folder_page() -> str:
    """Files of a run folder and their keys."""
    tree = re.search(r"\n\n(    RUN/.*?)\n\n", folder.__doc__ or "", re.S)
    assert tree is not None
    parts = [f"```text\n{inspect.cleandoc(tree[1])}\n```\n"]
    shown = {
        "run.json": records.RunInfo,
        "run.json: tasks and guards": records.DataInfo,
        "run.json: methods": records.MethodInfo,
        "rows/TTT/task-III.json and guard-III.json": records.Cell,
        "an example of a cell": records.Example,
        "evidence/TTT.json": records.TaskEvidence,
        "evidence of one method": records.Evidence,
        "watch.jsonl": watchlog.Look,
        "budget/TTT.json": watchlog.Frontier,
        "one step of budget/TTT.json": watchlog.Tried,
        "a point of watch.jsonl or budget/TTT.json": watchlog.Point,
        "noise.json": records.Noise,
        "a spread of noise.json": records.Spread,
        "cost.json": records.Cost,
        "a phase of cost.json": records.Phase,
    }
    for title, record in shown.items():
        doc = inspect.getdoc(record) or ""
        said = " ".join(doc.partition("\n\n")[0].split())
        meanings = attributes(doc)
        lines = [
            (f"`{name}`", type_words(schema), meanings.get(name, ""))
            for name, schema in record.model_json_schema()["properties"].items()
        ]
        parts.append(f"## {title}\n\n{said}\n\n" + table(("key", "type", "meaning"), lines))
    return page("Run folder", *parts)


def attributes(doc: str) -> dict[str, str]:
    """The `Attributes:` of a docstring."""
    _, _, listed = doc.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in listed.splitlines():
        if match := re.match(r" {4}(\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif name and line.startswith(" " * 8):
            found[name] += " " + line.strip()
    return found


# -- files ----------------------------------------------------------------------------------------


def block(text: str, name: str, content: str) -> str:
    """A text with what stands between the markers of a generated block replaced."""
    begin, end = f"<!-- generated: {name} -->", f"<!-- /generated: {name} -->"
    head, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"the markers {begin} … {end} are missing")
    return f"{head}{begin}\n{content}{end}{rest.partition(end)[2]}"


def generated() -> dict[Path, str]:
    """Every generated file and what it must hold."""
    reference = ROOT / "docs" / "reference"
    files = {
        reference / "cli.md": cli_page(),
        reference / "recipe.md": recipe_page(),
        reference / "recipe.schema.json": json.dumps(recipe.schema(), indent=2) + "\n",
        reference / "checks.md": checks_page(),
        reference / "metrics.md": metrics_page(),
        reference / "rows.md": rows_page(),
        reference / "run-folder.md": folder_page(),
        reference / "methods.md": page("Methods", methods_table("../methods")),
    }
    for cls in own_methods():
        files[ROOT / "docs" / "methods" / f"{cls.name()}.md"] = method_page(cls)
    for path, name, content in (
        (ROOT / "README.md", "methods", methods_table("docs/methods")),
        (ROOT / "docs" / "how-to" / "guards.md", "guards", guards_list()),
    ):
        files[path] = block(path.read_text("utf-8"), name, content)
    return files


def stale() -> list[str]:
    """Generated files that are missing, out of date, or of a method that is gone."""
    files = generated()
    old = [p for p in files if not p.is_file() or p.read_text("utf-8") != files[p]]
    gone = [p for p in (ROOT / "docs" / "methods").glob("*.md") if p not in files]
    return sorted(os.path.relpath(p, ROOT) for p in (*old, *gone))


def main() -> int:
    """Write all generated files, or check them."""
    if "--check" in sys.argv[1:]:
        for name in stale():
            print(f"{name} is out of date: run `make docs`.", file=sys.stderr)
        return int(bool(stale()))
    for path in (ROOT / "docs" / "methods").glob("*.md"):
        path.unlink()
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
