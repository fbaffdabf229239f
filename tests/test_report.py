from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

import runs
from keeptune.errors import FolderError
from keeptune.records import Routes
from keeptune.report import render, write

SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "input", "br", "hr"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on a tag that does not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def run(tmp_path):
    return runs.fabricate(tmp_path / "first", runs.info(methods=[runs.REPLAY, runs.EWC]))


@pytest.fixture
def plain(tmp_path):
    return runs.fabricate(tmp_path / "plain", loss=0.2)


def test_one_run(run):
    page = Page(render([run.path]))
    for words in (
        "Learned 3 tasks",
        "SmolLM2-135M-Instruct",
        "2026-11-21 09:30",
        "Scores after each task",
        "Over the stream",
        "What it knew before",
        "Backward transfer",
        "needs a run of the method joint",
        "Evidence that the methods were active",
        "must be above 0 from task 2 on",
        "right → wrong",
        "Peak memory 2.9 GB",
        "tokens/s",
        "Training loss",
        "learning_rate: 0.0002",
        "versions torch",
        "Only one seed was run",
    ):
        assert words in page.words
    assert "Side by side" not in page.words


def test_every_score_with_its_interval_is_in_a_table(run):
    html = render([run.path])
    cell = run.cell(3, "guard", 0)
    percent = f"{100 * cell.score:.0f}"
    assert re.search(rf'title="{percent}\u00a0% \(\d+–\d+\)">{percent}</td>', html)


def test_two_runs_are_compared(run, plain):
    page = Page(render([run.path, plain.path]))
    for words in (
        "Side by side",
        "plain fine-tuning keeps",
        "Δ",
        "Where each task and guard ended",
    ):
        assert words in page.words
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["#main", "#comparison", "#run-1", "#run-2"]
    assert "No method was used: this is plain fine-tuning." in page.words


def test_without_plain_there_are_no_differences(run, tmp_path):
    other = runs.fabricate(tmp_path / "other", runs.info(methods=[runs.EWC]))
    words = Page(render([run.path, other.path])).words
    assert "No plain run is among these folders" in words
    assert "Δ" not in words


def test_seeds_are_one_row(tmp_path):
    paths = [
        runs.fabricate(tmp_path / f"{name}{seed}", runs.info(methods=methods, seed=seed)).path
        for name, methods in (("a", ()), ("b", (runs.EWC,)))
        for seed in (0, 1)
    ]
    page = Page(render(paths))
    assert page.words.count("2 seeds") >= 2
    assert "Seeds 0, 1: the metrics are means over them" in page.words
    assert len([a for t, a in page.tags if t == "article"]) == 2


def test_the_page_is_small(run, plain):
    assert len(render([run.path, plain.path]).encode()) < 300_000


def test_the_page_asks_for_nothing(run, plain):
    html = render([run.path, plain.path])
    page = Page(html)
    assert not re.search(r"url\(|@import|https?://", html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "xlink:href", "action", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policies[0].startswith("default-src 'none'")


def test_figures_have_a_name_and_a_table(run, plain):
    page = Page(render([run.path, plain.path]))
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert len(ids) == len([a for _, a in page.tags if "id" in a])
    drawn = [a for t, a in page.tags if t == "svg" and a.get("role") == "img"]
    assert len(drawn) > 40
    for figure in drawn:
        names = (figure.get("aria-labelledby") or "").split()
        assert figure.get("aria-label") or (names and set(names) <= ids)
    summaries = re.findall(r"<summary>Table: ([^<]+)<", render([run.path, plain.path]))
    assert any("against" in s for s in summaries)
    assert sum("scores over the stream" in s for s in summaries) == 2
    assert sum("training loss" in s for s in summaries) == 2


def test_all_data_is_escaped(tmp_path):
    evil = f"\"'>{SCRIPT}<img src=x onerror=alert(1)>"
    info = runs.info([evil, "b"], [evil + "g"], [runs.EWC], strategy=evil, warnings=[evil])
    info.model["name"] = evil
    info.provenance[evil] = evil
    info.tasks[0].leaked_rows = 1
    values = {"ewc": {"gradient_share": evil, evil: {evil: [evil]}}}
    folder = runs.fabricate(tmp_path / "run", info, values=values, text=f"</script></td>{evil}")
    (folder.path / "recipe.yaml").write_text(f"# </pre>{evil}\n")
    html = render([folder.path])
    page = Page(html)
    assert {"script", "img"}.isdisjoint({tag for tag, _ in page.tags})
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert page.words.count("alert(1)") > 20


def test_characters_that_turn_text_around_are_shown_as_unknown(tmp_path):
    name = "a\u202eb\u2067c\x00d\u061ce"
    html = render([runs.fabricate(tmp_path / "run", runs.info([name])).path])
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c\x00]", html)
    assert "a\ufffdb\ufffdc\ufffdd\ufffde" in html
    arabic = render([runs.fabricate(tmp_path / "other", runs.info(["عربي"])).path])
    assert "<bdi>عربي</bdi>" in arabic


