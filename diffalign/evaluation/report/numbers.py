"""Formatting of numbers in the report, with decimals by the width of their interval."""

import math
from html import escape

from diffalign.evaluation.report.charts import number
from diffalign.utils.intervals import Estimate


def decimals(estimate: Estimate) -> int | None:
    """Return the number of decimals of an estimate: two digits of half its interval, at most four of the
    value; None without width.
    """
    half = (estimate.high - estimate.low) / 2
    if not (math.isfinite(half) and half > 0):
        return None
    largest = max(abs(estimate.low), abs(estimate.high), half)
    return max(0, min(1 - math.floor(math.log10(half)), 3 - math.floor(math.log10(largest))))


def fixed(value: float, places: int | None, sign: bool = False) -> str:
    """Return a number with so many decimals; with three digits where ``places`` is None."""
    if places is None or not math.isfinite(value) or abs(value) >= 1e6 or places > 7:
        return number(value, sign=sign)
    text = f"{value:.{places}f}"
    text = text.removeprefix("-") if not float(text) else text
    return ("+" if sign and float(text) > 0 else "") + text.replace("-", "\N{MINUS SIGN}")


def span(estimate: Estimate, sign: bool = True) -> str:
    """Return ``+0.012 to +0.034``, with the decimals of the interval."""
    places = decimals(estimate)
    return f"{fixed(estimate.low, places, sign)} to {fixed(estimate.high, places, sign)}"


def gained(estimate: Estimate) -> str:
    """Return ``+0.023``, with the decimals of its interval."""
    return fixed(estimate.value, decimals(estimate), True)


def percent(value: float) -> str:
    """``56.3 %``."""
    return f"{100 * value:.1f} %"


def plain_p(p: float) -> str:
    """``p = 0.012``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def p_value(p: float) -> str:
    """Return a p-value as HTML that is not broken into lines."""
    return escape(plain_p(p)).replace(" ", "&nbsp;")


def duration(seconds: float) -> str:
    """``52 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
