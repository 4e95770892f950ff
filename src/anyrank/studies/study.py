"""A study: one claim, tested in several settings with several methods and seeds, from one TOML file to one table.

A study file states the claim, and for each setting a configuration with its changes:

    title = "FlexLoRA collapses, raFLoRA does not"
    claim = "raFLoRA, section 3"
    minutes = 5
    seeds = 3
    methods = ["flexlora", "raflora"]
    columns = ["last_accuracy", "collapse"]
    figure = "accuracy"

    [[setting]]
    name = "Banking77"
    config = "../banking77.toml"
    set = ["run.rounds=60"]

`methods` (each as in `anyrank compare --methods`) and `seeds` may be overridden for a setting; a `set` at the top level holds
for all settings. `columns` may also name a metric of a setting's `[eval] metrics`: `macro_f1`, or `per_label.NAME` for one
label of a metric with a number for each label. In the first column, the largest mean is the best one, or the smallest if the
name says so (`lower_is_better`).

A study is read and reported without torch; what builds or runs it imports that itself.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyrank import config as configs
from anyrank.config.sections import Config
from anyrank.config.tables import read_toml
from anyrank.errors import AnyRankError, ConfigError, nearest
from anyrank.files import make_folder, sweep, write_whole_text
from anyrank.runs import lock
from anyrank.runs.finding import is_done
from anyrank.runs.names import METRICS, SUMMARY, lower_is_better
from anyrank.runs.scored import by_state
from anyrank.studies import variants
from anyrank.studies.variants import Cell

if TYPE_CHECKING:
    from anyrank.studies.grid import OnRound

STUDY, TABLE = "study.json", "study.md"
FIGURES = ("accuracy", "collapse", "bytes", "none")
_KEYS = {"title": str, "claim": str, "minutes": (int, float), "seeds": int, "methods": list, "columns": list, "setting": list}
_OPTIONAL = {"figure": str, "set": list, "target_accuracy": (int, float), "budget_megabytes": (int, float)}
_SETTING_KEYS = {"name": str, "config": str, "set": list, "methods": list, "seeds": int}

# A figure of one finished run, by the name of its column: from its summary, its metrics, and the study.
Figure = Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]], "Study"], "float | None"]


@dataclass(frozen=True)
class Column:
    """A column of a study's table: `heading`, the figure of one run, the `digits` to show after applying `scale`, and whether
    to show its `spread` over seeds.
    """

    heading: str
    figure: Figure
    digits: int = 1
    scale: float = 1.0
    spread: bool = True


def _from_summary(name: str) -> Figure:
    return lambda summary, metrics, study: summary.get(name)


def _energy_past(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], study: Study) -> float | None:
    """Energy past the smallest rank; `None` if all clients have one rank, because there is none by definition."""
    return summary["collapse"] if len(summary["ranks"]) > 1 else None


def _rounds_to_target(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], study: Study) -> float | None:
    """The first scored round in which the target is reached; `None` if it never is."""
    return next((row["round"] for row in _scored(metrics) if row["accuracy"] >= study.target_accuracy), None)


def _within_budget(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], study: Study) -> float | None:
    """The accuracy of the last scored round before up and download together exceed the budget; `None` if there is none."""
    moved, accuracy = 0, None
    for row in metrics:
        moved += row["upload_bytes"] + row["download_bytes"]
        if moved > 1e6 * study.budget_megabytes:
            break
        accuracy = row["accuracy"] if row["accuracy"] is not None else accuracy
    return accuracy


def _scored(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in metrics if row["accuracy"] is not None]


def _metric(column: str) -> Figure:
    """The final value of a metric, or of `METRIC.LABEL` for a metric with a number for each label."""
    name, dot, label = column.partition(".")

    def figure(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], study: Study) -> float | None:
        value = summary.get("metrics", {}).get(name)
        if value is not None and isinstance(value, Mapping) != bool(dot):
            mend = f"name one of them: {name}.{next(iter(value))}" if not dot else f"name it without .{label}"
            raise ConfigError(f"columns: {column}: {name} has {'one number' if dot else 'a number for each label'}; {mend}")
        return value.get(label) if isinstance(value, Mapping) else value

    return figure


COLUMNS = {
    "accuracy": Column("final, %", _from_summary("accuracy"), 1, 100),
    "best_accuracy": Column("best, %", _from_summary("best_accuracy"), 1, 100),
    "last_accuracy": Column("last 5, %", _from_summary("last_accuracy"), 1, 100),
    "start_accuracy": Column("start, %", _from_summary("start_accuracy"), 1, 100),
    "loss": Column("loss", _from_summary("loss"), 3),
    "worst_client": Column("worst client, %", _from_summary("worst_client_accuracy"), 1, 100),
    "collapse": Column("energy past min rank, %", _energy_past, 1, 100),
    "effective_rank": Column("effective rank", _from_summary("effective_rank"), 1),
    "upload": Column("MB up", _from_summary("upload_bytes"), 2, 1e-6, spread=False),
    "download": Column("MB down", _from_summary("download_bytes"), 2, 1e-6, spread=False),
    "epsilon": Column("ε spent", _from_summary("epsilon"), 2),
    "rounds_to_target": Column("rounds to target", _rounds_to_target, 1),
    "within_budget": Column("within budget, %", _within_budget, 1, 100),
}


def column_of(name: str) -> Column:
    """The column `name`: one of `COLUMNS`, or a metric's."""
    return COLUMNS.get(name) or Column(name, _metric(name), 3)


