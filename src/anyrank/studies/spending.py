"""What private runs have spent on a data set, and what runs that are to come would spend: figures for people and machines."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyrank import simulation
from anyrank.config.sections import Config
from anyrank.errors import ConfigError
from anyrank.federation import accounts
from anyrank.federation.federation import Federation
from anyrank.privacy import datasets, spent
from anyrank.privacy.datasets import DataSet, Kept, Source
from anyrank.privacy.spent import Planned, Total
from anyrank.privacy.statement import in_words
from anyrank.progress import Progress
from anyrank.runs.finding import is_done
from anyrank.runs.names import CONFIG
from anyrank.simulation import sources
from anyrank.studies.variants import Cell

ALL = "all"
_USUAL_DELTA = 1e-5

Work = list[tuple[Source, Planned, float]]  # what runs are to release on which data sets, and each one's own ceiling


def known(word: str, config: Config | None) -> list[DataSet]:
    """The data sets that a word names: those of the configuration `config` if the word is empty, or else a file, a folder or an
    embedded source, read as `config` says. Raises `RunError` if there is none."""
    return [sources.named(word, config)] if word else [each.data for each in sources.sources(config)()]


def table(data: Sequence[DataSet] | None, delta: float | None) -> dict[str, Any]:
    """What is spent on data sets (`None`: on all that have a ledger). `delta`: of all figures; `None`: each data set's smallest
    delta of a run."""
    if data is None:
        rows, notices = [_figures(kept, delta) for kept in datasets.kept()], []
    else:
        rows = [row for each in data for row in _of(each, delta)]
        notices = [line for each in data for line in datasets.alike(each)]
    return {"data_sets": rows, "notices": notices}


def _of(data: DataSet, delta: float | None) -> list[dict[str, Any]]:
    found = datasets.find(data)
    return [_figures(kept, delta) for kept in found] or [_row(Kept(Path(), (data,)), Total(), delta)]


def _figures(kept: Kept, delta: float | None) -> dict[str, Any]:
    return _row(kept, spent.total(kept), delta)


def _row(kept: Kept, total: Total, asked: float | None) -> dict[str, Any]:
    """The figures of one ledger. Epsilon is `None` where nothing bounds it."""
    delta = asked or min(total.deltas, default=kept.delta or _USUAL_DELTA)
    limit = {"epsilon": kept.epsilon, "delta": kept.delta} if kept.epsilon else None
    left = max(0.0, kept.epsilon - total.epsilon(kept.delta)) if limit else None
    runs = [
        {"run": run, **about, "epsilon": _number(total.epsilon(delta, str(about["level"]), run))}
        for run, about in total.runs.items()
    ]
    return {
        "name": kept.name,
        "ledger": str(kept.folder) if kept.folder.name else None,
        "delta": delta,
        "epsilon": _number(total.epsilon(delta)),
        "epsilon_client": _number(total.epsilon(delta, "client")) if runs else 0.0,
        "ceiling": limit,
        "left": left,
        "charges": sum(row["charges"] for row in runs),
        "runs": runs,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def set_ceiling(data: Sequence[DataSet], epsilon: float, delta: float | None) -> None:
    """Keep a ceiling for data sets. Raises `ConfigError` for one that could not be kept."""
    if not 0 <= epsilon < math.inf:
        raise ConfigError(f"--ceiling {epsilon:g}: expected an epsilon above 0, or 0 for no ceiling")
    if epsilon and delta is None:
        raise ConfigError(f"--ceiling {epsilon:g}: holds at one delta; give that too, as in --ceiling {epsilon:g} --delta 1e-5")
    check_delta(delta)
    for each in data:
        datasets.set_ceiling(each, epsilon, delta or 0.0)


def check_delta(delta: float | None) -> None:
    """Raise `ConfigError` for a delta that is none."""
    if delta is not None and not 0 < delta < 1:
        raise ConfigError(f"--delta {delta:g}: expected a number above 0 and below 1")


# --- runs that are to come -----------------------------------------------------------------------------------------------


def of_run(built: Federation, run: str = "planned", out: Path | None = None) -> Work:
    """What the run of a federation is to release; nothing if it is not private, or if its sites have ledgers of their own."""
    if built.privacy is None:
        return []
    ceiling = built.config.privacy.ceiling
    return [(source, accounts.planned(built, source, run, out), ceiling) for source in built.sources()]


def of_cells(cells: Sequence[Cell], progress: Progress | None = None) -> Work:
    """What the runs of a grid are to release, apart from those that are finished. The first run of each label is built, which
    checks the request, and so is one private run of each seed, which says how the examples are divided; the others of a label
    count as releasing the same."""
    work: Work = []
    first: dict[str, Federation] = {}
    divided: dict[tuple[str, ...], Sequence[Source]] = {}
    for cell in cells:
        like, private = first.get(cell.label), cell.config.privacy.level != "none"
        begun = (cell.out / CONFIG).exists()
        same = divided.get(_division(cell.config, like)) if like and private and not begun else None
        if like is None or (private and same is None):
            built = simulation.build(cell.config, progress)
            built.close()
            first.setdefault(cell.label, built)
            if private:
                divided[_division(cell.config, first[cell.label])] = built.sources()
        else:
            built = dataclasses.replace(like, sources=functools.partial(tuple, same or ()))
        if not is_done(cell.out, cell.config):
            work += of_run(built, accounts.name_of(cell.out) or f"planned {cell.out}", cell.out)
    return work


def _division(config: Config, first: Federation) -> tuple[str, ...]:
    """What runs have in common that divide examples in the same way: the configuration says so, and the first runs of their
    labels did."""
    return tuple(source.group for source in (*sources.sources(config)(), *first.sources()))


def check(work: Work) -> None:
    """Raise `ConfigError` if runs together would spend more on a data set than a ceiling of theirs allows."""
    for data, planned, ceilings in _by_data(work):
        spent.check(data, planned, ceilings)


def forecast(work: Work) -> list[dict[str, Any]]:
    """For each data set: what is spent on it, what the runs in `work` would spend, and both together. Epsilon at the smallest
    delta of these runs, for one example."""
    rows = []
    for data, planned, _ in _by_data(work):
        delta = min(each.plan.delta for each in planned)
        for kept in datasets.find(data) or [Kept(Path(), (data,))]:
            before = spent.total(kept) if kept.folder.name else Total()
            rows.append(
                {
                    **{"name": kept.name, "delta": delta, "runs_before": len(before.runs), "runs": len(planned)},
                    "spent": _number(before.epsilon(delta)),
                    "planned": _number(Total().with_all(planned).epsilon(delta)),
                    "together": _number(before.with_all(planned).epsilon(delta)),
                }
            )
    return rows


def before(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A forecast in lines for a person."""
    return [
        f"privacy: {_runs(row['runs'])} would spend ε {in_words(row['planned'])} on {row['name']}, {in_words(row['together'])} "
        f"together with {_runs(row['runs_before'])} before (δ = {row['delta']:g}, for one example)"
        for row in rows
    ]


def after(cells: Sequence[Cell]) -> list[str]:
    """What is spent on the data sets of a grid's private runs, in lines for a person."""
    private = [cell for cell in cells if cell.config.privacy.level != "none"]
    data = {source.data for cell in private for source in sources.sources(cell.config)()}
    rows = [row for each in sorted(data, key=lambda each: each.name) for row in _of(each, None)]
    return [
        f"privacy: ε {in_words(row['epsilon'])} spent on {row['name']} by {_runs(len(row['runs']))} in all (δ = "
        f"{row['delta']:g}, for one example)"
        for row in rows
    ]


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def _by_data(work: Work) -> list[tuple[DataSet, list[Planned], dict[float, float]]]:
    """For each data set, what is planned on it, and for each delta the least ceiling of the runs that have one (0: none)."""
    found: list[tuple[DataSet, list[Planned], dict[float, float]]] = []
    for source, planned, ceiling in work:
        own = next((each for each in found if each[0].is_same(source.data)), None)
        if own is None:
            found.append(own := (source.data, [], {}))
        own[1].append(planned)
        before = own[2].get(planned.plan.delta, 0.0)
        own[2][planned.plan.delta] = min(before, ceiling) if before and ceiling else before or ceiling
    return found
