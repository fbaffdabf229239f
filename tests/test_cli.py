"""The command line: what it prints, how it ends, and that it writes nothing when it must not."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from keeptune import cli
from keeptune.errors import DataError
from keeptune.folder import RunFolder
from keeptune.recipe import Recipe
from runs import fabricate

LOADING = "loading libraries, model and data\n"
RECIPE = """\
model: demo
tasks:
  - {name: a, train: a.jsonl, eval: b.jsonl}
methods: [{ewc: {strength: 3}}]
"""


@dataclass
class Called:
    """What the commands handed on, and what they shall get back."""

    recipes: list[Recipe] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    telemetry: str | None = None
    error: BaseException | None = None
    problems: list[str] = field(default_factory=list)


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Called:
    """Stands in for training: `run` and `learn` give back a made-up run folder."""
    seen = Called()

    def finish(out: Path) -> RunFolder:
        seen.telemetry = os.environ.get("HF_HUB_DISABLE_TELEMETRY")
        if seen.error is not None:
            raise seen.error
        return fabricate(out)

    def run(recipe: Recipe, **arguments: Any) -> RunFolder:
        seen.recipes.append(recipe)
        seen.arguments.append(arguments)
        assert recipe.out is not None
        return finish(recipe.out)

    def learn(path: Path, data: str, **arguments: Any) -> RunFolder:
        seen.arguments.append({"path": path, "data": data, **arguments})
        return finish(path / "again")

    def inspect(recipe: Recipe) -> Any:
        seen.recipes.append(recipe)
        return types.SimpleNamespace(lines=["model demo", "task a"], problems=seen.problems)

    def write(folders: list[Path], out: Path | None) -> Path:
        seen.arguments.append({"folders": folders, "out": out})
        return out or folders[0] / "report.html"

    stand_ins: dict[str, dict[str, Callable[..., Any]]] = {
        "keeptune.runs": {"run": run, "learn": learn},
        "keeptune.inspection": {"inspect": inspect},
        "keeptune.report": {"write": write},
        "keeptune.demo": {"run_demo": lambda out, progress: out / "index.html"},
    }
    for name, functions in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return seen


@pytest.fixture
def keeptune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["keeptune", *words])
        try:
            code = cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


Call = Callable[..., tuple[int, str, str]]


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


# -- help -----------------------------------------------------------------------------------------


def test_help_names_every_command(keeptune: Call) -> None:
    code, out, _ = keeptune("--help")
    assert code == 0
    for name in ("demo", "run", "learn", "compare", "report", "methods", "check", "version"):
        assert f" {name} " in out


def test_no_command_is_a_question_for_help(keeptune: Call) -> None:
    code, out, err = keeptune()
    assert code == 2
    assert "Usage: keeptune" in out + err, out + err


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom keeptune.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'pydantic'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in shown.stdout


# -- run ------------------------------------------------------------------------------------------


def test_run_hands_on_the_recipe_and_shows_what_came_out(called: Called, keeptune: Call) -> None:
    code, out, err = keeptune("run", "r.yaml", "--set", "methods.0.ewc.strength=9", "--seed", "4")
    assert (code, err) == (0, LOADING)
    recipe = called.recipes[0]
    assert recipe.strategy == [("ewc", {"strength": 9})]
    assert (recipe.seed, recipe.out) == (4, Path("runs/r"))
    assert called.arguments[0]["resume"] is False
    assert called.arguments[1] == {"folders": [Path("runs/r")], "out": None}
    assert "Run folder: runs/r\n" in out
    assert "Report:     runs/r/report.html\n" in out
    assert "French names" in out
    assert "capitals" in out


def test_telemetry_is_off_unless_asked_for(
    called: Called, keeptune: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeptune("run", "r.yaml")
    assert called.telemetry == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    keeptune("run", "r.yaml", "--out", "second")
    assert called.telemetry == "0"


@pytest.mark.parametrize(
    ("words", "out"),
    [
        ((), "runs/r"),
        (("--set", "out=there"), "there"),
        (("--out", "a b: #c"), "a b: #c"),
        (("--set", "out=there", "--out", "here"), "here"),
    ],
)
def test_where_the_run_goes(
    called: Called, keeptune: Call, words: tuple[str, ...], out: str
) -> None:
    assert keeptune("run", "r.yaml", *words)[0] == 0
    assert called.recipes[0].out == Path(out)


def test_ctrl_c_says_how_to_continue_and_that_works(called: Called, keeptune: Call) -> None:
    called.error = KeyboardInterrupt()
    code, out, err = keeptune(
        "run", "r.yaml", "--out", "my runs/a", "--set", "methods=[wise, ewc]", "--seed", "3"
    )
    assert (code, out) == (130, "")
    assert err == LOADING + (
        "keeptune: stopped. Continue with: keeptune run r.yaml --resume --out 'my runs/a' "
        "--set 'methods=[wise, ewc]' --set seed=3\n"
    )
    called.error = None
    again = shlex.split(err.partition("Continue with: keeptune ")[2])
    assert keeptune(*again)[0] == 0
    assert called.arguments[1]["resume"] is True
    assert called.recipes[0] == called.recipes[1]


def test_dry_run_and_check_write_nothing(called: Called, keeptune: Call) -> None:
    before = files()
    for words in (("run", "r.yaml", "--dry-run"), ("check", "r.yaml", "--set", "seed=1")):
        assert keeptune(*words) == (0, "model demo\ntask a\n", "")
    called.problems = ["a.jsonl is missing.", "b.jsonl is missing."]
    code, out, err = keeptune("check", "r.yaml")
    assert (code, out) == (2, "model demo\ntask a\n")
    assert err == "keeptune: 2 problems:\n  a.jsonl is missing.\n  b.jsonl is missing.\n"
    assert files() == before


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run", "no.yaml"), "no.yaml: there is no such recipe file."),
        (("check", "no.yaml"), "no.yaml: there is no such recipe file."),
        (
            ("run", "r.yaml", "--set", "tasks.0.scor=choice"),
            "--set tasks.0.scor=choice: there is no key 'scor' in tasks.0. Did you mean 'score'?",
        ),
        (("methods", "ewcc"), "There is no method 'ewcc'. Did you mean 'ewc'?"),
    ],
)
def test_a_users_error_is_one_sentence(
    called: Called, keeptune: Call, words: tuple[str, ...], sentence: str
) -> None:
    before = files()
    assert keeptune(*words) == (2, "", f"keeptune: {sentence}\n")
    assert files() == before
    assert called.recipes == []


def test_an_error_while_training_is_one_sentence(called: Called, keeptune: Call) -> None:
    called.error = DataError("broken JSON at line 17 of a.jsonl.")
    said = LOADING + "keeptune: broken JSON at line 17 of a.jsonl.\n"
    assert keeptune("run", "r.yaml") == (2, "", said)


def test_all_problems_of_a_recipe_are_listed(called: Called, keeptune: Call) -> None:
    Path("r.yaml").write_text(RECIPE + "sed: 1\nout: 3\n")
    code, _, err = keeptune("run", "r.yaml")
    assert code == 2
    assert err == (
        "keeptune: 2 problems:\n"
        "  r.yaml:5: there is no key 'sed'. Did you mean 'seed'?\n"
        "  r.yaml:6: out must be a path, got 3.\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run",), "RECIPE"),
        (("run", "r.yaml", "--sed", "3"), "--seed"),
        (("run", "r.yaml", "--seed", "-1"), "--seed"),
        (("learn", "runs/a", "b.jsonl"), "--name"),
        (("report",), "RUN"),
        (("rum",), "run"),
    ],
)
def test_wrong_usage(called: Called, keeptune: Call, words: tuple[str, ...], said: str) -> None:
    code, out, err = keeptune(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_bug_keeps_its_traceback(called: Called, keeptune: Call) -> None:
    called.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        keeptune("run", "r.yaml")


def test_a_place_that_cannot_be_written_is_one_sentence(called: Called, keeptune: Call) -> None:
    called.error = OSError(20, "Not a directory", "t.txt/report.html")
    said = LOADING + "keeptune: t.txt/report.html cannot be read or written: Not a directory.\n"
    assert keeptune("run", "r.yaml") == (2, "", said)


def test_any_letter_may_be_in_a_folders_name(called: Called, keeptune: Call) -> None:
    keeptune("run", "r.yaml", "--out", "runs/\N{SNOWMAN}\N{GRINNING FACE}")
    assert str(called.recipes[0].out) == "runs/\N{SNOWMAN}\N{GRINNING FACE}"


def test_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "keeptune", "run", "no.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == "keeptune: no.yaml: there is no such recipe file.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("version",), ("--help",)])
def test_a_closed_pipe_is_no_drama(words: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "keeptune", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


# -- the other commands ---------------------------------------------------------------------------


def test_learn_hands_on_everything(called: Called, keeptune: Call) -> None:
    words = ("learn", "runs/a", "b.csv", "--name", "b", "--eval", "c.csv", "--score", "choice")
    code, out, _ = keeptune(*words)
    assert code == 0
    given = called.arguments[0]
    del given["progress"]
    assert given == {
        "path": Path("runs/a"),
        "data": "b.csv",
        "name": "b",
        "eval": "c.csv",
        "score": "choice",
    }
    assert "Run folder: runs/a/again\n" in out


def test_learn_is_continued_by_the_same_command(called: Called, keeptune: Call) -> None:
    called.error = KeyboardInterrupt()
    code, _, err = keeptune("learn", "runs/a", "b.csv", "--name", "week 2", "--eval", "c.csv")
    assert code == 130
    assert err.endswith("keeptune learn runs/a b.csv --name 'week 2' --eval c.csv\n")


def test_export_says_what_it_wrote(monkeypatch: pytest.MonkeyPatch, keeptune: Call) -> None:
    from keeptune import export

    asked: list[Any] = []

    def write(path: Path, out: Path, **more: Any) -> export.Exported:
        asked.append((path, out, more))
        return export.Exported(out, "model", is_merged=True)

    monkeypatch.setattr(export, "export", write)
    code, out, _ = keeptune("export", "runs/a", "out", "--task", "sql", "--merged")
    assert code == 0
    assert asked == [(Path("runs/a"), Path("out"), {"task": "sql", "merged": True})]
    assert out == "Export: out, a whole model (its adapter merged in)\n"


def test_report_of_one_and_of_several(called: Called, keeptune: Call) -> None:
    assert keeptune("report", "runs/a") == (0, "Report: runs/a/report.html\n", "")
    assert keeptune("report", "a", "b", "--out", "x.html") == (0, "Report: x.html\n", "")
    assert called.arguments[1] == {"folders": [Path("a"), Path("b")], "out": Path("x.html")}


def test_demo_says_where_its_report_is(called: Called, keeptune: Call) -> None:
    assert keeptune("demo", "--out", "d") == (0, "Report: d/index.html\n", LOADING)


def test_methods_lists_every_method(keeptune: Call) -> None:
    code, out, _ = keeptune("methods")
    assert code == 0
    for name in ("ewc", "joint", "lwf", "plain", "replay", "task_lora", "wise"):
        assert f"\n{name} " in out


def test_a_methods_card_and_settings(keeptune: Call) -> None:
    code, out, _ = keeptune("methods", "ewc")
    assert code == 0
    assert "https://arxiv.org/abs/1612.00796" in out
    assert "strength" in out
    assert "number, ≥ 0" in out


def test_cards_as_markdown(keeptune: Call) -> None:
    code, out, _ = keeptune("methods", "--markdown")
    assert code == 0
    assert out.startswith(
        "| name | what it does | use when |\n|---|---|---|\n| [`adapters`](#adapters) |"
    )
    assert "\n## replay\n" in out
    assert (
        "\n| `ratio` | `0.2` | number, ≥ 0, ≤ 100 | old rows, or tokens, for each new one |\n"
        in out
    )
    code, out, _ = keeptune("methods", "wise", "--markdown")
    assert out.startswith("## wise\n")


def test_version(keeptune: Call) -> None:
    code, out, _ = keeptune("version")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()][:2] == ["keeptune", "torch"]


# -- compare --------------------------------------------------------------------------------------


@pytest.fixture
def grid(called: Called, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the runs of a comparison."""
    seen: dict[str, Any] = {"failed": [], "error": None}

    def plan(recipe: Recipe, out: Path, **how: Any) -> list[Any]:
        seen.update(recipe=recipe, out=out, how=how)
        job = types.SimpleNamespace(title="plain, seed 0", folder=out / "plain", is_done=False)
        return [job]

    def compare(jobs: list[Any], out: Path, board: Any, engine: Any) -> Any:
        seen["engine"] = engine
        if seen["error"] is not None:
            raise seen["error"]
        fabricate(jobs[0].folder)
        failed = [(jobs[0], said) for said in seen["failed"]]
        return types.SimpleNamespace(folder=out, page=out / "c.html", done=jobs, failed=failed)

    module = types.ModuleType("keeptune.compare")
    vars(module).update(plan=plan, compare=compare)
    monkeypatch.setitem(sys.modules, "keeptune.compare", module)
    return seen