@dataclass(frozen=True)
class Setting:
    """One federation of a study, with its methods and seeds."""

    name: str
    config: Config
    methods: tuple[str, ...]
    seeds: int

    def cells(self, out: Path) -> list[Cell]:
        return variants.make_cells(self.config, self.methods, self.seeds, out / _folder(self.name))


@dataclass(frozen=True)
class Study:
    """One claim and its settings; `minutes`: its duration on two cores. See the module's docstring."""

    name: str
    title: str
    claim: str
    minutes: float
    settings: tuple[Setting, ...]
    columns: tuple[str, ...]
    figure: str = "accuracy"
    target_accuracy: float = 0.0
    budget_megabytes: float = 0.0

    def cells(self, out: Path) -> list[Cell]:
        """All runs of the study, in separate folders below `out`."""
        return [cell for setting in self.settings for cell in setting.cells(out)]


def load(path: Path) -> Study:
    """The study of a TOML file. Raises `ConfigError` for an unknown key, column or figure, and the errors of configurations."""
    path = Path(path)
    table = read_toml(path, "study")
    _check(path, table, _KEYS, _OPTIONAL)
    for key in ("methods", "columns", "set"):
        _check_names(path, table, key)
    if table.get("figure", "accuracy") not in FIGURES:
        raise ConfigError(f"{path}: figure: expected one of {', '.join(FIGURES)}, got {table['figure']!r}")
    for column, key in (("rounds_to_target", "target_accuracy"), ("within_budget", "budget_megabytes")):
        if column in table["columns"] and not table.get(key, 0) > 0:
            raise ConfigError(f"{path}: column {column} needs {key}, a number above 0")
    settings = tuple(_setting(path, table, entry) for entry in table["setting"])
    known = {*COLUMNS, *(name for setting in settings for name in setting.config.eval.metrics)}
    for column in table["columns"]:
        if column not in COLUMNS and str(column).partition(".")[0] not in known - COLUMNS.keys():
            raise ConfigError(
                f"{path}: columns: unknown column {column!r}, also in eval.metrics; {nearest(str(column), known)}"
            )
    names = [_folder(setting.name) for setting in settings]
    if not settings or len(set(names)) != len(names):
        raise ConfigError(f"{path}: expected settings of different names, got {', '.join(names) or 'none'}")
    options = {key: table[key] for key in ("figure", "target_accuracy", "budget_megabytes") if key in table}
    told = {key: table[key] for key in ("title", "claim", "minutes")}
    return Study(path.stem, settings=settings, columns=tuple(table["columns"]), **told, **options)


