"""The report of some runs: one HTML file that loads nothing, and one PNG for a README. Reads only the run folders.

Runs of one label and one configuration are seeds of each other: their figures are shown as mean ± sample standard
deviation. What cannot be read, or compared, is said on the page.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from anyrank import figures
from anyrank.adapter import write_whole
from anyrank.errors import RunError
from anyrank.figures import Series, Style

_TEMPLATES = Path(__file__).parent / "templates"
_COLUMNS = (
    "accuracy",
    "loss",
    "collapse",
    "effective_rank",
    "upload_bytes",
    "download_bytes",
    "seconds",
    "rejected",
    "epsilon",
)
_MOST_REASONS = 20


@dataclass(frozen=True)
class TakingPart:
    """What clients.jsonl says, in short: each client's `ranks`; by rank how many updates were `used` and the examples of
    each client and round, `sizes`; and the rows of updates that were `unused`.
    """

    ranks: Mapping[str, int]
    used: Mapping[int, int]
    sizes: Mapping[int, Sequence[float]]
    unused: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One run folder: one method, one seed. `columns` `{name: [rounds]}`, NaN where a round has no such value;
    `spectrum` `[rounds, r]`: singular values combined over layers by root-sum-square; `layers`: the last round's, apart.
    """

    folder: Path
    label: str
    method: str
    seed: int | None
    config_text: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rounds: np.ndarray
    columns: Mapping[str, np.ndarray]
    spectrum: np.ndarray
    layers: Mapping[str, np.ndarray]
    taking_part: TakingPart
    unreadable: int

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def ranks(self) -> dict[int, int]:
        """How many registered clients hold each rank; from the clients that took part where nothing was summed up."""
        held = self.summary.get("ranks")
        if isinstance(held, Mapping) and held:
            return {int(rank): int(count) for rank, count in sorted(held.items(), key=lambda item: int(item[0]))}
        return dict(sorted(Counter(self.taking_part.ranks.values()).items()))

    @property
    def planned(self) -> int | None:
        rounds = _section(self.config, "run").get("rounds")
        return rounds if isinstance(rounds, int) else None

    @property
    def planned_ranks(self) -> list[int]:
        """The configuration's ranks, for an unfinished run: a rank that was not drawn yet has left no trace."""
        ranks = _section(self.config, "clients").get("ranks")
        return [rank for rank in ranks if isinstance(rank, int)] if isinstance(ranks, list) and not self.finished else []

    def final(self, name: str) -> float | None:
        """A final figure: the summary's where the run is finished, else the same reckoned from its rounds."""
        value = _number(self.summary.get(name))
        if value is not None or name not in _FINAL:
            return value
        column, reduce = _FINAL[name]
        values = self.columns[column]
        values = values[~np.isnan(values)]
        return float(reduce(values)) if len(values) else None


# summary.json's name: the column of metrics.jsonl that it comes from, and how
_FINAL = {
    "accuracy": ("accuracy", lambda values: values[-1]),
    "best_accuracy": ("accuracy", max),
    "last_accuracy": ("accuracy", lambda values: values[-5:].mean()),
    "loss": ("loss", lambda values: values[-1]),
    "collapse": ("collapse", lambda values: values[-1]),
    "effective_rank": ("effective_rank", lambda values: values[-1]),
    "upload_bytes": ("upload_bytes", sum),
    "download_bytes": ("download_bytes", sum),
    "seconds": ("seconds", sum),
    "rejected": ("rejected", sum),
    "epsilon": ("epsilon", lambda values: values[-1]),
}


@dataclass(frozen=True)
class Stat:
    """The mean over `n` seeds, and their sample standard deviation, 0 with one seed."""

    mean: float
    std: float
    n: int

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        mean = self.mean * scale
        return _places(mean, digits) + (f" ± {self.std * scale:.{_decimals(mean, digits)}f}" if self.n > 1 else "")


