"""Run folders to one self-contained HTML page: no script, no request, every figure its table."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from keeptune.checks import Finding, run_checks
from keeptune.comparison import Group, compare
from keeptune.disk import write_atomic
from keeptune.errors import FolderError
from keeptune.failures import failure
from keeptune.folder import RunFolder
from keeptune.report.flips import cut
from keeptune.report.several import ComparisonView, comparison_view
from keeptune.report.single import RunView, quantity, run_view
from keeptune.wording import headline, range_text, value_text

MOST_FLIPS = 12
_UNSEEN = (*range(9), 11, 12, *range(14, 32), *range(0x7F, 0xA0), 0x200E, 0x200F, 0x061C)
_CONTROLS = dict.fromkeys((*_UNSEEN, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


@dataclass(frozen=True)
class Page:
    """What the template shows.

    Attributes:
        title: For the browser's tab.
        main: The run that the headline is about.
        headline: Sentences.
        groups: All runs that did not fail, seeds and orders together.
        comparison: What stands on top where there are several groups.
        runs: The runs shown in full, one of each group.
        findings: What the checks found.
        failed: Names of runs that failed, and why.
        warnings: What the runs themselves warned of.
        several_seeds: Whether intervals are over seeds somewhere.
    """

    title: str
    main: str
    headline: list[str]
    groups: list[Group]
    comparison: ComparisonView | None
    runs: list[RunView]
    findings: list[Finding]
    failed: list[tuple[str, str]]
    warnings: list[str]
    several_seeds: bool


def write(
    folders: Sequence[Path], out: Path | None = None, *, varied: Collection[str] = ()
) -> Path:
    """Write the report of one run, or of several side by side, and say where it is.

    Args:
        folders: Run folders; a run need not be finished, and may have failed.
        out: The page; default report.html in the run folder, for several folders comparison.html
            beside the first one.
        varied: Keys of the runs' recipes that differ on purpose.

    Raises:
        FolderError: A folder is not a run, is damaged or given twice, or the disk is full.
    """
    page = render(folders, varied)
    if out is None:
        first = Path(folders[0])
        out = first / "report.html" if len(folders) == 1 else first.parent / "comparison.html"
    try:
        write_atomic(out, page.encode())
    except OSError as error:
        raise FolderError(f"The report cannot be written to {out}: {error.strerror}.") from error
    return out


def render(folders: Sequence[Path], varied: Collection[str] = ()) -> str:
    """The page as text.

    Args:
        folders: As in `write`.
        varied: As in `write`.

    Raises:
        FolderError: A folder is not a run, is damaged or given twice, or all runs failed.
    """
    if not folders:
        raise FolderError("No run folder is given: name at least one.")
    numbers = itertools.count(1)
    template = _environment().get_template("report.html.j2")
    return template.render(page=_page(folders, varied), uid=lambda: f"f{next(numbers)}")


def _page(folders: Sequence[Path], varied: Collection[str]) -> Page:
    failed = [(Path(f), said) for f in folders if (said := failure(Path(f))) is not None]
    bad = [path for path, _ in failed]
    opened = [RunFolder(folder) for folder in folders if Path(folder) not in bad]
    if not opened:
        raise FolderError(f"All of these runs failed; {bad[0].name}: {failed[0][1]}")
    groups = compare(opened)
    plain = next((g for g in groups if g.is_plain), None)
    main = next((g for g in groups if not g.is_plain and not g.is_joint), groups[0])
    findings = run_checks(*opened, varied=varied)
    shown = max(3, MOST_FLIPS // max(1, len(groups) - 1))
    return Page(
        title=" and ".join(g.label for g in groups[:3]) + (" and more" if groups[3:] else ""),
        main=main.label,
        headline=headline(main, plain),
        groups=groups,
        comparison=comparison_view(groups, failed) if len(groups) > 1 or failed else None,
        runs=[run_view(g, i, shown) for i, g in enumerate(groups)],
        findings=findings,
        failed=[(path.name, said) for path, said in failed],
        warnings=list(dict.fromkeys(w for f in opened for w in f.info.warnings)),
        several_seeds=any(len(g.results) > 1 for g in groups),
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("keeptune", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters.update(
        value=value_text, range=range_text, quantity=quantity, muted=_muted, name=_name
    )
    return environment


def _visible(value: object) -> object:
    """Text without control characters: an unclosed one would turn the text after it around."""
    return value.translate(_CONTROLS) if type(value) is str else value


def _name(text: str, length: int = 48) -> Markup:
    """A name, cut where it is very long; pointing at it shows the whole."""
    shown, whole = escape(_visible(cut(text, length))), escape(_visible(text))
    title = Markup(' title="{}"').format(whole) if len(text) > length else ""
    return Markup("<bdi{}>{}</bdi>").format(title, shown)


def _muted(sentence: str) -> Markup:
    """A sentence whose bracketed intervals are set lighter."""
    return Markup(re.sub(r"(\([^()]*\))", r'<span class="ci">\1</span>', str(escape(sentence))))
