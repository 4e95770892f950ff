"""Draw the charts of a report with Matplotlib: inline SVG that follows the page's theme, and one PNG for a README.

Nothing in a chart depends on the clock or on a random id: the same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from anyrank.report.style import CARD, HEAT, PAGE, SHARED, SIZE, Paint, Style, cut, label_width, look, plain, ramp, svg

_POINTS = 200  # a line, a stack or a heatmap has at most so many rounds
_WIDE, _SMALL = 4.2, 2.2  # inches: a chart, and one of many small ones
_EARLY = 0.75  # a line that ends before this share of the axis has its name right there, others at the axis' end
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Series:
    """One label's line: `x`, `mean` and `std` `[n]`; `std` is 0 if there is one seed. `rings`: where on x
    the line has a ring.
    """

    label: str
    style: Style
    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    rings: np.ndarray = field(default_factory=lambda: np.zeros(0))


def thin(n: int) -> np.ndarray:
    """At most `_POINTS` evenly spaced indices of `range(n)`, including the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, _POINTS)).round().astype(int)) if n else np.zeros(0, int)


def wants_log(series: Sequence[Series]) -> bool:
    """Whether the lines span more than a factor of 50, so that some would be flat on a linear axis."""
    means = np.concatenate([line.mean for line in series] or [np.zeros(0)])
    means = means[means > 0]
    return bool(len(means)) and means.min() * 50 < means.max()


def lines(
    series: Sequence[Series],
    title: str,
    x_label: str,
    alt: str,
    percent: bool = False,
    log: bool = False,
    from_zero: bool = False,
) -> Markup:
    """A line a label with its standard deviation shaded and its name at its end. A linear axis starts at zero or, without
    `from_zero`, where `zoomed` says.
    """
    with look():
        figure = Figure(figsize=(_WIDE, 2.75))
        _draw_lines(figure, (0.0, 0.0, 1.0, 1.0), series, PAGE, title, x_label, percent, log, from_zero)
        return svg(figure, alt)


def zoomed(series: Sequence[Series]) -> tuple[float, float] | None:
    """Limits of a linear axis that leave out the first fifth of the run, where that alone would take over half of the
    axis and press several lines together; `None` where the whole run is shown.
    """
    drawn = [line for line in series if len(line.x)]
    if len(drawn) < 2:
        return None
    begin = max(line.x[-1] for line in drawn) / 5
    whole = [np.concatenate([line.mean - line.std, line.mean + line.std]) for line in drawn]
    late = [values[np.tile(line.x >= min(begin, line.x[-1]), 2)] for values, line in zip(whole, drawn, strict=True)]
    low, high = min(map(np.min, late)), max(map(np.max, late))
    bottom, top = min(map(np.min, whole)), max(map(np.max, whole))
    if top - bottom < 2 * (high - low) or high <= low:
        return None
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def heatmap(spectrum: np.ndarray, rounds: np.ndarray, levels: Sequence[int], floor: float, alt: str) -> Markup:
    """`log10(sigma_i / sigma_1)` over the rounds: `spectrum` `[rounds, r]`, from `floor` (dark) to 0 (bright).

    Each rank partition is a band of the same height with its singular indices inside: partitions are what decays.
    """
    keep = thin(len(rounds))
    spectrum, rounds = spectrum[keep], rounds[keep]
    first = spectrum[:, :1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(first > 0, np.log10(spectrum / first), np.nan)
    share = np.clip(1 - ratio / floor, 0, 1)  # 0 at the floor, 1 at sigma_1; NaN where there is no update yet
    rows = np.concatenate([_band(share.T, low, high) for low, high in bands(levels, spectrum.shape[1])])
    pixels = HEAT(np.nan_to_num(rows), bytes=True)
    pixels[np.isnan(rows)] = 0
    with look():
        figure = Figure(figsize=(_SMALL, 1.95))
        ax = figure.add_axes((0.13, 0.2, 0.82, 0.75))
        edges = [high for _, high in bands(levels, spectrum.shape[1])]
        ax.imshow(
            pixels,
            origin="lower",
            aspect="auto",
            interpolation="none",
            extent=(rounds[0] - 0.5, rounds[-1] + 0.5, 0, len(edges)),
        )
        for level in range(1, len(edges)):
            ax.axhline(level, color="white", linewidth=0.9, alpha=0.85)
        ax.set_yticks(range(1, len(edges) + 1), [str(edge) for edge in edges])
        plain(ax, PAGE)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=_STEPS))
        ax.set_xlabel("round")
        return svg(figure, alt)


