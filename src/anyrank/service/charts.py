"""Charts of a run as inline SVG, small and without Matplotlib: they are drawn again whenever the page is asked for.

Colours are classes of the page's style, so that they follow its theme. No style attributes: the page's policy allows none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from anyrank.report import words

Points = Sequence[tuple[int, float]]
_WIDTH, _HEIGHT = 380, 190  # in units that are pixels on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 10, 26
_MOST = 1e300  # beyond it, differences are no numbers
_MOST_RINGS = 100
_SPARK_WIDTH, _SPARK_HEIGHT = 90, 22
_STEPS = (1, 2, 2.5, 5, 10)


def line(points: Points, what: str, rings: Sequence[int] = (), scale: float = 100.0, last_round: int | None = None) -> Markup:
    """A figure over the rounds, `[(round, value)]`, with a ring at each of the rounds `rings`; the axis has `scale` times the
    values, 100 for shares in %. `what`: its name, for those who do not see it. `last_round`: where the axis ends, if later."""
    first, last = points[0][0], max(points[-1][0], last_round or 0, points[0][0] + 1)
    values = [max(min(value * scale, _MOST), -_MOST) for _, value in points]
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def x(round: float) -> float:
        return _LEFT + (round - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy="0.35em" text-anchor="end">{_short(tick)}</text>')
    for round, anchor in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{x(round):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{round}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">round</text>')
    drawn = [(x(round), y(value)) for (round, _), value in zip(points, values, strict=True)]
    parts.append(f'<polyline class="curve" points="{_path(drawn)}"/>')
    parts.append(f'<circle class="dot" cx="{drawn[-1][0]:.1f}" cy="{drawn[-1][1]:.1f}" r="3"/>')
    at = dict(zip((round for round, _ in points), drawn, strict=True))
    for ring in [ring for ring in rings if ring in at][-_MOST_RINGS:]:
        parts.append(f'<circle class="ring" cx="{at[ring][0]:.1f}" cy="{at[ring][1]:.1f}" r="4"/>')
    told = f"{what} over rounds {first} to {points[-1][0]}: from {_short(values[0])} to {_short(values[-1])}"
    return _svg("chart", _WIDTH, _HEIGHT, told, "".join(parts))


def spark(points: Points, what: str) -> Markup:
    """A line without axes, of shares from 0 to 1, to stand in a cell of a table."""
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    drawn = [
        (1 + (round - first) / (last - first) * (_SPARK_WIDTH - 2), 2 + (1 - min(max(value, 0), 1)) * (_SPARK_HEIGHT - 4))
        for round, value in points
    ]
    told = f"{what}: from {words.share(points[0][1])} to {words.share(points[-1][1])}"
    body = f'<polyline class="curve" points="{_path(drawn)}"/>'
    return _svg("spark", _SPARK_WIDTH, _SPARK_HEIGHT, told, body)


def _svg(kind: str, width: int, height: int, told: str, body: str) -> Markup:
    return Markup(f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}">{body}</svg>')


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, from at most `low` to at least `high`.

    >>> _ticks(12.0, 87.0)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    largest = max(abs(low), abs(high))
    span = max((high - low) or 0.1 * largest or 1.0, 1e-9 * largest)  # smaller steps would not tell numbers apart
    rough = max(span / 4, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in _STEPS if step * power >= rough * 0.999)
    start = math.floor(low / step)
    count = max(math.ceil(high / step) - start, 1)
    return [(start + index) * step for index in range(min(count, 12) + 1)]


def _short(value: float) -> str:
    return f"{value:.4g}".replace("e+", "e")
