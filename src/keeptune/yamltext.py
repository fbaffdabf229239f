"""YAML text whose every value knows its line, and dotted overrides (`--set a.b=c`) on top of it.

Plain values follow YAML 1.2: `1e-4` is a number; `no`, `on` and `2026-11-21` stay text, so a task
may be named after a date and a label may be "no".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from keeptune.errors import RecipeError

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain values of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own class attribute


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or the loader above would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that occurs twice out twice: a recipe is read by people."""
        return True


_Loader.add_implicit_resolver(
    _TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    _TAG + "int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(
    _TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"^<<$"), ["<"])
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class Document:
    """A YAML text as nodes, each of which knows where it was written.

    Attributes:
        name: How messages call it, a file name as a rule.
        root: The top mapping; none for values that were never text.
    """

    name: str = field(default="recipe", compare=False)
    root: Node | None = field(default=None, compare=False)

    def values(self) -> Any:
        """The plain Python values.

        Raises:
            RecipeError: A value has a tag that is not plain YAML.
        """
        try:
            constructor = yaml.constructor.SafeConstructor()
            return {} if self.root is None else constructor.construct_document(self.root)
        except yaml.MarkedYAMLError as error:
            raise _not_yaml(error, self.name) from error
        except (ValueError, RecursionError) as error:  # such as `!!int x`
            raise RecipeError(f"{self.name} holds a value that cannot be read: {error}.") from error

    def where(self, path: Sequence[str | int]) -> str:
        """`file:line` (or the `--set` flag) of the value at a path, or of its nearest parent."""
        mark = self._mark(path)
        if mark is None:
            return self.name
        return mark.name if mark.name.startswith("--set ") else f"{mark.name}:{mark.line + 1}"

    def line(self, path: Sequence[str | int]) -> int:
        """The line of the value at a path, from 1; 0 where a flag or nothing says it."""
        mark = self._mark(path)
        return 0 if mark is None or mark.name.startswith("--set ") else mark.line + 1

    def _mark(self, path: Sequence[str | int]) -> yaml.Mark | None:
        if self.root is None:
            return None
        node, mark = self.root, self.root.start_mark
        for part in path:
            step = _step(node, part)
            if step is None:
                break
            mark, node = step
        return mark

    def override(self, assignment: str) -> Document:
        """A copy in which one value is replaced.

        Args:
            assignment: "key=value"; the key is dotted and may hold list positions
                ("methods.1.ewc.strength=10"); the value is YAML.

        Raises:
            RecipeError: There is no "=", or the key runs into a value that cannot hold it.
        """
        flag = f"--set {assignment}"
        key, equals, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError(
                f"{flag}: write key=value, for example --set trainer.learning_rate=1e-4."
            )
        value = _compose(text, flag) or _scalar("null", "", yaml.Mark(flag, 0, 0, 0, None, 0))
        return Document(self.name, _put(self.root, parts, value, flag))


def read(text: str, name: str) -> Document:
    """Read YAML text.

    Args:
        text: The text of one YAML document whose top is a mapping.
        name: How messages call it, a file name as a rule.

    Raises:
        RecipeError: Not YAML, a key given twice, a key that is not text, or not a mapping.
    """
    root = _compose(text, name)
    if root is None:
        raise RecipeError(f"{name}: the recipe is empty; it needs at least `model` and `tasks`.")
    if not isinstance(root, MappingNode):
        raise RecipeError(
            f"{name}:{root.start_mark.line + 1}: a recipe is a mapping (key: value) with at least "
            "`model` and `tasks`."
        )
    return Document(name, root)


