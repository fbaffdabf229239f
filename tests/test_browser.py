from __future__ import annotations

import pytest

import runs
from browser import Browser, executable
from keeptune.failures import write_failure
from keeptune.report import write

pytestmark = pytest.mark.skipif(
    executable() is None, reason="no Chromium or Chrome is installed (Debian: apt install chromium)"
)
EVIL = "<script>alert(1)</script>"

# Every drawn figure and mark has a place and a size.
EMPTY = """[...document.querySelectorAll('svg[role=img], svg circle, svg polyline, svg rect')]
  .filter(e => { const b = e.getBoundingClientRect(); return !(b.width > 0 && b.height >= 0) })
  .map(e => e.outerHTML.slice(0, 200))"""
# Text that stands on its background with less contrast than WCAG's AA asks for.
PALE = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] > 250) return c; }
    return [255, 255, 255]; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.getClientRects().length) continue;
    if (['title', 'desc', 'STYLE'].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const front = rgb(e.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(front), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    const large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) found.push([ratio.toFixed(2), walk.currentNode.data.trim()]);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A comparison with an error, a warning and a note, and all the details open."""
    folder = tmp_path_factory.mktemp("runs")
    info = runs.info(methods=[runs.REPLAY, runs.EWC], warnings=["a prompt was cut"])
    info.tasks[0].leaked_rows = 3
    ours = runs.fabricate(folder / "ours", info, values={"ewc": {}}, loss=0.02)
    plain = runs.fabricate(folder / "plain", loss=0.2)
    return write([ours.path, plain.path], folder / "page.html")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Three strategies and the ceiling, two seeds with two orders each, and a run that failed."""
    folder = tmp_path_factory.mktemp("many")
    strategies = {
        "plain": ((), 0.55, 0.2),
        "ewc": ([runs.EWC], 0.4, 0.05),
        "replay": ([runs.REPLAY], 0.5, 0.04),
        "joint": ([runs.JOINT], 0.56, 0.0),
    }
    paths = [
        runs.fabricate(
            folder / f"{name}-seed{seed}-order{order}",
            runs.info(runs.TASKS[:: 1 - 2 * order], methods=methods, seed=seed, n=40),
            gain=gain + 0.01 * seed, loss=loss + 0.01 * order,
        ).path
        for name, (methods, gain, loss) in strategies.items()
        for seed in (0, 1)
        for order in (0, 1)
    ]  # fmt: skip
    write_failure(folder / "ewc-seed2", f"the loss is not a number {EVIL}")
    return write([*paths, folder / "ewc-seed2"], folder / "comparison.html")


def background(browser):
    return browser.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_silent_and_asks_for_nothing(browser, page, theme):
    browser.open(page, theme=theme)
    assert browser.evaluate("document.title").startswith("keeptune:")
    assert browser.problems() == []
    assert browser.requests() == [page.resolve().as_uri()]


def test_a_page_with_an_error_would_be_noticed(browser, page, tmp_path):
    broken = tmp_path / "broken.html"
    extra = '<img src="https://example.org/x.png"><script>fail()</script>'
    policy = page.read_text("utf-8").replace("Content-Security-Policy", "x")
    broken.write_text(policy.replace("</main>", f"{extra}</main>"), "utf-8")
    browser.open(broken)
    assert len(browser.requests()) == 2
    assert any("fail is not defined" in problem for problem in browser.problems())


def test_every_figure_is_drawn(browser, page):
    browser.open(page)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.querySelectorAll('svg[role=img]').length") > 40
    assert browser.evaluate("document.querySelectorAll('svg circle').length") > 100
    assert browser.evaluate(EMPTY) == []
    heat = browser.evaluate(
        "[...document.querySelectorAll('.heat td.own')].map(e => getComputedStyle(e))"
        ".map(s => [s.backgroundColor, s.outlineStyle])"
    )
    assert len(heat) == 6
    assert all(color != "rgba(0, 0, 0, 0)" and line == "solid" for color, line in heat)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_all_text_can_be_read(browser, page, theme, width):
    browser.open(page, theme=theme, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate(PALE) == []


def test_pale_text_would_be_noticed(browser, page):
    browser.open(page)
    browser.evaluate("document.documentElement.style.setProperty('--muted', '#aaa')")
    assert len(browser.evaluate(PALE)) > 20


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, page, width):
    browser.open(page, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_both_themes_by_preference_and_by_keyboard(browser, page):
    browser.open(page, theme="dark")
    dark = background(browser)
    browser.open(page, theme="light")
    light = background(browser)
    assert dark != light
    # skip link first, then the theme switch, whose arrows choose
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.className") == "skip"
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.id") == "theme-auto"
    for key, code, chosen, color in (
        ("ArrowRight", 39, "theme-light", light),
        ("ArrowRight", 39, "theme-dark", dark),
        ("ArrowRight", 39, "theme-auto", light),
    ):
        browser.press(key, code)
        assert browser.evaluate("document.activeElement.id") == chosen
        assert background(browser) == color
    browser.open(page, theme="dark")
    browser.evaluate("document.getElementById('theme-light').click()")
    assert background(browser) == light


def test_details_open_by_keyboard(browser, page):
    browser.open(page)
    browser.evaluate("document.querySelector('details:not([open]) summary').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate("document.activeElement.parentElement.open") is True


@pytest.mark.parametrize("width", [390, 1280])
def test_hostile_data_stays_text(browser, tmp_path, width):
    names = [EVIL, "\"quoted\" & 'name'", "عربي \u202egnol", "x" * 300]
    run = runs.info(names, [EVIL + "g", "g" * 200], [runs.EWC], strategy=EVIL)
    text = "</script></style><img src=x onerror=alert(1)>\"'"
    folder = runs.fabricate(tmp_path / "run", run, text=text)
    page = write([folder.path])
    browser.open(page, width=width)
    assert browser.problems() == []
    assert browser.requests() == [page.resolve().as_uri()]
    assert not any(e.get("method") == "Page.javascriptDialogOpening" for e in browser.events)
    assert browser.evaluate("document.querySelectorAll('script, img').length") == 0
    assert EVIL in browser.evaluate("document.querySelector('main').textContent")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_many_runs_are_drawn_compared_and_escaped(browser, comparison, width, theme):
    browser.open(comparison, width=width, theme=theme)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.problems() == []
    assert browser.requests() == [comparison.resolve().as_uri()]
    assert browser.evaluate(EMPTY) == []
    assert browser.evaluate(PALE) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('script').length") == 0
    assert f"the loss is not a number {EVIL}" in browser.evaluate(
        "document.querySelector('.findings').textContent"
    )
    # A cross for each of the four, points of different sizes, and one line for the front.
    places = "document.querySelectorAll('svg.scatter {}')"
    assert browser.evaluate(places.format("line.whisker") + ".length") == 8
    assert browser.evaluate(places.format("polyline.front") + ".length") == 1
    corners = browser.evaluate(places.format("polyline.front") + "[0].getAttribute('points')")
    members = browser.evaluate("document.querySelectorAll('svg.scatter ~ details td.front').length")
    assert len(corners.split()) == 1 + 2 * members
    overlap = """(() => { const boxes = [...document.querySelectorAll('svg.scatter g text')]
      .map(e => e.getBoundingClientRect());
      return boxes.some((a, i) => boxes.some((b, j) => j > i && a.left < b.right &&
        b.left < a.right && a.top + 4 < b.bottom && b.top + 4 < a.bottom)) })()"""
    assert browser.evaluate(overlap) is False
