"""Scores: their names, their units, which shapes they fit, and the ones that compare text."""

from __future__ import annotations

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from keeptune.errors import DataError, suggest
from keeptune.records import Example, Unit
from keeptune.rows import Row, Rows, Shape, answer, options

TextScore = Callable[[str, Row], float]

_ASKED = (Shape.MESSAGES, Shape.CHOICE, Shape.COMPLETION)
SHAPES: dict[str, tuple[Shape, ...]] = {
    "exact_match": _ASKED,
    "greedy_match": (Shape.COMPLETION, Shape.CHOICE, Shape.MESSAGES),
    "choice": (Shape.CHOICE, Shape.COMPLETION),
    "token_f1": _ASKED,
    "rouge_l": _ASKED,
    "perplexity": (*_ASKED, Shape.TEXT),
    "accuracy": (Shape.LABEL,),
}
DEFAULTS = {
    Shape.MESSAGES: "exact_match",
    Shape.CHOICE: "choice",
    Shape.COMPLETION: "exact_match",
    Shape.LABEL: "accuracy",
    Shape.TEXT: "perplexity",
}


def unit(score: str) -> Unit:
    """The unit: perplexity (lower is better), or share (0 to 1, higher is better) for all else."""
    return "perplexity" if score == "perplexity" else "share"


def cell_score(examples: Sequence[Example], unit: Unit) -> float:
    """Weighted mean of the examples' scores; for perplexity exp of it. NaN without examples."""
    weight = sum(e.weight for e in examples)
    if not weight:
        return math.nan
    mean = sum(e.score * e.weight for e in examples) / weight
    if unit != "perplexity":
        return mean
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def check_score(score: str, rows: Rows) -> None:
    """See to it that these rows can be scored so.

    Raises:
        DataError: Unknown name, a function that cannot be imported, or rows it does not fit.
    """
    if ":" in score:
        _load(score)
    elif score not in SHAPES:
        raise DataError(
            f"unknown score {score!r}. {suggest(score, SHAPES)} "
            'A function of your own is written "package.module:function".'
        )
    fits = SHAPES.get(score, _ASKED)
    if rows.shape not in fits:
        raise DataError(
            f"score {score!r} fits rows of the shape {' or '.join(fits)}, but {rows.source} has "
            f"rows of the shape {rows.shape}, for which {DEFAULTS[rows.shape]!r} is the usual one."
        )
    if score == "choice":
        without = sum(options(row, rows.shape) is None for row in rows.rows)
        if without:
            raise DataError(
                f"score 'choice' needs a column `choices` that holds the right answer; {without} "
                f"of {len(rows)} rows of {rows.source} have none."
            )


def text_score(score: str, shape: Shape) -> TextScore:
    """The function that scores a generated answer against its row of this shape, 0 to 1.

    Raises:
        DataError: No such function, or (when called) it gives no number from 0 to 1.
    """
    own = _load(score) if ":" in score else None
    if own is None:
        compare = _COMPARE[score]
        return lambda got, row: compare(got, answer(row, shape))

    def checked(got: str, row: Row) -> float:
        try:
            value = float(own(got, row))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(
                f"score {score!r} failed on the answer {got!r:.60}: {reason}."
            ) from error
        if math.isnan(value) or not 0 <= value <= 1:
            raise DataError(f"score {score!r} gave {value}; it must give a number from 0 to 1.")
        return value

    return checked


def exact_match(got: str, expected: str) -> float:
    """1 when both are equal but for white space and upper or lower case; an empty answer is 0."""
    answered = " ".join(got.split()).casefold()
    return float(bool(answered) and answered == " ".join(expected.split()).casefold())


def token_f1(got: str, expected: str) -> float:
    """F1 of the bags of words, as in SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1).

    Lower case, no ASCII punctuation, no English articles. An empty side is 0.
    """
    a, b = _squad_words(got), _squad_words(expected)
    return _f1((Counter(a) & Counter(b)).total(), len(a), len(b))


def rouge_l(got: str, expected: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3, with beta = 1).

    Words are runs of letters and digits, in lower case. An empty side is 0.
    """
    a, b = re.findall(r"\w+", got.lower()), re.findall(r"\w+", expected.lower())
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = (
                row[j],
                diagonal + 1 if word == other else max(row[j], row[j - 1]),
            )
    return _f1(row[-1], len(a), len(b))


_COMPARE = {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l}


def _f1(common: int, got: int, expected: int) -> float:
    return 2 * common / (got + expected) if common else 0.0


def _squad_words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _load(score: str) -> Callable[[str, Row], float]:
    module, _, name = score.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise DataError(
            f"score {score!r} cannot be imported ({type(error).__name__}: {error}); it must be "
            '"package.module:function", and Python must find the module (see PYTHONPATH).'
        ) from error
    if not callable(function):
        raise DataError(f"score {score!r} is no function but {type(function).__name__}.")
    loaded: Callable[[str, Row], float] = function
    return loaded
