"""Numbers and headlines in words, as the report and the command line show them."""

from __future__ import annotations

import math

from keeptune.comparison import Group
from keeptune.intervals import Estimate
from keeptune.units import Shown

SPACE = "\u00a0"
_FINE = 0.01


def number(value: float, shown: Shown, *, digits: int = 0, sign: bool = True) -> str:
    """A value without its unit: 71, +12, −0.4, 14.2.

    Args:
        value: In the unit of `shown`; shares and changes are multiplied by 100.
        shown: The unit.
        digits: After the point, for shares and changes.
        sign: Whether a change carries a plus.
    """
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if shown == "perplexity":
        return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:,.0f}"
    plus = "+" if sign and shown in ("points", "relative") else ""
    text = f"{100 * value:{plus}.{digits}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def unit_of(shown: Shown) -> str:
    """What follows a number: " %", " points" or nothing."""
    return {"share": f"{SPACE}%", "relative": f"{SPACE}%", "points": f"{SPACE}points"}.get(
        shown, ""
    )


def digits_for(estimate: Estimate) -> int:
    """One digit after the point where the interval is narrow enough to bear it."""
    if estimate.low is None or estimate.high is None:
        return 0
    return int(0 < estimate.high - estimate.low < _FINE)


def value_text(estimate: Estimate | None, shown: Shown) -> str:
    """`71 %`, `+12 points`, `14.2`, or a dash."""
    if estimate is None or estimate.value is None:
        return "–"
    return number(estimate.value, shown, digits=digits_for(estimate)) + unit_of(shown)


