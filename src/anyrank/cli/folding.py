"""Tables that are too wide for the terminal are shown as several, one below the other, so that no number is cut off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from anyrank.cli.console import out, shown

_LEAST_NAME = 8  # columns of the first column, if its texts are longer
_EDGES, _BORDERS = 4, 3  # columns that the first column, and each other one, needs beside its text


def folded(
    title: str,
    heading: str,
    names: Sequence[str],
    columns: Mapping[str, Sequence[str | Text]],
    justify: Literal["left", "right"] = "left",
) -> list[Table]:
    """Tables with the first column `heading`, of `names`, and as many of the `columns`, `{heading: cells}`, as fit.

    The first column wraps where it needs more than a third of the terminal.
    """
    longest = max((_width(name) for name in names), default=0)
    room = out.width - min(max(longest, _width(heading)), max(out.width // 3, _LEAST_NAME)) - _EDGES
    parts: list[dict[str, Sequence[str | Text]]] = []
    left = 0
    for name, cells in columns.items():
        width = max(map(_width, (name, *map(str, cells)))) + _BORDERS
        if not parts or width > left:
            parts.append({})
            left = room
        parts[-1][name] = cells
        left -= width
    return [_table("" if place else title, heading, names, part, justify) for place, part in enumerate(parts)]


def _table(
    title: str,
    heading: str,
    names: Sequence[str],
    columns: Mapping[str, Sequence[str | Text]],
    justify: Literal["left", "right"],
) -> Table:
    table = Table(title=shown(title) or None, title_justify="left", header_style="bold")
    table.add_column(heading, overflow="fold", justify=justify, min_width=min(_LEAST_NAME, max(map(_width, (heading, *names)))))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(names, *columns.values(), strict=True):
        table.add_row(*row)
    return table


def _width(text: str) -> int:
    return max(map(cell_len, text.split("\n")))