WORDS = "loading libraries and data\n"


def test_compare_hands_on_the_grid_and_shows_its_page(grid: dict[str, Any], keeptune: Call) -> None:
    words = ("--methods", "plain,ewc", "--seeds", "3", "--orders", "2", "--jobs", "4")
    code, out, err = keeptune("compare", "r.yaml", *words, "--set", "seed=7")
    assert (code, err) == (0, WORDS)
    assert grid["how"] == {"methods": "plain,ewc", "seeds": "3", "orders": 2}
    assert (grid["recipe"].seed, grid["out"]) == (7, Path("runs/r-compare"))
    assert grid["engine"].keywords == {"at_once": 4}
    assert "plain " in out
    assert out.endswith("Run folders: runs/r-compare\nReport:      runs/r-compare/c.html\n")


def test_compare_ends_with_1_when_a_run_failed(grid: dict[str, Any], keeptune: Call) -> None:
    grid["failed"] = ["the loss is not a number"]
    code, out, err = keeptune("compare", "r.yaml")
    assert code == 1
    assert "Report: " in out
    assert "keeptune: plain, seed 0 failed: the loss is not a number\n" in err
    assert err.endswith("1 of 2 runs failed. The same command tries them again, and only them.\n")


def test_compare_lists_the_runs_and_runs_none(grid: dict[str, Any], keeptune: Call) -> None:
    code, out, _ = keeptune("compare", "r.yaml", "--dry-run")
    assert (code, out) == (0, "to do    plain, seed 0: runs/r-compare/plain\n")
    assert "engine" not in grid