def test_very_long_names_are_cut_with_the_whole_at_hand(tmp_path):
    html = render([runs.fabricate(tmp_path / "run", runs.info(["n" * 300])).path])
    assert f'<bdi title="{"n" * 300}">{"n" * 48}…</bdi>' in html


def test_an_inert_method_is_red(tmp_path):
    run = runs.info(methods=[runs.EWC])
    folder = runs.fabricate(tmp_path / "run", run, values={"ewc": {"penalty": 0.0}})
    html = render([folder.path])
    assert re.search(
        r'<li class="error"><strong>✗ Error:</strong><bdi>Method ewc did nothing', html
    )
    assert "✗ did nothing" in html


def test_answers_that_flipped_show_both(run):
    words = Page(render([run.path])).words
    then, now = (run.cell(row, "task", 0).examples for row in (1, 3))
    lost = [(a, b) for a, b in zip(then, now, strict=True) if a.score > b.score]
    won = [a for a, b in zip(then, now, strict=True) if a.score < b.score]
    assert f"{len(lost)} right → wrong, {len(won)} wrong → right of 120, since it was" in words
    old, new = lost[0]
    assert " ".join(f"{old.prompt} {old.expected} {old.answer} {new.answer}".split()) in words


def test_only_some_flips_are_shown_and_long_answers_are_cut(tmp_path):
    G = [[0.9]] + [[0.9]] * 2 + [[0.1]]
    run = runs.info(guards=["facts"])
    folder = runs.fabricate(tmp_path / "run", run, G=G, text="so " * 400)
    page = Page(render([folder.path]))
    assert "12 of 96 are shown" in page.words
    assert len(render([folder.path]).encode()) < 150_000
    assert "so so so…" in page.words


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_an_unfinished_run_has_a_report(tmp_path, rows):
    R = runs.stream(runs.TASKS, 0.5, 0.05)[:rows]
    run = runs.info(status="failed", methods=[runs.EWC])
    words = Page(render([runs.fabricate(tmp_path / "run", run, R=R).path])).words
    assert "status: failed" in words
    assert ("No task is learned yet." in words) == (rows < 2)


def test_perplexities_that_vary_between_seeds_are_drawn(tmp_path):
    paths = []
    for methods in ((), (runs.EWC,)):
        for seed, last in ((0, 10.0), (1, 20.0)):
            G = runs.drift(runs.GUARDS, 4, 0.02)
            G = [[*scores[:-1], last] for scores in G]
            run = runs.info(methods=methods, seed=seed)
            paths.append(runs.fabricate(tmp_path / f"{len(methods)}-{seed}", run, G=G).path)
    assert "14.1" in Page(render(paths)).words


