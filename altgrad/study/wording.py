"""Numbers and lists as they are written in sentences and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from altgrad.study.analysis import Difference


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a true minus among them; a dash for NaN.

    >>> signed(0.0412), signed(-0.5), signed(-0.001), signed(float("nan"))
    ('+0.04', '−0.50', '0.00', '–')
    """
    if math.isnan(value):
        return "–"
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def delta(difference: Difference, digits: int = 2) -> str:
    """A difference with half its confidence interval.

    >>> delta(Difference(0.04, 0.01, 3, 0)), delta(Difference(0.04, math.nan, 1, 0))
    ('+0.04 ± 0.01', '+0.04 (n = 1)')
    """
    if not difference.known:
        return "–"
    mean = signed(difference.mean, digits)
    return f"{mean} (n = 1)" if math.isnan(difference.half_width) else f"{mean} ± {difference.half_width:.{digits}f}"


def listing(items: Iterable[str]) -> str:
    """Words joined as in a sentence.

    >>> listing(["a"]), listing("ab"), listing("abc")
    ('a', 'a and b', 'a, b and c')
    """
    words = list(items)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def number(count: int) -> str:
    """A count as it is written in a sentence.

    >>> number(5), number(15)
    ('five', '15')
    """
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if count < len(words) else str(count)


def percent(rate: float) -> str:
    """A rate in percent with two significant digits; a dash for NaN.

    >>> [percent(rate) for rate in (0.0, 1e-7, 0.0000123, 0.0123, 0.5, 1.0, float("nan"))]
    ['0%', '<0.001%', '0.0012%', '1.2%', '50%', '100%', '–']
    """
    if math.isnan(rate):
        return "–"
    scaled = 100 * rate
    if scaled == 0 or scaled >= 10:
        return f"{scaled:.0f}%"
    if scaled < 0.001:
        return "<0.001%"
    return f"{scaled:.{1 - math.floor(math.log10(abs(scaled)))}f}%"


def span(values: Sequence[float], show: Callable[[float], str]) -> str:
    """One number, or the lowest and the highest of several."""
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"
