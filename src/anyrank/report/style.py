"""The look of charts: colours and dashes of the labels, and how an SVG follows the page's light or dark theme.

Charts are drawn in stand-in colours that become CSS variables of the page, so that one SVG serves both themes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from anyrank.errors import printable

# Chosen so that any two differ by a Lab distance of at least 14 also for red-, green- and blue-blind eyes, and each has a
# contrast of at least 4:1 with the page: the first row with white, the second with near-black.
LIGHT = ("#0068d0", "#d6540c", "#0f825e", "#9f3191", "#7b4a02", "#6d7485", "#4b25a4", "#00403c")
DARK = ("#8cb8ff", "#ff8456", "#00ba8d", "#dd7ab6", "#e7b43e", "#bfc1c3", "#9c87f5", "#62e0f8")
DASHES = ("", "5 2", "1.5 1.5", "7 2 1.5 2")
# A method has the same colour in every report, whatever other methods it shows: (hue, dash).
OF_METHOD = {
    "raflora": (0, 0),
    "flexlora": (1, 0),
    "rbla": (2, 0),
    "stayput": (3, 0),
    "hetlora": (5, 1),
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
SIZE = 9.2  # points; a chart 4.2 in wide keeps about this size in px on a phone
_LONGEST = 16  # characters of a label beside a line
HEAT = matplotlib.colormaps["magma"]
_PARTITIONS = matplotlib.colormaps["viridis"]


@dataclass(frozen=True)
class Style:
    """How one label is drawn in all charts: `hue` indexes the palettes, `dash` indexes `DASHES`."""

    hue: int
    dash: int

    @property
    def css(self) -> str:
        return f"var(--c{self.hue})"

    @property
    def dasharray(self) -> str:
        return DASHES[self.dash]


@dataclass(frozen=True)
class Paint:
    hues: Sequence[str]
    text: str
    muted: str
    grid: str
    surface: str


# Stand-ins: no chart uses these colours otherwise, and `svg` turns each into a variable of the page.
_STAND_INS = {f"#fe01{hue:02x}": f"var(--c{hue})" for hue in range(len(LIGHT))} | {
    "#fe0120": "var(--ink)",
    "#fe0121": "var(--muted)",
    "#fe0122": "var(--grid)",
    "#fe0123": "var(--card)",
    "#fe0124": "var(--shared)",
}
PAGE = Paint([f"#fe01{hue:02x}" for hue in range(len(LIGHT))], "#fe0120", "#fe0121", "#fe0122", "#fe0123")
SHARED = "#fe0124"
CARD = Paint(LIGHT, "#1f2328", "#59636e", "#e3e6ea", "#ffffff")


def styles(labels: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """A style for each `(label, method)`: a known method's own colour, and another dash for each further label of it.

    >>> styles([("fedavg@2", "fedavg"), ("fedavg@8", "fedavg")])
    {'fedavg@2': Style(hue=5, dash=0), 'fedavg@8': Style(hue=5, dash=1)}
    """
    chosen: dict[str, Style] = {}
    known = {OF_METHOD[method][0] for _, method in labels if method in OF_METHOD}
    free = [hue for hue in range(len(LIGHT)) if hue not in known] or list(range(len(LIGHT)))
    unknown = dict.fromkeys(method for _, method in labels if method not in OF_METHOD)
    own = {method: (free[i % len(free)], 0) for i, method in enumerate(unknown)}
    for label, method in sorted(labels, key=lambda pair: pair[1] not in OF_METHOD):  # known methods keep their own
        hue, dash = OF_METHOD.get(method) or own[method]
        taken = set(chosen.values())
        tries = [Style(hue, (dash + step) % len(DASHES)) for step in range(len(DASHES))]
        chosen[label] = next((style for style in tries if style not in taken), tries[0])
    return chosen


def heat_gradient() -> str:
    """The heatmap's colours from dark to bright as a CSS gradient."""
    stops = [matplotlib.colors.to_hex(HEAT(share)) for share in np.linspace(0, 1, 9)]
    return f"linear-gradient(to right, {', '.join(stops)})"


def partition_colors(count: int) -> list[str]:
    """CSS colours of the rank partitions: neutral for the shared one, a ramp for those beyond it."""
    return ["var(--shared)", *ramp(count - 1)]


def ramp(count: int) -> list[str]:
    """Colours of `count` neighbouring partitions."""
    places = np.linspace(0.22, 0.95, count) if count > 1 else np.full(count, 0.5)
    return [matplotlib.colors.to_hex(_PARTITIONS(place)) for place in places]


@contextmanager
def look() -> Iterator[None]:
    """Matplotlib's settings for every chart, put back at the end."""
    settings = {
        "svg.fonttype": "none",
        "font.family": ["DejaVu Sans"],
        "font.size": SIZE,
        "text.parse_math": False,  # labels are names, not formulas
        "axes.unicode_minus": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # browsers have fonts for every script
        yield


def plain(ax: Axes, paint: Paint) -> None:
    """Axes without a frame: a thin line below, the labels in `paint`."""
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(paint.muted)
    ax.spines["bottom"].set_linewidth(0.7)
    ax.tick_params(colors=paint.muted, labelcolor=paint.text, length=0, labelsize=8.6, pad=3, which="both")
    ax.tick_params(axis="x", length=2.5, which="major")
    ax.xaxis.label.set_color(paint.muted)
    ax.xaxis.label.set_size(8.6)
    ax.xaxis.labelpad = 1.5


def cut(label: str, longest: int = _LONGEST) -> str:
    """A label as it fits beside a line, or in so many characters."""
    label = printable(label)
    return label if len(label) <= longest else label[: longest - 1] + "…"


def label_width(labels: Sequence[str]) -> float:
    """Inches that the longest label takes next to an axis, with its gap."""
    return 0.14 + 0.075 * max([len(cut(label)) for label in labels] + [4])


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as an `<svg>` element in the page's colours, with the text alternative `alt`."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": alt}):  # different ids in every chart of a page
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    root = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', text)
    body = text[root.end() :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)  # Matplotlib's ids repeat in every chart, so they are useless in one page
    body = re.sub(r"#fe01[0-9a-f]{2}", lambda match: _STAND_INS.get(match[0], match[0]), body)
    body = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--font)", body)
    return Markup(f'<svg viewBox="{root[1]}" role="img" aria-label="{escape(printable(alt))}">{body.strip()}')
