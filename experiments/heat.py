"""A heat table as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

LARGEST = 95  # of the colours


def draw(
    path: Path,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    least: float,
    what: str,
) -> None:
    """`values` `[rows, columns]`, NaN where nothing is known; `groups`: the names of the columns, in groups with a title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [name for names in groups.values() for name in names]
    figure, axes = plt.subplots(figsize=(13, 0.21 * len(rows) + 2))
    image = axes.imshow(values, aspect="auto", cmap="RdYlGn", vmin=least, vmax=LARGEST)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    start = -0.5
    for title, names in groups.items():
        axes.text(start + len(names) / 2, -1.1, title, ha="center", va="bottom", fontsize=10)
        axes.axvline(start, color="black", linewidth=1)
        start += len(names)
    figure.colorbar(image, ax=axes, label=what, fraction=0.02, pad=0.01)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
