"""Write the report of some runs: one HTML file that loads nothing, and one PNG for a README. Reads only the run folders.

Runs of one label and one configuration count as seeds of one method: their figures are shown as mean ± sample standard
deviation. If something cannot be read or compared, a note on the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from anyrank.errors import RunError, printable
from anyrank.files import make_folder, write_whole, write_whole_text
from anyrank.report import charts, figures, page
from anyrank.report.groups import Group, grouped, seed_count, tells_accuracy
from anyrank.report.runs import read


def build(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of the run folders `runs` to `out`, whole or not at all, and return `out`.

    Raises `RunError` where a folder is no run folder, or another file than a page is at `out`.
    """
    groups, notes = _groups_of(runs)
    out = check_out(Path(out))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    html = environment.get_template("page.html.j2").render(page.contents(groups, notes))
    out = Path(out)
    make_folder(out.parent)
    write_whole_text(out, html)
    return out


def _shown(value: Any) -> Any:
    """A text as the page may hold it, whoever wrote it: without controls, or marks that turn the direction of writing."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def check_out(out: Path) -> Path:
    """`out`, if a page may be written there: nothing is there yet, or a page. Raises `RunError` for any other file."""
    try:
        if out.exists() and not (out.is_file() and _is_page(out)):
            raise RunError(f"{out}: expected a new file, or a page to write anew, got something else; choose another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise RunError(f"{out}: no page can be written there ({error}); choose another --out") from None
    return out


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(200).lstrip()[:14].lower() == b"<!doctype html"


def figure(runs: Sequence[Path], out: Path) -> Path:
    """Write the headline PNG of the run folders `runs` to `out`: accuracy (else loss), and energy beyond the minimum rank."""
    groups, _ = _groups_of(runs)
    seeds = max(len(group.runs) for group in groups)
    note = "One seed." if seeds == 1 else f"Mean over {seed_count(groups)}; shaded: ± one standard deviation."
    name = "accuracy" if tells_accuracy(groups) else "loss"
    first = [group.series(name, f"start_{name}") for group in groups]
    if figures.zoomed(first):
        note += " Left: the axis does not show the steep start."
    if not all(group.mixed for group in groups):
        note += " Right: only methods with mixed ranks."
    collapse = [group.series("collapse") for group in groups if group.mixed]
    out = Path(out)
    make_folder(out.parent)
    write_whole(out, lambda path: figures.headline(first, name, collapse, note, path))
    return out


_PANELS = {
    "accuracy": ("round", False, lambda group: _first(group)),
    "collapse": ("round", True, lambda group: group.series("collapse")),
    "bytes": ("megabytes uploaded so far, all clients", False, charts.against_upload),
}


def study_figure(settings: Sequence[tuple[str, Sequence[Path]]], kind: str, out: Path) -> Path:
    """Write a PNG with a panel for each setting, `(name, run folders)`, to `out`: lines of `kind`, one of
    `accuracy` (over rounds), `collapse` (energy beyond the minimum rank over rounds) and `bytes` (accuracy over uploads).
    If no setting has an accuracy, the loss is shown instead.
    """
    x_label, log, line_of = _PANELS[kind]
    shown, told = [], False
    for name, folders in settings:
        groups, _ = _groups_of(folders)
        told = told or tells_accuracy(groups)
        lines = [line_of(group) for group in groups if kind != "collapse" or group.mixed]
        shown.append((name, [line for line in lines if len(line.x)]))
    percent = told or kind == "collapse"
    what = "Energy beyond the minimum rank, %" if kind == "collapse" else "Accuracy, %" if told else "Loss"
    note = f"{what}. Mean over seeds; shaded: ± one standard deviation."
    write_whole(Path(out), lambda path: figures.panels(shown, x_label, log, note, path, percent))
    return Path(out)


def _first(group: Group) -> figures.Series:
    name = "accuracy" if tells_accuracy([group]) else "loss"
    return group.series(name, f"start_{name}")


def _groups_of(folders: Sequence[Path]) -> tuple[list[Group], list[str]]:
    return grouped([read(Path(folder)) for folder in folders])
