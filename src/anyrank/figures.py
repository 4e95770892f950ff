"""The charts of a report: Matplotlib to inline SVG that follows the page's light or dark theme, and one PNG for a README.

Charts are drawn in stand-in colours that become CSS variables of the page, so that one SVG serves both themes. Nothing
in a chart depends on the clock or on a random id: the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Chosen so that any two differ by a Lab distance of at least 14 also for red-, green- and blue-blind eyes, and each has a
# contrast of at least 4:1 with the page: the first row with white, the second with near-black.
LIGHT = ("#0068d0", "#d6540c", "#0f825e", "#9f3191", "#7b4a02", "#6d7485", "#4b25a4", "#00403c")
DARK = ("#8cb8ff", "#ff8456", "#00ba8d", "#dd7ab6", "#e7b43e", "#bfc1c3", "#9c87f5", "#62e0f8")
DASHES = ("", "5 2", "1.5 1.5", "7 2 1.5 2")
# A method has one colour in every report, whatever stands beside it: (hue, dash).
_OF_METHOD = {
    "raflora": (0, 0),
    "flexlora": (1, 0),
    "rbla": (2, 0),
    "hetlora": (3, 0),
    "zeropad": (4, 0),
    "fedavg": (5, 0),
    "flora": (6, 0),
    "fedex": (7, 0),
    "ffa_lora": (4, 1),
    "rolora": (2, 1),
    "fedsa": (3, 1),
    "florist": (6, 1),
    "lora_fair": (1, 1),
    "fedsvd": (7, 1),
}
_POINTS = 200  # a line, a stack or a heatmap has at most so many rounds
_SIZE = 9.2  # points; a chart 4.2 in wide keeps about this size in px on a phone
_WIDE, _SMALL = 4.2, 2.2  # inches: a chart, and one of many small ones
_EARLY = 0.75  # a line that ends before this share of the axis has its name right there, others at the axis' end
_STEPS = (1, 2, 2.5, 5, 10)
_LONGEST = 16  # characters of a label beside a line
_HEAT = matplotlib.colormaps["magma"]
_PARTITIONS = matplotlib.colormaps["viridis"]


@dataclass(frozen=True)
class Style:
    """How one label is drawn everywhere: `hue` indexes the palettes, `dash` indexes `DASHES`."""

    hue: int
    dash: int

    @property
    def css(self) -> str:
        return f"var(--c{self.hue})"

    @property
    def dasharray(self) -> str:
        return DASHES[self.dash]


@dataclass(frozen=True)
class Series:
    """One label's line: `x`, `mean` and `std` `[n]`; `std` is 0 where there is one seed."""

    label: str
    style: Style
    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class _Paint:
    hues: Sequence[str]
    text: str
    muted: str
    grid: str
    surface: str


# Stand-ins: no chart uses these colours otherwise, and `_to_css` turns each into a variable of the page.
_STAND_INS = {f"#fe01{hue:02x}": f"var(--c{hue})" for hue in range(len(LIGHT))} | {
    "#fe0120": "var(--ink)",
    "#fe0121": "var(--muted)",
    "#fe0122": "var(--grid)",
    "#fe0123": "var(--card)",
    "#fe0124": "var(--shared)",
}
_PAGE = _Paint([f"#fe01{hue:02x}" for hue in range(len(LIGHT))], "#fe0120", "#fe0121", "#fe0122", "#fe0123")
_SHARED = "#fe0124"
_CARD = _Paint(LIGHT, "#1f2328", "#59636e", "#e3e6ea", "#ffffff")