@dataclass(frozen=True)
class Group:
    """The runs of one label: its seeds. Finished runs only, where there are any."""

    label: str
    runs: Sequence[Run]
    style: Style = field(default=Style(0, 0))

    @property
    def levels(self) -> list[int]:
        """The ranks of the federation, rising."""
        return sorted({rank for run in self.runs for rank in (*run.ranks, *run.planned_ranks)})

    @property
    def mixed(self) -> bool:
        """Whether there can be energy beyond the minimum rank: with one rank for all there is none, by definition."""
        return len(self.levels) != 1 or any((run.columns["collapse"] > 1e-9).any() for run in self.runs)

    @property
    def rounds(self) -> int:
        return max((int(run.rounds[-1]) for run in self.runs if len(run.rounds)), default=0)

    def stat(self, name: str) -> Stat | None:
        values = [value for run in self.runs if (value := run.final(name)) is not None]
        if not values:
            return None
        return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def series(self, name: str, start: str = "") -> Series:
        """The mean over seeds of a column, at the rounds that every seed has; `start` is the summary's name of round 0."""
        tables = [table for run in self.runs if (table := _by_round(run, name, start))]
        shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        values = np.array([[table[number] for number in shared] for table in tables]).reshape(len(tables), len(shared))
        mean = values.mean(axis=0) if len(tables) else np.zeros(0)
        std = values.std(axis=0, ddof=1) if len(tables) > 1 else np.zeros(len(mean))
        return Series(self.label, self.style, np.array(shared, dtype=float), mean, std)