def range_text(estimate: Estimate | None, shown: Shown, *, sign: bool = True) -> str:
    """`65–77`, or `+4 to +11` where there are signs; "" without an interval."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    if estimate.low == estimate.high:
        return "±0"
    digits = digits_for(estimate)
    low, high = (number(e, shown, digits=digits, sign=sign) for e in (estimate.low, estimate.high))
    return f"{low} to {high}" if {"+", "−"} & {low[0], high[0]} else f"{low}–{high}"


def estimate_text(estimate: Estimate | None, shown: Shown) -> str:
    """`71 % (65–77)`."""
    ends = range_text(estimate, shown)
    return value_text(estimate, shown) + (f" ({ends})" if ends else "")


def headline(group: Group, plain: Group | None = None) -> list[str]:
    """What a run (or its mean over seeds) shows, in a few sentences that the numbers bear out.

    A loss or a gain is claimed only where the whole 95 % interval lies on its side, and where it is
    more than the noise, if that was measured.

    Args:
        group: The run.
        plain: Plain fine-tuning on the same data, when it was run too.
    """
    summary = next((s for s in group.summaries if s.learned), group.summaries[0])
    if not summary.learned:
        return ["No task is learned yet."]
    sentences = [
        _learned(group, summary.learned, summary.planned),
        _kept(group, plain),
        _since(group),
        _learned_perplexity(group),
        _since_perplexity(group),
        _guard_perplexity(group),
    ]
    if not summary.guards:
        sentences.append("No guard was measured: what it knew before was not watched.")
    return [sentence for sentence in sentences if sentence]


def _found(group: Group, key: str) -> Estimate | None:
    metric = group.metric(key)
    return metric.estimate if metric and metric.estimate.value is not None else None


def _count(number_of: int, word: str) -> str:
    return f"{number_of} {word}" + ("" if number_of == 1 else "s")


def _terms(group: Group, key: str) -> int:
    """Tasks or guards in a metric, whatever its interval is over."""
    return next(m.estimate.n for m in group.summaries[0].metrics if m.key == key)


def _size(estimate: Estimate, shown: Shown) -> str:
    """`12 points (4–18)`: a change without its sign, for after "lost" or "rose by"."""
    flip = (estimate.value or 0) < 0
    low, high = estimate.low, estimate.high
    if flip and low is not None and high is not None:
        low, high = -high, -low
    positive = Estimate(abs(estimate.value or 0), low, high, estimate.n)
    text = number(positive.value or 0, shown, digits=digits_for(positive), sign=False)
    ends = range_text(positive, shown, sign=False)
    return text + unit_of(shown) + (f" ({ends})" if ends else "")


def _learned(group: Group, learned: int, planned: int) -> str:
    gain = _found(group, "learning_gain")
    if gain is None:
        return ""
    n = _terms(group, "learning_gain")
    average = " on average" if n > 1 else ""
    tasks = _count(n, "task") if learned == planned or n < learned else f"{n} of {planned} tasks"
    if gain.is_above:
        ends = range_text(gain, "points", sign=False)
        return f"Learned {tasks}: {value_text(gain, 'points')}{average} ({ends})."
    if gain.is_below:
        return f"Learned nothing: {tasks} lost {_size(gain, 'points')}{average} in training."
    change = f"{value_text(gain, 'points')}{average}{_ends(gain, 'points')}"
    return f"{tasks} changed by {change} in training: {_nothing(gain, 'points', 'no learning')}."


def _learned_perplexity(group: Group) -> str:
    gain = _found(group, "learning_gain_perplexity")
    if gain is None:
        return ""
    tasks = _count(_terms(group, "learning_gain_perplexity"), "task")
    return _perplexity(gain, f"Perplexity of {tasks}", "as learned")


def _since(group: Group) -> str:
    change = _found(group, "backward_transfer")
    if change is None:
        return ""
    if change.is_below:
        return f"Earlier tasks lost {_size(change, 'points')} since they were learned."
    if change.is_above:
        return f"Earlier tasks gained {_size(change, 'points')} since they were learned."
    text = value_text(change, "points") + _ends(change, "points")
    return f"Earlier tasks changed by {text} since: {_nothing(change, 'points', 'no loss')}."


def _since_perplexity(group: Group) -> str:
    change = _found(group, "backward_transfer_perplexity")
    if change is None:
        return ""
    return _perplexity(change, "Perplexity of earlier tasks", "since they were learned")


def _perplexity(change: Estimate, subject: str, when: str) -> str:
    if change.is_above:
        return f"{subject} rose by {_size(change, 'relative')} {when}."
    if change.is_below:
        return f"{subject} fell by {_size(change, 'relative')} {when}."
    text = value_text(change, "relative") + _ends(change, "relative")
    return f"{subject} changed by {text} {when}: {_nothing(change, 'relative', 'nothing')}."


def _ends(change: Estimate, shown: Shown) -> str:
    return f" ({range_text(change, shown) or 'no interval'})"


def _kept(group: Group, plain: Group | None) -> str:
    kept = _found(group, "guard_kept")
    if kept is None:
        return ""
    guards = _count(_terms(group, "guard_kept"), "guard")
    text = estimate_text(kept, "share")
    loss = kept.shifted(-1.0)
    if loss.is_above:
        said = f"Knows more than before, by {guards}: {text}"
    else:
        said = f"Kept {text} of what it knew before, by {guards}"
    against = _against(group, plain)
    if not loss.is_above and not loss.is_below:
        return f"{said}: {_nothing(loss, 'share', 'no loss')}{against}."
    return f"{said}{against}."


def _nothing(change: Estimate, shown: Shown, what: str) -> str:
    """Why a change is not called one."""
    if not change.is_noise:
        return f"{what} that this sample could show"
    size = number(change.floor, shown, digits=1, sign=False) + unit_of(shown)
    return f"within the noise, as runs of this recipe vary by up to {size}"


def _against(group: Group, plain: Group | None) -> str:
    if plain is None or plain is group:
        return ""
    theirs, gap = _found(plain, "guard_kept"), group.differences.get("guard_kept")
    if theirs is None or gap is None:
        return ""
    text = estimate_text(theirs, "share")
    if gap.is_above:
        return f"; plain fine-tuning keeps {text}"
    if gap.is_below:
        return f"; plain fine-tuning keeps more, {text}"
    why = "is within the noise" if gap.is_noise else "this sample cannot tell apart"
    return f"; plain fine-tuning keeps {text}, which {why}"


def _guard_perplexity(group: Group) -> str:
    change = _found(group, "guard_change_perplexity")
    if change is None:
        return ""
    guards = _count(_terms(group, "guard_change_perplexity"), "guard text")
    return _perplexity(change, f"Perplexity of {guards}", "since the start")
