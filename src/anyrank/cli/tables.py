"""The tables that the commands print on stdout when they are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from anyrank.cli import sites
from anyrank.cli.console import megabytes, out, shown
from anyrank.cli.folding import folded
from anyrank.config.explain import Key, bracketed

_PLACES = {"memory": "in memory", "disk": "on disk (memory-mapped)"}

Cell = Callable[[Mapping[str, Any]], str | Text]  # a row's text in one column
_WIDE = 110  # columns of a terminal that has room for more than the essentials


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str) -> Group:
    """The final table of a comparison: means over seeds, with the best accuracy (or else the lowest loss) in bold.

    Tables below it have the metrics, and the disturbances, if there are any.
    """
    names = dict.fromkeys(name for row in rows for name, value in row["metrics"].items() if "mean" in value)
    metrics = {shown(name): _metric_of(name) for name in names}
    tables = _method_tables(rows, title, _comparison_columns(rows)) + _method_tables(rows, "metrics", metrics)
    told = "rounds and updates" + (", over all seeds" if max(row["seeds"] for row in rows) > 1 else "")
    return Group(*tables, *disturbance_tables(rows, told))


_DISTURBANCES = {"idle_rounds": "idle\nrounds", "shortened": "shortened\nsteps", "rejected": "updates\nnot used"}


def disturbance_tables(rows: Sequence[Mapping[str, Any]], title: str) -> list[Table]:
    """A table of what went wrong with each method: idle rounds, shortened steps, updates that were not used. A count that is 0
    for all methods has no column, and without any there is no table.
    """
    counts = {heading: key for key, heading in _DISTURBANCES.items() if any(row.get(key) for row in rows)}
    columns = {heading: lambda row, key=key: f"{row[key]:,}" for heading, key in counts.items()}
    return _method_tables(rows, title, columns)


def _method_tables(rows: Sequence[Mapping[str, Any]], title: str, columns: Mapping[str, Cell]) -> list[Table]:
    """Tables with a row for each method: one, or on a narrow terminal several."""
    cells = {heading: [show(row) for row in rows] for heading, show in columns.items()}
    return folded(title, "method", [_label(row["label"]) for row in rows], cells)


def _comparison_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    """`{heading: a row's text}`; on a narrow terminal, only the most important columns."""
    told = any(row["accuracy"] is not None for row in rows)
    first, pick = ("accuracy", max) if told else ("loss", min)
    best = pick((row[first] for row in rows if row[first] is not None), default=None)
    wide = out.width >= _WIDE
    several = max(row["seeds"] for row in rows) > 1 and wide
    paired = {"difference to best\n(seeds ahead)": lambda row: _paired(row, first)} if several else {}
    late = {"last 5\nrounds": lambda row: _known(row["last_accuracy"])} if told else {}
    worst = {"worst\nclient": lambda row: _known(row["worst_client_accuracy"])} if told and wide else {}
    return {
        first: lambda row: _leading(spread(row, first), row[first] == best),
        **paired,
        **late,
        **worst,
        f"energy past\nrank {rows[0]['rank']}": lambda row: _known(row["collapse"]),
        "MB up": lambda row: megabytes(row["upload_bytes"]),
        "MB down": lambda row: megabytes(row["download_bytes"]),
        "s / run": lambda row: _known(row["seconds"], 1),
    }


def _metric_of(name: str) -> Cell:
    """A metric's mean, with its spread over several seeds; a metric with a number for each label is in the report."""

    def cell(row: Mapping[str, Any]) -> str:
        told = row["metrics"].get(name)
        if told is None:
            return "–"
        return f"{told['mean']:.3f} ± {told['std']:.3f}" if row["seeds"] > 1 else f"{told['mean']:.3f}"

    return cell


def _label(label: str) -> str:
    """A method with its options, a line each."""
    return shown(label).replace(":", "\n  ")


def _paired(row: Mapping[str, Any], figure: str) -> str:
    """The difference to the best row, seed by seed, and on how many seeds the row is ahead."""
    own = row[f"{figure}_paired"]
    if own is None:
        return "–"
    if own["to"] == row["label"]:
        return "best"
    return f"{own['difference']:+.3f} ± {own['difference_std']:.3f} ({own['wins']}/{row['seeds']})"


def _leading(text: str, leads: bool) -> Text:
    return Text(text, style="bold" if leads else "")