def bands(levels: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Rank partitions `(r_{k-1}, r_k]` of singular indices as half-open ranges from 0.

    >>> bands([2, 4, 8], 8)
    [(0, 2), (2, 4), (4, 8)]
    """
    edges = sorted({level for level in levels if level > 0})
    edges = edges if edges and edges[-1] >= length else [*edges, length]
    return list(zip([0, *edges[:-1]], edges, strict=True))


def stack(energy: np.ndarray, rounds: np.ndarray, alt: str) -> Markup:
    """Shares of the energy in each rank partition as stacked areas: `energy` `[partitions, rounds]`, summing to 1."""
    keep = thin(len(rounds))
    with look():
        figure = Figure(figsize=(_SMALL, 1.7))
        ax = figure.add_axes((0.16, 0.22, 0.79, 0.71))
        colors = [SHARED, *ramp(len(energy) - 1)]
        ax.stackplot(rounds[keep], energy[:, keep], colors=colors, linewidth=0)
        ax.set_ylim(0, 1)
        ax.set_xlim(rounds[0], max(rounds[-1], rounds[0] + 1))
        ax.set_yticks([0, 0.5, 1], ["0", "50", "100"])
        plain(ax, PAGE)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=_STEPS))
        ax.set_xlabel("round")
        return svg(figure, alt)


def bars(rows: Sequence[tuple[str, Style, float, float]], title: str, alt: str) -> Markup:
    """Two bars per label: the first value solid, the second pale. `rows`: `(label, style, first, second)`."""
    with look():
        height = 0.5 + 0.36 * len(rows)
        figure = Figure(figsize=(_WIDE, height))
        left = label_width([row[0] for row in rows]) / _WIDE
        ax = figure.add_axes((left, 0.1 / height, 0.86 - left, (height - 0.5) / height))
        for place, (_, style, first, second) in enumerate(rows):
            color = PAGE.hues[style.hue]
            for value, at, alpha in ((first, place - 0.19, 1.0), (second, place + 0.19, 0.45)):
                ax.barh(at, value, height=0.34, color=color, alpha=alpha, linewidth=0)
                told = {"fontsize": 8, "color": PAGE.text, "va": "center"}
                ax.annotate(_short(value), (value, at), (3, 0), textcoords="offset points", **told)
        ax.set_yticks(range(len(rows)), [cut(row[0]) for row in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(0, max([value for row in rows for value in row[2:]] + [1e-9]))
        plain(ax, PAGE)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        figure.text(0.02, 1 - 0.19 / height, title, fontsize=SIZE, color=PAGE.text, weight="bold")
        return svg(figure, alt)


def headline(first: Sequence[Series], name: str, collapse: Sequence[Series], note: str, out: Path) -> None:
    """The README's PNG: `first`, of `name` accuracy or loss, and energy beyond the minimum rank, over the rounds, 1800 px wide.

    It is a white card with round corners, so that the text keeps its contrast on light and on dark pages.
    """
    with look():
        figure = Figure(figsize=(9, 3.9), dpi=200)
        figure.patch.set_alpha(0)
        corners = {"boxstyle": "round,pad=0,rounding_size=0.02", "mutation_aspect": 9 / 3.9}
        card = FancyBboxPatch((0.01, 0.02), 0.98, 0.96, **corners, fc="white", ec="#d1d9e0", lw=0.8, zorder=-1)
        card.set_transform(figure.transFigure)
        figure.add_artist(card)
        percent = name == "accuracy"
        told = "Accuracy, %" if percent else "Loss"
        _draw_lines(figure, (0.02, 0.09, 0.485, 0.87), first, CARD, told, "round", percent, False, False)
        log = wants_log(collapse)
        title = "Energy beyond the minimum rank, %" + (" (log scale)" if log else "")
        _draw_lines(figure, (0.505, 0.09, 0.485, 0.87), collapse, CARD, title, "round", True, log, True)
        figure.text(0.032, 0.055, note, fontsize=8, color=CARD.muted)
        figure.savefig(out, format="png", metadata={"Software": None})


def panels(
    shown: Sequence[tuple[str, Sequence[Series]]], x_label: str, log: bool, note: str, out: Path, percent: bool = True
) -> None:
    """A PNG with a panel a setting, `(title, lines)`, two per row, on a white card. `percent`: values are shares."""
    rows = -(-len(shown) // 2)
    tall = 3.4 * rows + 0.4
    with look():
        figure = Figure(figsize=(9, tall), dpi=150)
        figure.patch.set_facecolor("white")
        for place, (title, series) in enumerate(shown):
            row, column = divmod(place, 2)
            box = (0.02 + 0.49 * column, (0.4 + 3.4 * (rows - 1 - row)) / tall, 0.475, 3.3 / tall)
            _draw_lines(figure, box, series, CARD, title, x_label, percent, log and wants_log(series), log)
        figure.text(0.032, 0.16 / tall, note, fontsize=8, color=CARD.muted)
        figure.savefig(out, format="png", metadata={"Software": None})


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw_lines(
    figure: Figure,
    box: tuple[float, float, float, float],
    series: Sequence[Series],
    paint: Paint,
    title: str,
    x_label: str,
    percent: bool,
    log: bool,
    from_zero: bool,
) -> None:
    """Draw lines into `box` (left, bottom, width, height in figure shares), with space at the right for the names."""
    left, bottom, width, height = box
    wide, tall = figure.get_size_inches()
    names = label_width([line.label for line in series])
    rect = (left * wide + 0.5, bottom * tall + 0.42, width * wide - 0.58 - names, height * tall - 0.75)
    ax = figure.add_axes((rect[0] / wide, rect[1] / tall, rect[2] / wide, rect[3] / tall))
    for line in series:
        _draw_line(ax, line, paint, log)
        _draw_rings(ax, line, paint)
    if log:
        _log_axis(ax, series)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        ax.margins(y=0.06)
        ax.set_ylim(*((0, None) if from_zero else zoomed(series) or (None, None)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value if percent else value:.6g}"))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=x_label == "round", steps=_STEPS))
    ends = [line.x[-1] for line in series if len(line.x)]
    ax.set_xlim(0, max([*ends, 1e-9]))
    ax.grid(axis="y", color=paint.grid, linewidth=0.7)
    plain(ax, paint)
    ax.set_xlabel(x_label)
    at = (left + 0.12 / wide, (rect[1] + rect[3] + 0.13) / tall)
    figure.text(*at, title, fontsize=SIZE + 0.6, color=paint.text, weight="bold")
    _name_ends(ax, series, paint, rect[3])
    if not ends:
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", color=paint.muted)


def _draw_line(ax: Axes, line: Series, paint: Paint, log: bool) -> None:
    keep = thin(len(line.x))
    x, mean, std = line.x[keep], line.mean[keep], line.std[keep]
    if log:
        mean = np.where(mean > 0, mean, np.nan)
    color = paint.hues[line.style.hue]
    dashes = [float(part) for part in line.style.dasharray.split()]
    style = (0, dashes) if dashes else "-"
    ax.plot(x, mean, color=color, linewidth=1.7, linestyle=style, solid_capstyle="round", marker="o" if len(x) == 1 else "")
    if (std > 0).any():
        low = np.maximum(mean - std, mean / 10) if log else mean - std
        ax.fill_between(x, low, mean + std, color=color, alpha=0.16, linewidth=0)


def _draw_rings(ax: Axes, line: Series, paint: Paint) -> None:
    at = line.rings[line.rings <= line.x[-1]] if len(line.x) else line.x
    at = at[thin(len(at))]
    if len(at):
        ring = {"marker": "o", "markersize": 5, "markerfacecolor": paint.surface, "markeredgewidth": 1.2}
        color = paint.hues[line.style.hue]
        ax.plot(at, np.interp(at, line.x, line.mean), linestyle="", markeredgecolor=color, **ring)


def _log_axis(ax: Axes, series: Sequence[Series]) -> None:
    means = np.concatenate([line.mean for line in series])
    means = means[means > 1e-8]  # less than this is rounding, not energy
    ax.set_yscale("log")
    if len(means):
        ax.set_ylim(means.min() / 1.6, means.max() * 1.6)
    ax.yaxis.set_major_locator(LogLocator(10, numticks=6))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _name_ends(ax: Axes, series: Sequence[Series], paint: Paint, height: float) -> None:
    """Write each line's name next to its end, moved apart if names would overlap. `height` of the axes in inches."""
    to_share = ax.transData + ax.transAxes.inverted()
    low = ax.get_ylim()[0]
    drawn = [(line, *to_share.transform((line.x[-1], max(line.mean[-1], low)))) for line in series if len(line.x)]
    for line, x, y in drawn:
        if x < _EARLY:
            _name(ax, line, paint, x + 0.02, y)
    drawn = [end for end in drawn if end[1] >= _EARLY]
    gap = min(1.22 * 8.6 / 72 / height, 1.1 / max(len(drawn), 1))
    for (line, x, y), place in zip(drawn, apart([end[2] for end in drawn], gap), strict=True):
        color = paint.hues[line.style.hue]
        ax.plot([x, 1.035], [y, place], color=color, linewidth=0.7, alpha=0.6, transform=ax.transAxes, clip_on=False)
        _name(ax, line, paint, 1.05, place)


def _name(ax: Axes, line: Series, paint: Paint, x: float, y: float) -> None:
    color = paint.hues[line.style.hue]
    ax.text(x, y, cut(line.label), color=color, fontsize=8.6, va="center_baseline", transform=ax.transAxes)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The places moved as little as needed to stand `gap` apart, in their order: clusters share their mean.

    >>> [round(place, 2) for place in apart([0.5, 0.5, 0.9], 0.1)]
    [0.45, 0.55, 0.9]
    """
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    clusters: list[list[float]] = []  # each: the wished places, less the offset within the cluster
    for i in order:
        clusters.append([places[i]])
        while len(clusters) > 1 and _top(clusters[-2], gap) + gap > _bottom(clusters[-1], gap):
            last = clusters.pop()
            clusters[-1] += last
    spread = [_bottom(cluster, gap) + gap * step for cluster in clusters for step in range(len(cluster))]
    moved = dict(zip(order, spread, strict=True))
    return [moved[i] for i in range(len(places))]


def _bottom(cluster: Sequence[float], gap: float) -> float:
    half = gap * (len(cluster) - 1) / 2
    return min(max(sum(cluster) / len(cluster), half), max(1 - half, half)) - half


def _top(cluster: Sequence[float], gap: float) -> float:
    return _bottom(cluster, gap) + gap * (len(cluster) - 1)


def _band(rows: np.ndarray, low: int, high: int) -> np.ndarray:
    """The rows `low:high` stretched to one band's height; rows that a short spectrum lacks are 0: no energy there."""
    padded = np.zeros((high - low, rows.shape[1]))
    have = rows[low:high]
    padded[: len(have)] = have
    padded[:, np.isnan(rows[0])] = np.nan
    height = 96
    return padded[np.arange(height) * (high - low) // height]


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