def test_compare_says_how_to_continue(grid: dict[str, Any], keeptune: Call) -> None:
    grid["error"] = KeyboardInterrupt()
    words = ("--methods", "ewc(strength=1)", "--seeds", "3,5", "--engine", "slurm")
    more = ("--slurm", "cluster=local", "--set", "seed=7", "--out", "my runs")
    code, _, err = keeptune("compare", "r.yaml", *words, *more)
    assert code == 130
    first, grid["error"] = grid["how"], None
    again = shlex.split(err.partition("Continue with: keeptune ")[2])
    assert keeptune(*again)[0] == 0
    assert (grid["how"], grid["out"], grid["recipe"].seed) == (first, Path("my runs"), 7)
    assert grid["engine"].keywords == {"at_once": 1, "parameters": {"cluster": "local"}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--engine", "rya"), "--engine rya: there is no such engine. Did you mean 'ray'"),
        (("--address", "auto"), "--address is for --engine ray, but the engine is local"),
        (("--set", "sed=1"), "there is no key 'sed'"),
    ],
)
def test_compare_refuses_before_anything_is_loaded(
    grid: dict[str, Any], keeptune: Call, words: tuple[str, ...], said: str
) -> None:
    code, out, err = keeptune("compare", "r.yaml", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert WORDS not in err
    assert "how" not in grid