def styles(labels: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """A style for each `(label, method)`: a known method's own colour, and another dash for each further label of it.

    >>> styles([("fedavg@2", "fedavg"), ("fedavg@8", "fedavg")])
    {'fedavg@2': Style(hue=5, dash=0), 'fedavg@8': Style(hue=5, dash=1)}
    """
    chosen: dict[str, Style] = {}
    known = {_OF_METHOD[method][0] for _, method in labels if method in _OF_METHOD}
    free = [hue for hue in range(len(LIGHT)) if hue not in known] or list(range(len(LIGHT)))
    unknown = dict.fromkeys(method for _, method in labels if method not in _OF_METHOD)
    own = {method: (free[i % len(free)], 0) for i, method in enumerate(unknown)}
    for label, method in sorted(labels, key=lambda pair: pair[1] not in _OF_METHOD):  # known methods keep their own
        hue, dash = _OF_METHOD.get(method) or own[method]
        taken = set(chosen.values())
        tries = [Style(hue, (dash + step) % len(DASHES)) for step in range(len(DASHES))]
        chosen[label] = next((style for style in tries if style not in taken), tries[0])
    return chosen


def thin(n: int) -> np.ndarray:
    """At most `_POINTS` indices of `range(n)`, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, _POINTS)).round().astype(int)) if n else np.zeros(0, int)


def wants_log(series: Sequence[Series]) -> bool:
    """Whether the lines span more than a factor of 50, so that a linear axis would lay some of them on the floor."""
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
    with _look():
        figure = Figure(figsize=(_WIDE, 2.75))
        _draw_lines(figure, (0.0, 0.0, 1.0, 1.0), series, _PAGE, title, x_label, percent, log, from_zero)
        return _svg(figure, alt)


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
    pixels = _HEAT(np.nan_to_num(rows), bytes=True)
    pixels[np.isnan(rows)] = 0
    with _look():
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
        _plain(ax, _PAGE)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=_STEPS))
        ax.set_xlabel("round")
        return _svg(figure, alt)


def bands(levels: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Rank partitions `(r_{k-1}, r_k]` of singular indices as half-open ranges from 0.

    >>> bands([2, 4, 8], 8)
    [(0, 2), (2, 4), (4, 8)]
    """
    edges = sorted({level for level in levels if level > 0})
    edges = edges if edges and edges[-1] >= length else [*edges, length]
    return list(zip([0, *edges[:-1]], edges, strict=True))


def heat_gradient() -> str:
    """The heatmap's colours from dark to bright as a CSS gradient."""
    stops = [matplotlib.colors.to_hex(_HEAT(share)) for share in np.linspace(0, 1, 9)]
    return f"linear-gradient(to right, {', '.join(stops)})"


def partition_colors(count: int) -> list[str]:
    """CSS colours of the rank partitions: neutral for the shared one, a ramp for those beyond it."""
    return ["var(--shared)", *_ramp(count - 1)]


def stack(energy: np.ndarray, rounds: np.ndarray, alt: str) -> Markup:
    """Shares of the energy in each rank partition as stacked areas: `energy` `[partitions, rounds]`, summing to 1."""
    keep = thin(len(rounds))
    with _look():
        figure = Figure(figsize=(_SMALL, 1.7))
        ax = figure.add_axes((0.16, 0.22, 0.79, 0.71))
        colors = [_SHARED, *_ramp(len(energy) - 1)]
        ax.stackplot(rounds[keep], energy[:, keep], colors=colors, linewidth=0)
        ax.set_ylim(0, 1)
        ax.set_xlim(rounds[0], max(rounds[-1], rounds[0] + 1))
        ax.set_yticks([0, 0.5, 1], ["0", "50", "100"])
        _plain(ax, _PAGE)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=_STEPS))
        ax.set_xlabel("round")
        return _svg(figure, alt)


