"""Read a run folder, as far as it is readable. A round that was repeated after a resume counts once, by its last record."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anyrank.config.tables import parse_toml
from anyrank.errors import RunError, printable
from anyrank.files import parse_json, read_bounded
from anyrank.report import conduct, words
from anyrank.runs.scored import by_state

_MOST_BYTES = 1 << 30  # of one file of a run
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


@dataclass(frozen=True)
class TakingPart:
    """What clients.jsonl says, in short: each client's `ranks`; by rank how many updates were `used` and the examples of
    each client and round, `sizes`; the rows of updates that were `unused`; and the `conduct` of each client.
    """

    ranks: Mapping[str, int]
    used: Mapping[int, int]
    sizes: Mapping[int, Sequence[float]]
    unused: Sequence[Mapping[str, Any]]
    conduct: Mapping[str, conduct.Conduct]


@dataclass(frozen=True)
class Run:
    """One run folder: one method, one seed. `columns` `{name: [rounds]}`, NaN where a round has no such value, those of the
    task's `metrics` among them; `by_label`: the last numbers of those that have one for each label, `{name: {label: number}}`;
    `spectrum` `[rounds, r]`: singular values combined over layers by root-sum-square; `layers`: the last round's, apart;
    `idle`: the reasons of the rounds that left the state as it was, `{round: reason}`.
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
    metrics: Sequence[str]
    by_label: Mapping[str, Mapping[str, float]]
    spectrum: np.ndarray
    layers: Mapping[str, np.ndarray]
    taking_part: TakingPart
    idle: Mapping[int, str]
    unreadable: int

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def ranks(self) -> dict[int, int]:
        """How many registered clients have each rank; without a summary, counted over the clients that took part."""
        held = self.summary.get("ranks")
        if isinstance(held, Mapping) and held:
            counts = {int(rank): count for rank, count in held.items() if re.fullmatch(r"[0-9]{1,9}", rank)}
            return {rank: count for rank, count in sorted(counts.items()) if isinstance(count, int)}
        return dict(sorted(Counter(self.taking_part.ranks.values()).items()))

    @property
    def planned(self) -> int | None:
        rounds = section(self.config, "run").get("rounds")
        return rounds if isinstance(rounds, int) else None

    @property
    def planned_ranks(self) -> list[int]:
        """The configuration's ranks, for an unfinished run: a rank that was not drawn yet has no record."""
        ranks, sites = section(self.config, "clients").get("ranks"), self.config.get("sites")
        if isinstance(sites, list):
            ranks = [site.get("rank") for site in sites if isinstance(site, Mapping)]
        return [rank for rank in ranks if isinstance(rank, int)] if isinstance(ranks, list) and not self.finished else []

    def final(self, name: str) -> float | None:
        """A final figure: the summary's if the run is finished, or else computed from its rounds."""
        value = finite(section(self.summary, "metrics").get(name) if name in self.metrics else self.summary.get(name))
        if value is not None or name not in {**_FINAL, **dict.fromkeys(self.metrics)}:
            return value
        column, reduce = _FINAL.get(name, (name, lambda values: values[-1]))
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


def read(folder: Path) -> Run:
    """The run of a folder; `RunError` if it is no run folder, or its summary is broken."""
    if not any((folder / name).is_file() for name in ("summary.json", "config.toml")):
        raise RunError(f"{folder}: expected a run folder with config.toml or summary.json, got {_instead(folder)}")
    config_text, config = _read_config(folder / "config.toml")
    summary = _read_summary(folder / "summary.json")
    metrics, broken = _read_lines(folder / "metrics.jsonl")
    metrics = {int(row["round"]): row for row in metrics if _is_round(row.get("round"))}  # a repeated round: its last
    ordered = by_state([metrics[number] for number in sorted(metrics)], summary)
    idle = {number: str(metrics[number]["idle"]) for number in sorted(metrics) if metrics[number].get("idle")}
    taking_part, broken_clients = _read_clients(folder / "clients.jsonl", idle)
    single, by_label = _metrics(summary, config, ordered)
    method = summary.get("method") or section(config, "method").get("name") or folder.name
    seed = summary.get("seed", section(config, "run").get("seed"))
    return Run(
        folder=folder,
        label=printable(" ".join(str(summary.get("label") or section(config, "run").get("label") or method).split())),
        method=str(method),
        seed=seed if isinstance(seed, int) else None,
        config_text=config_text,
        config=config,
        summary=summary,
        rounds=np.array(sorted(metrics), dtype=int),
        columns={name: np.array([_float(row.get(name)) for row in ordered]) for name in (*_COLUMNS, *single)},
        metrics=single,
        by_label=by_label,
        spectrum=_combined([_spectra(row) for row in ordered]),
        layers=_spectra(ordered[-1]) if ordered else {},
        taking_part=taking_part,
        idle=idle,
        unreadable=broken + broken_clients,
    )