def write(values: Any) -> str:
    """YAML text that `read` turns into the same values; keys stay in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _compose(text: str, name: str) -> Node | None:
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is not None:
            _tidy(node, name, set(), set())
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, name) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise RecipeError(
            f"{name}:{line}: not YAML: the character #x{ord(text[int(error.position)]):04x} is not "
            "allowed there."
        ) from error
    except RecursionError as error:
        raise RecipeError(f"{name}: not YAML that can be read: nested too deep.") from error
    return node


def _not_yaml(error: yaml.MarkedYAMLError, name: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    flag = name.startswith("--set ") or mark is None
    where = name if flag or mark is None else f"{name}:{mark.line + 1}"
    column = f" (column {mark.column + 1})" if mark is not None and not flag else ""
    return RecipeError(f"{where}: not YAML: {error.problem or error.context}{column}.")


def _tidy(node: Node, name: str, above: set[int], done: set[int]) -> None:
    """Refuse doubled keys, keys that are not text and endless aliases; work out `<<` merges."""
    if id(node) in above:
        raise RecipeError(f"{_line(node, name)}: this alias contains itself.")
    if isinstance(node, ScalarNode) or id(node) in done:
        return
    above.add(id(node))
    if isinstance(node, MappingNode):
        _refuse_keys(node, name)
        for _, child in node.value:
            _tidy(child, name, above, done)
        yaml.constructor.SafeConstructor().flatten_mapping(node)
        node.value = list({key.value: (key, child) for key, child in node.value}.values())
    else:
        for child in node.value:
            _tidy(child, name, above, done)
    above.discard(id(node))
    done.add(id(node))


def _refuse_keys(node: MappingNode, name: str) -> None:
    seen: dict[str, Node] = {}
    for key, _ in node.value:
        if key.tag not in (_TAG + "str", _TAG + "merge"):
            shown = repr(key.value) if isinstance(key, ScalarNode) else "a list or mapping"
            raise RecipeError(f"{_line(key, name)}: a key must be text, got {shown}; quote it.")
        if key.value in seen:
            first = seen[key.value].start_mark.line + 1
            raise RecipeError(
                f"{_line(key, name)}: the key {key.value!r} is given twice (first in line {first});"
                " keep one."
            )
        seen[key.value] = key


def _line(node: Node, name: str) -> str:
    return name if name.startswith("--set ") else f"{name}:{node.start_mark.line + 1}"


def _step(node: Node, part: str | int) -> tuple[yaml.Mark, Node] | None:
    if isinstance(node, MappingNode):
        for key, child in node.value:
            if key.value == part:
                return key.start_mark, child
    if isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark, node.value[part]
    return None


def _scalar(kind: str, value: str, mark: yaml.Mark) -> ScalarNode:
    return ScalarNode(_TAG + kind, value, mark, mark)


def _put(node: Node | None, parts: Sequence[str], value: Node, flag: str) -> Node:
    """A copy of `node` with `value` at `parts`; the nodes passed in stay as they are."""
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    mark = value.start_mark
    if node is None or node.tag == _TAG + "null":
        node = SequenceNode(_TAG + "seq", []) if head == "0" else MappingNode(_TAG + "map", [])
        node.start_mark = node.end_mark = mark
    if isinstance(node, ScalarNode) and node.value == head:
        # `- ewc` is short for `- ewc: {}`, so `methods.1.ewc.strength` has its place.
        node = MappingNode(_TAG + "map", [(node, _scalar("null", "", mark))], node.start_mark)
    if isinstance(node, SequenceNode):
        items = list(node.value)
        if not head.isdecimal() or int(head) > len(items):
            raise RecipeError(
                f"{flag}: {head!r} is no position in this list; allowed: 0 to {len(items)} "
                f"({len(items)} appends)."
            )
        at = int(head)
        items[at : at + 1] = [_put(items[at] if at < len(items) else None, rest, value, flag)]
        return SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    if not isinstance(node, MappingNode):
        raise RecipeError(
            f"{flag}: the recipe has the single value {node.value!r} there, so {head!r} has no "
            "place in it; set the whole mapping, for example --set 'adapter={kind: lora, rank: 8}'."
        )
    old = {key.value: (key, child) for key, child in node.value}
    key, child = old.get(head, (_scalar("str", head, mark), None))
    if not rest:
        key = _scalar("str", head, mark)
    old[head] = (key, _put(child, rest, value, flag))
    return MappingNode(_TAG + "map", list(old.values()), node.start_mark, node.end_mark)