def bars(rows: Sequence[tuple[str, Style, float, float]], title: str, alt: str) -> Markup:
    """Two bars a label: the first value solid, the second pale. `rows`: `(label, style, first, second)`."""
    with _look():
        height = 0.5 + 0.36 * len(rows)
        figure = Figure(figsize=(_WIDE, height))
        left = _label_width([row[0] for row in rows]) / _WIDE
        ax = figure.add_axes((left, 0.1 / height, 0.86 - left, (height - 0.5) / height))
        for place, (_, style, first, second) in enumerate(rows):
            color = _PAGE.hues[style.hue]
            for value, at, alpha in ((first, place - 0.19, 1.0), (second, place + 0.19, 0.45)):
                ax.barh(at, value, height=0.34, color=color, alpha=alpha, linewidth=0)
                told = {"fontsize": 8, "color": _PAGE.text, "va": "center"}
                ax.annotate(_short(value), (value, at), (3, 0), textcoords="offset points", **told)
        ax.set_yticks(range(len(rows)), [_cut(row[0]) for row in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(0, max([value for row in rows for value in row[2:]] + [1e-9]))
        _plain(ax, _PAGE)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        figure.text(0.02, 1 - 0.19 / height, title, fontsize=_SIZE, color=_PAGE.text, weight="bold")
        return _svg(figure, alt)


def headline(accuracy: Sequence[Series], collapse: Sequence[Series], note: str, out: Path) -> None:
    """The README's PNG: accuracy, and energy beyond the minimum rank, over the rounds, 1800 px wide.

    It is a white card with round corners, so that the text keeps its contrast on light and on dark pages.
    """
    with _look():
        figure = Figure(figsize=(9, 3.9), dpi=200)
        figure.patch.set_alpha(0)
        corners = {"boxstyle": "round,pad=0,rounding_size=0.02", "mutation_aspect": 9 / 3.9}
        card = FancyBboxPatch((0.01, 0.02), 0.98, 0.96, **corners, fc="white", ec="#d1d9e0", lw=0.8, zorder=-1)
        card.set_transform(figure.transFigure)
        figure.add_artist(card)
        _draw_lines(figure, (0.02, 0.09, 0.485, 0.87), accuracy, _CARD, "Accuracy, %", "round", True, False, False)
        log = wants_log(collapse)
        title = "Energy beyond the minimum rank, %" + (" (log scale)" if log else "")
        _draw_lines(figure, (0.505, 0.09, 0.485, 0.87), collapse, _CARD, title, "round", True, log, True)
        figure.text(0.032, 0.055, note, fontsize=8, color=_CARD.muted)
        figure.savefig(out, format="png", metadata={"Software": None})


# --- drawing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _look() -> Iterator[None]:
    settings = {
        "svg.fonttype": "none",
        "font.family": ["DejaVu Sans"],
        "font.size": _SIZE,
        "text.parse_math": False,  # labels are names, never formulas
        "axes.unicode_minus": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a page's reader has fonts for every script
        yield


def _draw_lines(
    figure: Figure,
    box: tuple[float, float, float, float],
    series: Sequence[Series],
    paint: _Paint,
    title: str,
    x_label: str,
    percent: bool,
    log: bool,
    from_zero: bool,
) -> None:
    """Lines into `box` (left, bottom, width, height in figure shares), with room at the right for the names."""
    left, bottom, width, height = box
    wide, tall = figure.get_size_inches()
    names = _label_width([line.label for line in series])
    rect = (left * wide + 0.5, bottom * tall + 0.42, width * wide - 0.58 - names, height * tall - 0.75)
    ax = figure.add_axes((rect[0] / wide, rect[1] / tall, rect[2] / wide, rect[3] / tall))
    for line in series:
        _draw_line(ax, line, paint, log)
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
    _plain(ax, paint)
    ax.set_xlabel(x_label)
    at = (left + 0.12 / wide, (rect[1] + rect[3] + 0.13) / tall)
    figure.text(*at, title, fontsize=_SIZE + 0.6, color=paint.text, weight="bold")
    _name_ends(ax, series, paint, rect[3])
    if not ends:
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", color=paint.muted)


def _draw_line(ax: Axes, line: Series, paint: _Paint, log: bool) -> None:
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


def _log_axis(ax: Axes, series: Sequence[Series]) -> None:
    means = np.concatenate([line.mean for line in series])
    means = means[means > 1e-8]  # less than this is rounding, not energy
    ax.set_yscale("log")
    if len(means):
        ax.set_ylim(means.min() / 1.6, means.max() * 1.6)
    ax.yaxis.set_major_locator(LogLocator(10, numticks=6))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _name_ends(ax: Axes, series: Sequence[Series], paint: _Paint, height: float) -> None:
    """Each line's name beside its end, moved apart where names would overlap. `height` of the axes in inches."""
    to_share = ax.transData + ax.transAxes.inverted()
    low = ax.get_ylim()[0]
    drawn = [(line, *to_share.transform((line.x[-1], max(line.mean[-1], low)))) for line in series if len(line.x)]
    for line, x, y in drawn:
        if x < _EARLY:
            _name(ax, line, paint, x + 0.02, y)
    drawn = [end for end in drawn if end[1] >= _EARLY]
    gap = min(1.22 * 8.6 / 72 / height, 1.1 / max(len(drawn), 1))
    for (line, x, y), place in zip(drawn, _apart([end[2] for end in drawn], gap), strict=True):
        color = paint.hues[line.style.hue]
        ax.plot([x, 1.035], [y, place], color=color, linewidth=0.7, alpha=0.6, transform=ax.transAxes, clip_on=False)
        _name(ax, line, paint, 1.05, place)


def _name(ax: Axes, line: Series, paint: _Paint, x: float, y: float) -> None:
    color = paint.hues[line.style.hue]
    ax.text(x, y, _cut(line.label), color=color, fontsize=8.6, va="center_baseline", transform=ax.transAxes)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """The places moved as little as needed to stand `gap` apart, in their order: clusters share their mean.

    >>> [round(place, 2) for place in _apart([0.5, 0.5, 0.9], 0.1)]
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


def _ramp(count: int) -> list[str]:
    places = np.linspace(0.22, 0.95, count) if count > 1 else np.full(count, 0.5)
    return [matplotlib.colors.to_hex(_PARTITIONS(place)) for place in places]


def _plain(ax: Axes, paint: _Paint) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(paint.muted)
    ax.spines["bottom"].set_linewidth(0.7)
    ax.tick_params(colors=paint.muted, labelcolor=paint.text, length=0, labelsize=8.6, pad=3, which="both")
    ax.tick_params(axis="x", length=2.5, which="major")
    ax.xaxis.label.set_color(paint.muted)
    ax.xaxis.label.set_size(8.6)
    ax.xaxis.labelpad = 1.5


def _cut(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


def _label_width(labels: Sequence[str]) -> float:
    """Inches that the longest label takes beside an axis, with its gap."""
    return 0.14 + 0.075 * max([len(_cut(label)) for label in labels] + [4])


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _svg(figure: Figure, alt: str) -> Markup:
    """The figure as an `<svg>` element in the page's colours, named `alt` for those who do not see it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": alt}):  # its own ids in every chart of a page
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    root = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', text)
    body = text[root.end() :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)  # Matplotlib numbers them anew in every chart: no use in one page
    body = re.sub(r"#fe01[0-9a-f]{2}", lambda match: _STAND_INS.get(match[0], match[0]), body)
    body = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--font)", body)
    return Markup(f'<svg viewBox="{root[1]}" role="img" aria-label="{escape(alt)}">{body.strip()}')
