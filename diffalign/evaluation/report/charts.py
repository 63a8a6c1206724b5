"""Small charts as SVG text, without a dependency; their colours are CSS variables of the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from diffalign.evaluation.measuring.statistics import Estimate

WIDTH, HEIGHT = 360, 206  # width of a chart, about that of a phone's screen
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 42
_POINTS = 240  # a line of more points is thinned by averaging


@dataclass(frozen=True)
class Line:
    """One curve: label, CSS class (``base``, ``aligned``, ``plain``), x and y of equal length."""

    label: str
    kind: str
    x: Sequence[float]
    y: Sequence[float]


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """Return a number for people: ``0.0447``, ``+0.0447``, ``1234``, with a real minus sign."""
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if size == 0:
        text = "0"
    elif size >= 10 ** (digits - 1) and size < 1e6:
        text = f"{value:.0f}"
    elif 1e-4 <= size < 1e6:
        text = f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    else:
        text = f"{value:.{digits - 1}e}"
    return ("+" if sign and value > 0 else "") + text.replace("-", "\N{MINUS SIGN}")


def tick(value: float) -> str:
    """Return a number on an axis in its shortest form: ``0.25``, ``100``, ``5e-4``."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, _, power = f"{value:.2e}".partition("e")
        digits = digits.rstrip("0").rstrip(".")
        return f"{digits}e{int(power)}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.5g}".replace("-", "\N{MINUS SIGN}")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(title: str, body: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    label = escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" preserveAspectRatio="xMidYMid '
        'meet">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


@dataclass(frozen=True)
class _Frame:
    x: tuple[float, float]
    y: tuple[float, float]
    x_title: str = ""
    y_title: str = ""

    def px(self, value: float) -> float:
        low, high = self.x
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> str:
        parts = []
        for value in ticks(*self.y):
            y = self.py(value)
            parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick(value)}</text>'
            )
        for value in ticks(*self.x):
            x = min(self.px(value), WIDTH - _RIGHT - 8)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 26}" text-anchor="middle">{tick(value)}</text>'
            )
        return "".join(parts) + self.titles()

    def titles(self) -> str:
        """Return the titles of both axes."""
        middle = (HEIGHT - _BOTTOM + _TOP) / 2
        return (
            f'<text class="tick" x="{(WIDTH + _LEFT - _RIGHT) / 2:.0f}" y="{HEIGHT - 7}" '
            f'text-anchor="middle">{escape(self.x_title)}</text>'
            f'<text class="tick" x="11" y="{middle:.0f}" text-anchor="middle" '
            f'transform="rotate(-90 11 {middle:.0f})">{escape(self.y_title)}</text>'
        )


def _span(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * pad or max(abs(high) * 0.1, 1e-6)
    return low - room, high + room


def _thin(line: Line) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(line.x, dtype=np.float64), np.asarray(line.y, dtype=np.float64)
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) > _POINTS:
        parts = np.array_split(np.arange(len(x)), _POINTS)
        x, y = np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])
    return x, y


def _smooth(y: np.ndarray) -> np.ndarray:
    """Return a centred running mean over a tenth of the points, at the ends over fewer."""
    half = len(y) // 20
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    low, high = np.maximum(0, index - half), np.minimum(len(y), index + half + 1)
    return (total[high] - total[low]) / (high - low)


def line_chart(
    title: str,
    lines: Sequence[Line],
    level: float | None = None,
    smooth: bool = True,
    axes: tuple[str, str] = ("", ""),
) -> str:
    """Curves over a common x, raw and thin under a thick running mean.

    Args:
        title: text for screen readers.
        lines: the curves.
        level: of a dashed line.
        smooth: draw the running mean.
        axes: titles of x and y.
    """
    curves = [(line, *_thin(line)) for line in lines]
    curves = [(line, x, y) for line, x, y in curves if len(x)]
    if not curves:
        return _svg(
            title,
            f'<text class="tick" x="{WIDTH // 2}" y="{HEIGHT // 2}" text-anchor="middle">no data</text>',
        )
    values = [v for _, _, y in curves for v in y.tolist()] + ([] if level is None else [level])
    places = [v for _, x, _ in curves for v in x.tolist()]
    frame = _Frame(
        (min(places), max(places) if max(places) > min(places) else min(places) + 1), _span(values), *axes
    )
    parts = [frame.axes()]
    if level is not None:
        at = frame.py(level)
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    for line, x, y in curves:
        many = smooth and len(x) >= 20
        if many:
            parts.append(_polyline(frame, x, y, f"{line.kind} raw"))
        parts.append(_polyline(frame, x, _smooth(y) if many else y, line.kind))
        if len(x) <= 12:
            parts += [
                f'<circle class="dot {line.kind}" cx="{frame.px(a):.1f}" cy="{frame.py(b):.1f}" r="3"/>'
                for a, b in zip(x, y, strict=True)
            ]
    return _svg(title, "".join(parts))


