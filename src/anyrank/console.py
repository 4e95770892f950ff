"""What the commands show: live progress while something runs, and tables at the end, on stdout, progress on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Rounds:
    """Progress over all rounds of one or many runs: a live line on a terminal, now and then a plain line elsewhere."""

    def __init__(self, total_rounds: int, title: str, quiet: bool = False) -> None:
        self._quiet, self._total, self._done, self._bytes, self._spoke = quiet, total_rounds, 0, 0, time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=err, disable=quiet or not err.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task(title, total=total_rounds, note="")
        self._title = title

    def __enter__(self) -> Rounds:
        if not self._progress.disable:  # a Progress that shows nothing would still print a line end
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._progress.disable:
            self._progress.stop()

    def __call__(self, who: str, metrics: Mapping[str, Any]) -> None:
        self._done += 1
        self._bytes += metrics["upload_bytes"] + metrics["download_bytes"]
        note = f"{who} round {metrics['round']}"
        note += f" · accuracy {metrics['accuracy']:.3f}" if metrics["accuracy"] is not None else ""
        note += f" · energy past min rank {metrics['collapse']:.3f}" if metrics["collapse"] is not None else ""
        note += f" · {megabytes(self._bytes)} MB moved"
        self._progress.update(self._task, advance=1, note=note)
        if not self._quiet and not err.is_terminal and (time.monotonic() - self._spoke > 5 or self._done == self._total):
            self._spoke = time.monotonic()
            err.print(f"{self._title}: {self._done}/{self._total} rounds · {note}", soft_wrap=True)


class Preparing:
    """Progress of what is done once before round 1 (features of a frozen model): `callback(done, total)`."""

    def __init__(self, title: str, quiet: bool = False) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            console=err, disable=quiet, transient=True,
        )  # fmt: skip
        self._title, self._task = title, None

    def __enter__(self) -> Preparing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._task is not None:
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=total)
        self._progress.update(self._task, completed=done, total=total)


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The closing table of a comparison: means over seeds, the best accuracy in bold."""
    table = Table(title=title, title_justify="left", header_style="bold")
    rank, best = rows[0]["rank"], max(row["accuracy"] for row in rows)
    table.add_column("method", no_wrap=True)
    for heading in ("accuracy", "last 5\nrounds", f"energy past\nrank {rank}", "MB up", "MB down", "s / run"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        accuracy = spread(row, "accuracy")
        figures = (
            f"[bold]{accuracy}[/bold]" if row["accuracy"] == best else accuracy,
            f"{row['last_accuracy']:.3f}",
            "–" if row["collapse"] is None else f"{row['collapse']:.3f}",
            megabytes(row["upload_bytes"]),
            megabytes(row["download_bytes"]),
            f"{row['seconds']:.1f}",
        )
        table.add_row(row["label"], *figures)
    return table


def run_table(summary: Mapping[str, Any]) -> Table:
    """The closing table of one run."""
    title = f"{summary['name']}: {summary['method']}, {summary['rounds']} rounds"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    beyond = summary["collapse"]
    smallest = next(iter(summary["ranks"]))
    figures = {
        "accuracy": f"{summary['accuracy']:.4f} (start {summary['start_accuracy']:.4f}, best {summary['best_accuracy']:.4f})",
        "loss": f"{summary['loss']:.4f}",
        f"energy past rank {smallest}": "–" if beyond is None else f"{beyond:.4f}",
        "effective rank": "–" if beyond is None else f"{summary['effective_rank']:.2f}",
        "clients": f"{summary['clients']} registered, {summary['cohort']} a round, ranks {', '.join(summary['ranks'])}",
        "traffic": f"{megabytes(summary['upload_bytes'])} MB up, {megabytes(summary['download_bytes'])} MB down",
        "rejected": str(summary["rejected"]),
        "head": summary["head"],
        "time": f"{summary['seconds']:.1f} s",
    }
    for name, value in figures.items():
        table.add_row(name, value)
    return table


def spread(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.3f} ± {row[f'{name}_std']:.3f}" if row["seeds"] > 1 else f"{row[name]:.3f}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}" if count < 1e8 else f"{count / 1e6:.0f}"