def check(study: Study, progress=None, out: Path = Path()) -> list[dict[str, Any]]:
    """Build the first run of each setting and method, so that whatever is wrong stops before anything is trained: runs in
    `out` of another configuration, too. Returns what private runs would spend, as `spending.forecast`.
    """
    from anyrank.studies import comparison, spending

    comparison.check_begun(study.cells(out))
    work = [each for setting in study.settings for each in spending.of_cells(setting.cells(out), progress)]
    spending.check(work)
    return spending.forecast(work)


def execute(study: Study, out: Path, jobs: int, on_round: OnRound | None = None) -> dict[str, Any]:
    """Run all unfinished runs of all settings in one grid, and return the results, which are also written to `out` as JSON and
    as Markdown. A failed run does not stop the others; raises `RunFailed` if all runs failed, and `RunError` if another process
    is writing in `out`.
    """
    from anyrank.studies import grid

    make_folder(out)
    with lock.holding(out, "this study"):
        sweep(out)
        cells = study.cells(out)
        failures = grid.run_cells([cell for cell in cells if not is_done(cell.out, cell.config)], jobs, on_round)
        grid.finished(cells, failures)
        results = tell(study, out) | {"failures": failures}
        write_whole_text(out / STUDY, json.dumps(results, indent=2) + "\n")
        write_whole_text(out / TABLE, markdown(results))
    return results


def tell(study: Study, out: Path) -> dict[str, Any]:
    """The study's table: for each setting and method each column's values by seed, with mean and sample deviation, and the
    differences to the setting's best method, seed by seed, in the first column. A run that is not finished has no values.
    """
    settings = []
    for setting in study.settings:
        cells = setting.cells(out)
        rows = [_row(study, label, [cell for cell in cells if cell.label == label]) for label in setting.methods]
        _pair(rows, study.columns[0])
        seeds = [cell.config.run.seed for cell in cells[: setting.seeds]]
        settings.append({"name": setting.name, "seeds": seeds, "rows": rows})
    seconds = sum(_read(cell.out)[0]["seconds"] or 0.0 for cell in study.cells(out) if is_done(cell.out, cell.config))
    told = {"name": study.name, "title": study.title, "claim": study.claim, "columns": list(study.columns)}
    return told | {"settings": settings, "run_seconds": seconds}


def _row(study: Study, label: str, cells: Sequence[Cell]) -> dict[str, Any]:
    runs = [_read(cell.out) if is_done(cell.out, cell.config) else None for cell in cells]
    columns = {}
    for name in study.columns:
        values = [column_of(name).figure(*run, study) if run else None for run in runs]
        known = [value for value in values if value is not None]
        mean = statistics.fmean(known) if known else None
        columns[name] = {"values": values, "mean": mean, "std": statistics.stdev(known) if len(known) > 1 else None}
    return {"label": label, "columns": columns} | variants.disturbances([run[0] for run in runs if run])


def _pair(rows: Sequence[dict[str, Any]], name: str) -> None:
    """To each row: its mean difference to the row of the best mean, seed by seed, its spread, and how often it is ahead."""
    known = [row for row in rows if None not in row["columns"][name]["values"]]
    sign = -1 if lower_is_better(name.partition(".")[0]) else 1
    best = max(known, key=lambda row: sign * row["columns"][name]["mean"], default=None)
    for row in known:
        pairs = zip(row["columns"][name]["values"], best["columns"][name]["values"], strict=True)
        differences = [own - other for own, other in pairs]
        std = statistics.stdev(differences) if len(differences) > 1 else None
        ahead = sum(sign * difference > 0 for difference in differences)
        row["paired"] = {"to": best["label"], "mean": statistics.fmean(differences), "std": std, "ahead": ahead}