def test_a_seed_that_has_learned_nothing_yet_takes_no_part(tmp_path):
    whole = [
        runs.fabricate(tmp_path / name, runs.info(methods=methods)).path
        for name, methods in (("a0", [runs.EWC]), ("plain", []))
    ]
    begun = runs.info(methods=[runs.EWC], seed=1, status="running")
    R = runs.stream(runs.TASKS, 0.5, 0.05)[:1]
    paths = [runs.fabricate(tmp_path / "a1", begun, R=R).path, *whole]
    assert "No task is learned yet." not in Page(render(paths)).words


def test_keys_that_were_searched_differ_on_purpose(tmp_path):
    paths = [runs.fabricate(tmp_path / name, runs.info()).path for name in ("a", "b")]
    recipe = paths[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.0002", "learning_rate: 0.1"))
    assert "differ in more than their methods" in Page(render(paths)).words
    for varied in (["trainer.learning_rate"], ["trainer.learning_rate", "adapter.rank"]):
        assert "differ in more than" not in Page(render(paths, varied)).words


def test_one_task_and_no_guard(tmp_path):
    run = runs.info(["only"], [])
    words = Page(render([runs.fabricate(tmp_path / "run", run).path])).words
    assert "needs two tasks or more" in words
    assert "No guard was measured" in words
    assert "What it knew before was" not in words


def test_a_task_added_later_has_empty_cells(tmp_path):
    nan = float("nan")
    R = [[0.2, 0.1, nan], [0.8, 0.2, nan], [0.8, 0.7, 0.3], [0.8, 0.7, 0.9]]
    html = render([runs.fabricate(tmp_path / "run", R=R).path])
    assert html.count('class="none task"') == 2


def test_a_run_without_cost_steps_and_provenance(tmp_path):
    folder = runs.fabricate(tmp_path / "run", runs.info(provenance={}, model={}))
    (folder.path / "cost.json").unlink()
    (folder.path / "steps.jsonl").unlink()
    words = Page(render([folder.path])).words
    assert "No cost was recorded." in words
    assert "started unknown" in words


def test_many_tasks_stay_readable(tmp_path):
    tasks = [f"task {i}" for i in range(20)]
    html = render([runs.fabricate(tmp_path / "run", runs.info(tasks, n=30)).path])
    assert len(html.encode()) < 600_000
    assert html.count('class="panel task"') == 20
    Page(html)


def test_perplexities_are_explained_only_where_there_are_some(run, tmp_path):
    assert "a perplexity is coloured" in render([run.path])
    shares = runs.fabricate(tmp_path / "shares", runs.info(guards=["facts"]))
    assert "a perplexity is coloured" not in render([shares.path])


def test_write_puts_the_page_into_the_run_folder(run):
    page = write([run.path])
    assert page == run.path / "report.html"
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_write_puts_a_comparison_beside_the_runs(run, plain, tmp_path):
    assert write([run.path, plain.path]) == tmp_path / "comparison.html"
    assert write([run.path, plain.path], tmp_path / "x" / "page.html").is_file()


def test_the_same_folder_gives_the_same_page(run):
    assert render([run.path]) == render([run.path])


def test_bad_folders_are_refused_in_a_sentence(run, tmp_path):
    with pytest.raises(FolderError, match="No run folder is given"):
        write([])
    with pytest.raises(FolderError, match="is not a run folder"):
        write([tmp_path])
    with pytest.raises(FolderError, match="given twice"):
        write([run.path, run.path])
    with pytest.raises(FolderError, match=r"cannot be written to .*first: Is a directory"):
        write([run.path], run.path)


def test_where_questions_of_unknown_task_go(run):
    assert "Questions whose task is not told" not in Page(render([run.path])).words
    tasks = {"Welsh names": {"Welsh names": 3, "French names": 1}}
    run.write_routes(run.rows_done - 1, Routes(tasks=tasks))
    words = Page(render([run.path])).words
    assert "Questions whose task is not told" in words
    assert "75 %" in words
    assert "French names: 1" in words