def _is_round(value: Any) -> bool:
    number = finite(value)
    return number is not None and 0 <= number < 2**53


def _metrics(
    summary: Mapping[str, Any], config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], dict[str, dict[str, float]]]:
    """The names of the task's metrics of one number, and the last numbers of those with one for each label.

    A summary says which metrics there are. An unfinished run has only those that its configuration names.
    """
    asked = section(config, "eval").get("metrics")
    names = dict.fromkeys([*section(summary, "metrics"), *map(str, asked if isinstance(asked, list) else ())])
    single, by_label = [], {}
    for name in names:
        values = [row[name] for row in [*rows, section(summary, "metrics")] if row.get(name) is not None]
        if values and isinstance(values[-1], Mapping):
            numbers = {str(label): number for label, value in values[-1].items() if (number := finite(value)) is not None}
            by_label |= {name: numbers} if numbers else {}
        elif values and name not in _COLUMNS:
            single.append(name)
    return single, by_label


def _instead(folder: Path) -> str:
    if not folder.exists():
        return "no such folder; check the path, or run `anyrank run CONFIG.toml --out DIR` first"
    if not folder.is_dir():
        return "a file; name the folder that holds it"
    inside = sorted({path.parent.relative_to(folder) for path in folder.glob("*/config.toml")})
    inside = inside or sorted({path.parent.relative_to(folder) for path in folder.glob("*/*/config.toml")})
    if inside:
        all_of_them = folder / "/".join("*" * len(inside[0].parts))
        return f"a folder that holds {words.count(len(inside), 'run folder')} ({inside[0]}, …); name those: {all_of_them}"
    return "neither; name a folder that `anyrank run` wrote"


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = _text(path)
        return text, parse_toml(text)
    except FileNotFoundError:
        return "", {}
    except ValueError:
        return text, {}  # shown as it stands: the run that wrote it is past


def _text(path: Path) -> str:
    """The text of a file; bytes that are not UTF-8 are replaced. Raises `FileNotFoundError`, or `RunError` for other faults."""
    try:
        return read_bounded(path, _MOST_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}); correct that, or name other runs") from None


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = parse_json(_text(path))
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
        *lines, partial = _text(path).split("\n")
    except FileNotFoundError:
        return [], 0
    rows = [_object(line) for line in lines if line.strip()]
    last = _object(partial)
    good = [row for row in rows if row is not None]
    return good + ([last] if last else []), len(rows) - len(good)


def _read_clients(path: Path, idle: Container[int]) -> tuple[TakingPart, int]:
    """The summary of clients.jsonl, and how many of its lines could not be read. In `idle` rounds, no update is used."""
    rows, broken = _read_lines(path)
    ranks: dict[str, int] = {}
    used: Counter[int] = Counter()
    sizes: dict[int, list[float]] = defaultdict(list)
    unused = []
    rows = conduct.once(rows)
    for row in rows:
        client, rank, size = str(row.get("client")), row.get("rank"), finite(row.get("num_examples"))
        if isinstance(rank, int):
            ranks[client] = rank
            used[rank] += row.get("status") == "ok" and not conduct.is_idle(row, idle)
            sizes[rank] += [size] if size else []
        if row.get("status") not in ("ok", None):
            unused.append(row | {"client": client})
    return TakingPart(ranks, used, sizes, unused, conduct.tally(rows, idle)), broken


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _spectra(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    spectrum = row.get("spectrum")
    if not isinstance(spectrum, Mapping):
        return {}
    listed = {str(layer): values for layer, values in spectrum.items() if isinstance(values, list)}
    return {layer: np.nan_to_num(np.array([_float(value) for value in values])) for layer, values in listed.items()}


def _combined(rounds: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """The spectrum `[rounds, r]`: at each index, the root of the sum of squares over layers; NaN without a spectrum."""
    length = max((len(values) for layers in rounds for values in layers.values()), default=0)
    energy = np.full((len(rounds), length), np.nan)
    for row, layers in zip(energy, rounds, strict=True):
        if layers:
            row[:] = 0
        for values in layers.values():
            row[: len(values)] += values**2
    return np.sqrt(energy)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a configuration; empty if it is missing."""
    table = config.get(name)
    return table if isinstance(table, Mapping) else {}


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else `None`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def _float(value: Any) -> float:
    number = finite(value)
    return math.nan if number is None else number