def cells_of(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The results as text, for each setting `(title, headings, rows)`: mean ± sample deviation over seeds."""
    tables = []
    for setting in results["settings"]:
        headings = ["method", *(column_of(name).heading for name in results["columns"]), "to the best (ahead)"]
        rows = []
        for row in setting["rows"]:
            cells = [_cell(column_of(name), row["columns"][name]) for name in results["columns"]]
            rows.append([row["label"], *cells, _against(row, results["columns"][0], len(setting["seeds"]))])
        seeds = ", ".join(map(str, setting["seeds"]))
        tables.append((f"{setting['name']} (seeds {seeds})", headings, rows))
    return tables


def markdown(results: Mapping[str, Any]) -> str:
    """The results as one Markdown table per setting."""
    parts = []
    for title, headings, rows in cells_of(results):
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *([f"`{row[0]}`", *row[1:]] for row in rows)]
        parts.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _cell(column: Column, told: Mapping[str, Any]) -> str:
    if told["mean"] is None:
        return "–"
    text = f"{column.scale * told['mean']:.{column.digits}f}"
    text += f" ± {column.scale * told['std']:.{column.digits}f}" if column.spread and told["std"] is not None else ""
    missing = sum(value is None for value in told["values"])
    return text + (f" (of {len(told['values']) - missing})" if missing else "")


def _against(row: Mapping[str, Any], name: str, seeds: int) -> str:
    own, column = row.get("paired"), column_of(name)
    if own is None or own["to"] == row["label"]:
        return "" if own is None else "best"
    spread = f" ± {column.scale * own['std']:.{column.digits}f}" if own["std"] is not None else ""
    return f"{column.scale * own['mean']:+.{column.digits}f}{spread} ({own['ahead']}/{seeds})"


# --- reading ---------------------------------------------------------------------------------------------------------


def _setting(path: Path, table: Mapping[str, Any], entry: Any) -> Setting:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{path}: [[setting]]: expected a table of keys, got {entry!r}")
    _check(path, entry, {"name": str, "config": str}, _SETTING_KEYS)
    for key in ("methods", "set"):
        _check_names(path, entry, key)
    methods = tuple(entry.get("methods", table["methods"]))
    seeds = entry.get("seeds", table["seeds"])
    chosen = configs.load(path.parent / entry["config"], [*table.get("set", ()), *entry.get("set", ())])
    if seeds < 1:
        raise ConfigError(f"{path}: seeds: expected at least 1, got {seeds}")
    if len(set(methods)) != len(methods):
        raise ConfigError(f"{path}: methods: expected different methods, got {', '.join(methods)}")
    try:
        for label in methods:
            variants.check_method(variants.variant(chosen, label))
    except AnyRankError as error:
        raise type(error)(f"{path}, setting {entry['name']!r}: {error}") from None
    return Setting(entry["name"], chosen, methods, seeds)


def _check_names(path: Path, table: Mapping[str, Any], key: str) -> None:
    """Raise `ConfigError` for a list that holds anything but text, or nothing although something is needed."""
    listed = table.get(key, ["-"])
    if not all(isinstance(each, str) for each in listed) or not (listed or key == "set"):
        raise ConfigError(f"{path}: {key}: expected a list of texts, {'' if key == 'set' else 'at least one, '}got {listed!r}")


def _check(path: Path, table: Mapping[str, Any], needed: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a key that is missing, unknown or of another type."""
    known = {**needed, **optional}
    for key in needed:
        if key not in table:
            raise ConfigError(f"{path}: expected the key {key!r}; it has {', '.join(table) or 'none'}")
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}; {nearest(key, known)}")
        if not isinstance(value, known[key]):
            names = known[key] if isinstance(known[key], tuple) else (known[key],)
            raise ConfigError(f"{path}: {key}: expected {' or '.join(kind.__name__ for kind in names)}, got {value!r}")


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and metrics of a finished run; each round's scores are those of the state after it."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return summary, by_state([json.loads(line) for line in lines], summary)


def _folder(name: str) -> str:
    """A setting's folder: its name in lower-case letters, digits and dashes."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