def _known(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def study_tables(results: Mapping[str, Any], cells_of: Callable[[Mapping[str, Any]], Any]) -> list[Table]:
    """The final tables of a study, one per setting, and one below it if rounds or updates were disturbed; `cells_of` formats
    its results as text.
    """
    tables = []
    for (title, headings, rows), setting in zip(cells_of(results), results["settings"], strict=True):
        table = Table(title=shown(title), title_justify="left", header_style="bold")
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place else "left", overflow="fold", min_width=None if place else 10)
        for row in rows:
            table.add_row(_label(row[0]), *row[1:], style="bold" if row[-1] == "best" else None)
        tables += [table, *disturbance_tables(setting["rows"], "rounds and updates, over all seeds")]
    return tables


def audit_table(verdict: Mapping[str, Any]) -> Table:
    """The result of an audit, with a remark on what it proves."""
    table = Table(title="membership-inference audit", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("ε claimed", f"{verdict['claimed']:.3f} at δ = {verdict['delta']:g}")
    table.add_row("ε at least", f"{verdict['lower_bound']:.3f}, with confidence {verdict['confidence']:.0%}")
    table.add_row("correct guesses", f"{verdict['right']} of {verdict['guessed']}, among {verdict['canaries']} canaries")
    told = "refuted: the training leaks more than it promises" if verdict["refuted"] else "not refuted (which proves nothing)"
    table.add_row("the claim is", told)
    return table


def run_table(summary: Mapping[str, Any]) -> Group:
    """The closing table of one run, and one with a row for each named site."""
    title = f"{shown(summary['name'])}: {summary['method']}, {summary['rounds']} rounds"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    beyond = summary["collapse"]
    smallest = next(iter(summary["ranks"]))
    private = {}
    if "epsilon" in summary:
        plan = summary["privacy"]["plan"]
        private = {"privacy": f"ε {summary['epsilon']:.4g} spent at δ = {plan['delta']:g}, for one {plan['level']}"}
    figures = {
        "accuracy": _accuracy(summary),
        "loss": _loss(summary),
        **sites.scores(summary),
        **_metric_rows(summary["metrics"], summary["start_metrics"]),
        f"energy past rank {smallest}": "–" if beyond is None else f"{beyond:.4f}",
        "effective rank": "–" if beyond is None else f"{summary['effective_rank']:.2f}",
        "clients": f"{summary['clients']} registered, {summary['cohort']} per round, ranks {', '.join(summary['ranks'])}",
        "traffic": f"{megabytes(summary['upload_bytes'])} MB up, {megabytes(summary['download_bytes'])} MB down",
        **private,
        **sites.rows(summary),
        "updates not used": str(summary["rejected"]),
        **_disturbances(summary),
        "head": summary["head"],
        **_measured(summary),
    }
    for name, value in figures.items():
        table.add_row(name, value)
    return Group(table, *sites.tables(summary))


def _measured(summary: Mapping[str, Any]) -> dict[str, str]:
    """The rows of what a private run does not say, because it depends on single examples."""
    rows = {}
    if "inputs_bytes" in summary:
        rows["examples"] = f"{megabytes(summary['inputs_bytes'])} MB, {_PLACES[summary['inputs_in']]}"
    if summary["seconds"] is not None:
        rows["time"] = f"{summary['seconds']:.1f} s"
    return rows


def _disturbances(summary: Mapping[str, Any]) -> dict[str, str]:
    """The rows of what the guard shortened and of idle rounds, if there are any."""
    shortened, idle = summary.get("shortened", 0), summary.get("idle_rounds", 0)
    rows = {"shortened": f"{shortened:,} steps"} if shortened else {}
    return rows | ({"idle rounds": f"{idle:,} of {summary['rounds']:,}"} if idle else {})


_MOST_LABELS = 3  # for a metric with a number for each label, this many of the lowest are shown


def _has_accuracy(summary: Mapping[str, Any]) -> bool:
    return summary["accuracy"] is not None


def _accuracy(summary: Mapping[str, Any]) -> str:
    if not _has_accuracy(summary):
        return "–"
    start = "–" if summary["start_accuracy"] is None else f"{summary['start_accuracy']:.4f}"
    return f"{summary['accuracy']:.4f} (start {start}, best {summary['best_accuracy']:.4f})"


def _loss(summary: Mapping[str, Any]) -> str:
    if summary["loss"] is None:
        return "–"
    told = _has_accuracy(summary) or summary["start_loss"] is None
    return f"{summary['loss']:.4f}" + ("" if told else f" (start {summary['start_loss']:.4f})")


def _metric_rows(end: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, str]:
    """A row for each metric: its value, or the lowest of its values by label; names may be anybody's."""
    rows = {}
    for name, value in end.items():
        if isinstance(value, Mapping):
            lowest = sorted(value.items(), key=lambda item: item[1])
            told = ", ".join(f"{shown(label)} {number:.4f}" for label, number in lowest[:_MOST_LABELS])
            rows[shown(name)] = f"lowest {told}" + (
                f", {len(lowest) - _MOST_LABELS} more" if len(lowest) > _MOST_LABELS else ""
            )
        else:
            rows[shown(name)] = f"{value:.4f}" + (f" (start {start[name]:.4f})" if name in start else "")
    return rows


def merge_table(done: Mapping[str, Any]) -> Table:
    """The inputs and outputs of a merge."""
    ranks = sorted({rank for client in done["clients"] for rank in client["ranks"]})
    ways = ", ".join(f"{count} by {way}" for way, count in sorted(done["algebra"].items()))
    table = Table(title=f"{done['method']}: {len(done['clients'])} adapters", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("layers", str(done["layers"]))
    table.add_row("ranks", ", ".join(map(str, ranks)))
    table.add_row("examples", str(sum(client["num_examples"] for client in done["clients"])))
    table.add_row("singular values", f"{ways}; backward error {done['error']:.1e}" if ways else "not needed")
    if done["missed"]:
        table.add_row("distance from the mean\nof the products", "\n".join(_missed(*each) for each in done["missed"].items()))
    table.add_row("time", f"{done['seconds']:.1f} s")
    table.add_row("written", "\n".join(f"{shown(done['out'])}/{name}" for name in done["folders"]))
    return table


def _missed(folder: str, share: float) -> str:
    return f"{share:.2%} of its norm: {folder}" if share > 1e-5 else f"none beyond rounding: {folder}"


def inspection_tables(reports: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table with a row per adapter, then one table per adapter with a row per layer."""
    levels = list(reports[0]["total"]["energy_past"])
    totals = _inspection_table("adapters", ["adapter", "layers", "ranks"], levels)
    for report in reports:
        ranks = ", ".join(map(str, report["total"]["ranks"]))
        totals.add_row(shown(report["adapter"]), str(report["total"]["layers"]), ranks, *_figures(report["total"], levels))
    tables = [totals]
    for report in reports:
        table = _inspection_table(shown(report["adapter"]), ["layer", "rank", "scaling", "largest\nvalue"], levels)
        for layer in report["layers"]:
            row = (shown(layer["layer"]), str(layer["rank"]), f"{layer['scaling']:.3g}", f"{layer['values'][0]:.4g}")
            table.add_row(*row, *_figures(layer, levels))
        tables.append(table)
    return tables


def _inspection_table(title: str, columns: Sequence[str], levels: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column(columns[0], overflow="fold", min_width=12)
    for heading in (*columns[1:], "norm", "effective\nrank", "energy past rank\n" + "".join(f"{level:<5}" for level in levels)):
        table.add_column(heading, justify="left" if "past" in heading else "right", no_wrap=heading != "ranks")
    return table


def _figures(entry: Mapping[str, Any], levels: Sequence[str]) -> list[str]:
    past = " ".join(f"{entry['energy_past'][level]:.2f}" for level in levels)
    return [f"{entry['norm']:.4g}", f"{entry['effective_rank']:.2f}", past]


def section_table(sections: Mapping[str, str]) -> Table:
    """The sections of a configuration."""
    table = Table(header_style="bold")
    table.add_column("section", no_wrap=True)
    table.add_column("meaning")
    for name, doc in sections.items():
        table.add_row(Text(bracketed(name)), Text(doc))  # as it is: brackets are no markup here
    return table


def key_tables(keys: Sequence[Key]) -> list[Table]:
    """The description of each key, one small table per key."""
    tables = []
    for key in keys:
        table = Table(title=Text(key.path, style="bold"), title_justify="left", show_header=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        rows = {"meaning": f"{key.doc} {key.limits}".strip(), "type": key.type, "values": key.takes, "default": key.usual}
        for name, value in (rows | {"other names": key.elsewhere}).items():
            if value:
                table.add_row(name, Text(value))
        tables.append(table)
    return tables


def spread(row: Mapping[str, Any], name: str) -> str:
    """A figure's mean, with its spread over several seeds."""
    if row[name] is None:
        return "–"
    return f"{row[name]:.3f} ± {row[f'{name}_std']:.3f}" if row["seeds"] > 1 else f"{row[name]:.3f}"