def build(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of the run folders `runs` to `out`, whole or not at all, and return `out`.

    Raises `RunError` where a folder is no run folder.
    """
    groups, notes = _groups([_read(Path(folder)) for folder in runs])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(_page(groups, notes))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda path: path.write_text(page, encoding="utf-8"))
    return out


def figure(runs: Sequence[Path], out: Path) -> Path:
    """Write the headline PNG of the run folders `runs` to `out`: accuracy, and energy beyond the minimum rank."""
    groups, _ = _groups([_read(Path(folder)) for folder in runs])
    seeds = max(len(group.runs) for group in groups)
    note = "One seed." if seeds == 1 else f"Mean over {_seeds(groups)}; shaded: ± one standard deviation."
    accuracy = [group.series("accuracy", "start_accuracy") for group in groups]
    if figures.zoomed(accuracy):
        note += " Left: the axis leaves out the steep start."
    if not all(group.mixed for group in groups):
        note += " Right: where ranks are mixed."
    collapse = [group.series("collapse") for group in groups if group.mixed]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda path: figures.headline(accuracy, collapse, note, path))
    return out


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> Run:
    if not any((folder / name).is_file() for name in ("summary.json", "config.toml")):
        raise RunError(f"{folder}: expected a run folder with config.toml or summary.json, got {_instead(folder)}")
    config_text, config = _read_config(folder / "config.toml")
    summary = _read_summary(folder / "summary.json")
    metrics, broken = _read_lines(folder / "metrics.jsonl")
    taking_part, broken_clients = _read_clients(folder / "clients.jsonl")
    metrics = {int(row["round"]): row for row in metrics if _number(row.get("round")) is not None}  # a repeated round: its last
    ordered = [metrics[number] for number in sorted(metrics)]
    method = summary.get("method") or _section(config, "method").get("name") or folder.name
    seed = summary.get("seed", _section(config, "run").get("seed"))
    return Run(
        folder=folder,
        label=" ".join(str(summary.get("label") or method).split()),
        method=str(method),
        seed=seed if isinstance(seed, int) else None,
        config_text=config_text,
        config=config,
        summary=summary,
        rounds=np.array(sorted(metrics), dtype=int),
        columns={name: np.array([_float(row.get(name)) for row in ordered]) for name in _COLUMNS},
        spectrum=_combined([_spectra(row) for row in ordered]),
        layers=_spectra(ordered[-1]) if ordered else {},
        taking_part=taking_part,
        unreadable=broken + broken_clients,
    )


def _instead(folder: Path) -> str:
    if not folder.exists():
        return "no such folder; check the path, or run `anyrank run CONFIG.toml --out DIR` first"
    if not folder.is_dir():
        return "a file; name the folder that holds it"
    inside = sorted({path.parent.relative_to(folder) for path in folder.glob("*/config.toml")})
    inside = inside or sorted({path.parent.relative_to(folder) for path in folder.glob("*/*/config.toml")})
    if inside:
        all_of_them = folder / "/".join("*" * len(inside[0].parts))
        return f"a folder that holds {_count(len(inside), 'run folder')} ({inside[0]}, …); name those: {all_of_them}"
    return "neither; name a folder that `anyrank run` wrote"


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return text, tomllib.loads(text)
    except FileNotFoundError:
        return "", {}
    except tomllib.TOMLDecodeError:
        return text, {}  # shown as it stands: the run that wrote it is past


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(f"{path}: expected one JSON object, got {error}; delete it to report from metrics.jsonl alone") from None
    if not isinstance(summary, dict):
        raise RunError(
            f"{path}: expected one JSON object, got {type(summary).__name__}; delete it to report from metrics.jsonl alone"
        )
    return summary


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and how many lines could not be read. A last line without its end was being
    written when the run stopped: it is passed over and not counted.
    """
    try:
        *lines, partial = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [], 0
    rows = [_object(line) for line in lines if line.strip()]
    last = _object(partial)
    good = [row for row in rows if row is not None]
    return good + ([last] if last else []), len(rows) - len(good)


def _read_clients(path: Path) -> tuple[TakingPart, int]:
    """clients.jsonl in short, and how many of its lines could not be read."""
    rows, broken = _read_lines(path)
    ranks: dict[str, int] = {}
    used: Counter[int] = Counter()
    sizes: dict[int, list[float]] = defaultdict(list)
    unused = []
    for row in {(row.get("round"), str(row.get("client"))): row for row in rows}.values():  # a repeated round: its last
        client, rank, size = str(row.get("client")), row.get("rank"), _number(row.get("num_examples"))
        if isinstance(rank, int):
            ranks[client] = rank
            used[rank] += row.get("status") == "ok"
            sizes[rank] += [size] if size else []
        if row.get("status") not in ("ok", None):
            unused.append(row | {"client": client})
    return TakingPart(ranks, used, sizes, unused), broken


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _spectra(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    spectrum = row.get("spectrum")
    if not isinstance(spectrum, Mapping):
        return {}
    return {str(layer): np.nan_to_num(np.array([_float(value) for value in values])) for layer, values in spectrum.items()}


def _combined(rounds: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """`[rounds, r]`: at each index the root of the sum of squares over layers, so that energies add; NaN without a spectrum."""
    length = max((len(values) for layers in rounds for values in layers.values()), default=0)
    energy = np.full((len(rounds), length), np.nan)
    for row, layers in zip(energy, rounds, strict=True):
        if layers:
            row[:] = 0
        for values in layers.values():
            row[: len(values)] += values**2
    return np.sqrt(energy)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _number(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def _float(value: Any) -> float:
    number = _number(value)
    return math.nan if number is None else number


# --- seeds of one label ----------------------------------------------------------------------------------------------


def _groups(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """The runs by label, in the order given, and what a reader must know about them."""
    if not runs:
        raise RunError("report: expected at least one run folder, got none; name the folders that `anyrank run` wrote")
    notes = [
        f"{run.folder.name}: left out {_count(run.unreadable, 'line')} of its records that could not be read."
        for run in runs
        if run.unreadable
    ]
    by_label: dict[str, dict[str, dict[Any, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        seeds = by_label[run.label][_fingerprint(run)]
        if run.seed in seeds and run.seed is not None:
            notes.append(
                f"{run.folder.name} has the label, configuration and seed of {seeds[run.seed].folder.name}: counted once."
            )
        else:
            seeds[run.folder if run.seed is None else run.seed] = run
    named: list[tuple[str, list[Run]]] = []
    for label, variants in by_label.items():
        for number, seeds in enumerate(variants.values(), start=1):
            own = f"{label} #{number}" if len(variants) > 1 else label
            named.append((own, list(seeds.values())))
            if len(variants) > 1:
                notes.append(
                    f"Runs of {label} differ in configuration: {own} is {_and(run.folder.name for run in seeds.values())}."
                )
    styles = figures.styles([(label, members[0].method) for label, members in named])
    groups = []
    for label, members in named:
        kept, told = _finished(label, sorted(members, key=lambda run: -1 if run.seed is None else run.seed))
        groups.append(Group(label, kept, styles[label]))
        notes += told
    return groups, notes + _unlike(groups)


def _fingerprint(run: Run) -> str:
    """The configuration without what may differ between the seeds of one label."""
    config = {name: section for name, section in run.config.items() if name != "run"}
    return json.dumps([config, _section(run.config, "run").get("rounds")], sort_keys=True, default=str)


def _finished(label: str, runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    done = [run for run in runs if run.finished]
    open_ = [run for run in runs if not run.finished]
    notes = []
    for run in open_:
        at = f"round {run.rounds[-1]}" if len(run.rounds) else "no round yet"
        seed = "" if run.seed is None else f", seed {run.seed}"
        of = f" of {run.planned}" if run.planned and len(run.rounds) else ""
        fate = "left out of every figure" if done else "shown as far as it went"
        notes.append(f"{label}{seed} is unfinished ({at}{of}): {fate}.")
    return done or open_, notes


def _unlike(groups: Sequence[Group]) -> list[str]:
    """What the runs do not share, and that makes their accuracies hard to compare."""
    notes = []
    for key, what in (
        ("task", "task"),
        ("base_model", "base model"),
        ("head", "head"),
        ("test_examples", "number of test examples"),
        ("clients", "number of clients"),
        ("rounds", "number of rounds"),
    ):
        values = {str(run.summary[key]) for group in groups for run in group.runs if key in run.summary}
        if len(values) > 1:
            notes.append(f"These runs differ in their {what} ({_and(sorted(values))}): compare with care.")
    return notes


def _by_round(run: Run, name: str, start: str) -> dict[int, float]:
    table = {
        int(number): float(value) for number, value in zip(run.rounds, run.columns[name], strict=True) if not math.isnan(value)
    }
    first = _number(run.summary.get(start)) if start else None
    return ({0: first} if first is not None and table else {}) | table


# --- the page --------------------------------------------------------------------------------------------------------


def _page(groups: Sequence[Group], notes: Sequence[str]) -> dict[str, Any]:
    """Everything that the template shows."""
    return {
        "title": f"anyrank report: {', '.join(group.label for group in groups)}",
        "headline": _headline(groups),
        "notes": notes,
        "facts": _facts(groups),
        "table": _table(groups),
        "keys": [(group.label, group.style) for group in groups],
        "learning": _learning(groups),
        "collapse": _collapse(groups),
        "spectra": _spectra_charts(groups),
        "partitions": _partition_charts(groups),
        "layers": _layer_table(groups),
        "traffic": _traffic(groups),
        "federations": _federations(groups),
        "rejections": _rejections(groups),
        "privacy": _privacy(groups),
        "configs": [
            (group.label, group.runs[0].seed, group.runs[0].config_text) for group in groups if group.runs[0].config_text
        ],
        "methods": _methods(groups),
        "versions": _versions(groups),
        "light": figures.LIGHT,
        "dark": figures.DARK,
    }


def _headline(groups: Sequence[Group]) -> str:
    """One sentence from the numbers: the best mean final accuracy, who ties with it, and where the energy lies."""
    scored = sorted(((stat, group) for group in groups if (stat := group.stat("accuracy"))), key=lambda pair: -pair[0].mean)
    if not scored:
        return "No round of these runs has been scored yet."
    (best, winner), *rest = scored
    value = f"{best.text(2, 100)} %"
    seeds = _count(best.n, "seed")
    if not rest:
        sentence = f"{winner.label} ends at an accuracy of {value} after {_count(winner.rounds, 'round')} ({seeds})"
    else:
        sentence = f"{winner.label} has the highest final accuracy, {value} ({seeds}), {_rivals(best, rest)}"
    energy = _energy_clause(groups)
    return f"{sentence}; {energy}." if energy else f"{sentence}."


def _rivals(best: Stat, rest: Sequence[tuple[Stat, Group]]) -> str:
    ties = [group.label for stat, group in rest if _tie(best, stat)]
    second, runner = rest[0]
    if ties:
        return f"a tie with {_and(ties)} within the spread"
    gap = f"{_places(100 * (best.mean - second.mean), 2)} points ahead of {runner.label}"
    if best.mean == second.mean:
        return f"level with {runner.label}, with too few seeds to tell them apart"
    return f"{gap}, more than the spread" if min(best.n, second.n) > 1 else f"{gap}, with too few seeds to know the spread"


def _tie(one: Stat, other: Stat) -> bool:
    """Whether two means differ by no more than the larger of their standard deviations. Without a spread: not known."""
    return min(one.n, other.n) > 1 and abs(one.mean - other.mean) <= max(one.std, other.std)


def _energy_clause(groups: Sequence[Group]) -> str:
    ends = sorted(
        ((stat.mean, i, group) for i, group in enumerate(groups) if group.mixed and (stat := group.stat("collapse"))),
        reverse=True,
    )
    if not ends:
        return ""
    ranks = {group.levels[0] for _, _, group in ends if group.levels}
    beyond = f"beyond rank {ranks.pop()}" if len(ranks) == 1 else "beyond the minimum rank"
    told = [
        f"{_share(mean)} with {group.label}{_from(group)}"
        for mean, _, group in (ends if len(ends) < 3 else (ends[0], ends[-1]))
    ]
    if len(ends) == 1:
        return (
            f"the energy of its update {beyond} ends at {_share(ends[0][0])}{_from(ends[0][2])}"
            if len(groups) == 1
            else f"energy {beyond} ends at {told[0]}"
        )
    if len(ends) == 2:
        return f"energy {beyond} ends at {told[0]} and at {told[1]}"
    return f"energy {beyond} ends highest at {told[0]} and lowest at {told[1]}"


def _from(group: Group) -> str:
    line = group.series("collapse")
    return f" (round {line.x[0]:.0f}: {_share(line.mean[0])})" if len(line.x) > 1 else ""


def _facts(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """What the runs share, as short pairs; what they do not share is given as a list."""
    runs = [run for group in groups for run in group.runs]
    mixed = max(groups, key=lambda group: len(group.levels))
    examples = [f"{told} {what}" for what in ("train", "test") if (told := _shared(runs, f"{what}_examples"))]
    pairs = [
        ("task", _shared(runs, "task")),
        ("base model", _shared(runs, "base_model")),
        ("head", _shared(runs, "head")),
        ("clients", _shared(runs, "clients")),
        ("cohort", _shared(runs, "cohort")),
        ("ranks", ", ".join(map(str, mixed.levels))),
        ("rounds", str(max(group.rounds for group in groups))),
        ("seeds", _seeds(groups).removesuffix(" seeds").removesuffix(" seed")),
        ("examples", ", ".join(examples)),
    ]
    return [(name, value) for name, value in pairs if value]


def _shared(runs: Iterable[Run], key: str) -> str:
    return ", ".join(dict.fromkeys(str(run.summary[key]) for run in runs if run.summary.get(key) not in (None, "")))


# heading, name of the figure, decimals, scale, whether the spread is told
_TABLE = (
    ("final accuracy, %", "accuracy", 2, 100, True),
    ("best, %", "best_accuracy", 2, 100, True),
    ("last 5, %", "last_accuracy", 2, 100, True),
    ("energy beyond min rank, %", "collapse", 2, 100, True),
    ("effective rank", "effective_rank", 2, 1, True),
    ("up, MB", "upload_bytes", 1, 1e-6, False),
    ("down, MB", "download_bytes", 1, 1e-6, False),
    ("time, s", "seconds", 1, 1, False),
    ("rejected", "rejected", 0, 1, False),
)


def _table(groups: Sequence[Group]) -> dict[str, Any]:
    """The results: a row a label, its cells as text. Accuracy and energy in %, traffic in MB (10^6 bytes), time in s."""
    best = max((stat.mean for group in groups if (stat := group.stat("accuracy"))), default=None)
    rows = []
    for group in groups:
        stats = {name: group.stat(name) for _, name, *_ in _TABLE if name != "collapse" or group.mixed}
        cells = [_cell(stats.get(name), digits, scale, spread) for _, name, digits, scale, spread in _TABLE]
        top = len(groups) > 1 and stats["accuracy"] is not None and stats["accuracy"].mean == best
        rows.append({"label": group.label, "style": group.style, "seeds": len(group.runs), "cells": cells, "best": top})
    return {
        "columns": [heading for heading, *_ in _TABLE],
        "rows": rows,
        "alone": [group.label for group in groups if not group.mixed],
        "spread": any(len(group.runs) > 1 for group in groups),
    }


def _cell(stat: Stat | None, digits: int, scale: float, spread: bool) -> str:
    if stat is None:
        return "–"
    if digits == 0:  # a count, whose mean need not be whole
        return f"{round(stat.mean, 1):g}"
    return (stat if spread else replace(stat, n=1)).text(digits, scale)


def _learning(groups: Sequence[Group]) -> list[dict[str, Any]]:
    spread = _spread_note(groups)
    accuracy = [group.series("accuracy", "start_accuracy") for group in groups]
    loss = [group.series("loss", "start_loss") for group in groups]
    return [
        _chart(
            figures.lines(
                accuracy, "Accuracy, %", "round", "Accuracy of the global model over the rounds, a line a method", percent=True
            ),
            f"Higher is better: accuracy of the global model on held-out examples after each round{spread}"
            + _zoom_note(accuracy),
        ),
        _chart(
            figures.lines(loss, "Loss", "round", "Loss of the global model over the rounds, a line a method"),
            f"Lower is better: loss of the global model on the same examples{spread}" + _zoom_note(loss),
        ),
    ]


def _collapse(groups: Sequence[Group]) -> list[dict[str, Any]]:
    charts = []
    series = [line for group in groups if group.mixed and len((line := group.series("collapse")).x)]
    if series:
        log = figures.wants_log(series)
        alt = "Share of the update's energy beyond the minimum rank over the rounds, a line a method"
        told = "A line that sinks is rank collapse: what only larger ranks hold is being lost."
        told += " The axis is logarithmic: a straight fall is a steady decay." if log else ""
        svg = figures.lines(series, "Energy beyond the minimum rank, %", "round", alt, percent=True, log=log, from_zero=True)
        charts.append(
            _chart(
                svg,
                told + _spread_note(groups, " "),
            )
        )
    series = [line for group in groups if len((line := group.series("effective_rank")).x)]
    if series:
        svg = figures.lines(
            series,
            "Effective rank",
            "round",
            "Effective rank of the global update over the rounds, a line a method",
            from_zero=True,
        )
        told = "Higher is richer: how many directions the global update really uses (the exponential of its energy's entropy)."
        charts.append(_chart(svg, told + _spread_note(groups, " ")))
    return charts


def _spectra_charts(groups: Sequence[Group]) -> dict[str, Any] | None:
    """A heatmap a label, of its first seed, on one colour scale."""
    shown = [(group, run) for group in groups if (run := group.runs[0]).spectrum.size and np.nansum(run.spectrum) > 0]
    if not shown:
        return None
    floor = _floor([run.spectrum for _, run in shown])
    minis = []
    for group, run in shown:
        alt = f"Singular values of {group.label} over the rounds, by rank partition"
        minis.append(
            {
                "label": group.label,
                "style": group.style,
                "svg": figures.heatmap(run.spectrum, run.rounds, group.levels, floor, alt),
            }
        )
    return {
        "minis": minis,
        "gradient": figures.heat_gradient(),
        "floor": f"{10**floor:.2g}",
        "middle": f"{10 ** (floor / 2):.2g}",
    }


def _floor(spectra: Sequence[np.ndarray]) -> float:
    """The dark end of the colour scale, a power of ten from -4 to -1: low enough for all but the smallest 2 % of the ratios."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.concatenate([np.log10(spectrum / spectrum[:, :1]).ravel() for spectrum in spectra])
    ratios = ratios[np.isfinite(ratios)]
    return float(np.clip(math.floor(np.quantile(ratios, 0.02)), -4, -1)) if len(ratios) else -4.0


def _partition_charts(groups: Sequence[Group]) -> dict[str, Any] | None:
    minis, legends = [], {}
    for group in groups:
        tables = [table for run in group.runs if (table := _energy_by_round(run, group.levels))]
        shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        if not shared or not group.mixed:
            continue
        energy = np.mean([[table[number] for number in shared] for table in tables], axis=0).T
        parts = figures.bands(group.levels, max(run.spectrum.shape[1] for run in group.runs))[: len(energy)]
        names = tuple(f"{low + 1}–{high}" if high > low + 1 else f"{high}" for low, high in parts)
        legends.setdefault(names, []).append(group.label)
        alt = f"Shares of the energy of {group.label} by rank partition over the rounds"
        minis.append({"label": group.label, "style": group.style, "svg": figures.stack(energy, np.array(shared), alt)})
    keys = [
        {
            "of": _and(labels) if len(legends) > 1 else "",
            "parts": list(zip(names, figures.partition_colors(len(names)), strict=True)),
        }
        for names, labels in legends.items()
    ]
    return {"minis": minis, "legends": keys} if minis else None


def _energy_by_round(run: Run, levels: Sequence[int]) -> dict[int, list[float]]:
    """`{round: [partitions]}`: the share of the energy between two neighbouring ranks."""
    energy = run.spectrum**2
    total = energy.sum(axis=1)
    parts = figures.bands(levels, energy.shape[1])
    return {
        int(number): [float(row[low:high].sum() / whole) for low, high in parts]
        for number, row, whole in zip(run.rounds, energy, total, strict=True)
        if whole > 0
    }


def _layer_table(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Energy beyond the minimum rank in the last round, layer by layer, of each label's first seed, in %."""
    shown = [group for group in groups if group.mixed and group.levels and group.runs[0].layers]
    names = list(dict.fromkeys(name for group in shown for name in group.runs[0].layers))
    if not names or len(names) == 1:
        return None
    rows = [(name, [_beyond(group.runs[0].layers.get(name), group.levels[0]) for group in shown]) for name in names]
    return {"labels": [(group.label, group.style) for group in shown], "rows": rows}


def _beyond(values: np.ndarray | None, rank: int) -> str:
    if values is None or not (total := float((values**2).sum())):
        return "–"
    return _places(100 * float((values[rank:] ** 2).sum()) / total, 2)


def _traffic(groups: Sequence[Group]) -> list[dict[str, Any]]:
    rows = [
        (g.label, g.style, up.mean / 1e6, g.stat("download_bytes").mean / 1e6)
        for g in groups
        if (up := g.stat("upload_bytes")) and g.stat("download_bytes")
    ]
    if not rows:
        return []
    charts = [
        _chart(
            figures.bars(rows, "Megabytes over the whole run", "Megabytes up and down in the whole run, two bars a method"),
            "Solid: uploaded by all clients. Pale: downloaded by them. Shorter is cheaper.",
        )
    ]
    series = [line for group in groups if len((line := _against_upload(group)).x)]
    if series:
        alt = "Accuracy against megabytes uploaded so far, a line a method"
        svg = figures.lines(series, "Accuracy, %", "megabytes uploaded so far, all clients", alt, percent=True)
        charts.append(
            _chart(
                svg,
                f"Further left and higher is better: the accuracy that so many uploaded megabytes bought.{_zoom_note(series)}",
            )
        )
    return charts


def _against_upload(group: Group) -> Series:
    line = group.series("accuracy")
    sums = []
    for run in group.runs:
        if len(run.rounds):
            total = np.cumsum(np.nan_to_num(run.columns["upload_bytes"])) / 1e6
            sums.append(np.interp(line.x, run.rounds, total))
    return replace(line, x=np.mean(sums, axis=0)) if sums and len(line.x) else line


def _federations(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Who took part, a table for each set of clients: labels with the same clients of the same ranks share one."""
    together: dict[tuple, list[Group]] = defaultdict(list)
    for group in groups:
        together[tuple(group.runs[0].ranks.items())].append(group)
    tables = []
    for held, members in together.items():
        runs = [run for group in members for run in group.runs]
        rows = [_rank_row(rank, count, runs) for rank, count in held]
        for row in rows:
            row["share"] = row["count"] / max(row["count"] for row in rows)
            row["used_share"] = row["used"] / (max(row["used"] for row in rows) or 1)
        if rows:
            tables.append(
                {"of": _and(group.label for group in members), "runs": len(runs), "rows": rows, "examples": _examples(runs)}
            )
    return tables


def _rank_row(rank: int, count: int, runs: Sequence[Run]) -> dict[str, Any]:
    used = sum(run.taking_part.used.get(rank, 0) for run in runs) / len(runs)
    sizes = [size for run in runs for size in run.taking_part.sizes.get(rank, ())]
    return {
        "rank": rank,
        "count": count,
        "used": used,
        "used_text": f"{round(used, 1):g}",
        "examples": f"{statistics.median(sizes):g}" if sizes else "–",
    }


def _examples(runs: Sequence[Run]) -> str:
    for run in runs:
        sizes = run.summary.get("examples")
        if isinstance(sizes, Mapping) and all(_number(sizes.get(key)) is not None for key in ("min", "median", "max")):
            seed = "" if run.seed is None else f" (seed {run.seed})"
            low, middle, high = (f"{sizes[key]:g}" for key in ("min", "median", "max"))
            return f"Examples a client{seed}: {low} at least, {middle} in the median, {high} at most."
    return ""


def _rejections(groups: Sequence[Group]) -> dict[str, Any]:
    """Updates that were not used, by status and reason; a client's own name and the round are taken out of reasons."""
    found: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    for group in groups:
        for row in (row for run in group.runs for row in run.taking_part.unused):
            found[str(row["status"]), _reason(row)].append((group.label, row))
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = []
    for (status, reason), hits in ordered[:_MOST_REASONS]:
        by_label = Counter(label for label, _ in hits)
        clients = sorted({row["client"] for _, row in hits})
        labels = ", ".join(f"{label} {times}" for label, times in by_label.most_common())
        span = _span([row for _, row in hits])
        rows.append(
            {"status": status, "reason": reason, "times": len(hits), "labels": labels, "clients": _few(clients), "rounds": span}
        )
    known = any(run.taking_part.ranks for group in groups for run in group.runs)
    return {"rows": rows, "more": len(ordered) - len(rows), "known": known}


def _reason(row: Mapping[str, Any]) -> str:
    reason = str(row.get("reason") or "no reason recorded")
    reason = re.sub(rf"(?<!\w){re.escape(row['client'])}(?!\w)", "…", reason) if row["client"] else reason
    return re.sub(r"\bround \d+", "round …", reason)


def _span(rows: Sequence[Mapping[str, Any]]) -> str:
    rounds = [int(number) for row in rows if (number := _number(row.get("round"))) is not None]
    return "" if not rounds else f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)}–{max(rounds)}"


def _privacy(groups: Sequence[Group]) -> dict[str, Any] | None:
    private = [(group, stat) for group in groups if (stat := group.stat("epsilon"))]
    if not private:
        return None
    series = [line for group, _ in private if len((line := group.series("epsilon")).x)]
    svg = figures.lines(series, "ε spent", "round", "Privacy spent over the rounds, a line a method") if series else None
    return {
        "rows": [(group.label, group.style, stat.text(3)) for group, stat in private],
        "chart": _chart(svg, "Lower is more private: ε spent from the first round up to this one.") if svg else None,
        "without": _and(group.label for group in groups if not group.stat("epsilon")),
    }


def _methods(groups: Sequence[Group]) -> list[tuple[str, str, str, str]]:
    """Label, method, options and paper, as far as they are recorded."""
    rows = []
    for group in groups:
        summary = group.runs[0].summary
        options = summary.get("options")
        told = ", ".join(f"{key} = {value}" for key, value in options.items()) if isinstance(options, Mapping) else ""
        rows.append((group.label, group.runs[0].method, told, str(summary.get("paper") or "")))
    return rows


def _versions(groups: Sequence[Group]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for run in (run for group in groups for run in group.runs):
        versions = run.summary.get("versions")
        for name, version in versions.items() if isinstance(versions, Mapping) else ():
            found[str(name)][str(version)] = None
        if run.summary.get("platform"):
            found["platform"][str(run.summary["platform"])] = None
    return [(name, ", ".join(values)) for name, values in found.items()]


# --- words -----------------------------------------------------------------------------------------------------------


def _chart(svg: Any, caption: str) -> dict[str, Any]:
    return {"svg": svg, "caption": caption}


def _zoom_note(series: Sequence[Series]) -> str:
    return " The axis leaves out the steep start." if figures.zoomed(series) else ""


def _spread_note(groups: Sequence[Group], lead: str = ". ") -> str:
    return (
        f"{lead}Shaded: ± one standard deviation over seeds."
        if any(len(group.runs) > 1 for group in groups)
        else "." * (lead == ". ")
    )


def _seeds(groups: Sequence[Group]) -> str:
    counts = sorted({len(group.runs) for group in groups})
    return _count(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _share(value: float) -> str:
    return f"{_places(100 * value, 1)} %"


def _places(value: float, digits: int) -> str:
    return f"{value:.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    """`digits`, or as many as a small value needs for two significant figures, so that it is not shown as nothing."""
    return max(digits, min(9, 1 - math.floor(math.log10(abs(value))))) if value else digits


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _and(names: Iterable[str]) -> str:
    *most, last = [*names] or [""]
    return f"{', '.join(most)} and {last}" if most else last
