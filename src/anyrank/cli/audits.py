"""What `anyrank audit` says: what it does with the data, and the table of known noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from anyrank.errors import ConfigError

NOTICE = (
    "audit: trains on the clients' data, in this process, and discards what it trains; no ledger is charged. What it prints is "
)
OF_NOISE = NOTICE + "computed from the noise, and reveals nothing about the data if the promise holds."
OF_GUESSES = NOTICE + "a count of guesses about which examples were included: epsilon does not cover it, so do not publish it."
_MOST_ROWS = 40  # of a table; those with the least noise


def check(canaries: int, rounds: int, noise_factor: float, confidence: float) -> None:
    """Raise `ConfigError` for options of an audit that do not fit together."""
    if canaries and rounds:
        raise ConfigError("--rounds: an audit by --canaries takes all rounds of the run; leave one of the two out")
    if not noise_factor >= 0:
        raise ConfigError(f"--noise-factor: expected a number of 0 or more, got {noise_factor}")
    if not 0.5 <= confidence < 1:
        raise ConfigError(f"--confidence: expected a number from 0.5 to below 1, got {confidence}")


def noise_table(verdict: Mapping[str, Any]) -> Group:
    """The noise of each group over the promised noise, and the verdict."""
    rows = Table(title="known noise", title_justify="left", header_style="bold")
    rows.add_column("noise of", overflow="fold")
    for heading in ("numbers", "over the promised", "between", "by guesses, at most"):
        rows.add_column(heading, justify="right")
    shown = sorted(verdict["rows"], key=lambda row: row["high"])[:_MOST_ROWS]
    for row in (row for row in verdict["rows"] if row in shown):
        between = f"{row['low']:.3f} and {row['high']:.3f}"
        style = "bold red" if row["what"] in verdict["short"] else None
        figures = (f"{row['numbers']:,}", f"{row['noise']:.3f}", between, "–" if row["most"] is None else f"{row['most']:.3f}")
        rows.add_row(Text(row["what"]), *figures, style=style)
    if len(shown) < len(verdict["rows"]):
        rows.caption = f"the {len(shown)} of {len(verdict['rows'])} groups with the least noise; --json has all"
    told = Table(show_header=False)
    told.add_column(style="dim")
    told.add_column(overflow="fold")
    told.add_row("releases", f"{verdict['releases']}, at level {verdict['level']}, noise at the {verdict['noise_at']}")
    told.add_row("ε claimed", f"{verdict['claimed']:.3f} at δ = {verdict['delta']:g}")
    told.add_row("ε at least", f"{verdict['lower_bound']:.3f}, with confidence {verdict['confidence']:.0%} over all groups")
    for what, found in (("too little noise", verdict["short"]), ("noise that repeats", verdict["repeats"])):
        if found:
            told.add_row(what, Text("; ".join(found)))
    for fault in verdict["faults"]:
        told.add_row("fault", fault)
    told.add_row("the claim is", "refuted" if verdict["refuted"] else "not refuted (which proves nothing)")
    return Group(rows, told)
