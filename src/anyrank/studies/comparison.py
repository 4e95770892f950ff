"""Run the same federation with several methods and seeds as a grid over the cores; compute means with their spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank.algebra import spectra
from anyrank.errors import RunError
from anyrank.files import contents, make_folder, sweep, write_whole_text
from anyrank.runs import lock
from anyrank.runs.finding import is_done
from anyrank.runs.folder import RunDir
from anyrank.runs.names import COMPARISON, METRICS, SUMMARY, lower_is_better
from anyrank.studies import spending
from anyrank.studies.grid import OnRound, finished, run_cells
from anyrank.studies.variants import Cell, disturbances, folder, make_cells, variant

__all__ = ["Results", "check", "execute", "folder", "make_cells", "table", "variant"]


@dataclass(frozen=True)
class Results:
    """The results of a grid: the table's rows, from finished runs only; `failures`, `{label, seed, reason}` of the others."""

    rows: list[dict[str, Any]]
    failures: list[dict[str, Any]]


def check(cells: Sequence[Cell], out: Path, resume: bool, progress=None) -> list[dict[str, Any]]:
    """Build the first run of each method, so that whatever is wrong with the request stops before anything is trained: runs
    in `out` of another configuration, too. Returns what private runs would spend, as `spending.forecast`.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: expected a folder for the runs, got a file; choose another --out")
    if not (resume and (out / COMPARISON).exists()) and any(not path.name.startswith(".") for path in contents(out)):
        raise RunError(f"{out}: is not empty; go on with the comparison in it by --resume, or choose another --out")
    check_begun(cells)
    work = spending.of_cells(cells, progress)
    spending.check(work)
    return spending.forecast(work)


def check_begun(cells: Sequence[Cell]) -> None:
    """Raise `RunError` that names the key where a run that is there already, finished or not, is not the one asked for."""
    for cell in cells:
        RunDir.check(cell.out, cell.config, resume=True)


def execute(cells: Sequence[Cell], out: Path, jobs: int, on_round: OnRound | None = None) -> Results:
    """Run every cell that is not finished yet, `jobs` at a time, then write and return the results.

    A failed run does not stop the others. Raises `RunFailed` if all runs failed, and `RunError` if another process is writing
    in `out`.
    """
    make_folder(out)
    with lock.holding(out, "this comparison"):
        sweep(out)
        _write(out, cells, Results([], []))
        failures = run_cells([cell for cell in cells if not is_done(cell.out, cell.config)], jobs, on_round)
        results = Results(table(finished(cells, failures)), failures)
        _write(out, cells, results)
    return results


def table(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row per method: means over seeds with their sample standard deviation (0 for one seed). The cells must be finished.

    Accuracies are `None` if no answer is right or wrong; then the loss decides which row is best. `metrics`: `{name: {mean,
    std}}` of the task's metrics; `{name: {label: {mean, std}}}` for a metric with a number for each label.
    """
    rows, rank = [], min(min(cell.config.clients.ranks) for cell in cells)
    for label in dict.fromkeys(cell.label for cell in cells):
        runs = [cell for cell in cells if cell.label == label]
        summaries = [json.loads((cell.out / SUMMARY).read_text(encoding="utf-8")) for cell in runs]
        row: dict[str, Any] = {"label": label, "method": summaries[0]["method"], "seeds": len(runs)}
        for figure in ("accuracy", "best_accuracy", "last_accuracy", "start_accuracy", "loss", "seconds"):
            row |= _mean(figure, [summary[figure] for summary in summaries])
        beyond = [_energy_past(cell, rank) for cell in runs]
        row |= {"rank": rank, **(_mean("collapse", beyond) if None not in beyond else {"collapse": None})}
        row |= {key: statistics.fmean(s[key] for s in summaries) for key in ("upload_bytes", "download_bytes")}
        row |= {"worst_client_accuracy": _mean_of_known([summary["worst_client_accuracy"] for summary in summaries])}
        row |= {"metrics": _metrics([summary.get("metrics", {}) for summary in summaries])}
        rows.append(row | disturbances(summaries))
    for figure in ("accuracy", "last_accuracy", "loss"):
        _pair(rows, figure, {label: _by_seed(cells, label, figure) for label in dict.fromkeys(cell.label for cell in cells)})
    return rows


def _by_seed(cells: Sequence[Cell], label: str, figure: str) -> dict[int, float]:
    runs = [cell for cell in cells if cell.label == label]
    return {cell.config.run.seed: json.loads((cell.out / SUMMARY).read_text(encoding="utf-8"))[figure] for cell in runs}


def _pair(rows: list[dict[str, Any]], figure: str, values: Mapping[str, Mapping[int, float]]) -> None:
    """Give each row its differences to the row with the best mean, seed by seed: for one seed, all methods have the same
    clients, cohorts and batches, so that much of the spread over seeds cancels. `wins`: number of seeds on which the row is
    ahead. `None` for a row that has no seed in common with the best one, and for all rows if the figure is not reported.
    """
    if any(row[figure] is None for row in rows):
        for row in rows:
            row[f"{figure}_paired"] = None
        return
    sign = -1 if lower_is_better(figure) else 1
    best = max(rows, key=lambda row: sign * row[figure])["label"]
    for row in rows:
        own, other = values[row["label"]], values[best]
        differences = [own[seed] - other[seed] for seed in own if seed in other]
        wins = sum(sign * difference > 0 for difference in differences)
        paired = {"to": best, **_mean("difference", differences), "wins": wins} if differences else None
        row[f"{figure}_paired"] = paired


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def _mean(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    if None in values:
        return {name: None, f"{name}_std": None}
    return {name: statistics.fmean(values), f"{name}_std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _metrics(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of each metric over the runs that have it."""
    told: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in runs for name in each):
        values = [each[name] for each in runs if name in each]
        if isinstance(values[0], Mapping):
            told[name] = _metrics(values)
        else:
            told[name] = {"mean": statistics.fmean(values), "std": _mean(name, values)[f"{name}_std"]}
    return told


def _energy_past(cell: Cell, rank: int) -> float | None:
    """The share of energy past the comparison's smallest rank after the last round, also where all clients are larger."""
    import torch

    spectrum = json.loads((cell.out / METRICS).read_text(encoding="utf-8").splitlines()[-1])["spectrum"]
    if spectrum is None:
        return None
    return spectra.energy_beyond({name: torch.tensor(values) for name, values in spectrum.items()}, rank)


def _write(out: Path, cells: Sequence[Cell], results: Results) -> None:
    runs = [cell.out.relative_to(out).as_posix() for cell in cells]  # in the requested order, which reports keep
    held = {"runs": runs, "rows": results.rows, "failures": results.failures}
    write_whole_text(out / COMPARISON, json.dumps(held, indent=2) + "\n")