def _polyline(frame: _Frame, x: np.ndarray, y: np.ndarray, kind: str) -> str:
    points = " ".join(f"{frame.px(a):.1f},{frame.py(b):.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="curve {kind}" points="{points}"/>'


def histogram(
    title: str,
    base: Sequence[float],
    aligned: Sequence[float],
    bins: int = 24,
    axes: tuple[str, str] = ("score", "share"),
) -> str:
    """Two distributions over common bins: base as filled bars, aligned as a stepped outline.

    The y axis is the share of each model's scores, so that different counts are comparable.
    """
    everything = np.concatenate([np.asarray(base, dtype=np.float64), np.asarray(aligned, dtype=np.float64)])
    distinct = len(np.unique(everything))
    low, high = _span(everything.tolist(), 0.02)
    edges = np.linspace(low, high, min(bins, max(6, 2 * distinct)) + 1)
    first, second = (np.histogram(v, edges)[0] / max(1, len(v)) for v in (base, aligned))
    frame = _Frame((low, high), (0.0, max(float(first.max()), float(second.max())) * 1.05), *axes)
    floor = frame.py(0.0)
    parts = [frame.axes()]
    for left, right, share in zip(edges[:-1], edges[1:], first, strict=True):
        x, y = frame.px(left), frame.py(share)
        parts.append(
            f'<rect class="bar base" x="{x + 0.5:.1f}" y="{y:.1f}" width="{frame.px(right) - x - 1:.1f}" '
            f'height="{floor - y:.1f}"/>'
        )
    path = [f"M{frame.px(edges[0]):.1f} {floor:.1f}"]
    for right, share in zip(edges[1:], second, strict=True):
        path.append(f"V{frame.py(share):.1f}H{frame.px(right):.1f}")
    parts.append(f'<path class="outline aligned" d="{"".join(path)}V{floor:.1f}"/>')
    for kind, values in (("base", base), ("aligned", aligned)):
        x = frame.px(float(np.mean(values)))
        parts.append(f'<line class="mean {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor:.1f}"/>')
    parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{floor:.1f}" y2="{floor:.1f}"/>')
    return _svg(title, "".join(parts))


def interval_bar(
    title: str, estimate: Estimate, low: float, high: float, neutral: float, percent: bool = False
) -> str:
    """Draw a 95 % interval with its value on an axis from low to high, with numbers; ``neutral`` is marked.

    ``percent`` writes the axis' numbers as percentages.
    """
    width, height, margin = 300, 42, 18

    def place(value: float) -> float:
        return margin + (min(max(value, low), high) - low) / (high - low) * (width - 2 * margin)

    kind = "good" if estimate.low > neutral else "bad" if estimate.high < neutral else "even"
    a, b, c = place(estimate.low), place(estimate.high), place(estimate.value)
    marks = "".join(
        f'<line class="rule" x1="{place(value):.1f}" x2="{place(value):.1f}" y1="20" y2="24"/>'
        f'<text class="tick" x="{place(value):.1f}" y="37" text-anchor="middle">'
        f"{f'{100 * value:.0f} %' if percent else tick(value)}</text>"
        for value in ticks(low, high)
    )
    body = (
        f'<line class="rule" x1="{margin}" x2="{width - margin}" y1="13" y2="13"/>{marks}'
        f'<line class="level" x1="{place(neutral):.1f}" x2="{place(neutral):.1f}" y1="2" y2="24"/>'
        f'<rect class="interval {kind}" x="{a:.1f}" y="8" width="{max(b - a, 2):.1f}" height="10" rx="5"/>'
        f'<circle class="point {kind}" cx="{c:.1f}" cy="13" r="5"/>'
    )
    return _svg(title, body, width, height)


def outcome_bar(title: str, wins: int, ties: int, losses: int) -> str:
    """Wins, ties and losses as one bar of three parts."""
    width, total, x, parts = 300, max(1, wins + ties + losses), 0.0, []
    for kind, count in (("good", wins), ("even", ties), ("bad", losses)):
        length = width * count / total
        parts.append(f'<rect class="part {kind}" x="{x:.1f}" y="0" width="{length:.1f}" height="12"/>')
        x += length
    return _svg(title, "".join(parts), width, 12)
