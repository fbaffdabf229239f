"""The documentation does what it says: code runs, recipes load, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import pico
from keeptune import session, yamltext
from keeptune.checks import CHECKS, COMPARISONS
from keeptune.cli import app
from keeptune.models import Loaded
from keeptune.recipe import check_recipe, parse_recipe
from keeptune.rows import read_rows
from keeptune.scorers import SHAPES
from runs import fabricate

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"(?:^<!-- not run: ?(.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# What a recipe's fragment is a part of.
WHOLE = {"model": "demo", "tasks": [{"name": "t", "train": "t.jsonl", "eval": "e.jsonl"}]}

CHOICES = [
    {"prompt": f"Case {i}. Topic:", "choices": ["a", "b"], "answer": "ab"[i % 2]} for i in range(8)
]
ANSWERS = [{"prompt": f"{i} and 1 are", "completion": f" {i + 1}"} for i in range(8)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {i}."},
            {"role": "assistant", "content": f"It is {i}."},
        ]
    }
    for i in range(4)
]
LABELS = [{"text": f"case {i}", "label": ("billing", "login")[i % 2]} for i in range(8)]
DATA: dict[str, list[dict[str, Any]]] = {
    "tickets/train.jsonl": CHOICES[:6],
    "tickets/test.jsonl": CHOICES[6:],
    "billing/train.jsonl": CHOICES[2:],
    "billing/test.jsonl": CHOICES[:2],
    "sql/train.parquet": ANSWERS[:6],
    "sql/test.parquet": ANSWERS[6:],
    "sums/train.jsonl": ANSWERS[:6],
    "sums/test.jsonl": ANSWERS[6:],
    "domain/train.jsonl": TALKS[:3],
    "domain/test.jsonl": TALKS[3:],
    "chat.jsonl": TALKS,
    "spring/train.csv": LABELS[:6],
    "spring/test.csv": LABELS[6:],
    "summer/train.csv": LABELS[2:],
    "summer/test.csv": LABELS[:2],
}


@dataclass(frozen=True)
class Block:
    """A fenced block; `skipped` is the reason why it is not run, None where it is."""

    page: Path
    line: int
    language: str
    code: str
    skipped: str | None

    @property
    def file(self) -> str | None:
        """The file that the block says it is, in a comment on its first line."""
        named = re.match(r"# ([\w-]+\.(?:py|yaml))\n", self.code)
        return named[1] if named else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(page, text.count("\n", 0, m.start(3)) + 1, m[2], m[3], m[1])
        for m in FENCE.finditer(text)
    ]


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -- a folder in which the examples work ----------------------------------------------------------


def stand_in(model: str, *, labels: Any = (), **rest: Any) -> Loaded:
    made: Any = pico.causal_lm() if not labels else pico.classifier(len(labels))
    made.config.pad_token_id = 0
    return Loaded(
        model=made, tokenizer=pico.tokenizer(chat=True), name=model, source=model, identity="pico"
    )


def from_folder_or(make: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """What loads a folder that is there, and a tiny stand-in for any other name."""
    return lambda name, *a, **k: real(name, *a, **k) if Path(name).is_dir() else make()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the data that the pages name; every model in it is a tiny one."""
    import pandas
    import transformers

    for name, rows in DATA.items():
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        frame = pandas.DataFrame(rows)
        if file.suffix == ".parquet":
            frame.to_parquet(file)
        elif file.suffix == ".csv":
            frame.to_csv(file, index=False)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "wiki.txt").write_text("The committee met on Tuesday.\n" * 5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs" / "start")
    # The tests have a module of the same name as the script of the documentation.
    monkeypatch.delitem(sys.modules, "by_hand", raising=False)
    monkeypatch.setattr(session, "load", stand_in)
    for cls, make in (
        (transformers.AutoModelForCausalLM, lambda *a, **k: pico.causal_lm()),
        (transformers.AutoTokenizer, lambda *a, **k: pico.tokenizer(chat=True)),
    ):
        monkeypatch.setattr(cls, "from_pretrained", from_folder_or(make, cls.from_pretrained))
    yield tmp_path
    sys.modules.pop("by_hand", None)


def before_notebook(home: Path) -> None:
    readme = next(b for b in blocks(ROOT / "README.md") if b.file == "tickets.yaml")
    (home / "tickets.yaml").write_text(readme.code)


def before_evidence(home: Path) -> None:
    fabricate(home / "runs" / "first")


def before_budget(home: Path) -> None:
    """Rows enough to be sure of something."""
    data = home / "data"
    (data / "wiki.txt").write_text("The committee met on Tuesday.\n" * 600)
    for name, rows in (("sums", ANSWERS), ("billing", CHOICES)):
        lines = "".join(json.dumps(row) + "\n" for row in rows * 2)
        (data / name / "test.jsonl").write_text(lines)


def before_many_runs(home: Path) -> None:
    """What the stand-in does not reach, such as runs' own processes, finds a real, tiny folder."""
    folder = home / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    pico.causal_lm().save_pretrained(folder)
    pico.tokenizer(chat=True).save_pretrained(folder)


BEFORE: dict[str, Callable[[Path], None]] = {
    "README.md": before_many_runs,
    "docs/how-to/loss-under-one-point.md": before_budget,
    "docs/how-to/many-runs.md": before_many_runs,
    "docs/how-to/notebook.md": before_notebook,
    "docs/how-to/which-method.md": before_many_runs,
    "docs/why/evidence.md": before_evidence,
}


# -- blocks ---------------------------------------------------------------------------------------


def run_python(block: Block, names: dict[str, Any]) -> None:
    lines = "\n" * (block.line - 1)
    exec(compile(lines + block.code, str(block.page), "exec"), names)


def run_commands(block: Block, names: dict[str, Any]) -> None:
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "keeptune", f"{line!r} cannot be run here; say so above its block"
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"


def load_yaml(block: Block, names: dict[str, Any]) -> None:
    check_recipe(parse_recipe({**WHOLE, **yamltext.read(block.code, "block").values()}))


def read_lines(block: Block, names: dict[str, Any]) -> None:
    read_rows([json.loads(line) for line in block.code.splitlines()])


def read_toml(block: Block, names: dict[str, Any]) -> None:
    tomllib.loads(block.code)


def nothing(block: Block, names: dict[str, Any]) -> None:
    """Drawings and printed text."""


RUNNERS: dict[str, Callable[[Block, dict[str, Any]], None]] = {
    "python": run_python,
    "bash": run_commands,
    "yaml": load_yaml,
    "jsonl": read_lines,
    "toml": read_toml,
    "text": nothing,
}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=title)
def test_every_block_of_a_page_runs_from_top_to_bottom(
    page: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    BEFORE.get(title(page), lambda _: None)(home)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        assert block.language in RUNNERS, f"{title(page)}:{block.line}: what is this block?"
        if block.skipped is not None:
            assert block.skipped, f"{title(page)}:{block.line}: say why it is not run"
            continue
        if block.file:
            Path(block.file).write_text(block.code)
        RUNNERS[block.language](block, names)


def test_the_loop_by_hand_runs_as_a_script(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script: Any = loaded(ROOT / "docs" / "start" / "by_hand.py")
    monkeypatch.setattr(script, "EPOCHS", 1)
    script.main()
    shown = capsys.readouterr().out
    assert "plain" in shown
    assert shown.count("forgotten of 'next'") == 2


# -- links and generated files --------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_link_inside_the_project_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), f"{title(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{title(page)} links to {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        targets = LINK.findall(FENCE.sub("", page.read_text("utf-8")))
        waiting += [(page.parent / t.partition("#")[0]).resolve() for t in targets if ":" not in t]
    missing = set(PAGES) - reached - {ROOT / "docs" / "README.md"}
    assert not {title(page) for page in missing}


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_written_from_the_code_is_up_to_date() -> None:
    assert loaded(ROOT / "docs" / "generate.py").stale() == [], "run `make docs`"


def test_a_stale_file_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    generate: Any = loaded(ROOT / "docs" / "generate.py")
    monkeypatch.setattr(generate, "methods_table", lambda cards: "| another | table |\n")
    assert "README.md" in generate.stale()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1


def test_the_readme_begins_with_a_command() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert any(line.startswith("make demo") for line in lines[:25])


def test_every_check_is_explained() -> None:
    explained = (ROOT / "docs" / "why" / "evidence.md").read_text("utf-8")
    for check in (*CHECKS, *COMPARISONS):
        assert (
            f"**{check.code}, {check.title[0].lower()}{check.title[1:]}** ({check.severity})"
            in (explained)
        )


def test_every_score_is_explained() -> None:
    explained = (ROOT / "docs" / "how-to" / "own-data.md").read_text("utf-8")
    for score in SHAPES:
        assert f"\n| `{score}` |" in explained


def test_lines_are_short_enough_to_read_a_change() -> None:
    long = [
        f"{title(page)}:{number}"
        for page in PAGES
        if "Written by docs/generate.py" not in page.read_text("utf-8")
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1)
        if len(line) > 110 and line[:1] not in "|{" and "](" not in line
    ]
    assert not long
