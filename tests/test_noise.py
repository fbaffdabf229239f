"""Noise: the formula by hand, a run measured for real, and every verdict that then rests on it."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

import pico
import runs
from keeptune import report, terminal
from keeptune.board import Board
from keeptune.checks import run_checks
from keeptune.compare import compare as compare_all
from keeptune.compare import plan
from keeptune.comparison import compare
from keeptune.disk import locked
from keeptune.errors import DataError, FolderError, ModelError
from keeptune.floors import deviation, floor
from keeptune.folder import RunFolder
from keeptune.intervals import Estimate
from keeptune.jobs import Job, run_job
from keeptune.metrics import summarise
from keeptune.noise import Measured, measure, other_sizes, spreads
from keeptune.progress import Silent
from keeptune.ranking import rankings
from keeptune.records import Noise, Spread
from keeptune.results import load
from keeptune.runs import run
from keeptune.units import convert
from keeptune.wording import headline
from test_runs import home, recipe

__all__ = ["home"]


def spread(**changes: Any) -> Spread:
    values = {"kind": "task", "name": "t", "unit": "share", "seeds": [0.5], "examples": 0.0}
    return Spread(**{**values, **changes})


# -- the formula ----------------------------------------------------------------------------------


def test_two_runs_differ_by_root_two_of_what_one_varies() -> None:
    # s = 0.1 over three seeds, t(2) = 4.303
    seeds = [0.4, 0.5, 0.6]
    assert floor(spread(seeds=seeds), 1, 1) == pytest.approx(math.sqrt(2) * 4.303 * 0.1)
    assert floor(spread(seeds=seeds), 4, 4) == pytest.approx(math.sqrt(0.5) * 4.303 * 0.1)
    assert floor(spread(seeds=seeds), 1) == pytest.approx(4.303 * 0.1)


def test_examples_are_added_at_right_angles() -> None:
    # two runs: √(2 · 4.303² · 0.1² + 1.96² · 0.2²)
    both = spread(seeds=[0.4, 0.5, 0.6], examples=9.0, paired=0.2)
    assert floor(both, 1, 1) == pytest.approx(math.hypot(math.sqrt(2) * 0.4303, 1.96 * 0.2))


def test_one_seed_leaves_scoring_and_examples_of_its_own() -> None:
    # 0.30 and 0.32 when scored again: s = 0.01414, t(1) = 12.706; examples unpaired
    one = spread(seeds=[0.3], again=[0.30, 0.32], examples=0.05)
    expected = math.sqrt(2) * math.hypot(12.706 * 0.02 / math.sqrt(2), 1.96 * 0.05)
    assert floor(one, 1, 1) == pytest.approx(expected)
    assert floor(spread(examples=0.05), 1, 1) == pytest.approx(math.sqrt(2) * 1.96 * 0.05)


def test_two_runs_of_one_recipe_rarely_differ_by_the_floor() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=300)

    def answers() -> Any:
        return (hard + 0.4 * rng.normal(size=300) + 0.1 * rng.normal() > 0).astype(float)

    beyond = 0
    for _ in range(500):
        known = [answers() for _ in range(4)]
        gaps = [(a - b).std() / math.sqrt(300) for a, b in combinations(known, 2)]
        paired = math.sqrt(np.mean(np.square(gaps)))
        found = spread(seeds=[a.mean() for a in known], paired=paired)
        beyond += abs(answers().mean() - answers().mean()) > floor(found, 1, 1)
    assert 0 < beyond < 0.05 * 500


def test_a_single_value_has_no_deviation() -> None:
    assert deviation([0.5]) is None
    assert deviation([0.4, 0.6]) == pytest.approx(0.2 / math.sqrt(2))


@pytest.mark.parametrize(
    ("value", "low", "high", "side"),
    [(0.1, 0.05, 0.2, 1), (0.04, 0.01, 0.07, 0), (-0.1, -0.2, -0.05, -1), (-0.04, -0.07, -0.01, 0),
     (0.01, -0.1, 0.1, 0)],
)  # fmt: skip
def test_a_change_under_the_floor_is_none(value: float, low: float, high: float, side: int) -> None:
    found = Estimate(value, low, high, floor=0.05)
    assert int(found.is_above) - int(found.is_below) == side
    assert found.is_noise == (side == 0 and low * high > 0)
    assert found.shifted(0.0) == found


def test_the_floor_of_a_perplexity_is_relative() -> None:
    # the logarithm fell by 0.2: 18 % less, and two runs differ by 0.1: 9.5 % less, or 10.5 % more
    found = convert(Estimate(0.2, 0.15, 0.25, floor=0.1), "change", "relative")
    assert found.floor == pytest.approx(-math.expm1(-0.1))
    assert found.is_below
    rise = convert(Estimate(-0.2, -0.25, -0.15, floor=0.1), "change", "relative")
    assert rise.floor == pytest.approx(math.expm1(0.1))
    assert convert(Estimate(0.09, 0.05, 0.12, floor=0.1), "change", "relative").is_noise


def test_batches_are_of_other_sizes() -> None:
    assert [other_sizes(n) for n in (1, 2, 3, 16)] == [[2], [1, 3], [1, 4], [8, 17]]


# -- made-up runs ---------------------------------------------------------------------------------


def noisy(path: Path, seed: int = 0, *, by: float = 0.0, **more: Any) -> RunFolder:
    """Two tasks and a guard; all end by so much lower."""
    R = [[0.2, 0.2], [0.7, 0.2], [0.6 - by, 0.75 - by]]
    G = [[0.6], [0.6], [0.55 - by]]
    info = runs.info(runs.TASKS[:2], runs.GUARDS[:1], seed=seed, **more)
    return runs.fabricate(path, info, R=R, G=G)


def record(folders: Sequence[RunFolder]) -> Noise:
    found = spreads([load(one) for one in folders], {("task", 0): [0.6], ("guard", 0): [0.55]})
    seeds = [one.info.seed for one in folders]
    return Noise(tasks=2, seeds=seeds, batch_sizes=[16, 8], spreads=found)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    others = [noisy(home / f"s{i}", i, by=by) for i, by in ((1, 0.1), (2, -0.1))]
    folder = noisy(home / "run")
    folder.write_noise(record([folder, *others]))
    return folder.path


@pytest.fixture
def measured(made: Path, tmp_path: Path) -> RunFolder:
    """A run whose seeds differ by so much that nothing it lost means anything."""
    shutil.copytree(made, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_every_task_guard_and_metric_has_its_spread(measured: RunFolder) -> None:
    noise = measured.noise()
    assert noise is not None
    found = {(s.kind, s.name): s for s in noise.spreads}
    assert found["task", runs.TASKS[0]].seeds == pytest.approx([0.6, 0.5, 0.7], abs=0.01)
    assert found["task", runs.TASKS[0]].again == pytest.approx([0.6, 0.6])
    assert found["task", runs.TASKS[1]].again == pytest.approx([0.75])
    assert found["guard", "capitals"].seeds == pytest.approx([0.55, 0.45, 0.65], abs=0.01)
    gain = found["metric", "backward_transfer"]
    assert gain.seeds == pytest.approx([-0.1, -0.2, 0.0], abs=0.01)
    assert found["task", runs.TASKS[0]].examples == pytest.approx(math.sqrt(0.24 / 120), rel=0.1)
    assert found["task", runs.TASKS[0]].paired is not None
    assert ("metric", "forward_transfer") in found
    first, last = runs.TASKS[:2]
    assert found["gain", first].seeds == pytest.approx([0.5, 0.5, 0.5], abs=0.01)
    assert found["change", first].seeds == pytest.approx([-0.1, -0.2, 0.0], abs=0.01)
    assert found["change", "capitals"].seeds == pytest.approx([-0.05, -0.15, 0.05], abs=0.01)
    assert ("change", last) not in found, "nothing came after it"
    assert ("gain", "capitals") not in found


def test_a_loss_within_the_noise_is_called_so(measured: RunFolder, tmp_path: Path) -> None:
    (group,) = compare([measured])
    words = " ".join(headline(group))
    assert "Learned 2 tasks" in words, "what is more than the noise stays"
    assert "since: within the noise, as runs of this recipe vary by up to" in words
    assert "of what it knew before, by 1 guard: within the noise" in words
    track = summarise(measured).guards[0]
    assert track.change.is_noise
    page = report.render([measured.path])
    assert ">smallest difference<" in page
    assert "What chance does" in page
    assert ", within the noise" in page
    shown = io.StringIO()
    Console(file=shown, width=200).print(terminal.scores_table(summarise(measured)))
    assert "within the noise" in shown.getvalue()
    (measured.path / "noise.json").unlink()
    (group,) = compare([measured])
    assert "Earlier tasks lost" in " ".join(headline(group))
    assert "within the noise" not in report.render([measured.path])


def test_a_difference_between_single_runs_must_be_above_the_floor(
    measured: RunFolder, tmp_path: Path
) -> None:
    ewc = noisy(tmp_path / "ewc", by=-0.2, methods=[runs.EWC])
    ranking = {r.metric.key: r for r in rankings(compare([measured, ewc]))}
    assert ranking["average_accuracy"].duels[0].better == 0
    assert "within the noise" in report.render([measured.path, ewc.path])
    (measured.path / "noise.json").unlink()
    ranking = {r.metric.key: r for r in rankings(compare([measured, ewc]))}
    assert ranking["average_accuracy"].duels[0].better == -1


def test_a_measured_run_is_not_said_to_have_one_seed(measured: RunFolder) -> None:
    assert "KT006" not in [f.code for f in run_checks(measured)]
    (measured.path / "noise.json").unlink()
    assert "KT006" in [f.code for f in run_checks(measured)]


def test_after_one_more_task_the_record_says_nothing(measured: RunFolder) -> None:
    noise = measured.noise()
    assert noise is not None
    measured.write_noise(noise.model_copy(update={"tasks": 1}))
    assert load(measured).noise is None
    assert not summarise(measured).guards[0].change.is_noise


def test_the_table_tells_tasks_guards_and_metrics(measured: RunFolder) -> None:
    noise = measured.noise()
    assert noise is not None
    shown = io.StringIO()
    Console(file=shown, width=160).print(terminal.noise_table(noise))
    text = shown.getvalue()
    assert "means of 3" in text
    assert "Backward transfer" in text
    assert "Forward transfer" not in text
    assert "of the seed (0, 1, 2). Then" in " ".join(text.split())
    alone = noise.model_copy(
        update={"seeds": [0], "spreads": [spread(again=[0.5, 0.5], examples=0.02)]}
    )
    Console(file=(shown := io.StringIO()), width=160).print(terminal.noise_table(alone))
    assert "No other seed was run" in shown.getvalue()


# -- real runs ------------------------------------------------------------------------------------


class Engine:
    """Runs jobs in this process; after so many it is stopped."""

    def __init__(self, most: int = 9) -> None:
        self.most = most
        self.began: list[str] = []

    def __call__(self, jobs: Sequence[Job], board: Board) -> Iterator[tuple[Job, str | None]]:
        for job in jobs:
            if len(self.began) == self.most:
                raise KeyboardInterrupt
            self.began.append(job.folder.name)
            board.started(job)
            yield job, run_job(job)


def noise_of(path: Path, seeds: int, engine: Engine | None = None) -> Measured:
    board = Board(io.StringIO())
    return measure(path, seeds, board=board, engine=engine or Engine(), progress=Silent())


def files(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != "noise.json"
    }


def test_a_run_is_measured_stopped_and_measured_on(home: Path) -> None:
    text = home / "old.txt"
    text.write_text("The committee met on Tuesday.\n" * 60)
    asked = recipe(
        home, guards=[{"name": "old", "text": str(text)}], methods=["replay"], eval_batch_size=3
    )
    folder = run(asked)
    before = files(folder.path)
    first = Engine(most=1)
    with pytest.raises(KeyboardInterrupt):
        noise_of(folder.path, 2, first)
    assert folder.noise() is None
    second = Engine()
    done = noise_of(folder.path, 2, second)
    assert not set(first.began) & set(second.began)
    assert len(second.began) == 1
    assert done.failed == []
    assert done.seeds_in == folder.path.with_name("run-seeds")
    assert done.noise == folder.noise()
    assert (done.noise.seeds, done.noise.batch_sizes) == ([0, 1, 2], [3, 1, 4])
    assert files(folder.path) == before, "nothing else of the run is changed"
    for found in done.noise.spreads:
        if found.kind in ("task", "guard"):
            assert len(found.again) == 3
            assert found.again == pytest.approx([found.again[0]] * 3, abs=1e-4)
    third = Engine()
    assert noise_of(folder.path, 2, third).noise == done.noise
    assert third.began == []


def test_runs_of_a_comparison_count(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    jobs = plan(recipe(home, count=1), Path("cmp"), methods="plain", seeds="2")
    compare_all(jobs, Path("cmp"), Board(io.StringIO()), Engine())
    engine = Engine()
    done = noise_of(jobs[0].folder, 1, engine)
    assert engine.began == []
    assert (done.noise.seeds, done.seeds_in) == ([0, 1], (home / "cmp").resolve())


def test_classes_and_strict_privacy_are_measured(home: Path) -> None:
    labels = [{"text": f"case {i}", "label": ("x", "y")[i % 2]} for i in range(8)]
    data = pico.write_rows(home / "labels.jsonl", labels)
    pico.classifier().save_pretrained(home / "cls")
    pico.tokenizer().save_pretrained(home / "cls")
    asked = recipe(
        home,
        kind="classification",
        model=str(home / "cls"),
        tasks=[{"name": "t", "train": data, "eval": data}],
        privacy="strict",
    )
    folder = run(asked)
    done = noise_of(folder.path, 0)
    assert done.noise.spreads[0].name == "t"
    assert "case" not in (folder.path / "noise.json").read_text()


def spread_over_two(folder: Any) -> None:
    """Write into the recipe that FSDP spread the model, as `torchrun` would have run it."""
    file = folder.path / "recipe.yaml"
    given = yaml.safe_load(file.read_text())
    given["trainer"]["fsdp"] = True
    file.write_text(yaml.safe_dump(given))


def test_a_run_of_several_processes_has_as_many_rows_in_a_step(home: Path) -> None:
    folder = run(recipe(home, count=1))
    provenance = folder.info.provenance | {"processes": 2}
    folder.info = folder.info.model_copy(update={"provenance": provenance})
    folder.save_info()
    spread_over_two(folder)
    engine = Engine()
    done = noise_of(folder.path, 1, engine)
    (other,) = done.seeds_in.iterdir()
    text = (other / "recipe.yaml").read_text()
    assert "gradient_accumulation_steps: 2" in text
    assert "fsdp" not in text


def test_what_cannot_be_measured_is_said(home: Path) -> None:
    folder = run(recipe(home, count=1))
    with locked(folder.path), pytest.raises(FolderError, match="Another process is at work"):
        noise_of(folder.path, 0)
    pico.write_rows(home / "eval0.jsonl", pico.questions(5, 4))
    with pytest.raises(
        DataError, match=r"The evaluation rows of 't0' changed since .* Put the old"
    ):
        noise_of(folder.path, 0)
    (home / "eval0.jsonl").unlink()
    with pytest.raises(DataError, match="there is no file"):
        noise_of(folder.path, 0)
    pico.write_rows(home / "eval0.jsonl", pico.questions(0, 4))
    shutil.rmtree(home / "tiny")
    pico.causal_lm(seed=3).save_pretrained(home / "tiny")
    pico.tokenizer().save_pretrained(home / "tiny")
    with pytest.raises(ModelError, match=r"was trained from other weights of .* than those found"):
        noise_of(folder.path, 0)
    folder.info = folder.info.model_copy(update={"status": "stopped"})
    folder.save_info()
    with pytest.raises(FolderError, match=r"is not finished \(status: stopped\)"):
        noise_of(folder.path, 0)
    assert folder.noise() is None
    with pytest.raises(FolderError, match="is not a run folder"):
        noise_of(home, 0)
