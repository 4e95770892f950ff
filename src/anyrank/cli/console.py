"""Show progress on stderr, so that stdout has only results."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from anyrank.errors import printable, shortened

_LONGEST = 160  # characters of the reason of an idle round
_LEAST_NOTE = 20  # columns beside a progress bar, however narrow the terminal


def shown(name: Any) -> str:
    """Somebody's name for something (a layer, a folder, a run, a label) as a terminal may show it: in one line, as it is."""
    return printable(str(name))


class _Plain(Console):
    """A console on which a text is what it says: no markup in it, no control characters, line ends alone kept."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **how | {"markup": False, "emoji": False})


out = _Plain(highlight=False)
err = _Plain(stderr=True, highlight=False)


class Rounds:
    """Progress over all rounds of one or many runs: a live line on a terminal; otherwise a plain line every few seconds."""

    def __init__(self, total_rounds: int, title: str, quiet: bool = False) -> None:
        self._quiet, self._total, self._done, self._bytes, self._spoke = quiet, total_rounds, 0, 0, time.monotonic()
        self._idle, self._last_idle = 0, ""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=_bar()), MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False), console=err, disable=quiet or not err.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task(shown(title), total=total_rounds, note="")
        self._title = shown(title)

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
        at = f"{shown(who)} round {metrics['round']}".strip()
        idle = shortened(shown(metrics.get("idle") or ""), _LONGEST)
        if idle:
            self._idle, self._last_idle = self._idle + 1, f"{at}: {idle}"
        told = f" · idle: {idle}" if idle else ""
        note = f"{at}{told}{_figures(metrics)} · {megabytes(self._bytes)} MB moved"
        self._progress.update(self._task, advance=1, note=self._fitting(note))
        if not self._quiet and not err.is_terminal and (time.monotonic() - self._spoke > 5 or self._done == self._total):
            self._spoke = time.monotonic()
            so_far = f" · {self._idle} idle so far, the last in {self._last_idle}" if self._idle and not idle else ""
            err.print(f"{self._title}: {self._done}/{self._total} rounds · {note}{so_far}", soft_wrap=True)

    def _fitting(self, note: str) -> str:
        """The beginning of `note` that fits on the line beside the title, the bar, the count of rounds and the time left."""
        spaces, clock = 4, 7
        taken = cell_len(self._title) + _bar() + 2 * len(str(self._total)) + 1 + clock + spaces
        text = Text(note)
        text.truncate(max(err.width - taken, _LEAST_NOTE), overflow="ellipsis")
        return text.plain


def _bar() -> int:
    """Columns of a progress bar."""
    return 24 if err.width >= 110 else 8


def _figures(metrics: Mapping[str, Any]) -> str:
    figure = next((name for name in ("accuracy", "loss") if metrics[name] is not None), None)
    text = f" · {figure} {metrics[figure]:.3f}" if figure else ""
    return text + (f" · energy past min rank {metrics['collapse']:.3f}" if metrics["collapse"] is not None else "")


class Preparing:
    """Progress of one long task, `callback(done, total)`: a live line on a terminal; otherwise a plain line at times.

    `percent`: in hundredths, so that it does not show how many examples there are."""

    def __init__(self, title: str, quiet: bool = False, percent: bool = False) -> None:
        self._percent = percent
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=err, disable=quiet or not err.is_terminal, transient=True,
        )  # fmt: skip
        self._title, self._task, self._quiet, self._spoke = title, None, quiet, time.monotonic()

    def __enter__(self) -> Preparing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._task is not None:
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._percent:
            done, total = 100 * done // max(1, total), 100
        if self._progress.disable:
            if not self._quiet and time.monotonic() - self._spoke > 5:
                self._spoke = time.monotonic()
                err.print(f"{self._title}: {done}/{total}", soft_wrap=True)
            return
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=total)
        self._progress.update(self._task, completed=done, total=total)


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}" if count < 1e8 else f"{count / 1e6:.0f}"
